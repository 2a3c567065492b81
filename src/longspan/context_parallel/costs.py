"""Costs: each rank's computation and communication in a forward pass, from a layout alone.

They are computed for ``longspan layout`` and for plans, without process groups and tensors.

    move keys    a rank computes all heads of its queries and receives the key/value rows that they need
    move heads   a rank computes its share of the heads for the rows of its group, and all
                 ranks of the group exchange their rows of q, k, v and out

The unit of communication is a *key/value row*: one token's keys and values of all heads that a rank
holds. If heads move, rows of q and out count in proportion to their size, so that layouts can be compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from longspan.context_parallel.layout import SequenceLayout
from longspan.context_parallel.move_heads import split_heads
from longspan.context_parallel.needed import effective_window, rows_matrix
from longspan.context_parallel.schedule import ROWS_A_STEP, exchanges


@dataclass(frozen=True)
class AlikeLayers:
    """Attention layers that are alike, and their number (``count``).

    Attributes:
        comm_type: the communication type, for example ``p2p``.
        window: the sliding window, in tokens; None means no window.
        together: number of ranks that exchange heads with each other; 1 if only keys move.
    """

    comm_type: str
    window: int | None = None
    together: int = 1
    count: int = 1


@dataclass(frozen=True)
class Costs:
    """The costs, summed over the layers.

    Attributes:
        pairs: [P] (query, key) pairs that each rank computes; a pair of only 1/i of the heads counts 1/i.
        keys: [users, owners] key/value rows that owners send to users; after a move of heads, a row has
            only some of the heads.
        head_rows: number of rows of each of q, k, v and out that every rank sends and receives to move heads.
        wire: [users, owners] all communication, as key/value rows of the same size.
        steps: [P] steps of each rank's schedule, in the layer with the most steps.
        ring: key/value rows that a plain ring would send, in which each rank receives all other ranks' rows;
            summed over the ranks.
    """

    layout: SequenceLayout
    pairs: np.ndarray
    keys: np.ndarray
    head_rows: float
    wire: np.ndarray
    steps: np.ndarray
    ring: int

    @classmethod
    def of(
        cls,
        layout: SequenceLayout,
        layers: Sequence[AlikeLayers] = (AlikeLayers("p2p"),),
        n: int = 1,
        m: int = 1,
    ) -> Costs:
        """The costs of attention layers with ``n`` query and ``m`` key/value heads a rank."""
        P = layout.ranks
        pairs, keys, wire = np.zeros(P), np.zeros((P, P)), np.zeros((P, P))
        head_rows, steps = 0.0, np.ones(P, dtype=np.int64)
        for layer in layers:
            i = layer.together
            groups = [range(first, first + i) for first in range(0, P, i)]
            held = layout.merged(groups) if i > 1 else layout
            areas = [held.area(group, layer.window) / i for group in range(P // i)]
            pairs += layer.count * np.repeat(areas, i)
            # Ranks with the same number in their groups have the same heads, so keys move between them.
            rows = np.kron(rows_matrix(held, window=layer.window), np.eye(i))
            kv_heads = len(split_heads(n, m, i)[1][0])
            keys += layer.count * rows
            wire += layer.count * rows * kv_heads / m
            if i > 1:
                inside = np.kron(np.eye(P // i), 1 - np.eye(i))
                wire += layer.count * inside * layout.local_length * (n / i + kv_heads) / m
                head_rows += layer.count * layout.local_length * (i - 1) / i
            steps = np.maximum(steps, np.repeat(_steps(held, layer), i))
        ring = (P - 1) * layout.total * sum(layer.count for layer in layers)
        return cls(layout, pairs, keys, head_rows, wire, steps, ring)

    @property
    def imbalance(self) -> float:
        """The busiest rank's work, divided by the mean."""
        return float(self.pairs.max() / self.pairs.mean())

    @property
    def of_ring(self) -> float:
        """All communication, divided by the communication of a plain ring."""
        return float(self.wire.sum()) / self.ring if self.ring else 0.0

    @property
    def rank_of_ring(self) -> np.ndarray:
        """[P] the ratio of :attr:`of_ring` for the rows that each rank receives."""
        return self.wire.sum(1) * self.layout.ranks / max(1, self.ring)

    def padding(self, rank: int) -> int:
        """The number of a rank's padding rows."""
        return self.layout.local_length - sum(s.stop - s.start for s in self.layout.segments(rank))


def _steps(layout: SequenceLayout, layer: AlikeLayers) -> np.ndarray:
    """[P] steps of each rank's Schedule up to the last step with a message, computed without tiles."""
    window, ranks = effective_window(layout, layer.window), np.arange(layout.ranks)
    matrix = rows_matrix(layout, window=window)
    steps = np.ones(layout.ranks, dtype=np.int64)
    least = None if layer.comm_type == "all_gather" else ROWS_A_STEP
    for number, offsets in enumerate(exchanges(layout, True, window, least), start=2):
        for i in offsets:
            sends, receives = (
                matrix[(ranks + i) % layout.ranks, ranks],
                matrix[ranks, (ranks - i) % layout.ranks],
            )
            steps[(sends > 0) | (receives > 0)] = number
    return steps
