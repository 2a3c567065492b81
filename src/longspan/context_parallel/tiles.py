"""Tiles: the local query rows that attend to key rows, as rectangles that a kernel can compute.

Spans are disjoint and documents are causal, so without a window a tile is never partly
masked: it is FULL (all its keys come before all its queries, in one document) or CAUSAL (a
run of tokens with itself). A sliding window of w tokens cuts a band out of the triangle.
Cut into blocks of w rows, the band needs one more shape and no mask:

    CAUSAL  query i sees keys j <= i     a block with itself
    ANTI    query i sees keys j >= i     a block with the w - 1 keys before it; with rows and
                                         keys in reverse order it is CAUSAL again

            . . . . . . . .              w = 4, one document of 8 tokens:
            C                            C: CAUSAL tiles, A: ANTI tile (its row i = 3 sees
            C C                          nothing, so it has 3 rows)
            C C C
            C C C C
              A A A C
                A A C C
                  A C C C
                    C C C C

Every shape is square or full, so any backend can compute it, and no tile computes a masked pair.
"""

from __future__ import annotations

import bisect
import enum
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from longspan.context_parallel.layout import Segment

Range = tuple[int, int]


class Mask(enum.Enum):
    """The pairs of a tile that are computed; CAUSAL and ANTI tiles are square."""

    FULL = "full"
    CAUSAL = "causal"
    ANTI = "anti"


class Tile(NamedTuple):
    """Query rows x key rows, half-open ranges. ``first``: no earlier tile has these query rows."""

    q: Range
    k: Range
    mask: Mask
    first: bool = False

    @property
    def area(self) -> int:
        """Number of (query, key) pairs."""
        rows, keys = self.q[1] - self.q[0], self.k[1] - self.k[0]
        return rows * keys if self.mask is Mask.FULL else rows * (rows + 1) // 2


def own_tiles(mine: Sequence[Segment], causal: bool, window: int | None) -> tuple[Tile, ...]:
    """Tiles of a rank's own rows; the first tile of a row comes before its other tiles."""
    if not causal:
        return _full_tiles(mine, mine, causal=False, first=True)
    return _causal_tiles(mine) if window is None else _band_tiles(mine, window)


def received_tiles(
    mine: Sequence[Segment], keys: Sequence[Segment], causal: bool, window: int | None
) -> tuple[Tile, ...]:
    """Tiles of own queries with received keys, whose ``row`` is a number among the received rows."""
    if window is None:
        return _full_tiles(mine, keys, causal)
    by_document = _by_document(_join_segments(keys))
    return tuple(
        tile
        for q in mine
        for k in by_document.get(q.document, ())
        if k.stop <= q.start
        for tile in _before(q, k, window)
    )


def join_ranges(ranges: Iterable[Range]) -> tuple[Range, ...]:
    """The ranges, with adjacent ranges joined."""
    joined: list[Range] = []
    for start, stop in ranges:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    return tuple(joined)


def row_ranges(segments: Iterable[Segment]) -> tuple[Range, ...]:
    """The rows of segments, with adjacent ranges joined."""
    return join_ranges((s.row, s.row + s.stop - s.start) for s in segments)


def _by_document(segments: Iterable[Segment]) -> dict[int, list[Segment]]:
    found: dict[int, list[Segment]] = defaultdict(list)
    for s in segments:
        found[s.document].append(s)
    return found


def _join_segments(segments: Iterable[Segment]) -> list[Segment]:
    """The segments; a segment that continues the one before, in position and in rows, is joined with it."""
    joined: list[Segment] = []
    for s in segments:
        last = joined[-1] if joined else None
        if (
            last
            and last.document == s.document
            and last.stop == s.start
            and last.row + last.stop - last.start == s.row
        ):
            joined[-1] = last._replace(stop=s.stop)
        else:
            joined.append(s)
    return joined


