"""torch.autocast for parts whose autograd functions are written by hand, which autocast does not look into.

Such a part does as PyTorch's own do: it takes its inputs in autocast's type, and computes with autocast off.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor


def cast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors as they are; where autocast is on, in its type. float64 stays: it was asked for by name."""
    if not torch.is_autocast_enabled(tensors[0].device.type):
        return tensors
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)


def off(tensor: Tensor) -> contextlib.AbstractContextManager:
    """A context without autocast on the tensor's device."""
    if not torch.is_autocast_enabled(tensor.device.type):
        return contextlib.nullcontext()
    return torch.autocast(tensor.device.type, enabled=False)


def state(tensor: Tensor) -> Callable[[], torch.autocast]:
    """Makes contexts with autocast as it is now on the tensor's device: for what is computed again in backward."""
    kind = tensor.device.type
    return partial(
        torch.autocast, kind, torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind)
    )
