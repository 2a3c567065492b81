"""Random numbers: initial weights that know no layout, and generator states an axis.

*Initial weights* (invariant I2) depend on (seed, parameter name, shape) alone. A tensor is
drawn in blocks of rows, each from a generator seeded by a hash of (seed, name, block), so a
rank draws just the blocks its rows lie in, and nobody ever holds a whole large tensor.

*Dropout-like noise* needs two streams under tensor parallelism: one that all tensor
parallel ranks share (activations they hold alike) and one that differs (activations they
hold in parts). The tracker keeps both, as Megatron-LM's does.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from longspan.mesh.installed import process_groups

BLOCK_NUMEL = 1 << 20
MODEL_PARALLEL_RNG = "model-parallel-rng"


def hash_seed(*parts: object) -> int:
    """A 63-bit seed from any printable parts; the same on every platform."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def draw_rows(
    seed: int,
    name: str,
    shape: tuple[int, ...],
    std: float,
    rows: tuple[int, int],
    columns: tuple[int, int] | None = None,
    dtype: torch.dtype = torch.float32,
    uniform: bool = False,
) -> Tensor:
    """Part of a normal tensor: ``rows`` (and ``columns`` of dim 1) of the tensor named ``name``.

    Args:
        seed, name, shape, std: what the whole tensor is drawn from; float32 on the CPU always,
            so that device and precision do not change it.
        rows: half-open range of dim 0.
        columns: half-open range of dim 1; None takes all.
        uniform: of a uniform tensor of that deviation instead, in +-sqrt(3) std.

    Returns:
        [rows, columns, ...] in ``dtype``.
    """
    start, stop = rows
    row_numel = max(1, torch.Size(shape[1:]).numel())
    block = max(1, BLOCK_NUMEL // row_numel)
    width = slice(*columns) if columns is not None else slice(None)
    parts = []
    for index in range(start // block, -(-stop // block)):
        first = index * block
        generator = torch.Generator("cpu").manual_seed(hash_seed(seed, name, index))
        drawn = torch.empty(min(block, shape[0] - first), *shape[1:], dtype=torch.float32, device="cpu")
        if uniform:
            drawn.uniform_(-(3**0.5) * std, 3**0.5 * std, generator=generator)
        else:
            drawn.normal_(0.0, std, generator=generator)
        drawn = drawn[max(0, start - first) : stop - first]
        parts.append((drawn[:, width] if columns is not None else drawn).to(dtype))
    if not parts:  # no rows
        empty = torch.empty(0, *shape[1:], dtype=dtype, device="cpu")
        return empty[:, width] if columns is not None else empty
    return torch.cat(parts)


class RNGStatesTracker:
    """Named generator states; ``fork(name)`` runs a block of code under one of them.

    A name stands for a state of the CPU's default generator and, once CUDA is in use, one of
    the current CUDA device's. Adding a name touches neither generator.
    """

    def __init__(self) -> None:
        self.seeds: dict[str, int] = {}
        self.states: dict[str, dict[str, Tensor]] = {}  # name -> device type -> state

    def reset(self) -> None:
        self.seeds.clear()
        self.states.clear()

    def add(self, name: str, seed: int) -> None:
        """Adds a state seeded with ``seed``; the current state of the default generator stays."""
        if name in self.states:
            raise ValueError(f"RNG state {name!r} exists already; reset() the tracker before seeding again.")
        self.seeds[name], self.states[name] = seed, {}

    @contextlib.contextmanager
    def fork(self, name: str = MODEL_PARALLEL_RNG) -> Iterator[None]:
        """Runs the block under the named state and keeps where it got to."""
        if name not in self.states:
            raise ValueError(f"RNG state {name!r} does not exist: call model_parallel_seed(seed) first.")
        before = _default_states()
        held = self.states[name]
        for device in before:
            if device not in held:
                held[device] = torch.Generator(device).manual_seed(self.seeds[name]).get_state()
        _set_default_states(held)
        try:
            yield
        finally:
            now = _default_states()
            self.states[name] = {device: now[device] for device in before}
            _set_default_states(before)


def _default_states() -> dict[str, Tensor]:
    """States of the default generators in use, by device type."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _set_default_states(states: dict[str, Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])


_tracker = RNGStatesTracker()


def get_rng_tracker() -> RNGStatesTracker:
    return _tracker


def model_parallel_seed(seed: int, tp_rank: int | None = None) -> None:
    """Seeds the default generator alike on all tensor parallel ranks and the tracker's state apart.

    Args:
        tp_rank: None takes the installed tensor parallel rank.
    """
    if tp_rank is None:
        tp_rank = dist.get_rank(process_groups().tp)
    torch.manual_seed(seed)
    _tracker.reset()
    _tracker.add(MODEL_PARALLEL_RNG, hash_seed(seed, "tensor-parallel", tp_rank))
