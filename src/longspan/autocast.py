"""torch.autocast for parts with hand-written autograd functions, inside which autocast has no effect.

Like PyTorch's own functions, such a part casts its inputs to autocast's dtype and computes with autocast off.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor


def cast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors, in autocast's dtype if autocast is on; float64 stays, because the user chose it."""
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
    """A function that makes contexts with the device's present autocast state, to recompute in backward."""
    kind = tensor.device.type
    return partial(
        torch.autocast, kind, torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind)
    )
