"""Parts of a layer that compute cheap intermediate results again in backward instead of keeping them.

Autograd keeps the tensors that each operation needs: four of [s, ffn] for a gated MLP, and four of [s, h] for
a norm on the CPU. These parts keep two (gate and up) for the MLP and one (the input) for the norm. Unlike in
checkpointing, no matrix product runs twice. The parts can be used inside checkpointing, because
``save_for_backward`` saves everything that they keep.

The compiler (``longspan.compiled``) chooses the kept tensors itself, so it gets the plain operations.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from longspan import autocast
from longspan.matmul import product


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, epsilon):
        ctx.save_for_backward(x, weight)
        ctx.epsilon = epsilon
        return F.rms_norm(x, weight.shape, weight, epsilon)

    @staticmethod
    def backward(ctx, grad):
        x, weight = (
            t.detach().requires_grad_(need) for t, need in zip(ctx.saved_tensors, ctx.needs_input_grad)
        )
        with torch.enable_grad():
            y = F.rms_norm(x, weight.shape, weight, ctx.epsilon)
        wanted = [t for t in (x, weight) if t.requires_grad]
        grads = iter(torch.autograd.grad(y, wanted, grad))
        return *(next(grads) if t.requires_grad else None for t in (x, weight)), None


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """``torch.nn.functional.rms_norm`` over the last dim; it keeps x and the weight for backward."""
    # On other devices the norm is one kernel, which keeps x, the weight and one number per row.
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.rms_norm(x, weight.shape, weight, epsilon)
    return _RMSNorm.apply(x, weight, epsilon)


class _GatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, weight, activation):
        ctx.save_for_backward(gate, up, weight)
        ctx.activation = activation
        x = activation(gate, up)
        return product(x.flatten(0, -2), weight.t()).view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx, grad):
        gate, up, weight = ctx.saved_tensors
        grad = grad.flatten(0, -2)
        gate, up = (t.detach().requires_grad_() for t in (gate, up))
        with torch.enable_grad():
            x = ctx.activation(gate, up)
        grad_weight = None
        if ctx.needs_input_grad[2]:
            grad_weight = product(grad.t(), x.detach().flatten(0, -2)).contiguous()
        grad_x = product(grad, weight).view(x.shape)
        return *torch.autograd.grad(x, (gate, up), grad_x), grad_weight, None


def gated_linear(
    gate: Tensor, up: Tensor, weight: Tensor, activation: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """``activation(gate, up) @ weight^T``; it keeps gate, up and the weight for backward.

    Args:
        gate, up: [.., ffn].
        weight: [h, ffn].
        activation: works on each element of gate and up by itself.

    Returns:
        [.., h], in autocast's dtype if autocast is on.
    """
    if torch.compiler.is_compiling():
        return F.linear(activation(gate, up), weight)
    gate, up, weight = autocast.cast(gate, up, weight)
    with autocast.off(gate):
        return _GatedLinear.apply(gate, up, weight, activation)
