"""One tile of attention, forward and backward, and the merge of two results.

    forward   q [s, b, n, d], k and v [t, b, m, d]     -> out [s, b, n, d], lse [b, n, s]
    backward  dout, q, k, v, out, lse                  -> dq, dk, dv

n query heads, m key/value heads (m divides n), s query rows, t key rows; a causal tile has
s = t. The log-sum-exp is natural and at least float32. Backward takes the *global* out and
lse of its rows: with p = exp(q k^T scale - lse) and delta = rowsum(dout * out), each tile's
gradients are parts of the whole ones and just add up, so backward needs no merge.

Backends: ``cpu-blocks`` (its own file), PyTorch's flash attention for CPU and CUDA, and ``math``, plain PyTorch in any
dtype, which is the reference and serves where no flash kernel does.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from longspan.context_parallel import cpu_blocks
from longspan.errors import UserError, did_you_mean

aten = torch.ops.aten


class Kernel(Protocol):
    """What a backend provides. ``reason`` says why it was chosen, for the start-up banner."""

    name: str

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]: ...

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        causal: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]: ...


def heads_first(x: Tensor) -> Tensor:
    """[s, b, n, d] -> [b, n, s, d], a view."""
    return x.permute(1, 2, 0, 3)


def rows_first(x: Tensor) -> Tensor:
    """[b, n, s, d] -> [s, b, n, d], a view."""
    return x.permute(2, 0, 1, 3)


class CpuFlash:
    """PyTorch's blockwise attention for CPU; grouped key/value heads without a copy."""

    name = "cpu-flash"

    def forward(self, q, k, v, causal, scale):
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
            heads_first(q), heads_first(k), heads_first(v), 0.0, causal, scale=scale
        )
        return rows_first(out), lse

    def backward(self, dout, q, k, v, out, lse, causal, scale):
        grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *map(heads_first, (dout, q, k, v, out)), lse, 0.0, causal, scale=scale
        )
        return tuple(rows_first(g) for g in grads)


class CudaFlash:
    """PyTorch's built-in flash attention (fp16, bf16)."""

    name = "cuda-flash"

    def forward(self, q, k, v, causal, scale):
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))  # [b, s, n, d]
        out, lse, *_ = aten._flash_attention_forward(
            q, k, v, None, None, q.shape[1], k.shape[1], 0.0, causal, False, scale=scale
        )
        return out.transpose(0, 1), lse

    def backward(self, dout, q, k, v, out, lse, causal, scale):
        dout, q, k, v, out = (x.transpose(0, 1) for x in (dout, q, k, v, out))
        state = torch.empty(2, dtype=torch.uint64, device=q.device)  # random numbers of dropout: none
        grads = aten._flash_attention_backward(
            dout.contiguous(),
            q,
            k,
            v,
            out.contiguous(),
            lse.contiguous(),
            None,
            None,
            q.shape[1],
            k.shape[1],
            0.0,
            causal,
            state,
            state.new_empty(0),
            scale=scale,
        )
        return tuple(g.transpose(0, 1) for g in grads)


