"""Matrix products on the CPU by the faster of PyTorch's two libraries.

On x86, ``torch.matmul`` computes float32 with MKL, which on AMD processors is less than half as fast as
oneDNN, at the same precision (it computes bfloat16 with oneDNN). oneDNN's float32 product is called
through the operator that PyTorch's own compiler uses for linear layers. All other products (other
dtypes, other processors, CUDA) are plain PyTorch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

#: Products of fewer multiplications than this use torch.matmul, because a oneDNN call would cost too much.
SMALL = 1 << 16

#: oneDNN is used with AVX-512 only, because no other processor has been measured.
_HAS_ONEDNN = (
    torch.backends.mkldnn.is_available()
    and torch.backends.cpu.get_cpu_capability() == "AVX512"
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)


def fast_dtypes() -> tuple[torch.dtype, ...]:
    """The dtypes whose products oneDNN computes fast on this processor."""
    if not _HAS_ONEDNN:
        return ()
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return (torch.float32, torch.bfloat16) if native else (torch.float32,)


def _onednn(a: Tensor, b: Tensor) -> bool:
    return (
        _HAS_ONEDNN
        and a.device.type == "cpu"
        and a.dtype == b.dtype == torch.float32
        and a.shape[0] * a.shape[1] * b.shape[1] >= SMALL
    )


def _dense(x: Tensor) -> Tensor:
    """``x``, copied unless it or its transpose is contiguous, because oneDNN is slow for other strides."""
    return x if x.is_contiguous() or x.t().is_contiguous() else x.contiguous()


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` [m, n] for [m, k] and [k, n] of any strides, without autograd."""
    if not _onednn(a, b):
        return a @ b
    # This operator computes (x, w) -> x w^T and copies x if it is not contiguous. If a is larger than b,
    # the transposed product is computed, so that the smaller tensor is copied.
    linear = torch.ops.mkldnn._linear_pointwise
    if not a.is_contiguous() and a.shape[0] > b.shape[1]:
        return linear(b.t(), _dense(a), None, "none", [], "").t()
    return linear(a, _dense(b.t()), None, "none", [], "")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        # Only the weight's gradient needs the input, and a frozen weight has no gradient.
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return product(x.flatten(0, -2), weight.t()).view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        leading, grad = grad.shape[:-1], grad.flatten(0, -2)
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = product(grad, weight).view(*leading, weight.shape[1])
        if ctx.needs_input_grad[1]:
            grad_weight = product(grad.t(), x.flatten(0, -2)).contiguous()
        return grad_x, grad_weight


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x [.., k] @ weight [n, k]^T + bias [n]`` -> [.., n], like ``torch.nn.functional.linear``."""
    # The compiler itself chooses the library, so it gets the plain operation.
    if torch.compiler.is_compiling():
        return F.linear(x, weight, bias)
    plain = x.device.type != "cpu" or x.dtype != torch.float32 or x.dim() < 2 or not x.numel()
    if plain or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight, bias)
    y = _Linear.apply(x, weight)
    return y if bias is None else y + bias
