"""Sets of times as sorted, disjoint intervals: their union, difference, length. Pure Python."""

from __future__ import annotations

from collections.abc import Iterable

#: (start, stop) in microseconds; a set of times is a sorted list of disjoint intervals
Interval = tuple[float, float]


def union(intervals: Iterable[Interval], gap: float = 0.0) -> list[Interval]:
    """The set of times in any of the intervals.

    Args:
        gap: intervals that are at most so far apart are joined, which leaves fewer of them for a picture.
    """
    merged: list[Interval] = []
    for start, stop in sorted(intervals):
        if merged and start <= merged[-1][1] + gap:
            merged[-1] = merged[-1][0], max(merged[-1][1], stop)
        elif stop > start:
            merged.append((start, stop))
    return merged


def clip(intervals: Iterable[Interval], inside: Interval) -> list[Interval]:
    """The parts of the intervals that lie inside another one."""
    first, last = inside
    return [(max(a, first), min(b, last)) for a, b in intervals if a < last and b > first]


def length(times: Iterable[Interval]) -> float:
    """The length of a set of times."""
    return sum(stop - start for start, stop in times)


def difference(times: list[Interval], without: list[Interval]) -> list[Interval]:
    """The times of the first set that are not in the second; both are sorted and disjoint."""
    left: list[Interval] = []
    at = 0
    for start, stop in times:
        while at < len(without) and without[at][1] <= start:
            at += 1
        begin, other = start, at
        while other < len(without) and without[other][0] < stop:
            if without[other][0] > begin:
                left.append((begin, without[other][0]))
            begin = max(begin, without[other][1])
            other += 1
        if begin < stop:
            left.append((begin, stop))
    return left
