"""Several datasets mixed by weights.

Which member gives place t of the endless line of samples is looked up, as everything in
`loader` is: weights are fractions over a common denominator, so the deal repeats with that
period, and one period is a table. Place t is entry t % period; how many samples the member
has given before follows from t // period. So nothing is iterated to resume at any step,
and memory is a table of at most `PERIOD` entries, however long the run is.

The deal is the fairest there is: after any number of samples each member has given its
share to within one sample. (Megatron-LM's rule, "the largest deficit next", has the same
shares in the long run and lets a member fall behind by up to two samples on the way.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from heapq import heappop, heappush

import numpy as np

from longspan.data.loader import TokenDataset
from longspan.data.packing import Row, empty_row

PERIOD = 1 << 20
"""Longest period. Weights of a larger common denominator are rounded to parts of it."""


class BlendedDataset(TokenDataset):
    """The samples of several datasets, each as often as its weight says; the rest is as in `TokenDataset`.

    Each member goes through shuffled epochs of its own: it gives all of its samples before
    one comes again, and is repeated as its weight asks. An epoch of the blend is as many
    samples as the members have together.

    Args:
        members: of one sequence_len and one sample_packing.
        weights: above 0, one a member; only their ratios count.
        held_out: number the samples so that the first n of them are mixed by the weights too, each
            sample once (an evaluation takes them in order of number).
    """

    def __init__(
        self, members: Sequence[TokenDataset], weights: Sequence[Fraction | float], held_out: bool = False
    ):
        if not members or len(members) != len(weights):
            raise ValueError(f"{len(members)} members and {len(weights)} weights")
        self.members = list(members)
        self.sequence_len, self.sample_packing = members[0].sequence_len, members[0].sample_packing
        self.apart = members[0].apart
        self.seed, self.split = members[0].seed, members[0].split
        self.num_tokens = sum(member.num_tokens for member in members)
        self.masks = [mask for member in members for mask in member.masks]
        self.has_samples = any(member.has_samples for member in members)
        self.num_excess = sum(member.num_excess for member in members)
        self.counts = common_counts(weights)
        """Samples of each member in a period."""
        sizes = [len(member) for member in members]
        # First sample of each member in the common numbering.
        self._first = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        self._numbers = None
        if held_out:
            turns = [(np.arange(n) + 0.5) / count for n, count in zip(sizes, self.counts)]
            self._numbers = np.argsort(np.concatenate(turns), kind="stable")

    def __len__(self) -> int:
        return int(self._first[-1])

    def row(self, index: int | None) -> Row:
        if index is None or index == -1:
            return empty_row(self.sequence_len)
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        member, number = self._find(index)
        return member.row(number)

    def boundaries(self, index: int) -> list[int]:
        member, number = self._find(index)
        return member.boundaries(number)

    def sources(self, index: int) -> list[tuple[str, int, int, int]]:
        member, number = self._find(index)
        return member.sources(number)

    @property
    def num_learned(self) -> int:
        return sum(member.num_learned for member in self.members)

    @property
    def num_documents(self) -> int:
        return sum(member.num_documents for member in self.members)

    def has_targets(self, most: int) -> bool:
        return any(member.has_targets(most) for member in self.members)

    @property
    def longest_document(self) -> int:
        return max(member.longest_document for member in self.members)

    def global_batch(self, step: int, size: int) -> list[int]:
        givers, turns = self.deal(step * size, (step + 1) * size)
        samples = []
        for giver, turn in zip(givers.tolist(), turns.tolist()):
            member = self.members[giver]
            epoch, at = divmod(turn, len(member))
            samples.append(int(self._first[giver]) + int(member.order(epoch)[at]))
        return samples

    def deal(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """(member, how many samples it has given before) of places ``[start, stop)``, int64 each."""
        givers, turns = period(self.counts)
        round_, at = np.divmod(np.arange(start, stop, dtype=np.int64), len(givers))
        giver = givers[at].astype(np.int64)
        return giver, round_ * np.array(self.counts, dtype=np.int64)[giver] + turns[at]

    def _find(self, index: int) -> tuple[TokenDataset, int]:
        number = index if self._numbers is None else int(self._numbers[index])
        at = int(np.searchsorted(self._first, number, side="right")) - 1
        return self.members[at], number - int(self._first[at])


def common_counts(weights: Sequence[Fraction | float]) -> tuple[int, ...]:
    """Weights as whole numbers without a common divisor, which add up to at most `PERIOD`.

    Where that takes rounding, each number is right to one part in `PERIOD`, and at least 1.
    """
    parts = [w if isinstance(w, Fraction) else Fraction(str(w)) for w in weights]
    if min(parts) <= 0:
        raise ValueError(f"weights {list(map(float, parts))} must be above 0")
    scale = math.lcm(*(part.denominator for part in parts))
    counts = [int(part * scale) for part in parts]
    divisor = math.gcd(*counts)
    counts = [count // divisor for count in counts]
    total = sum(counts)
    if total <= PERIOD:
        return tuple(counts)
    # Largest remainders; those that would get nothing get one, from the largest.
    floors = [count * PERIOD // total for count in counts]
    left = sorted(range(len(counts)), key=lambda d: -(counts[d] * PERIOD % total))
    for d in left[: PERIOD - sum(floors)]:
        floors[d] += 1
    for d in range(len(floors)):
        if floors[d] == 0:
            floors[d] = 1
            floors[floors.index(max(floors))] -= 1
    return tuple(floors)


@lru_cache(maxsize=4)
def period(counts: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """One period of the deal: (member of each place, how many it gave before in this period), int32 each.

    Sample j of a member with share w may not come at a place where it would be more than one
    ahead of its share (before place (j - 1) / w), and must come before it is one behind (place
    j / w). Of those that may come, the one that must come soonest does: where any order keeps
    all these dates this one does, and there always is one (Tijdeman 1980).
    """
    length = sum(counts)
    givers = np.empty(length, dtype=np.int32)
    given = [0] * len(counts)
    waiting = [(1, d) for d in range(len(counts))]  # (first place, from 1, at which it may come, member)
    ready: list[tuple[int, int]] = []  # (last place at which it must, member)
    for place in range(1, length + 1):
        while waiting and waiting[0][0] <= place:
            d = heappop(waiting)[1]
            heappush(ready, (-(-(given[d] + 1) * length // counts[d]), d))
        d = heappop(ready)[1]
        givers[place - 1] = d
        given[d] += 1
        if given[d] < counts[d]:
            heappush(waiting, (given[d] * length // counts[d] + 1, d))
    order = np.argsort(givers, kind="stable")
    turns = np.empty(length, dtype=np.int32)
    turns[order] = np.arange(length) - np.repeat(np.cumsum(counts) - np.array(counts), counts)
    for table in (givers, turns):
        table.setflags(write=False)
    return givers, turns
