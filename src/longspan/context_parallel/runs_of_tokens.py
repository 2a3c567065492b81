"""Layouts in which each rank holds one run of tokens, as recurrent layers need them.

Everything follows from the layout's integers, and the layout keeps it.
"""

from __future__ import annotations

import bisect
from typing import NamedTuple

import torch
from torch import Tensor

from longspan.context_parallel.layout import SequenceLayout


def runs_of(layout: SequenceLayout) -> list[tuple[int, int]]:
    """The run of tokens (start, stop) of each rank of a contiguous layout, without padding.

    Raises:
        ValueError: a rank holds several runs, or runs are out of order.
    """

    def make() -> list[tuple[int, int]]:
        found, at = [], 0
        for held in layout.all_spans:
            real = [(a, min(b, layout.total)) for a, b in held if a < min(b, layout.total)]
            start, stop = (real[0][0], real[-1][1]) if real else (at, at)
            if start != at or any(b != c for (_, b), (c, _) in zip(real, real[1:])):
                raise ValueError(
                    f"the layout is {layout.name}, where a rank holds several runs of tokens: a recurrent layer hands a state "
                    "from token to token, so each rank holds one run, in the order of the ranks. Cut the tokens by "
                    "SequenceLayout.contiguous(total, ranks, cu_seqlens=...), and give it as layout=."
                )
            found.append((start, stop))
            at = stop
        return found

    return layout.once(("runs",), make)


def borders(layout: SequenceLayout) -> tuple[list[bool], list[bool]]:
    """For each rank: whether a document begins in its run, and whether its first token continues one."""

    def make() -> tuple[list[bool], list[bool]]:
        runs, edges = runs_of(layout), set(layout.cu_seqlens[:-1])
        begins = sorted(edges)
        resets = [
            bisect.bisect_left(begins, stop) > bisect.bisect_left(begins, start) for start, stop in runs
        ]
        return resets, [start < stop and start not in edges for start, stop in runs]

    return layout.once(("borders",), make)


class Marks(NamedTuple):
    """What a recurrent layer reads of each row of a batch, whose sequences all have the layout's documents.

    Attributes:
        starts: bool [s, b], True at the first token of each document; None if no state has to begin anew.
        real: bool [s, b], False where the row is padding, which hands a state on unchanged; None if there is none.
        documents: int64 [b k + 1], the borders of each sequence's k documents, or parts of them, in all sequences one
            after another, for kernels that take documents so; None where ``starts`` is None. Padding is part of the
            document before.
    """

    starts: Tensor | None
    real: Tensor | None
    documents: Tensor | None


def marks_of_rank(layout: SequenceLayout, rank: int, device: torch.device, batch: int) -> Marks:
    """The marks of the rows of one rank."""
    return layout.once(("marks", rank, device, batch), lambda: _marks(layout, [rank], device, batch))


def marks_of_all(layout: SequenceLayout, device: torch.device, batch: int) -> Marks:
    """The marks of all ranks' rows, rank after rank."""
    ranks = list(range(layout.ranks))
    return layout.once(("marks", None, device, batch), lambda: _marks(layout, ranks, device, batch))


def _marks(layout: SequenceLayout, ranks: list[int], device: torch.device, batch: int) -> Marks:
    size, runs = layout.local_length, runs_of(layout)
    rows = len(ranks) * size
    begun: list[int] = []
    padding: list[int] = []
    for number, rank in enumerate(ranks):
        start, stop = runs[rank]
        padding += range(number * size + stop - start, (number + 1) * size)
        # Before the first token of all there is no state to begin anew from.
        edges = [edge for edge in layout.cu_seqlens[:-1] if start <= edge < stop and edge > 0]
        begun += [number * size + edge - start for edge in dict.fromkeys(edges)]

    def marked(at: list[int], inside: bool) -> Tensor:
        marks = torch.full((rows,), not inside, dtype=torch.bool)
        marks[at] = inside
        return marks.to(device, non_blocking=True).unsqueeze(1).expand(-1, batch)

    borders = [*(row for row in begun if row), rows]
    borders = [0, *(number * rows + border for number in range(batch) for border in borders)]
    return Marks(
        marked(begun, True) if begun else None,
        marked(padding, False) if padding else None,
        torch.tensor(borders).to(device, non_blocking=True) if begun else None,
    )
