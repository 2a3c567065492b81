"""Attention in plain PyTorch, in any dtype: the reference, and the fallback if no flash kernel works."""

from __future__ import annotations

import torch

from longspan.context_parallel.kernels.protocol import heads_first, rows_first


class Math:
    """The reference: plain PyTorch in the input's dtype, at least float32, at most 256 query rows at once."""

    name, varlen, rows = "math", False, 256

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
