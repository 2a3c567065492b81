"""Several datasets mixed by weights.

The endless line of samples assigns each place t to a member dataset. As everywhere in `loader`, the
member is looked up. Weights are fractions with a common denominator, so the order of members repeats
with this period, and a table holds one period. Place t is entry t % period. The number of samples
of this member before place t follows from t // period. So a resume at any step iterates over
nothing, and memory is a table of at most `PERIOD` entries for a run of any length.

No order is fairer: after any number of samples, each member's number of samples differs from
its share by less than one. (Megatron-LM's rule, to take the member with the largest deficit, has the
same shares in the long run, but in between a member may be up to two samples below its share.)
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
    """The samples of several datasets, mixed by weights; otherwise like `TokenDataset`.

    Each member has its own shuffled epochs: all its samples come once before a sample comes
    again, and epochs repeat as often as its weight requires. An epoch of the blend has as many
    samples as all members together.

    Args:
        members: datasets with the same sequence_len and the same sample_packing.
        weights: one number above 0 for each member; only their ratios count.
        held_out: number the samples so that the first n samples, for any n, are also mixed by the weights,
            each sample once (an evaluation takes samples in the order of their numbers).

    Raises:
        ValueError: there is no member, a weight is not above 0, or the numbers of members and weights differ.
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
        # The first sample of each member in the common numbering.
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
        """(member, number of its samples before) for places ``[start, stop)``, int64 each."""
        givers, turns = period(self.counts)
        round_, at = np.divmod(np.arange(start, stop, dtype=np.int64), len(givers))
        giver = givers[at].astype(np.int64)
        return giver, round_ * np.array(self.counts, dtype=np.int64)[giver] + turns[at]

    def _find(self, index: int) -> tuple[TokenDataset, int]:
        number = index if self._numbers is None else int(self._numbers[index])
        at = int(np.searchsorted(self._first, number, side="right")) - 1
        return self.members[at], number - int(self._first[at])


def common_counts(weights: Sequence[Fraction | float]) -> tuple[int, ...]:
    """The weights as whole numbers without a common divisor, with a sum of at most `PERIOD`.

    If this needs rounding, each number is right to one part in `PERIOD`, and at least 1.

    Raises:
        ValueError: a weight is not above 0.
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
    # Rounding by largest remainders; a member that would get 0 gets 1, taken from the largest.
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
    """One period: (member of each place, number of its samples before in this period), int32 each.

    Sample j of a member with share w must not come so early that the member is more than one sample
    above its share (before place (j - 1) / w), and must come before the member is one sample below it
    (place j / w). Of the samples that are allowed at a place, the sample with the earliest deadline comes.
    If any order keeps all deadlines, this order does, and there is always such an order (Tijdeman 1980).
    """
    length = sum(counts)
    givers = np.empty(length, dtype=np.int32)
    given = [0] * len(counts)
    # waiting: (first place, from 1, at which the member's next sample may come, member).
    # ready: (last place at which this sample must come, member).
    waiting = [(1, d) for d in range(len(counts))]
    ready: list[tuple[int, int]] = []
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
