"""The causal depthwise convolution in front of a recurrent scan, on one span of a longer sequence.

    y_t = bias + sum over j = 0 .. k-1 of weight[:, k-1-j] x_{t-j}        x, y [s, b, c], weight [c, k]

The window never reaches over the first token of a document. It does reach over the beginning of a span: the
last k - 1 inputs of what comes before are the span's *tail*. A span may be shorter than the kernel, so its
own tail may begin with a part of the tail that it received.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

#: On a CPU, so many elements of x are computed at once, because they stay in its cache.
CPU_ELEMENTS = 1 << 18


def causal_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    starts: Tensor | None = None,
    tail: Tensor | None = None,
    tail_valid: Tensor | None = None,
) -> Tensor:
    """y [s, b, c] in the dtype of x; sums are at least float32. It keeps its inputs for backward.

    Args:
        x: [s, b, c]; s may be any number, also 0.
        weight: [c, k], the last column for the present token, like ``torch.nn.Conv1d``'s with k - 1 zeros of
            padding on the left.
        bias: [c]; None is zero.
        starts: bool [s, b], True at the first token of each document; None if no document begins in x.
        tail: [k - 1, b, c], the last inputs of what comes before the span, oldest first; None if nothing does.
        tail_valid: bool [k - 1, b], which rows of the tail belong to the document that is still open at the
            span's beginning; None if all of them do.

    Raises:
        ValueError: shapes that do not fit.
    """
    _check(x, weight.shape[1], starts, tail, tail_valid)
    if weight.shape[0] != x.shape[2] or (bias is not None and bias.shape != weight.shape[:1]):
        raise ValueError(
            f"weight must be [c, k] and bias [c] with c = {x.shape[2]}, but the weight is {list(weight.shape)}"
            f"{'' if bias is None else f' and the bias {list(bias.shape)}'}."
        )
    if tail is not None and tail_valid is not None:
        tail = tail.masked_fill(~tail_valid.unsqueeze(-1), 0)
    return _Convolution.apply(x, weight, bias, tail, starts)


def convolution_tail(
    x: Tensor,
    kernel: int,
    starts: Tensor | None = None,
    tail: Tensor | None = None,
    tail_valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What a span hands on: its last ``kernel - 1`` inputs [k - 1, b, c], and which are valid, bool [k - 1, b].

    Valid are the inputs of the document that is still open after the span. All others are 0.

    Args:
        x, starts, tail, tail_valid: of the span; see :func:`causal_convolution`. A span of fewer than k - 1
            tokens hands a part of its own tail on; without one, the missing rows are not valid.

    Raises:
        ValueError: shapes that do not fit.
    """
    _check(x, kernel, starts, tail, tail_valid)
    s, b, c = x.shape
    count = kernel - 1
    if tail is None:
        tail, tail_valid = x.new_zeros(count, b, c), x.new_zeros(count, b, dtype=torch.bool)
    elif tail_valid is None:
        tail_valid = x.new_ones(count, b, dtype=torch.bool)
    assert tail_valid is not None
    own = min(s, count)
    valid = torch.cat([tail_valid[own:], tail_valid.new_ones(own, b)])
    if starts is not None:
        # A row belongs to the open document if no document begins after it.
        begins = torch.cat([starts.new_zeros(count - own, b), starts[s - own :]]).long()
        valid &= begins.sum(0) - begins.cumsum(0) == 0
    rows = torch.cat([tail[own:].to(x.dtype), x[s - own :]])
    return rows.masked_fill(~valid.unsqueeze(-1), 0), valid


