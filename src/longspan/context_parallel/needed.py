"""The key/value rows that each rank needs from other ranks; every rank computes them from the layout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from longspan.context_parallel.layout import Segment, SequenceLayout


def effective_window(layout: SequenceLayout, window: int | None) -> int | None:
    """The window, or None if no document is longer than it."""
    return None if window is None or window >= layout.longest_document else window


def rows_matrix(layout: SequenceLayout, *, causal: bool = True, window: int | None = None) -> np.ndarray:
    """int64 [users, owners]: number of key/value rows that ``user`` receives from ``owner`` in forward."""
    window = effective_window(layout, window)
    key = ("rows_matrix", causal, window)

    def make() -> np.ndarray:
        matrix = np.zeros((layout.ranks, layout.ranks), dtype=np.int64)
        owners, held = _all_segments(layout)
        for user in range(layout.ranks):
            first = _first_needed(layout, user, held, causal, window)
            matrix[user] = np.bincount(owners, weights=held[:, 2] - first, minlength=layout.ranks)
            matrix[user, user] = 0
        return matrix

    return layout.once(key, make)


def needed(layout: SequenceLayout, user: int, owner: int, causal: bool, window: int | None) -> list[Segment]:
    """The parts of the owner's segments that the user's queries attend to, in the owner's local order."""
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
    """The first token that the user needs of each segment (document, start, stop); stop if it needs none.

    Spans are disjoint, so a key segment lies completely before or after each query segment. Of the query
    segments after it, the nearest needs the earliest tokens, and it needs all tokens from there to the key
    segment's end.
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
    limit = layout.total + 1

    def make() -> np.ndarray:
        starts = [s.document * limit + s.start for s in layout.segments(user)]
        return np.sort(np.array(starts, dtype=np.int64))

    return layout.once(("query_starts", user), make)


def _all_segments(layout: SequenceLayout) -> tuple[np.ndarray, np.ndarray]:
    """The owners [n] and (document, start, stop) [n, 3] of all ranks' segments."""
    found: Sequence = [(r, *s[:3]) for r in range(layout.ranks) for s in layout.segments(r)]
    table = np.array(found, dtype=np.int64).reshape(-1, 4)
    return table[:, 0], table[:, 1:]
