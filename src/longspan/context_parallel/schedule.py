"""Schedule: from a SequenceLayout to Steps of "receive these rows, then compute these tiles".

Forward, backward and the planner read the same Steps. Everything follows from the layout,
so both ends of a message know its size without asking.

Step 0 computes with the rank's own rows. Then, with P ranks:

    step by step (p2p)       step i: rows from rank r-i, rows to rank r+i
    all at once (all_gather) step 1: rows from every rank, rows to every rank

Only rows that somebody needs are sent. A causal zigzag sequence moves 3/4 of the rows a
ring would (summed over the ranks): the second chunk of rank j is needed by ranks r < j only.
Steps that bring few rows are merged into one exchange: 512 ranks are not 511 tiny messages
one after another. All ranks merge alike, because they look at the heaviest of all.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from longspan.context_parallel.layout import Segment, SequenceLayout
from longspan.context_parallel.tiles import Range, Tile, own_tiles, received_tiles, row_ranges

#: key/value rows one exchange should bring to the rank that receives most
ROWS_A_STEP = 512


class Message(NamedTuple):
    """Rows to or from one peer: ``ranges`` are the owner's local rows, ``rows`` their number."""

    peer: int
    ranges: tuple[Range, ...]

    @property
    def rows(self) -> int:
        return sum(stop - start for start, stop in self.ranges)


@dataclass(frozen=True)
class Step:
    """One exchange and the tiles that need it.

    Attributes:
        sends, receives: messages; empty ones are left out on both sides.
        order: ranges of the received rows (peers one after another) in the order in which
            the tiles count them; None is the order of arrival.
        tiles: what to compute with the received rows (step 0: with the own rows).
    """

    sends: tuple[Message, ...]
    receives: tuple[Message, ...]
    order: tuple[Range, ...] | None
    tiles: tuple[Tile, ...]
    _memo: dict = field(default_factory=dict, compare=False, repr=False)

    @property
    def received_rows(self) -> int:
        return sum(message.rows for message in self.receives)


@dataclass(frozen=True)
class Schedule:
    """The Steps of one rank for one layout."""

    rank: int
    rows: int
    steps: tuple[Step, ...]
    #: every local row is computed by some tile (False: there is padding)
    covered: bool

    @classmethod
    def of(
        cls,
        layout: SequenceLayout,
        rank: int,
        *,
        causal: bool = True,
        window: int | None = None,
        all_at_once: bool = False,
        rows_a_step: int | None = None,
    ) -> Schedule:
        """The schedule of a rank; computed once a layout.

        Args:
            window: a query sees itself and the ``window - 1`` tokens before it; None is no limit.
            rows_a_step: rows an exchange should bring at least; None is ``ROWS_A_STEP``.
        """
        window = effective_window(layout, window)
        rows_a_step = ROWS_A_STEP if rows_a_step is None else rows_a_step
        key = ("schedule", rank, causal, window, None if all_at_once else rows_a_step)
        if key not in layout._memo:
            offsets = exchanges(layout, causal, window, None if all_at_once else rows_a_step)
            layout._memo[key] = _build(layout, rank, causal, window, offsets)
        return layout._memo[key]

    @property
    def received_rows(self) -> int:
        return sum(step.received_rows for step in self.steps)

    @property
    def sent_rows(self) -> int:
        return sum(message.rows for step in self.steps for message in step.sends)

    @property
    def area(self) -> int:
        """(query, key) pairs computed."""
        return sum(tile.area for step in self.steps for tile in step.tiles)

    @property
    def single_tile(self) -> bool:
        """One tile computes everything: no accumulation, no merge."""
        tiles = [tile for step in self.steps for tile in step.tiles]
        return len(tiles) == 1 and tiles[0].q == (0, self.rows)


def effective_window(layout: SequenceLayout, window: int | None) -> int | None:
    """None where no document is longer than the window."""
    return None if window is None or window >= layout.longest_document else window


def rows_matrix(layout: SequenceLayout, *, causal: bool = True, window: int | None = None) -> np.ndarray:
    """[users, owners]: the key/value rows rank ``user`` receives from rank ``owner`` in a forward pass."""
    window = effective_window(layout, window)
    key = ("rows_matrix", causal, window)
    if key not in layout._memo:
        matrix = np.zeros((layout.ranks, layout.ranks), dtype=np.int64)
        owners, held = _all_segments(layout)
        for user in range(layout.ranks):
            first = _first_needed(layout, user, held, causal, window)
            matrix[user] = np.bincount(owners, weights=held[:, 2] - first, minlength=layout.ranks)
            matrix[user, user] = 0
        layout._memo[key] = matrix
    return layout._memo[key]