def _check(
    x: Tensor, kernel: int, starts: Tensor | None, tail: Tensor | None, tail_valid: Tensor | None
) -> None:
    if x.dim() != 3:
        raise ValueError(f"x must be [s, b, c], but its shape is {list(x.shape)}.")
    s, b, c = x.shape
    shapes = {
        "starts": (starts, [s, b]),
        "tail": (tail, [kernel - 1, b, c]),
        "tail_valid": (tail_valid, [kernel - 1, b]),
    }
    for name, (tensor, expected) in shapes.items():
        if tensor is not None and list(tensor.shape) != expected:
            raise ValueError(
                f"{name} is {list(tensor.shape)}, but x {list(x.shape)} and a kernel of {kernel} need {expected}."
            )
    if tail_valid is not None and tail is None:
        raise ValueError("tail_valid needs a tail: give both, or None for both if nothing comes before.")


def _blocks(x: Tensor) -> Iterator[tuple[int, int]]:
    """(first row, end) of the blocks of rows that are computed at once."""
    s, b, c = x.shape
    rows = max(1, CPU_ELEMENTS // max(1, b * c)) if x.device.type == "cpu" else max(1, s)
    for first in range(0, s, rows):
        yield first, min(first + rows, s)


def _window(x: Tensor, tail: Tensor | None, before: int, first: int, end: int, wide: torch.dtype) -> Tensor:
    """Rows ``first - before`` to ``end`` of x, with the tail (zeros without one) before its row 0."""
    if first >= before:
        return x[first - before : end].to(wide)
    rows = x.new_zeros(before, *x.shape[1:], dtype=wide) if tail is None else tail.to(wide)
    return torch.cat([rows[first:], x[:end].to(wide)])


def _ages(starts: Tensor | None, before: int) -> Tensor | None:
    """int64 [s, b]: how many rows of its document lie before each row; ``before`` or more if there are enough."""
    if starts is None or before == 0 or not len(starts):
        return None
    row = torch.arange(len(starts), device=starts.device).unsqueeze(1)
    return row - torch.where(starts, row, -before).cummax(0).values


class _Convolution(torch.autograd.Function):
    """It keeps x; plain autograd would keep a masked copy of x for each column of the kernel."""

    @staticmethod
    def forward(ctx, x, weight, bias, tail, starts):
        ctx.save_for_backward(x, weight, bias, tail, starts)
        before = weight.shape[1] - 1
        ages = _ages(starts, before)
        wide = torch.promote_types(x.dtype, torch.float32)
        columns = weight.to(wide).t().contiguous()
        y = torch.empty_like(x)
        for first, end in _blocks(x):
            window = _window(x, tail, before, first, end, wide)
            total = window[before:] * columns[before]
            if bias is not None:
                total += bias.to(wide)
            for back in range(1, before + 1):
                part = window[before - back : len(window) - back]
                if ages is not None:
                    part = part.masked_fill((ages[first:end] < back).unsqueeze(-1), 0)
                total.addcmul_(part, columns[before - back])
            y[first:end] = total
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        x, weight, bias, tail, starts = ctx.saved_tensors
        before = weight.shape[1] - 1
        ages = _ages(starts, before)
        wide = torch.promote_types(x.dtype, torch.float32)
        columns = weight.to(wide).t().contiguous()
        grad_columns = torch.zeros_like(columns)
        grad_bias = None if bias is None else columns.new_zeros(len(bias))
        # The gradients of the tail's rows, and after them those of x.
        grad_rows = x.new_zeros(before + len(x), *x.shape[1:], dtype=wide)
        for first, end in _blocks(x):
            window = _window(x, tail, before, first, end, wide)
            grad = grad_y[first:end].to(wide)
            if grad_bias is not None:
                grad_bias += grad.sum((0, 1))
            for back in range(before + 1):
                part = grad
                if ages is not None and back:
                    part = grad.masked_fill((ages[first:end] < back).unsqueeze(-1), 0)
                start = before - back
                grad_columns[start] += (part * window[start : len(window) - back]).sum((0, 1))
                grad_rows[first + start : end + start].addcmul_(part, columns[start])
        return (
            grad_rows[before:].to(x.dtype),
            grad_columns.t().to(weight.dtype),
            None if bias is None else grad_bias.to(bias.dtype),
            None if tail is None else grad_rows[:before].to(tail.dtype),
            None,
        )
