"""Sums of rows that several others add to, in one order where that is asked for."""

from __future__ import annotations

from torch import Tensor


def add_rows(total: Tensor, rows: slice | Tensor, part: Tensor, fixed_order: bool = False) -> None:
    """``total[rows] += part`` in the dtype of ``total``, repeats of a row included.

    Args:
        total: [t, ..].
        rows: a slice, or int64 [p] with repeats.
        part: [p, ..].
        fixed_order: adds with ``index_put_``, which sorts the rows, because CUDA's ``index_add_`` has no fixed order.
    """
    if isinstance(rows, slice):
        total[rows].add_(part)
    elif fixed_order:
        total.index_put_((rows,), part.to(total.dtype), accumulate=True)
    else:
        total.index_add_(0, rows, part.to(total.dtype))