def _causal_tiles(mine: Sequence[Segment]) -> tuple[Tile, ...]:
    """Causal tiles of the own rows first, then the full tiles between them.

    Segments of a document whose positions and rows both rise are causal in row order too, even with
    gaps between them, so they make one tile (unless another own segment fills the gap).
    """
    # document -> its runs (positions, rows)
    runs: dict[int, list[tuple[Range, Range]]] = defaultdict(list)
    rising = set(pairwise(sorted(mine)))
    for last, s in zip((None, *mine), mine):
        held, rows = runs[s.document], (s.row, s.row + s.stop - s.start)
        if held and held[-1][1][1] == s.row and (last, s) in rising:
            held[-1] = ((held[-1][0][0], s.stop), (held[-1][1][0], rows[1]))
        else:
            held.append(((s.start, s.stop), rows))
    tiles = [Tile(rows, rows, Mask.CAUSAL, True) for held in runs.values() for _, rows in held]
    for held in runs.values():
        for positions, rows in held:
            before = sorted(r for p, r in held if p[1] <= positions[0])
            tiles += [Tile(rows, k, Mask.FULL) for k in join_ranges(before)]
    return tuple(tiles)


def _full_tiles(
    queries: Sequence[Segment], keys: Sequence[Segment], causal: bool, first: bool = False
) -> tuple[Tile, ...]:
    """Fused tiles of query segments x key segments of the same document (causal: keys before queries).

    Args:
        first: whether these are the first tiles of their rows (own rows, full attention).
    """
    by_document = _by_document(keys)
    fused: list[tuple[Range, tuple[Range, ...]]] = []
    for q in queries:
        ranges = row_ranges(k for k in by_document.get(q.document, ()) if not causal or k.stop <= q.start)
        if not ranges:
            continue
        rows = (q.row, q.row + q.stop - q.start)
        if fused and fused[-1][0][1] == rows[0] and fused[-1][1] == ranges:
            # Query rows with the same keys make one taller tile.
            fused[-1] = ((fused[-1][0][0], rows[1]), ranges)
        else:
            fused.append((rows, ranges))
    return tuple(Tile(q, k, Mask.FULL, first and i == 0) for q, ranges in fused for i, k in enumerate(ranges))


def _band_tiles(mine: Sequence[Segment], window: int) -> tuple[Tile, ...]:
    """Own rows with a sliding window: blocks of ``window`` rows with themselves, then with earlier keys."""
    segments = _join_segments(mine)
    blocks = [
        Segment(s.document, start, min(start + window, s.stop), s.row + start - s.start)
        for s in segments
        for start in range(s.start, s.stop, window)
    ]
    tiles = [Tile(_rows(b), _rows(b), Mask.CAUSAL, True) for b in blocks]
    for same in _by_document(blocks).values():
        order = sorted(range(len(same)), key=lambda i: same[i].start)
        stops = [same[i].stop for i in order]
        for q in same:
            # The blocks that end less than window - 1 tokens before q.
            ends = (bisect.bisect_right(stops, q.start - window + 1), bisect.bisect_right(stops, q.start))
            for i in sorted(order[slice(*ends)]):
                tiles += _before(q, same[i], window)
    return tuple(tiles)


def _rows(s: Segment) -> Range:
    return s.row, s.row + s.stop - s.start


def _before(q: Segment, k: Segment, window: int) -> Iterator[Tile]:
    """Tiles of queries with earlier keys of their document, less than ``window`` tokens before the query."""
    first_key = max(k.start, q.start - window + 1)
    # The end of the queries that see a key; it is exclusive.
    last_query = min(q.stop, k.stop + window - 1)
    if first_key >= k.stop or last_query <= q.start:
        return
    # Queries from edge on do not see all keys. Only some of these queries see the keys before corner.
    edge = min(first_key + window - 1, last_query)
    corner = first_key + last_query - edge

    def tile(queries: Range, keys: Range, mask: Mask) -> Iterator[Tile]:
        if queries[0] < queries[1] and keys[0] < keys[1]:
            to_row, to_key = q.row - q.start, k.row - k.start
            yield Tile((queries[0] + to_row, queries[1] + to_row), (keys[0] + to_key, keys[1] + to_key), mask)

    yield from tile((q.start, edge), (first_key, k.stop), Mask.FULL)
    yield from tile((edge, last_query), (first_key, corner), Mask.ANTI)
    yield from tile((edge, last_query), (corner, k.stop), Mask.FULL)
