"""One tile of attention, forward and backward, and the merge of two results.

    forward   q [s, b, n, d], k and v [t, b, m, d]     -> out [s, b, n, d], lse [b, n, s]
    backward  dout, q, k, v, out, lse                  -> dq, dk, dv

n query heads, m key/value heads (m divides n), s query rows, t key rows; a causal tile has
s = t. The log-sum-exp is natural and at least float32. Backward takes the *global* out and
lse of its rows: with p = exp(q k^T scale - lse) and delta = rowsum(dout * out), each tile's
gradients are parts of the whole ones and just add up, so backward needs no merge.

Backends: PyTorch's flash attention for CPU, ``cpu_blocks``, those of ``cuda_kernels``, and ``math``, plain
PyTorch in any dtype, which is the reference and serves where no flash kernel does.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from longspan.context_parallel import cpu_blocks
from longspan.errors import UserError, did_you_mean

aten = torch.ops.aten


class Kernel(Protocol):
    """What a backend provides.

    Where ``packs`` is true it also has ``forward_packed`` and ``backward_packed``, which compute
    many tiles as variable-length sequences in one call (see ``calls.Pack``).
    """

    name: str
    packs: bool

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

    name, packs = "cpu-flash", False

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


class Math:
    """Plain PyTorch in the input's dtype, at least float32: the reference. Never more than 256 query rows at once."""

    name, packs, rows = "math", False, 256

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


class Choice(NamedTuple):
    """A kernel, and why it was taken (for the start-up banner)."""

    kernel: Kernel
    reason: str


#: in the order in which ``auto`` tries them
BACKENDS = (
    "auto",
    "flash-attn-3",
    "flash-attn-2",
    "cuda-flash",
    "cudnn",
    "cpu-blocks",
    "cpu-flash",
    "math",
)


def select_kernel(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    backend: str = "auto",
    deterministic: bool = False,
) -> Choice:
    """The kernel for these inputs; ``auto`` takes the fastest that can take them.

    Args:
        deterministic: two runs give equal bits. Gradients are always summed in a fixed order
            around the kernels, so this asks it of the kernel's own backward.

    Raises:
        UserError: no such backend, or the backend cannot take these inputs.
    """
    if backend not in BACKENDS:
        raise UserError(
            f"attention_backend {backend!r}: one of {', '.join(BACKENDS)}.{did_you_mean(backend, BACKENDS)}"
        )
    reasons: list[str] = []
    for name in BACKENDS[1:] if backend == "auto" else (backend,):
        why_not = _why_not(name, device, dtype, head_dim, deterministic)
        if not why_not:
            reason = (
                "asked for" if backend != "auto" else "; ".join(reasons) or "the fastest for these inputs"
            )
            return Choice(_kernel(name, deterministic), reason)
        if name not in OTHER_DEVICE.get(device.type, ()):
            reasons.append(f"{name} {why_not}")
    raise UserError(f"attention_backend {backend!r} {why_not}. Use auto.")


#: backends that nobody expects on a device
OTHER_DEVICE = {
    "cpu": ("flash-attn-3", "flash-attn-2", "cuda-flash", "cudnn"),
    "cuda": ("cpu-blocks", "cpu-flash"),
}


def _why_not(name: str, device: torch.device, dtype: torch.dtype, head_dim: int, deterministic: bool) -> str:
    """Why a backend cannot take these inputs; empty where it can."""
    if name == "math":
        return ""
    if name in OTHER_DEVICE.get(device.type, ()):
        return f"runs on {'cpu' if name.startswith('cpu') else 'cuda'}, not on {device.type}"
    if name == "cpu-flash":
        return ""
    if name == "cpu-blocks":
        return cpu_blocks.why_not(device, dtype)
    if dtype not in (torch.float16, torch.bfloat16):
        return f"takes float16 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    if head_dim > 256 or head_dim % 8:
        return f"takes head sizes up to 256 that divide by 8, not {head_dim}"
    from longspan.context_parallel.cuda_kernels import why_not

    return why_not(name, head_dim, deterministic)


def _kernel(name: str, deterministic: bool) -> Kernel:
    if name in CPU_KERNELS:
        return CPU_KERNELS[name]
    from longspan.context_parallel.cuda_kernels import make_kernel

    return make_kernel(name, deterministic)


CPU_KERNELS: dict[str, Kernel] = {
    kernel.name: kernel for kernel in (cpu_blocks.CpuBlocks(CpuFlash()), CpuFlash(), Math())
}


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
