"""Move rows: rows of tokens go from the ranks that hold them to the ranks that want them, in one all-to-all.

    x [s, ..] of the rows a rank holds -> [w, ..] of the rows it wants, zeros where nothing comes

Two plans use it, both made from a layout's integers, the same on every rank:

    change of layout    a hybrid model's stream is contiguous, and its attention works on a balanced layout: the
                        rows of query, key and value go there, and those of the output come back
    tails               the convolution of a recurrent layer reads the last rows of the ranks before
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from longspan.context_parallel.layout import SequenceLayout
from longspan.context_parallel.runs_of_tokens import runs_of
from longspan.mesh import collectives


class Piece(NamedTuple):
    """Tokens ``start .. stop - 1``, in consecutive rows from ``row`` on."""

    start: int
    stop: int
    row: int


class RowMove(NamedTuple):
    """What a rank sends and receives.

    Attributes:
        rows: rows of the result.
        send: int64 [rows sent], the rows that this rank sends, receiver after receiver.
        place: int64 [rows received], the rows of the result to which they belong, sender after sender.
        sent, received: rows to and from each rank, the rank itself among them.
    """

    rows: int
    send: Tensor
    place: Tensor
    sent: list[int]
    received: list[int]


def plan_rows(
    held: Sequence[Sequence[Piece]], wanted: Sequence[Sequence[Piece]], rank: int, rows: int
) -> RowMove:
    """The move of one rank.

    Args:
        held: for each rank, the tokens it holds; a token is held once.
        wanted: for each rank, the tokens it wants; several ranks may want the same.
        rows: rows of the result on every rank.
    """
    sends = [_overlaps(held[rank], wanted[other]) for other in range(len(held))]
    places = [_overlaps(held[other], wanted[rank]) for other in range(len(held))]
    return RowMove(
        rows,
        _numbers([(source, count) for pairs in sends for source, _, count in pairs]),
        _numbers([(target, count) for pairs in places for _, target, count in pairs]),
        [sum(count for *_, count in pairs) for pairs in sends],
        [sum(count for *_, count in pairs) for pairs in places],
    )


def _overlaps(held: Sequence[Piece], wanted: Sequence[Piece]) -> list[tuple[int, int, int]]:
    """(row where it is held, row where it is wanted, number of rows) of the tokens that both have, by token."""
    found = []
    left, right = sorted(held), sorted(wanted)
    i = j = 0
    while i < len(left) and j < len(right):
        a, b = left[i], right[j]
        start, stop = max(a.start, b.start), min(a.stop, b.stop)
        if start < stop:
            found.append((a.row + start - a.start, b.row + start - b.start, stop - start))
        if a.stop <= b.stop:
            i += 1
        else:
            j += 1
    return found


def _numbers(runs: list[tuple[int, int]]) -> Tensor:
    """The numbers of runs (first, count), one run after another."""
    if not runs:
        return torch.empty(0, dtype=torch.int64)
    return torch.cat([torch.arange(first, first + count) for first, count in runs])


def move_rows(x: Tensor, move: RowMove, group: dist.ProcessGroup) -> Tensor:
    """[s, ..] -> [rows, ..], zeros where nothing comes. Backward moves the gradients back and adds them up."""
    sent = collectives.all_to_all(x.index_select(0, move.send), group, move.received, move.sent)
    return x.new_zeros(move.rows, *x.shape[1:]).index_copy(0, move.place, sent)


def change_of_layout(
    source: SequenceLayout, target: SequenceLayout, rank: int, device: torch.device
) -> RowMove:
    """Rows in the order of ``source`` -> rows in the order of ``target``, another layout of the same tokens."""

    def make() -> RowMove:
        return _on(plan_rows(_held(source), _held(target), rank, target.local_length), device)

    return source.once(("change_of_layout", target.all_spans, rank, device), make)


def rows_between(source: SequenceLayout, target: SequenceLayout) -> np.ndarray:
    """[senders, receivers] rows that a change of layout sends, those that stay on their rank included."""
    firsts, holders = zip(*(_holders(one) for one in (source, target)))
    # Between two neighbouring edges, all tokens are on one rank of each layout.
    edges = np.union1d(*firsts)
    held, wanted = (
        of_rank[np.searchsorted(first, edges, "right") - 1] for first, of_rank in zip(firsts, holders)
    )
    counts = np.zeros((source.ranks, target.ranks), dtype=np.int64)
    np.add.at(counts, (held, wanted), np.diff(edges, append=source.total))
    return counts


def _holders(layout: SequenceLayout) -> tuple[np.ndarray, np.ndarray]:
    """(the first token of each span in the order of tokens, the rank that holds it); no padding."""
    spans = sorted(
        (start, rank)
        for rank, held in enumerate(layout.all_spans)
        for start, _ in held
        if start < layout.total
    )
    first, rank = np.array(spans).T
    return first, rank


def _held(layout: SequenceLayout) -> list[list[Piece]]:
    """The tokens that each rank holds."""
    return [[Piece(s.start, s.stop, s.row) for s in layout.segments(rank)] for rank in range(layout.ranks)]


def tails(layout: SequenceLayout, width: int, rank: int, device: torch.device) -> RowMove:
    """The last ``width`` tokens before each rank's run, oldest first, without those of other documents.

    The rows may come from several ranks, where runs are shorter than ``width``.

    Args:
        layout: contiguous (``runs_of_tokens.runs_of``).
    """

    def make() -> RowMove:
        wanted = [
            [Piece(start, stop, width - (stop - start))] if start < stop else []
            for start, stop in _tails(layout, width)
        ]
        return _on(plan_rows(_held(layout), wanted, rank, width), device)

    return layout.once(("tails", width, rank, device), make)


def tail_rows(layout: SequenceLayout, width: int) -> np.ndarray:
    """[senders] rows that each rank sends for the tails of all ranks.

    Args:
        layout, width: as for :func:`tails`.
    """
    runs, sent = np.array(runs_of(layout)), np.zeros(layout.ranks, dtype=np.int64)
    for start, stop in _tails(layout, width):
        sent += np.maximum(0, np.minimum(runs[:, 1], stop) - np.maximum(runs[:, 0], start))
    return sent


def _tails(layout: SequenceLayout, width: int) -> list[tuple[int, int]]:
    """The tokens (start, stop) that each rank wants before its run; empty where its run begins a document."""
    found = []
    for start, stop in runs_of(layout):
        # A rank of padding alone wants nothing.
        number = bisect.bisect_right(layout.cu_seqlens, start) - 1
        begins = layout.cu_seqlens[number] if start < stop else start
        found.append((max(begins, start - width), start))
    return found


def _on(move: RowMove, device: torch.device) -> RowMove:
    send, place = (rows.to(device, non_blocking=True) for rows in (move.send, move.place))
    return move._replace(send=send, place=place)
