"""Memory that an operation takes and gives back while it runs, which tensors without data do not show.

The entries were compared with the events of the CPU's allocator in float32. Other dtypes of the flash kernel are not
compared yet, and a kernel that is missing here counts as one without scratch memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from longspan.planner.work import name_of

aten = torch.ops.aten


def _input(args: Sequence[Any]) -> int:
    """One more tensor of the size of the first argument."""
    return args[0].nbytes


def _cpu_flash(args: Sequence[Any]) -> int:
    """The block of scores of each thread, in float32: rows of queries x (keys + head size + 2), see FlashAttentionKernel."""
    q, k, v = args[:3]
    rows = 256 if q.shape[2] >= 768 else 64 if q.shape[2] >= 192 else 32
    rows, keys = min(rows, q.shape[2]), min(512, k.shape[2])
    floats = rows * keys + 2 * rows + rows * v.shape[3]
    narrow = 0 if q.dtype in (torch.float32, torch.float64) else rows * keys * q.element_size()
    wide = 8 if q.dtype == torch.float64 else 4
    return torch.get_num_threads() * (floats * wide + narrow)


#: operation -> bytes from its arguments
SCRATCH: dict[Any, Callable[[Sequence[Any]], int]] = {
    # exp(x - max) before the sum
    aten.logsumexp.default: _input,
    aten._fused_rms_norm.default: _input,
    aten._scaled_dot_product_flash_attention_for_cpu.default: _cpu_flash,
}

#: gloo gathers into a buffer of its own, and reduces a copy of what it scatters: collective -> the tensor's argument
_GLOO = {"c10d._allgather_base_.default": 0, "c10d._reduce_scatter_base_.default": 1}


def scratch_bytes(func: Any, args: Sequence[Any], device_type: str) -> int:
    """Bytes that an operation holds beside its arguments and results."""
    if device_type == "cpu" and name_of(func) in _GLOO:
        return args[_GLOO[name_of(func)]].nbytes
    found = SCRATCH.get(func)
    if found is None or not isinstance(args[0], Tensor) or not math.prod(args[0].shape):
        return 0
    return found(args)
