"""Schedule: the Steps of a rank for a SequenceLayout. A Step receives rows, then computes tiles with them.

Forward, backward and the planner use the same Steps. Everything follows from the layout,
so sender and receiver both compute a message's size, without communication.

Step 0 computes with the rank's own rows. Then, with P ranks:

    step by step (p2p)       step i: rows from rank r-i, rows to rank r+i
    all at once (all_gather) step 1: rows from every rank, rows to every rank

Only rows that a rank needs are sent. For a causal zigzag sequence these are 3/4 of the rows that a
ring sends (summed over the ranks), because only ranks r < j need the second chunk of rank j.
Steps with few rows are merged into one exchange, so that 512 ranks do not need 511 tiny messages
one after another. All ranks merge the same steps, because they compare the rows of the rank that
receives most.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from longspan.context_parallel.layout import Segment, SequenceLayout
from longspan.context_parallel.needed import effective_window, needed, rows_matrix
from longspan.context_parallel.once import Once, Store
from longspan.context_parallel.tiles import Range, Tile, own_tiles, received_tiles, row_ranges

#: The fewest key/value rows that one exchange should send to the rank that receives most.
ROWS_A_STEP = 512


class Message(NamedTuple):
    """Rows to or from one peer: ``ranges`` holds the owner's local rows, ``rows`` is their number."""

    peer: int
    ranges: tuple[Range, ...]

    @property
    def rows(self) -> int:
        return sum(stop - start for start, stop in self.ranges)


@dataclass(frozen=True)
class Step(Once):
    """One exchange and the tiles that need it.

    Attributes:
        sends, receives: messages; empty ones are left out on both sides.
        order: ranges of the received rows (peers one after another) in the order in which
            the tiles number them; None is the order of arrival.
        tiles: the tiles to compute with the received rows (in step 0 with the own rows).
    """

    sends: tuple[Message, ...]
    receives: tuple[Message, ...]
    order: tuple[Range, ...] | None
    tiles: tuple[Tile, ...]
    _made: Store = field(default_factory=Store, compare=False, repr=False)

    @property
    def received_rows(self) -> int:
        return sum(message.rows for message in self.receives)


@dataclass(frozen=True)
class Schedule:
    """The Steps of one rank for one layout."""

    rank: int
    rows: int
    steps: tuple[Step, ...]
    #: Whether every local row is a token; False means that some rows are padding.
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
        """The schedule of a rank; computed once for each layout and these arguments.

        Args:
            window: a query attends to itself and the ``window - 1`` tokens before it; None means no limit.
            all_at_once: one exchange with every rank (``all_gather``).
            rows_a_step: the fewest rows that an exchange should send to a rank; None means ``ROWS_A_STEP``.
        """
        window = effective_window(layout, window)
        rows_a_step = ROWS_A_STEP if rows_a_step is None else rows_a_step
        key = ("schedule", rank, causal, window, None if all_at_once else rows_a_step)

        def make() -> Schedule:
            offsets = exchanges(layout, causal, window, None if all_at_once else rows_a_step)
            return _build(layout, rank, causal, window, offsets)

        return layout.once(key, make)

    @property
    def received_rows(self) -> int:
        return sum(step.received_rows for step in self.steps)

    @property
    def sent_rows(self) -> int:
        return sum(message.rows for step in self.steps for message in step.sends)

    @property
    def area(self) -> int:
        """Number of (query, key) pairs computed."""
        return sum(tile.area for step in self.steps for tile in step.tiles)

    @functools.cached_property
    def single_tile(self) -> bool:
        """Whether one tile computes everything, without accumulation and merge."""
        tiles = [tile for step in self.steps for tile in step.tiles]
        return len(tiles) == 1 and tiles[0].q == (0, self.rows)


def exchanges(layout: SequenceLayout, causal: bool, window: int | None, least: int | None) -> list[list[int]]:
    """The offsets i (rows from rank r-i, to rank r+i) of each exchange; the same on every rank.

    Args:
        least: the fewest rows that an exchange should send to the rank that receives most; None means one
            exchange.
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
            if wanted := needed(layout, to, rank, causal, window):
                sends.append(Message(to, row_ranges(wanted)))
            if coming := needed(layout, rank, source, causal, window):
                receives.append(Message(source, row_ranges(coming)))
                placed, at = _place(coming, at)
                arrived += placed
        order = None
        if len(receives) > 1:
            # Neighbours in the sequence become neighbours in the buffer, which makes fewer, longer tiles.
            arrived.sort()
            order = row_ranges(arrived)
            arrived, _ = _place(arrived, 0)
        tiles = received_tiles(mine, arrived, causal, window)
        steps.append(Step(tuple(sends), tuple(receives), order, tiles))
    # An empty step between other steps stays, because all ranks must post their messages in the same order:
    # NCCL matches the messages of a pair of ranks by their order, not by a tag.
    while len(steps) > 1 and not steps[-1].sends and not steps[-1].receives:
        steps.pop()
    held = sum(s.stop - s.start for s in mine)
    return Schedule(rank, layout.local_length, tuple(steps), covered=held == layout.local_length)


def _place(segments: Iterable[Segment], at: int) -> tuple[list[Segment], int]:
    """The segments moved to consecutive rows from ``at``, and the row after them."""
    placed = []
    for s in segments:
        placed.append(s._replace(row=at))
        at += s.stop - s.start
    return placed, at
