"""The products of an MLP between its two exchanges, as a function of plain tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from longspan.config.architecture import Architecture
from longspan.recomputed import gated_linear
from longspan.tensor_parallel.layers import Operands, projected


def squared_relu(x: Tensor) -> Tensor:
    """relu(x)^2, of each element."""
    return F.relu(x).square()


def quick_gelu(x: Tensor) -> Tensor:
    """x sigmoid(1.702 x), of each element (Hendrycks and Gimpel 2016)."""
    return x * (1.702 * x).sigmoid()


#: names of activations that PyTorch does not have
_OWN = {"squared_relu": squared_relu, "quick_gelu": quick_gelu}


def activation_of(func: str | Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """``activation_func`` of a config -> the function: a name of ``ACTIVATIONS``, or a callable as it is."""
    if not isinstance(func, str):
        return func
    return _OWN[func] if func in _OWN else getattr(F, func)


def mlp_activation(config: Architecture) -> Callable[..., Tensor]:
    """What an MLP computes between its products: of (gate, up) if it is gated, otherwise of (up)."""
    if not config.gated_linear_unit:
        return activation_of(config.activation_func)
    return _gated(config.activation_func, config.activation_func_clamp_value, config.glu_linear_offset)


# One function for all layers, so that the parts of a layer are compiled once.
@functools.cache
def _gated(func: str | Callable, clamp: float | None, offset: float) -> Callable[[Tensor, Tensor], Tensor]:
    activation = activation_of(func)

    def gated(gate: Tensor, up: Tensor) -> Tensor:
        if clamp is not None:
            gate, up = gate.clamp(max=clamp), up.clamp(-clamp, clamp)
        return activation(gate) * (up + offset if offset else up)

    return gated


def mlp_product(
    x: Tensor, gate: Operands | None, up: Operands, down: Operands, activation: Callable[..., Tensor]
) -> Tensor:
    """[.., h], equal on all tensor parallel ranks -> this rank's part of the sum [.., h]; token by token.

    Args:
        activation: of (gate, up), or of (up) if ``gate`` is None; see :func:`mlp_activation`.
    """
    if gate is None:
        return projected(activation(projected(x, up)), down)
    gates, ups = projected(x, gate), projected(x, up)
    y = gated_linear(gates, ups, down.weight, activation)
    if down.lora is not None:
        y = y + down.lora.expand(gated_linear(gates, ups, down.lora.a, activation))
    return y
