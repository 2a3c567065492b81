"""Balanced layouts: which chunks of a pack each rank holds, so that work is even and few rows are sent.

Short and long documents in one pack make causal work uneven: the last chunk of a long document
costs many times as much as a chunk of short documents. The pack is cut into equal chunks. Then

    1. each chunk, the largest area first, goes to a rank with a free slot and room for its work: to the
       rank that needs the fewest additional rows for it, and among equal ranks to the least loaded;
    2. heavy chunks of the most loaded rank are swapped with lighter chunks of other ranks, by the
       swap that costs the fewest rows, until the busiest rank is within 2 % of the mean.

If this balance is not reached, the chunks are halved and both steps start again. (Assigning by
area comes from MagiAttention, 2025; placing by received rows, and the swaps, are longspan's own.)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

#: Balance is reached when the busiest rank's work, divided by the mean, is at most this number.
TOLERANCE = 1.02
#: The most work, divided by the mean, that the first placement may assign to a rank.
SLACK = 1.04
#: Chunks per rank: the first number to try, and the last; the number is doubled in between.
CHUNKS = (16, 64)
#: The fewest rows of a chunk when chunks are halved for balance.
SMALLEST_CHUNK = 32


def balanced_chunks(
    bounds: Sequence[int], ranks: int, windows: Sequence[int | None], multiple_of: int = 1
) -> tuple[int, list[list[int]]]:
    """Chunks of a pack for each rank.

    Args:
        bounds: document boundaries [d + 1], from 0 to the number of tokens.
        windows: the sliding window of each layer (None for no window); areas are summed over them.
        multiple_of: the number of rows of every rank is a multiple of this number.

    Returns:
        Tokens of a chunk, and the chunks of each rank in rising order; all ranks have equally many.
    """
    total = bounds[-1]
    count = max(1, min(CHUNKS[0], total // (ranks * SMALLEST_CHUNK)))
    best = None
    while True:
        size = -(-total // (ranks * count))
        while size * count % multiple_of:
            size += 1
        pack = _Pack(bounds, ranks, count, size, windows)
        pack.place()
        pack.swap()
        imbalance = pack.imbalance
        if best is None or imbalance < best[0]:
            best = (imbalance, size, [sorted(chunks) for chunks in pack.held])
        count *= 2
        if imbalance <= TOLERANCE or count > CHUNKS[1] or total < ranks * count * SMALLEST_CHUNK:
            return best[1], best[2]


class _Pack:
    """Chunks, their work, the chunks that they need, and their ranks. An int's bits are a set of chunks."""

    def __init__(
        self, bounds: Sequence[int], ranks: int, count: int, size: int, windows: Sequence[int | None]
    ):
        self.ranks, self.slots, n = ranks, count, ranks * count
        edges = np.minimum(np.arange(n + 1) * size, bounds[-1])
        documents = np.asarray(bounds, dtype=np.int64)
        areas = [np.diff(_pairs_before(edges, documents, window)) for window in windows]
        self.area = np.sum(areas, axis=0)
        # A chunk needs rows of other chunks only for the document inside which it begins.
        first = documents[np.searchsorted(documents, edges[:-1], side="right") - 1]
        widest = None if None in windows else max(w for w in windows if w is not None)
        if widest is not None:
            first = np.maximum(first, edges[:-1] - widest + 1)
        self.need = [((1 << i) - 1) >> (a // size) << (a // size) for i, a in enumerate(first.tolist())]
        self.held: list[list[int]] = [[] for _ in range(ranks)]
        # The chunks that each rank needs, and those that it holds, as bits.
        self.needed, self.own = [0] * ranks, [0] * ranks
        self.load = np.zeros(ranks)
        self.mean = float(self.area.sum()) / ranks

    @property
    def imbalance(self) -> float:
        return float(self.load.max()) / self.mean

    def place(self) -> None:
        """Step 1: places chunks. Chunks that need no other chunk (short documents, padding) come last."""
        area, load, limit = self.area.tolist(), [0.0] * self.ranks, SLACK * self.mean
        for i in np.argsort(-self.area, kind="stable").tolist():
            need, bit, a = self.need[i], 1 << i, area[i]
            best, best_key = -1, None
            for r in range(self.ranks):
                if len(self.held[r]) == self.slots:
                    continue
                if load[r] + a > limit:
                    key = (1.0, load[r], 0.0)
                else:
                    more = ((self.needed[r] | need) & ~(self.own[r] | bit)).bit_count() - (
                        self.needed[r] & ~self.own[r]
                    ).bit_count()
                    key = (0.0, more, load[r])
                if best_key is None or key < best_key:
                    best, best_key = r, key
            self.held[best].append(i)
            self.needed[best] |= need
            self.own[best] |= bit
            load[best] += a
        self.load = np.array(load)

    def swap(self) -> None:
        """Step 2: the busiest rank swaps a chunk for a lighter chunk, until it is within the tolerance."""
        for _ in range(4 * self.ranks * self.slots):
            busy = int(self.load.argmax())
            if self.load[busy] <= TOLERANCE * self.mean:
                return
            found = self._best_swap(busy)
            if found is None:
                return
            other, mine, theirs = found
            gain = float(self.area[mine] - self.area[theirs])
            for r, gone, come in ((busy, mine, theirs), (other, theirs, mine)):
                self.held[r].remove(gone)
                self.held[r].append(come)
                self.needed[r], self.own[r] = self._bits(self.held[r])
            self.load[busy] -= gain
            self.load[other] += gain

    def _best_swap(self, busy: int) -> tuple[int, int, int] | None:
        """(rank, chunk of the busy rank, chunk of that rank) with the fewest rows among the best swaps."""
        ours = np.array(self.held[busy])
        others = [r for r in np.argsort(self.load, kind="stable").tolist() if r != busy]
        candidates = []
        for r in others[: max(8, self.ranks // 4)]:
            theirs = np.array(self.held[r])
            gain = self.area[ours][:, None] - self.area[theirs][None, :]
            # The larger load of the two ranks after each swap.
            after = np.maximum(self.load[busy] - gain, self.load[r] + gain)
            after = np.where(gain > 0, after, np.inf)
            for at in np.argsort(after, axis=None, kind="stable")[:4].tolist():
                i, j = divmod(at, len(theirs))
                if after[i, j] < self.load[busy]:
                    candidates.append((float(after[i, j]), r, int(ours[i]), int(theirs[j])))
        if not candidates:
            return None
        good = max(min(c[0] for c in candidates), TOLERANCE * self.mean)
        return min(
            (self._rows_after(busy, r, mine, theirs), after, r, mine, theirs)
            for after, r, mine, theirs in candidates
            if after <= good
        )[2:]

    def _rows_after(self, a: int, b: int, from_a: int, from_b: int) -> int:
        """The chunks that two ranks receive after they have swapped two chunks."""
        rows = 0
        for r, gone, come in ((a, from_a, from_b), (b, from_b, from_a)):
            needed, own = self._bits([i for i in self.held[r] if i != gone] + [come])
            rows += (needed & ~own).bit_count()
        return rows

    def _bits(self, chunks: list[int]) -> tuple[int, int]:
        needed = own = 0
        for i in chunks:
            needed |= self.need[i]
            own |= 1 << i
        return needed, own


def _pairs_before(edges: np.ndarray, bounds: np.ndarray, window: int | None) -> np.ndarray:
    """The (query, key) pairs of all queries before each token number."""
    whole = np.concatenate(([0], np.cumsum(_pairs(np.diff(bounds), window))))
    document = np.minimum(np.searchsorted(bounds, edges, side="right") - 1, len(bounds) - 2)
    return whole[document] + _pairs(edges - bounds[document], window)


def _pairs(rows: np.ndarray, window: int | None) -> np.ndarray:
    """Pairs of the first ``rows`` queries of a document: 1 + 2 + .., at most ``window`` each."""
    if window is None:
        return rows * (rows + 1) // 2
    ramp = np.minimum(rows, window)
    return ramp * (ramp + 1) // 2 + (rows - ramp) * window
