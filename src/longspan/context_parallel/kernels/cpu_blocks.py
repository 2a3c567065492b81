"""Attention for CPU from matrix products over blocks of queries and keys.

PyTorch's own flash kernel for CPU computes a whole block in one thread, with the slow products that
``longspan.matmul`` avoids. Here large blocks use oneDNN's products. A block has ``ROWS`` rows of scores x
``KEYS`` keys, a few MiB that stay in the cache. The query heads that share a key head are folded into the
rows, [s, g, d] -> [s g, d], so grouped heads make taller products.

Scores, exponentials and sums are float32 for bfloat16 inputs too (a product of two bfloat16 numbers is exact
in float32). Exponentials have base 2, because that is twice as fast.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longspan.matmul import fast_dtypes, product

if TYPE_CHECKING:
    from longspan.context_parallel.kernels.protocol import Kernel

#: The size of a block: rows of scores (all heads of a group together), and keys.
ROWS, KEYS = 768, 1024
#: With fewer (query, key) pairs per head the small kernel is faster, because calls cost more than computing.
SMALL = 512 * 512
LOG2E = math.log2(math.e)


def _fold(x: Tensor, batch: int, group: slice) -> Tensor:
    """[s, b, n, d] -> [s g, d], at least float32, contiguous: a batch entry's rows of a group of heads."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return x[:, batch, group].to(wide).reshape(-1, x.shape[3]).contiguous()


def _groups(q: Tensor, k: Tensor, v: Tensor) -> Iterator[tuple[int, int, slice, Tensor, Tensor, Tensor]]:
    """Yields (batch entry, key head, the query heads that share it, and their folded rows of q, k and v)."""
    g = q.shape[2] // k.shape[2]
    for batch in range(q.shape[1]):
        for head in range(k.shape[2]):
            group, own = slice(head * g, (head + 1) * g), slice(head, head + 1)
            yield batch, head, group, _fold(q, batch, group), _fold(k, batch, own), _fold(v, batch, own)


def _fold_lse(lse: Tensor, batch: int, group: slice) -> Tensor:
    """[b, n, s] -> [s g, 1]"""
    return lse[batch, group].t().reshape(-1, 1)


def _blocks(
    queries: int, keys: int, causal: bool, rows: int, columns: int
) -> Iterator[tuple[int, int, int, int]]:
    """(first query, end of queries, first key, end of keys) of all blocks with an unmasked pair."""
    for start in range(0, queries, rows):
        stop = min(start + rows, queries)
        seen = min(stop, keys) if causal else keys
        for first in range(0, seen, columns):
            yield start, stop, first, min(first + columns, seen)


def _hide(scores: Tensor, block: tuple[int, int, int, int], causal: bool) -> None:
    """Sets the scores [rows g, keys] of masked pairs to -inf."""
    start, stop, first, end = block
    if not causal or end - 1 <= start:
        return
    query = torch.arange(start, stop).repeat_interleave(scores.shape[0] // (stop - start))
    # All rows see the keys before ``low``.
    low = max(first, start + 1)
    scores[:, low - first :].masked_fill_(torch.arange(low, end) > query.unsqueeze(1), float("-inf"))


class CpuBlocks:
    """Attention by blocks; grouped key/value heads need no copy.

    Args:
        small: the kernel for small tiles.
        least: query-key pairs a head from which a tile is not small.
        rows, keys: the size of a block: rows of scores (all heads of a group together), and keys.
    """

    name, varlen = "cpu-blocks", False

    def __init__(self, small: Kernel, least: int = SMALL, rows: int = ROWS, keys: int = KEYS):
        self.small, self.least = small, least
        self.rows, self.keys = rows, keys

    def forward(self, q, k, v, causal, scale):
        if q.shape[0] * k.shape[0] < self.least:
            return self.small.forward(q, k, v, causal, scale)
        s, batches, n, d = q.shape
        g = n // k.shape[2]
        rows = max(1, self.rows // g)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        lse = torch.empty(batches, n, s, dtype=torch.promote_types(q.dtype, torch.float32))
        c = scale * LOG2E
        for batch, _, group, qs, ks, vs in _groups(q, k, v):
            # The queries are scaled to base 2 first. If the scores were scaled instead, a large score could
            # be rounded to another value than its maximum.
            qs = qs * c
            total = torch.zeros_like(qs)
            # Every row sees key 0, which is in its first block, so no maximum stays infinite.
            top, norm = qs.new_full((s * g, 1), -math.inf), qs.new_zeros(s * g, 1)
            for block in _blocks(s, k.shape[0], causal, rows, self.keys):
                start, stop, first, end = block
                part = slice(start * g, stop * g)
                scores = product(qs[part], ks[first:end].t())
                _hide(scores, block, causal)
                new = torch.maximum(top[part], scores.amax(1, keepdim=True))
                scores.sub_(new).exp2_()
                # The factor that rescales the present sums to the new maximum.
                old = (top[part] - new).exp2_()
                norm[part] = norm[part] * old + scores.sum(1, keepdim=True)
                total[part] = total[part] * old + product(scores, vs[first:end])
                top[part] = new
            out[:, batch, group] = (total / norm).view(s, g, d)
            lse[batch, group] = ((top + norm.log2()) / LOG2E).view(s, g).t()
        return out, lse

    def backward(self, dout, q, k, v, out, lse, causal, scale):
        if q.shape[0] * k.shape[0] < self.least:
            return self.small.backward(dout, q, k, v, out, lse, causal, scale)
        s, _, n, d = q.shape
        g = n // k.shape[2]
        rows = max(1, self.rows // g)
        dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        c = scale * LOG2E
        for batch, head, group, qs, ks, vs in _groups(q, k, v):
            do = _fold(dout, batch, group)
            # sum(p dp) of each row, which softmax's derivative subtracts, equals sum(dout out).
            delta = (do * _fold(out, batch, group)).sum(1, keepdim=True)
            scaled, lse_2 = qs * c, _fold_lse(lse, batch, group) * LOG2E
            gq, gk, gv = torch.zeros_like(qs), torch.zeros_like(ks), torch.zeros_like(vs)
            for block in _blocks(s, k.shape[0], causal, rows, self.keys):
                start, stop, first, end = block
                part, seen = slice(start * g, stop * g), slice(first, end)
                p = product(scaled[part], ks[seen].t())
                _hide(p, block, causal)
                p.sub_(lse_2[part]).exp2_()
                ds = product(do[part], vs[seen].t()).sub_(delta[part]).mul_(p)
                # Only products and sums remain, for which bfloat16 is precise enough.
                p, ds = p.to(q.dtype), ds.to(q.dtype)
                gv[seen] += product(p.t(), do[part].to(q.dtype))
                gq[part] += product(ds, ks[seen].to(q.dtype))
                gk[seen] += product(ds.t(), qs[part].to(q.dtype))
            dq[:, batch, group] = gq.mul_(scale).view(s, g, d)
            dk[:, batch, head], dv[:, batch, head] = gk.mul_(scale), gv
        return dq, dk, dv


def why_not(device: torch.device, dtype: torch.dtype) -> str:
    """Why this kernel does not support these inputs; empty if it does."""
    if device.type != "cpu":
        return f"runs on cpu, not on {device.type}"
    name = str(dtype).removeprefix("torch.")
    return "" if dtype in fast_dtypes() else f"is not the faster one for {name} on this processor"
