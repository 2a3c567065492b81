"""The choice of the kernels of recurrent layers: the config's ``recurrent_backend``, or the package that supports the run."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, NamedTuple

import torch

from longspan.config.architecture import Architecture
from longspan.config.packages import has_package
from longspan.config.recurrent import PACKAGES, RECURRENT, mixer_sizes
from longspan.errors import UserError
from longspan.recurrent.kernels.packages import CausalConv1d, Fla, MambaSsm
from longspan.recurrent.kernels.plain import PlainConvolution, PlainDelta, PlainStateSpace

CONVOLUTION = "convolution"


class Choice(NamedTuple):
    """A kernel, and the reason for its choice (for the start-up banner)."""

    kernel: Any
    reason: str


class _Package(NamedTuple):
    """A package with a kernel: its name for pip, and where its function is."""

    pip: str
    module: str
    function: str
    adapter: Callable[[Callable], Any]


#: mixer, or the convolution before both -> the package
_PACKAGES = {
    "mamba": _Package(
        "mamba-ssm", "mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined", MambaSsm
    ),
    "gated_delta": _Package(
        "flash-linear-attention", "fla.ops.gated_delta_rule", "chunk_gated_delta_rule", Fla
    ),
    CONVOLUTION: _Package("causal-conv1d", "causal_conv1d", "causal_conv1d_fn", CausalConv1d),
}
_PLAIN = {"mamba": PlainStateSpace(), "gated_delta": PlainDelta(), CONVOLUTION: PlainConvolution()}


def select_kernel(
    part: str,
    device: torch.device,
    dtype: torch.dtype,
    sizes: Sequence[int],
    backend: str = "auto",
    deterministic: bool = False,
) -> Choice:
    """The kernel of one part of a recurrent layer for these inputs.

    A backend that is the package of another mixer is ``auto`` for this part.

    Args:
        part: ``mamba``, ``gated_delta`` or ``convolution``.
        sizes: mamba: head size and state size; gated_delta: key and value head size; convolution: a rank's channels and
            the width of the kernel.
        backend: a value of ``recurrent_backend``.
        deterministic: two runs give equal bits.

    Raises:
        UserError: the backend is the part's package and does not support these inputs.
    """
    if backend == "torch":
        return Choice(_PLAIN[part], "asked for")
    asked = backend == PACKAGES.get(part)
    name = PACKAGES.get(part, _PACKAGES[part].pip)
    why_not = _why_not(part, device, dtype, tuple(sizes), deterministic)
    if not why_not:
        return Choice(_kernel(part), "asked for" if asked else "it is installed")
    if asked:
        raise UserError(f"recurrent_backend {backend!r} {why_not}. Use auto.")
    reason = f"{name} {why_not}" if device.type == "cuda" else "packages with kernels run on cuda"
    return Choice(_PLAIN[part], reason)


@functools.lru_cache(maxsize=64)
def chosen_kernel(
    part: str,
    device: torch.device,
    dtype: torch.dtype,
    sizes: tuple[int, ...],
    backend: str,
    deterministic: bool,
) -> Any:
    """The kernel of :func:`select_kernel`, cached because every layer of every forward pass needs it."""
    return select_kernel(part, device, dtype, sizes, backend, deterministic).kernel


def select_kernels(
    model: Architecture, device: torch.device, dtype: torch.dtype, backend: str, deterministic: bool, tp: int
) -> dict[str, Choice]:
    """The choices for all recurrent layers of a model: the scan of each mixer, and its convolution.

    Args:
        tp: tensor parallel ranks, which share a layer's channels.

    Raises:
        UserError: as :func:`select_kernel`.
    """
    found = {}
    for kind in RECURRENT:
        if kind in model.mixers:
            sizes = mixer_sizes(model, kind)
            channels = sizes.groups * sizes.channels // tp
            for part, its in ((kind, scan_sizes(model, kind)), (CONVOLUTION, (channels, sizes.kernel))):
                name = kind if part == kind else f"convolution of {kind}"
                found[name] = select_kernel(part, device, dtype, its, backend, deterministic)
    return found


def scan_sizes(model: Architecture, kind: str) -> tuple[int, int]:
    """The sizes on which the choice of a mixer's scan depends."""
    if kind == "mamba":
        return model.mamba_head_dim, model.mamba_state_dim
    return model.linear_key_head_dim, model.linear_value_head_dim


def kernels_line(choices: dict[str, Choice], device: torch.device, dtype: str) -> str:
    """What computes recurrent layers and why, for the banner; parts with the same answer together."""
    parts: dict[str, list[str]] = {}
    for name, (kernel, reason) in choices.items():
        parts.setdefault(f"{kernel.name} on {device.type}, {dtype} ({reason})", []).append(name)
    if len(parts) == 1:
        return next(iter(parts))
    return "; ".join(f"{', '.join(names)}: {text}" for text, names in parts.items())


def _why_not(
    part: str, device: torch.device, dtype: torch.dtype, sizes: tuple[int, ...], deterministic: bool
) -> str:
    """Why a part's package does not support these inputs; empty if it does."""
    if device.type != "cuda":
        return f"runs on cuda, not on {device.type}"
    package = _PACKAGES[part]
    if not has_package(package.module.partition(".")[0]):
        return f"is not installed (pip install {package.pip})"
    dtypes = (torch.float16, torch.bfloat16)
    if part == CONVOLUTION:
        if dtype not in (*dtypes, torch.float32):
            return f"takes float16, bfloat16 and float32, not {str(dtype).removeprefix('torch.')}"
    elif dtype not in dtypes:
        # In float32 mamba-ssm would multiply in TensorFloat-32, and most releases of fla refuse it.
        return f"takes float16 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    if why_not := _sizes_problem(part, *sizes):
        return why_not
    if deterministic:
        # Atomic sums in mamba-ssm's and causal-conv1d's backward; Triton's kernels are tuned in every process anew.
        return "is not deterministic"
    try:
        _function(part)
    except Exception as error:  # a package that does not fit this torch fails in many ways
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        return f"cannot be imported ({first[:150]})"
    return ""


def _sizes_problem(part: str, first: int, second: int) -> str:
    if part == "mamba" and (first % 8 or second % 8 or second > 256):
        return f"takes head and state sizes that divide by 8, and states up to 256, not {first} and {second}"
    if part == "gated_delta" and first > 256:
        return f"takes key head sizes up to 256, not {first}"
    if part == CONVOLUTION and (first % 8 or not 2 <= second <= 4):
        return f"takes channels that divide by 8 and kernels of 2 to 4, not {first} and {second}"
    return ""


def _function(part: str) -> Callable:
    package = _PACKAGES[part]
    return getattr(import_module(package.module), package.function)


def _kernel(part: str) -> Any:
    return _PACKAGES[part].adapter(_function(part))
