"""The numbers that code reads from tensors to decide how to go on: the one place that training and planning share.

A plan runs a step on tensors without data (``longspan.planner``). There a number has the value that the caller expects
of an ordinary step; everywhere else it is the tensor's own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake


def known_number(tensor: Tensor, default: float) -> float:
    """The value of a tensor of one element; ``default`` if the tensor has no data."""
    return default if is_fake(tensor) else tensor.item()


def known_numbers(tensor: Tensor, default: Sequence[float]) -> list[float]:
    """The values of a tensor [n]; ``default`` if the tensor has no data."""
    return list(default) if is_fake(tensor) else tensor.tolist()


def known_choices(indices: Tensor, choices: int) -> Tensor:
    """The numbers [t, k] that each of t rows chooses; without data they are spread evenly over 0 .. ``choices`` - 1."""
    if not is_fake(indices):
        return indices
    rows, each = indices.shape
    return torch.arange(rows * each, dtype=indices.dtype).remainder(choices).view(rows, each)
