"""The interface of a backend: one tile of attention, forward and backward; and the merge of two results.

    forward   q [s, b, n, d], k and v [t, b, m, d]     -> out [s, b, n, d], lse [b, n, s]
    backward  dout, q, k, v, out, lse                  -> dq, dk, dv

n query heads, m key/value heads (m divides n), s query rows, t key rows; a causal tile has
s = t. The log-sum-exp is natural and at least float32. Backward takes the *global* out and
lse of its rows: with p = exp(q k^T scale - lse) and delta = rowsum(dout * out), the tiles'
gradients add up to the whole gradients, so backward needs no merge.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Kernel(Protocol):
    """The interface of a backend.

    If ``varlen`` is true it also has ``forward_varlen`` and ``backward_varlen``, which compute
    many tiles as variable-length sequences in one call (see ``calls.VarlenCall``).
    """

    name: str
    varlen: bool

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


def merge(out: Tensor, lse: Tensor, new_out: Tensor, new_lse: Tensor) -> None:
    """Adds the keys of a new tile to a running result, in place.

    Args:
        out: [s, b, n, d], at least float32; lse: [b, n, s]. Both are updated.
        new_out, new_lse: the result of the new tile, in the same shapes.

    With weights w = exp(l_old - l) and w_new = exp(l_new - l), l = log(exp(l_old) + exp(l_new)),
    the sum is ``w out + w_new new_out``. As w + w_new = 1, this interpolates from out to new_out by
    w_new = sigmoid(l_new - l_old). If both are -inf (no key yet), the weight is 0, not NaN.
    """
    weight = torch.sigmoid(new_lse - lse).nan_to_num_(0.0)
    out.lerp_(new_out.to(out.dtype), weight.permute(2, 0, 1).unsqueeze(-1).to(out.dtype))
    lse.copy_(torch.logaddexp(lse, new_lse))
