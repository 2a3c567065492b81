"""The choice of the attention backend: the config's backend, or the fastest that supports the inputs."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from longspan.context_parallel.kernels import cpu_blocks
from longspan.context_parallel.kernels.cpu_blocks import CpuBlocks
from longspan.context_parallel.kernels.cpu_flash import CpuFlash
from longspan.context_parallel.kernels.math import Math
from longspan.context_parallel.kernels.protocol import Kernel
from longspan.errors import UserError, did_you_mean


class Choice(NamedTuple):
    """A kernel, and the reason for its choice (for the start-up banner)."""

    kernel: Kernel
    reason: str


#: The backends, in the order in which ``auto`` tries them.
BACKENDS = (
    "auto",
    "flash-attn-3",
    "flash-attn-2",
    "cuda-flash",
    "cudnn",
    "cpu-blocks",
    "cpu-flash",
    "math",
)


def select_kernel(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    backend: str = "auto",
    deterministic: bool = False,
) -> Choice:
    """The kernel for these inputs; ``auto`` takes the fastest kernel that supports them.

    Args:
        deterministic: two runs give equal bits. Outside the kernels gradients are always summed
            in a fixed order, so this argument concerns the kernel's own backward only.

    Raises:
        UserError: the backend does not exist, or does not support these inputs.
    """
    if backend not in BACKENDS:
        raise UserError(
            f"attention_backend {backend!r}: one of {', '.join(BACKENDS)}.{did_you_mean(backend, BACKENDS)}"
        )
    reasons: list[str] = []
    for name in BACKENDS[1:] if backend == "auto" else (backend,):
        why_not = _why_not(name, device, dtype, head_dim, deterministic)
        if not why_not:
            reason = (
                "asked for" if backend != "auto" else "; ".join(reasons) or "the fastest for these inputs"
            )
            return Choice(_kernel(name, deterministic), reason)
        if name not in OTHER_DEVICE.get(device.type, ()):
            reasons.append(f"{name} {why_not}")
    raise UserError(f"attention_backend {backend!r} {why_not}. Use auto.")


@functools.lru_cache(maxsize=64)
def chosen_kernel(
    device: torch.device, dtype: torch.dtype, head_dim: int, backend: str, deterministic: bool
) -> Kernel:
    """The kernel of :func:`select_kernel`, cached because every layer of every forward pass needs it."""
    return select_kernel(device, dtype, head_dim, backend, deterministic).kernel


#: Device -> backends that ``auto`` skips there without a reason.
OTHER_DEVICE = {
    "cpu": ("flash-attn-3", "flash-attn-2", "cuda-flash", "cudnn"),
    "cuda": ("cpu-blocks", "cpu-flash"),
}


def _why_not(name: str, device: torch.device, dtype: torch.dtype, head_dim: int, deterministic: bool) -> str:
    """Why a backend does not support these inputs; empty if it does."""
    if name == "math":
        return ""
    if name in OTHER_DEVICE.get(device.type, ()):
        return f"runs on {'cpu' if name.startswith('cpu') else 'cuda'}, not on {device.type}"
    if name == "cpu-flash":
        return ""
    if name == "cpu-blocks":
        return cpu_blocks.why_not(device, dtype)
    if dtype not in (torch.float16, torch.bfloat16):
        return f"takes float16 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    if head_dim > 256 or head_dim % 8:
        return f"takes head sizes up to 256 that divide by 8, not {head_dim}"
    from longspan.context_parallel.kernels.cuda import why_not

    return why_not(name, head_dim, deterministic)


def _kernel(name: str, deterministic: bool) -> Kernel:
    if name in CPU_KERNELS:
        return CPU_KERNELS[name]
    from longspan.context_parallel.kernels.cuda import make_kernel

    return make_kernel(name, deterministic)


CPU_KERNELS: dict[str, Kernel] = {
    kernel.name: kernel for kernel in (CpuBlocks(CpuFlash()), CpuFlash(), Math())
}