class Math:
    """Plain PyTorch in the input's dtype, at least float32: the reference. Never more than 256 query rows at once."""

    name = "math"
    rows = 256

    def _scores(self, q, k, start, causal, scale):
        """[b, m, n/m, rows, t] for query rows from ``start``."""
        b, n, rows, d = q.shape
        m, t = k.shape[1], k.shape[2]
        scores = torch.einsum("bgrsd,bgtd->bgrst", q.reshape(b, m, n // m, rows, d), k) * scale
        if causal:
            hidden = (
                torch.arange(t, device=q.device) > torch.arange(start, start + rows, device=q.device)[:, None]
            )
            scores = scores.masked_fill(hidden, float("-inf"))
        return scores

    def forward(self, q, k, v, causal, scale):
        dtype, wide = q.dtype, torch.promote_types(q.dtype, torch.float32)
        q, k, v = (heads_first(x).to(wide) for x in (q, k, v))
        outs, lses = [], []
        for start in range(0, q.shape[2], self.rows):
            part = q[:, :, start : start + self.rows]
            scores = self._scores(part, k, start, causal, scale)
            lse = torch.logsumexp(scores, -1)
            out = torch.einsum("bgrst,bgtd->bgrsd", (scores - lse.unsqueeze(-1)).exp(), v)
            outs.append(out.reshape(*part.shape[:3], v.shape[3]))
            lses.append(lse.reshape(part.shape[:3]))
        return rows_first(torch.cat(outs, 2).to(dtype)), torch.cat(lses, 2)

    def backward(self, dout, q, k, v, out, lse, causal, scale):
        dtype, wide = q.dtype, torch.promote_types(q.dtype, torch.float32)
        dout, q, k, v, out = (heads_first(x).to(wide) for x in (dout, q, k, v, out))
        m = k.shape[1]
        dqs, dk, dv = [], torch.zeros_like(k), torch.zeros_like(v)
        for start in range(0, q.shape[2], self.rows):
            part = slice(start, start + self.rows)

            def grouped(x, part=part):
                x = x[:, :, part]
                return x.reshape(x.shape[0], m, x.shape[1] // m, *x.shape[2:])

            scores = self._scores(q[:, :, part], k, start, causal, scale)
            p = (scores - grouped(lse).unsqueeze(-1)).exp()
            do = grouped(dout)
            delta = (do * grouped(out)).sum(-1, keepdim=True)
            ds = p * (torch.einsum("bgrsd,bgtd->bgrst", do, v) - delta) * scale
            dqs.append(torch.einsum("bgrst,bgtd->bgrsd", ds, k).reshape(q[:, :, part].shape))
            dk += torch.einsum("bgrst,bgrsd->bgtd", ds, grouped(q))
            dv += torch.einsum("bgrst,bgrsd->bgtd", p, do)
        return tuple(rows_first(x).to(dtype) for x in (torch.cat(dqs, 2), dk, dv))


KERNELS: dict[str, Kernel] = {
    kernel.name: kernel for kernel in (cpu_blocks.CpuBlocks(CpuFlash()), CpuFlash(), CudaFlash(), Math())
}
BACKENDS = ("auto", *KERNELS)


def select_kernel(device: torch.device, dtype: torch.dtype, head_dim: int, backend: str = "auto") -> Kernel:
    """The kernel for these inputs; ``auto`` takes flash where it can.

    Raises:
        UserError: no such backend, or the backend cannot take these inputs.
    """
    why_not = {
        "cpu-blocks": cpu_blocks.why_not(device, dtype),
        "cpu-flash": "" if device.type == "cpu" else f"runs on cpu, not on {device.type}",
        "cuda-flash": (
            f"runs on cuda, not on {device.type}"
            if device.type != "cuda"
            else f"takes float16 and bfloat16, not {str(dtype).removeprefix('torch.')}"
            if dtype not in (torch.float16, torch.bfloat16)
            else f"takes head sizes up to 256 that divide by 8, not {head_dim}"
            if head_dim > 256 or head_dim % 8
            else ""
        ),
        "math": "",
    }
    if backend == "auto":
        return next(KERNELS[name] for name, reason in why_not.items() if not reason)
    if backend not in why_not:
        raise UserError(
            f"attention_backend {backend!r}: one of {', '.join(BACKENDS)}.{did_you_mean(backend, BACKENDS)}"
        )
    if why_not[backend]:
        raise UserError(f"attention_backend {backend!r} {why_not[backend]}. Use auto.")
    return KERNELS[backend]


def merge(out: Tensor, lse: Tensor, new_out: Tensor, new_lse: Tensor) -> None:
    """Adds the keys of a new tile to a running result, in place.

    Args:
        out: [s, b, n, d], at least float32; lse: [b, n, s]. Both are updated.
        new_out, new_lse: the same of the new tile.

    With weights w = exp(l_old - l) and w_new = exp(l_new - l), l = log(exp(l_old) + exp(l_new)),
    the sum is ``w out + w_new new_out``. As w + w_new = 1 this is a step from out to new_out by
    w_new = sigmoid(l_new - l_old). Where both are -inf (no key yet) the weight is 0, not NaN.
    """
    weight = torch.sigmoid(new_lse - lse).nan_to_num_(0.0)
    out.lerp_(new_out.to(out.dtype), weight.permute(2, 0, 1).unsqueeze(-1).to(out.dtype))
    lse.copy_(torch.logaddexp(lse, new_lse))
