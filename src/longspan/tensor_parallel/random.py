"""Random numbers: initial weights that do not depend on the layout, and states of random number generators.

*Initial weights* (invariant I2) depend on (seed, parameter name, shape) only. A tensor is
drawn in blocks of rows, each from a generator seeded with a hash of (seed, name, block). So a
rank draws only the blocks that contain its rows, and no rank ever holds a whole large tensor.
``Normal``, ``Uniform`` and ``Constant`` are kinds of values; a function can be another kind.
Outside the trainer the seed is that of ``model_parallel_seed``, or a model's argument
(``tensor_parallel.initial``).

*Dropout-like noise* needs two streams under tensor parallelism: a stream that all tensor
parallel ranks share (for activations that are equal on them) and a stream that differs (for
activations that they hold in parts). The default generator is the shared stream, and the tracker
keeps the other, as in Megatron-LM.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from longspan.mesh.default_groups import process_groups

BLOCK_NUMEL = 1 << 20
MODEL_PARALLEL_RNG = "model-parallel-rng"


def hash_seed(*parts: object) -> int:
    """A 63-bit seed from any printable parts; the same on every platform."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


# --- initial values -----------------------------------------------------------------------

Range = tuple[int, int]
#: A kind of initial values: (seed, name, shape of the whole tensor, (start, stop) of dim 0) -> these rows,
#: whole in the other dims. A row must not depend on the range. Your own function may use the kinds below.
Initial = Callable[[int, str, tuple[int, ...], Range], Tensor]


