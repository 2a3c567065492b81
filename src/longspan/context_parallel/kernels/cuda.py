"""Attention backends for CUDA, each with the protocol of ``protocol``.

    cuda-flash      PyTorch's built-in FlashAttention-2
    cudnn           PyTorch's cuDNN attention, tile by tile
    flash-attn-2    the flash-attn package, if it is installed
    flash-attn-3    its successor for Hopper (flash_attn_interface), if it is installed

The flash backends also compute many tiles in one call as variable-length sequences. A
causal sequence is aligned at the bottom right (its last query sees its last key), so a run
of queries and all keys before it are one sequence; an ANTI tile is a window without keys to
the left of the diagonal.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from longspan.config.packages import has_package
from longspan.context_parallel.calls import VarlenCall
from longspan.context_parallel.tiles import Mask
from longspan.errors import UserError

aten = torch.ops.aten

#: Mask -> (causal, window to the left, window to the right); -1 means no limit.
WINDOWS = {Mask.FULL: (False, -1, -1), Mask.CAUSAL: (True, -1, 0), Mask.ANTI: (False, 0, -1)}


def why_not(name: str, head_dim: int, deterministic: bool) -> str:
    """Why a CUDA backend cannot be used here; empty if it can."""
    if name == "flash-attn-2" and not has_package("flash_attn"):
        return "is not installed (pip install flash-attn)"
    if name == "flash-attn-3":
        if not has_package("flash_attn_interface"):
            return "is not installed (it is built from the hopper folder of flash-attention)"
        if torch.cuda.get_device_capability()[0] != 9:
            return "runs on Hopper GPUs only"
    if name == "cuda-flash" and torch.cuda.get_device_capability() < (8, 0):
        return "needs an Ampere GPU or newer"
    if name == "cudnn":
        if head_dim > 128:
            return f"takes head sizes up to 128, not {head_dim}"
        if deterministic:
            return "has no deterministic backward"
    return ""


class VarlenKernel:
    """The base of the flash backends: a tile is a call with one sequence, unless a subclass overrides it."""

    varlen = True

    def __init__(self, deterministic: bool):
        self.deterministic = deterministic

    def forward(self, q, k, v, causal, scale):
        """q [s, b, n, d], k and v [t, b, m, d]: the batch dim is flattened into the heads."""
        s, b, n, d = q.shape
        call = VarlenCall.single(s, k.shape[0], Mask.CAUSAL if causal else Mask.FULL, q.device)
        out, lse = self.forward_varlen(*(x.flatten(1, 2) for x in (q, k, v)), call, scale)
        return out.unflatten(1, (b, n)), lse.unflatten(0, (b, n))

    def backward(self, dout, q, k, v, out, lse, causal, scale):
        call = VarlenCall.single(q.shape[0], k.shape[0], Mask.CAUSAL if causal else Mask.FULL, q.device)
        flat = (x.flatten(1, 2) for x in (dout, q, k, v, out))
        grads = self.backward_varlen(*flat, lse.flatten(0, 1), call, scale)
        return tuple(g.unflatten(1, x.shape[1:3]) for g, x in zip(grads, (q, k, v)))


class CudaFlash(VarlenKernel):
    """PyTorch's built-in FlashAttention-2."""

    name = "cuda-flash"

    def forward_varlen(self, q, k, v, call, scale):
        causal, left, right = WINDOWS[call.mask]
        out, lse, *_ = aten._flash_attention_forward(
            q,
            k,
            v,
            call.cu_q,
            call.cu_k,
            call.max_q,
            call.max_k,
            0.0,
            causal,
            False,
            scale=scale,
            window_size_left=left,
            window_size_right=right,
        )
        return out, lse

    def backward_varlen(self, dout, q, k, v, out, lse, call, scale):
        causal, left, right = WINDOWS[call.mask]
        # The state of the random numbers of dropout, which is not used.
        state = torch.zeros(2, dtype=torch.uint64, device=q.device)
        with _deterministic(self.deterministic):
            return aten._flash_attention_backward(
                dout.contiguous(),
                q,
                k,
                v,
                out.contiguous(),
                lse.contiguous(),
                call.cu_q,
                call.cu_k,
                call.max_q,
                call.max_k,
                0.0,
                causal,
                state,
                state.new_empty(0),
                scale=scale,
                window_size_left=left,
                window_size_right=right,
            )


