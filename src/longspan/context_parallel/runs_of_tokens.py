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
    """What a recurrent layer reads of each row.

    Attributes:
        starts: bool [s], True at the first token of each document; None if no state has to begin anew.
        real: bool [s], False where the row is padding, which hands a state on unchanged; None if there is none.
    """

    starts: Tensor | None
    real: Tensor | None


def marks_of_rank(layout: SequenceLayout, rank: int, device: torch.device) -> Marks:
    """The marks of the rows of one rank."""
    return layout.once(("marks", rank, device), lambda: _on(_marks(layout, [rank]), device))


def marks_of_all(layout: SequenceLayout, device: torch.device) -> Marks:
    """The marks of all ranks' rows, rank after rank."""
    ranks = list(range(layout.ranks))
    return layout.once(("marks", None, device), lambda: _on(_marks(layout, ranks), device))


def _marks(layout: SequenceLayout, ranks: list[int]) -> Marks:
    size, runs = layout.local_length, runs_of(layout)
    starts = torch.zeros(len(ranks) * size, dtype=torch.bool)
    real = torch.zeros(len(ranks) * size, dtype=torch.bool)
    for number, rank in enumerate(ranks):
        start, stop = runs[rank]
        real[number * size : number * size + stop - start] = True
        for edge in layout.cu_seqlens[:-1]:
            # Before the first token of all there is no state to begin anew from.
            if start <= edge < stop and edge > 0:
                starts[number * size + edge - start] = True
    return Marks(starts if starts.any() else None, None if real.all() else real)


def _on(marks: Marks, device: torch.device) -> Marks:
    return Marks(*(None if one is None else one.to(device, non_blocking=True) for one in marks))
