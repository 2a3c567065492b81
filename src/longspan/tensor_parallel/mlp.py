"""The products of an MLP between its two exchanges, as a function of plain tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from longspan.recomputed import gated_linear
from longspan.tensor_parallel.layers import Operands, projected


def squared_relu(x: Tensor) -> Tensor:
    """relu(x)^2, of each element."""
    return F.relu(x).square()


def activation_of(func: str | Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """``activation_func`` of a config -> the function: a name of ``ACTIVATIONS``, or a callable as it is."""
    if not isinstance(func, str):
        return func
    return squared_relu if func == "squared_relu" else getattr(F, func)


def mlp_product(
    x: Tensor, gate: Operands | None, up: Operands, down: Operands, activation: Callable[[Tensor], Tensor]
) -> Tensor:
    """[.., h], equal on all tensor parallel ranks -> this rank's part of the sum [.., h]; token by token."""
    if gate is None:
        return projected(activation(projected(x, up)), down)
    gates, ups = projected(x, gate), projected(x, up)
    y = gated_linear(gates, ups, down.weight, activation)
    if down.lora is not None:
        y = y + down.lora.expand(gated_linear(gates, ups, down.lora.a, activation))
    return y