@contextlib.contextmanager
def _deterministic(on: bool) -> Iterator[None]:
    """Sets the global deterministic switch, which makes PyTorch's flash backward avoid atomics."""
    before, warn = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    if on:
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        if on:
            torch.use_deterministic_algorithms(before, warn_only=warn)


class Cudnn:
    """PyTorch's cuDNN attention."""

    name, varlen = "cudnn", False

    def forward(self, q, k, v, causal, scale):
        out, lse, *_ = aten._scaled_dot_product_cudnn_attention(
            *(x.permute(1, 2, 0, 3) for x in (q, k, v)), None, True, 0.0, causal, False, scale=scale
        )
        return out.permute(2, 0, 1, 3), lse.squeeze(-1)

    def backward(self, dout, q, k, v, out, lse, causal, scale):
        # The state of the random numbers of dropout, which is not used.
        state = torch.zeros((), dtype=torch.int64, device=q.device)
        grads = aten._scaled_dot_product_cudnn_attention_backward(
            *(x.permute(1, 2, 0, 3) for x in (dout, q, k, v, out)),
            lse.unsqueeze(-1).contiguous(),
            state,
            state,
            None,
            None,
            None,
            q.shape[0],
            k.shape[0],
            0.0,
            causal,
            scale=scale,
        )
        return tuple(g.permute(2, 0, 1, 3) for g in grads)


class FlashAttn(VarlenKernel):
    """The flash-attn package, version 2 or 3, whose functions differ in a few argument names only."""

    def __init__(self, version: int, deterministic: bool):
        super().__init__(deterministic)
        self.name = f"flash-attn-{version}"
        if version == 2:
            from flash_attn import flash_attn_interface as module  # type: ignore[import-not-found]

            self._forward = module._flash_attn_varlen_forward
            self._backward = module._flash_attn_varlen_backward
        else:
            import flash_attn_interface as module  # type: ignore[import-not-found]

            self._forward, self._backward = module._flash_attn_forward, module._flash_attn_backward

    def _about(self, call: VarlenCall, scale: float) -> dict:
        """The arguments that forward and backward share, under the names of all releases."""
        causal, left, right = WINDOWS[call.mask]
        return {
            "cu_seqlens_q": call.cu_q,
            "cu_seqlens_k": call.cu_k,
            "max_seqlen_q": call.max_q,
            "max_seqlen_k": call.max_k,
            "dropout_p": 0.0,
            "softmax_scale": scale,
            "causal": causal,
            "is_causal": causal,
            "window_size_left": left,
            "window_size_right": right,
            "window_size": (left, right),
        }

    def forward_varlen(self, q, k, v, call, scale):
        out, lse, *_ = _call(self._forward, q=q, k=k, v=v, **self._about(call, scale))
        if lse.shape != (q.shape[1], q.shape[0]):
            raise UserError(
                f"{self.name} returned a log-sum-exp of shape {tuple(lse.shape)}, not [heads, rows] = "
                f"[{q.shape[1]}, {q.shape[0]}]: the installed release is too old (flash-attn before 2.7). Upgrade it, or set "
                "attention_backend: cuda-flash."
            )
        return out, lse

    def backward_varlen(self, dout, q, k, v, out, lse, call, scale):
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        _call(
            self._backward,
            dout=dout.contiguous(),
            q=q,
            k=k,
            v=v,
            out=out.contiguous(),
            softmax_lse=lse.contiguous(),
            dq=dq,
            dk=dk,
            dv=dv,
            **self._about(call, scale),
            softcap=0.0,
            alibi_slopes=None,
            deterministic=self.deterministic,
        )
        return dq, dk, dv


def _call(function: Callable, **arguments) -> tuple[Tensor, ...]:
    """Calls a function with the arguments that it has, and None for its other required arguments.

    This is needed because flash-attn's releases have different arguments.
    """
    known = inspect.signature(getattr(function, "_init_fn", function)).parameters
    needed = {name: None for name, parameter in known.items() if parameter.default is parameter.empty}
    return function(**needed | {name: value for name, value in arguments.items() if name in known})


_KERNELS: dict[str, Callable] = {
    "cuda-flash": CudaFlash,
    "cudnn": lambda deterministic: Cudnn(),
    "flash-attn-2": lambda deterministic: FlashAttn(2, deterministic),
    "flash-attn-3": lambda deterministic: FlashAttn(3, deterministic),
}


def make_kernel(name: str, deterministic: bool):
    """Makes the backend with this name."""
    return _KERNELS[name](deterministic)
