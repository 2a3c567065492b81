"""Attention sinks: a learned logit for each head, one more term in the denominator of the softmax.

    p_j = exp(s_j) / (exp(sink) + sum over keys of exp(s))      (Agarwal et al. 2025, gpt-oss, arXiv 2508.10925)

A sink has no value, so it only takes weight away. With the results over the keys, out and lse:

    lse' = log(exp(lse) + exp(sink))        out' = exp(lse - lse') out

This is done once for a row, when the results of all its tiles are merged: a tile with a sink of its own would count the
sink again. A kernel's backward takes lse' and out': with p = exp(s - lse') and delta = rowsum(dout * out') its formulas
hold without a change. The gradient of a head's sink is minus the sum over its rows of exp(sink - lse') (dout . out').
"""

from __future__ import annotations

import torch
from torch import Tensor


def add_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """The result over all keys -> the result with the sinks: out' and lse', in the dtype of lse.

    Args:
        out: [s, b, n, d]; overwritten if its dtype is that of lse.
        lse: [b, n, s], at least float32. Rows of padding, which see no key, are 0 and -inf, and stay so.
        sinks: [n]; -inf is no sink.
    """
    sink = sinks.to(lse.dtype).view(1, -1, 1)
    none = lse == float("-inf")
    # exp(lse - lse') is a sigmoid, which is exact for sinks and scores of any size, infinite ones too.
    weight = torch.sigmoid(lse - sink).masked_fill(none, 0.0)
    lse = torch.logaddexp(lse, sink).masked_fill(none, float("-inf"))
    return out.to(lse.dtype).mul_(weight.permute(2, 0, 1).unsqueeze(-1)), lse


def sink_gradients(sinks: Tensor, dout: Tensor, out: Tensor, lse: Tensor) -> Tensor:
    """The gradient of ``sinks`` [n] from the rows of this rank, in the dtype of ``sinks``.

    Args:
        dout, out: [s, b, n, d]; out and lse [b, n, s] are the results with the sinks.
    """
    wide = lse.dtype
    product = (dout.to(wide) * out.to(wide)).sum(-1).permute(1, 2, 0)
    # A row that sees no key has the output 0, and so has a row under an infinite sink: nothing depends on the sink.
    share = (sinks.to(wide).view(1, -1, 1) - lse).exp().masked_fill(product == 0, 0.0)
    return -(share * product).sum((0, 2)).to(sinks.dtype)