def exchanges(layout: SequenceLayout, causal: bool, window: int | None, least: int | None) -> list[list[int]]:
    """Offsets i (rows from rank r-i, to rank r+i) by exchange; the same on every rank.

    Args:
        least: rows an exchange brings to the heaviest rank, None for all at once.
    """
    P = layout.ranks
    if least is None or P == 1:
        return [list(range(1, P))] if P > 1 else []
    matrix, ranks = rows_matrix(layout, causal=causal, window=window), np.arange(P)
    found: list[list[int]] = []
    open_rows = least
    for i in range(1, P):
        heaviest = int(matrix[ranks, (ranks - i) % P].max())
        if heaviest == 0:
            continue
        if open_rows >= least:
            found.append([])
            open_rows = 0
        found[-1].append(i)
        open_rows += heaviest
    return found


def _build(
    layout: SequenceLayout, rank: int, causal: bool, window: int | None, exchanges: list[list[int]]
) -> Schedule:
    P, mine = layout.ranks, layout.segments(rank)
    steps = [Step((), (), None, own_tiles(mine, causal, window))]
    for offsets in exchanges:
        sends, receives, arrived = [], [], []
        at = 0
        for i in offsets:
            to, source = (rank + i) % P, (rank - i) % P
            if wanted := _needed(layout, to, rank, causal, window):
                sends.append(Message(to, row_ranges(wanted)))
            if coming := _needed(layout, rank, source, causal, window):
                receives.append(Message(source, row_ranges(coming)))
                placed, at = _place(coming, at)
                arrived += placed
        order = None
        if len(receives) > 1:
            # neighbours in the sequence become neighbours in the buffer: fewer, longer tiles
            arrived.sort()
            order = row_ranges(arrived)
            arrived, _ = _place(arrived, 0)
        tiles = received_tiles(mine, arrived, causal, window)
        steps.append(Step(tuple(sends), tuple(receives), order, tiles))
    # An empty step in between stays: all ranks post their messages in the same order, which is
    # how two messages of one pair find their ends. (NCCL matches by order, not by tag.)
    while len(steps) > 1 and not steps[-1].sends and not steps[-1].receives:
        steps.pop()
    held = sum(s.stop - s.start for s in mine)
    return Schedule(rank, layout.local_length, tuple(steps), covered=held == layout.local_length)


def _place(segments: Iterable[Segment], at: int) -> tuple[list[Segment], int]:
    """The segments in consecutive rows from ``at``, and the row after them."""
    placed = []
    for s in segments:
        placed.append(s._replace(row=at))
        at += s.stop - s.start
    return placed, at


# --- who needs what ---------------------------------------------------------------------------


def _needed(layout: SequenceLayout, user: int, owner: int, causal: bool, window: int | None) -> list[Segment]:
    """What the user's queries attend to of the owner's segments, in the owner's local order."""
    segments = layout.segments(owner)
    if not segments:
        return []
    held = np.array([s[:3] for s in segments], dtype=np.int64)
    first = _first_needed(layout, user, held, causal, window)
    return [
        s._replace(start=start, row=s.row + start - s.start)
        for s, start in zip(segments, first.tolist())
        if start < s.stop
    ]


def _first_needed(
    layout: SequenceLayout, user: int, held: np.ndarray, causal: bool, window: int | None
) -> np.ndarray:
    """For each segment (document, start, stop) the first token the user needs; its stop where none.

    Spans are disjoint, so a segment is before or after the whole of each query segment. Of
    those after it the nearest sees furthest back, and sees an end of the segment.
    """
    document, start, stop = held.T
    keys, limit = _query_starts(layout, user), layout.total + 1
    if not causal:
        at = np.searchsorted(keys, document * limit)
    else:
        at = np.searchsorted(keys, document * limit + stop)
    at_end = at == len(keys)
    nearest = np.append(keys, -1)[at]
    seen = ~at_end & (nearest // limit == document)
    reach = start if window is None else np.maximum(start, nearest % limit - window + 1)
    return np.where(seen, np.minimum(reach, stop), stop)


def _query_starts(layout: SequenceLayout, user: int) -> np.ndarray:
    """The starts of a rank's segments as sorted numbers document x (total + 1) + start."""
    key = ("query_starts", user)
    if key not in layout._memo:
        limit = layout.total + 1
        layout._memo[key] = np.sort(
            np.array([s.document * limit + s.start for s in layout.segments(user)], dtype=np.int64)
        )
    return layout._memo[key]


def _all_segments(layout: SequenceLayout) -> tuple[np.ndarray, np.ndarray]:
    """The owners [n] and (document, start, stop) [n, 3] of all ranks' segments."""
    found: Sequence = [(r, *s[:3]) for r in range(layout.ranks) for s in layout.segments(r)]
    table = np.array(found, dtype=np.int64).reshape(-1, 4)
    return table[:, 0], table[:, 1:]
