"""The memory and the work of a large run, from the corners that stand for it (``planner.reduced``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from longspan.planner.components import MESSAGES
from longspan.planner.memory import RankMemory, Traced, rank_memory
from longspan.planner.work import Work


def at(corners: Sequence[Sequence[float]], x: float, y: float) -> float:
    """The value at (x, y) of what is linear in each of two numbers, from its values at 0 and 1 of each.

    A dimension with one corner has one value.
    """
    low, high = corners[0], corners[-1]
    first = low[0] + y * (low[-1] - low[0])
    return first + x * (high[0] + y * (high[-1] - high[0]) - first)


def _each(corners: Sequence[Sequence[Mapping[Any, float]]], x: float, y: float) -> dict[Any, float]:
    """:func:`at` for each entry of dicts; an entry that is missing is 0."""
    names = dict.fromkeys(name for row in corners for one in row for name in one)
    return {name: at([[one.get(name, 0) for one in row] for row in corners], x, y) for name in names}


def memory_at(
    rank: int, corners: Sequence[Sequence[Traced]], repeats: float, in_flight: float, micro_batches: float
) -> RankMemory:
    """The memory of a rank so many steps away from the first corner.

    Activations are held for the micro-batches in flight, but the buffers of a pipeline's messages for all of a step.
    """
    names = set.intersection(*(set(one.parts) for row in corners for one in row))
    parts: list[dict[str, float]] = []
    for name in names:
        of_corners = [[one.parts[name] for one in row] for row in corners]
        part = _each(of_corners, repeats, in_flight)
        buffers = [[one.get(MESSAGES, 0) for one in row] for row in of_corners]
        parts.append(part | {MESSAGES: at(buffers, repeats, micro_batches)})
    return rank_memory(rank, parts, _each([[one.held for one in row] for row in corners], repeats, in_flight))


def work_at(corners: Sequence[Sequence[Traced]], repeats: float, micro_batches: float) -> Work:
    """The work of a rank ``repeats`` and ``micro_batches`` steps away from the first corner."""
    works = [[one.work for one in row] for row in corners]
    return Work(
        groups=works[0][0].groups,
        flops=_each([[one.flops for one in row] for row in works], repeats, micro_batches),
        moved=_each([[one.moved for one in row] for row in works], repeats, micro_batches),
        sent={
            name: (
                at([[one.sent.get(name, (0, 0))[0] for one in row] for row in works], repeats, micro_batches),
                at([[one.sent.get(name, (0, 0))[1] for one in row] for row in works], repeats, micro_batches),
            )
            for name in dict.fromkeys(name for row in works for one in row for name in one.sent)
        },
    )
