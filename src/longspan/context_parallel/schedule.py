"""Schedule: from a SequenceLayout to Steps of "receive these rows, then compute these tiles".

Forward, backward and the planner read the same Steps. Everything follows from the layout,
so both ends of a message know its size without asking.

A *tile* is a range of local query rows x a range of key rows. Spans are disjoint and
documents are causal, so a tile is never partly masked: it is *full* (all its keys come
before all its queries, in the same document) or *causal* (a run of tokens with itself).

Step 0 computes with the rank's own rows. Then, with P ranks:

    step by step (p2p)       step i: rows from rank r-i, rows to rank r+i
    all at once (all_gather) step 1: rows from every rank, rows to every rank

Only rows that somebody needs are sent. A causal zigzag sequence moves 3/4 of the rows a
ring would (summed over the ranks): the second chunk of rank j is needed by ranks r < j only.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from longspan.context_parallel.layout import Segment, SequenceLayout

Range = tuple[int, int]


class Tile(NamedTuple):
    """Query rows x key rows, half-open ranges. ``first``: no earlier tile has touched these query rows."""

    q: Range
    k: Range
    causal: bool
    first: bool

    @property
    def area(self) -> int:
        """(query, key) pairs."""
        rows, keys = self.q[1] - self.q[0], self.k[1] - self.k[0]
        return rows * (rows + 1) // 2 if self.causal else rows * keys


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
        cls, layout: SequenceLayout, rank: int, *, causal: bool = True, all_at_once: bool = False
    ) -> Schedule:
        """The schedule of a rank; computed once a layout."""
        key = ("schedule", rank, causal, all_at_once)
        if key not in layout._memo:
            layout._memo[key] = _build(layout, rank, causal, all_at_once)
        return layout._memo[key]

    @property
    def received_rows(self) -> int:
        return sum(message.rows for step in self.steps for message in step.receives)

    @property
    def sent_rows(self) -> int:
        return sum(message.rows for step in self.steps for message in step.sends)

    @property
    def single_tile(self) -> bool:
        """One tile computes everything: no accumulation, no merge."""
        tiles = [tile for step in self.steps for tile in step.tiles]
        return len(tiles) == 1 and tiles[0].q == (0, self.rows)


def _build(layout: SequenceLayout, rank: int, causal: bool, all_at_once: bool) -> Schedule:
    P, mine = layout.ranks, layout.segments(rank)
    steps = [Step((), (), None, _local_tiles(mine) if causal else _full_tiles(mine, mine, False, first=True))]
    exchanges = [range(1, P)] if all_at_once else [range(i, i + 1) for i in range(1, P)]
    for offsets in exchanges:
        sends, receives, arrived = [], [], []
        at = 0
        for i in offsets:
            to, source = (rank + i) % P, (rank - i) % P
            if wanted := _needed(layout, to, rank, causal):
                sends.append(Message(to, _row_ranges(wanted)))
            if coming := _needed(layout, rank, source, causal):
                receives.append(Message(source, _row_ranges(coming)))
                placed, at = _place(coming, at)
                arrived += placed
        order = None
        if len(receives) > 1:
            # neighbours in the sequence become neighbours in the buffer: fewer, longer tiles
            arrived.sort()
            order = _row_ranges(arrived)
            arrived, _ = _place(arrived, 0)
        steps.append(Step(tuple(sends), tuple(receives), order, _full_tiles(mine, arrived, causal)))
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


def _needed(layout: SequenceLayout, user: int, owner: int, causal: bool) -> list[Segment]:
    """The owner's segments that the user's queries attend to, in the owner's local order."""
    key = ("last_query", user)
    if key not in layout._memo:
        last: dict[int, int] = {}
        for s in layout.segments(user):
            last[s.document] = max(last.get(s.document, -1), s.start)
        layout._memo[key] = last
    last = layout._memo[key]
    return [s for s in layout.segments(owner) if last.get(s.document, -1) >= (s.stop if causal else 0)]


def _row_ranges(segments: Iterable[Segment]) -> tuple[Range, ...]:
    return _join_ranges([(s.row, s.row + s.stop - s.start) for s in segments])


def _join_ranges(ranges: Iterable[Range]) -> tuple[Range, ...]:
    joined: list[Range] = []
    for start, stop in ranges:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    return tuple(joined)


def _local_tiles(mine: list[Segment]) -> tuple[Tile, ...]:
    """Causal tiles of the own rows, the causal ones first: each row's own tile touches it first.

    Segments of a document that rise in position and lie row by row are causal in row order
    too, gaps or not, so they make one tile.
    """
    runs: dict[int, list[tuple[Range, Range]]] = defaultdict(list)  # document -> (positions, rows)
    for s in mine:
        held, rows = runs[s.document], (s.row, s.row + s.stop - s.start)
        if held and held[-1][1][1] == s.row and held[-1][0][1] <= s.start:
            held[-1] = ((held[-1][0][0], s.stop), (held[-1][1][0], rows[1]))
        else:
            held.append(((s.start, s.stop), rows))
    tiles = [Tile(rows, rows, True, True) for held in runs.values() for _, rows in held]
    for held in runs.values():
        for positions, rows in held:
            before = sorted(r for p, r in held if p[1] <= positions[0])
            tiles += [Tile(rows, k, False, False) for k in _join_ranges(before)]
    return tuple(tiles)


def _full_tiles(
    queries: list[Segment], keys: list[Segment], causal: bool, first: bool = False
) -> tuple[Tile, ...]:
    """Tiles of query segments x key segments of the same document (causal: keys before queries), fused.

    Args:
        first: these are the first tiles of their rows (step 0 of full attention).
    """
    by_document: dict[int, list[Segment]] = defaultdict(list)
    for s in keys:
        by_document[s.document].append(s)
    fused: list[tuple[Range, tuple[Range, ...]]] = []
    for q in queries:
        ranges = _row_ranges(k for k in by_document.get(q.document, ()) if not causal or k.stop <= q.start)
        if not ranges:
            continue
        rows = (q.row, q.row + q.stop - q.start)
        if fused and fused[-1][0][1] == rows[0] and fused[-1][1] == ranges:
            fused[-1] = ((fused[-1][0][0], rows[1]), ranges)  # the same keys: one taller tile
        else:
            fused.append((rows, ranges))
    return tuple(Tile(q, k, False, first and i == 0) for q, ranges in fused for i, k in enumerate(ranges))