def draw_rows(
    seed: int,
    name: str,
    shape: tuple[int, ...],
    rows: Range,
    draw: Callable[[Tensor, torch.Generator], Any],
    block_numel: int = BLOCK_NUMEL,
) -> Tensor:
    """Rows of the random tensor that (seed, name, shape) define.

    Args:
        rows: half-open range of dim 0.
        draw: fills a tensor from a generator.
        block_numel: elements of a block of rows, which has a generator of its own: the values depend on it.

    Returns:
        [rows, *shape[1:]], always float32 on the CPU, so that device and precision do not change the values.
    """
    block, parts = _block_rows(shape, block_numel), []
    for index in range(rows[0] // block, -(-rows[1] // block)):
        first = index * block
        generator = torch.Generator("cpu").manual_seed(hash_seed(seed, name, index))
        drawn = torch.empty(min(block, shape[0] - first), *shape[1:], dtype=torch.float32, device="cpu")
        draw(drawn, generator)
        parts.append(drawn[max(0, rows[0] - first) : rows[1] - first])
    if not parts:
        return torch.empty(0, *shape[1:], dtype=torch.float32, device="cpu")
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _block_rows(shape: tuple[int, ...], block_numel: int) -> int:
    """Rows of a block."""
    return max(1, block_numel // max(1, torch.Size(shape[1:]).numel()))


@dataclass(frozen=True)
class Normal:
    """Values from a normal distribution of this standard deviation."""

    std: float

    def __call__(self, seed: int, name: str, shape: tuple[int, ...], rows: Range) -> Tensor:
        return draw_rows(seed, name, shape, rows, lambda x, g: x.normal_(0.0, self.std, generator=g))


@dataclass(frozen=True)
class Uniform:
    """Values from a uniform distribution of this standard deviation: in +-sqrt(3) std."""

    std: float

    def __call__(self, seed: int, name: str, shape: tuple[int, ...], rows: Range) -> Tensor:
        end = 3**0.5 * self.std
        return draw_rows(seed, name, shape, rows, lambda x, g: x.uniform_(-end, end, generator=g))


@dataclass(frozen=True)
class Constant:
    """One value everywhere; no seed is needed."""

    value: float

    def __call__(self, seed: int, name: str, shape: tuple[int, ...], rows: Range) -> Tensor:
        return torch.full((rows[1] - rows[0], *shape[1:]), self.value, dtype=torch.float32, device="cpu")


@dataclass(frozen=True)
class FilledWhole:
    """Megatron's ``init_method``, which fills the whole tensor in place from the default generator.

    It gets the whole tensor on every rank (its values may depend on the fan-in), so every layout gets the
    same values.
    """

    method: Callable[[Tensor], Any]

    def whole(self, seed: int, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        whole, before = torch.empty(shape, dtype=dtype, device="cpu"), torch.get_rng_state()
        torch.default_generator.manual_seed(hash_seed(seed, name))
        try:
            self.method(whole)
        finally:
            torch.set_rng_state(before)
        return whole


def draw_part(
    initial: Initial | FilledWhole,
    seed: int,
    name: str,
    shape: tuple[int, ...],
    ranges: Sequence[Range],
    dtype: torch.dtype = torch.float32,
    block_numel: int = BLOCK_NUMEL,
) -> Tensor:
    """The part of a tensor's initial values that lies in ``ranges``, (start, stop) along each dim.

    Args:
        block_numel: elements of a block of rows, the most of the whole tensor that exists at once.
    """
    if isinstance(initial, FilledWhole):
        return initial.whole(seed, name, shape, dtype)[tuple(slice(*edges) for edges in ranges)]
    (start, stop), rest = ranges[0], tuple(slice(*edges) for edges in ranges[1:])
    # A block of rows is cut along the other dims before the next one is made: a rank never holds all of them.
    block = _block_rows(shape, block_numel)
    edges = [start, *range(start // block * block + block, stop, block), stop]
    parts = [initial(seed, name, shape, rows)[:, *rest].to(dtype) for rows in zip(edges, edges[1:])]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


@torch.no_grad()
def fill(tensor: Tensor, initial: Initial | FilledWhole, seed: int, name: str) -> None:
    """Fills this rank's part of a parameter or buffer; a tensor that is no DTensor is whole on every rank."""
    if isinstance(tensor, DTensor):
        held, ranges = tensor.to_local(), local_ranges(tensor)
    else:
        held, ranges = tensor, [(0, size) for size in tensor.shape]
    held.copy_(draw_part(initial, seed, name, tuple(tensor.shape), ranges, held.dtype))


#: The mesh axes along which layers cut a weight to compute with it. Data axes cut the remaining parts.
MODEL_AXES = ("ep", "etp", "tp")


def local_ranges(parameter: DTensor) -> list[Range]:
    """The part of the whole tensor that this rank holds: (start, stop) along each dim.

    Tensor and expert parallelism cut first. FSDP then cuts dim 0 of the remaining part into even runs (the
    last runs may be shorter or empty).
    """
    ranges = [(0, size) for size in parameter.shape]
    # A mesh that was made from a group has no names.
    names = parameter.device_mesh.mesh_dim_names or ("tp",)
    for axis in sorted(range(len(names)), key=lambda i: names[i] not in MODEL_AXES):
        placement = parameter.placements[axis]
        if placement.is_replicate():
            continue
        dim = placement.dim  # type: ignore[attr-defined]  # of Shard, and of _StridedShard, which is none
        start, stop = ranges[dim]
        size = parameter.device_mesh.size(axis)
        rows = -(-(stop - start) // size)
        first = min(start + parameter.device_mesh.get_local_rank(axis) * rows, stop)
        ranges[dim] = (first, min(first + rows, stop))
    assert [stop - start for start, stop in ranges] == list(parameter.to_local().shape)
    return ranges


# --- generator states ---------------------------------------------------------------------


class RNGStatesTracker:
    """Named generator states; ``fork(name)`` runs a block of code with one of them.

    A name stands for a state of the CPU's default generator and, once CUDA is in use, a state of
    the current CUDA device's default generator. Adding a name changes neither generator.
    """

    def __init__(self) -> None:
        self.seeds: dict[str, int] = {}
        #: name -> device type -> state
        self.states: dict[str, dict[str, Tensor]] = {}
        #: The seed of initial weights; None until ``model_parallel_seed`` sets it.
        self.initial_seed: int | None = None
        #: Number of parameters, of layers that were made alone, that were drawn from this seed.
        self.lone = 0

    def reset(self) -> None:
        self.seeds.clear()
        self.states.clear()
        self.initial_seed, self.lone = None, 0

    def add(self, name: str, seed: int) -> None:
        """Adds a state seeded with ``seed``; the current state of the default generator stays.

        Raises:
            ValueError: there is a state of this name.
        """
        if name in self.states:
            raise ValueError(f"RNG state {name!r} exists already; reset() the tracker before seeding again.")
        self.seeds[name], self.states[name] = seed, {}

    @contextlib.contextmanager
    def fork(self, name: str = MODEL_PARALLEL_RNG) -> Iterator[None]:
        """Runs the block with the named state, and keeps the state at the end of the block.

        Raises:
            ValueError: there is no state of this name.
        """
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
    """Seeds the initial weights, the default generator and the tracker's state.

    The default generator has the same state on all tensor parallel ranks, and the tracker's state differs
    between them. Models and layers that are made afterwards have the initial weights of this seed. Neither
    the layout nor other draws from the default generator change these weights; see
    ``longspan.tensor_parallel.init_weights`` for their names. ``destroy_model_parallel`` removes the seed.

    Args:
        seed: the same number on every rank.
        tp_rank: None takes the tensor parallel rank of the installed groups.
    """
    if tp_rank is None:
        tp_rank = dist.get_rank(process_groups().tp)
    torch.manual_seed(seed)
    _tracker.reset()
    _tracker.add(MODEL_PARALLEL_RNG, hash_seed(seed, "tensor-parallel", tp_rank))
    _tracker.initial_seed = seed


def initial_seed(tp_size: int) -> int:
    """The default seed of initial weights: ``model_parallel_seed``'s, or a number of the default generator.

    Args:
        tp_size: number of ranks that hold parts of the weights; all other ranks hold copies.

    Raises:
        ValueError: ``model_parallel_seed`` has set no seed, and there are copies, which might then differ.
    """
    if _tracker.initial_seed is not None:
        return _tracker.initial_seed
    world = dist.get_world_size()
    if world > tp_size:
        raise ValueError(
            f"initial weights without a seed: {world} processes hold {world // tp_size} copies of each weight (data and "
            "context parallel ranks), which would start different. Call longspan.tensor_parallel.model_parallel_seed(seed) "
            "with the same seed on every rank first (torch.manual_seed alone cannot be checked), or give a model seed=; "
            "perform_initialization=False leaves the weights to you."
        )
    return int(torch.randint(2**62, (1,), device="cpu"))


def lone_seed(tp_size: int) -> tuple[int, str]:
    """(seed, prefix of the name) for a parameter of a layer that is made alone, without a model's names.

    With ``model_parallel_seed`` such parameters are numbered in the order in which they are made. So two
    parameters of one shape differ, and each is the same on every rank.
    """
    seeded, seed = _tracker.initial_seed is not None, initial_seed(tp_size)
    if not seeded:
        return seed, ""
    _tracker.lone += 1
    return seed, f"{_tracker.lone - 1}."
