"""Smaller runs in the place of a large one: fewer equal layers, shorter pipelines, fewer micro-batches.

What a step takes on a rank grows by the same amount with each further group of equal layers, and with each further
micro-batch in flight, at every place of the step. So a stage of n layers with K micro-batches in flight is known
from stages of few layers with two and three micro-batches in flight: each of these runs is a *corner*, and every number
of the large run lies on the plane through the corners.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from longspan.config.run import Run
from longspan.config.stages import Stage
from longspan.mesh.topology import RankGenerator

#: schedules with one stage a rank, whose micro-batches in flight follow from the place of the stage
_SIMPLE = ("1f1b", "gpipe")


@dataclass(frozen=True)
class Pattern:
    """A stage's layers as ``before``, then ``period`` layers again and again, then ``after``; in numbers of layers."""

    before: int
    period: int
    after: int

    @classmethod
    def of(cls, kinds: Sequence[Any]) -> Pattern | None:
        """The shortest pattern of a list of kinds of layers; None if nothing is repeated often enough to be left out."""
        n = len(kinds)
        found = [
            cls(before, period, after)
            for period in range(1, 9)
            for before in range(min(n, 9))
            for after in range(min(n - before, 9))
            if cls(before, period, after)._fits(kinds)
        ]
        return min(found, key=lambda one: one.layers(1), default=None)

    def _fits(self, kinds: Sequence[Any]) -> bool:
        body = kinds[self.before : len(kinds) - self.after]
        # More layers than the larger corner has
        return (
            len(body) % self.period == 0
            and len(body) // self.period > self.least + 1
            and all(one == body[index % self.period] for index, one in enumerate(body))
        )

    @property
    def least(self) -> int:
        """Repeats in the smaller corner: two layers from the bottom and two from the top, because each works beside its
        neighbour, whose weights are gathered ahead."""
        return -(-4 // self.period)

    def layers(self, more: int) -> int:
        """Layers of a corner: of the smaller one (``more`` 0) or the larger one (1)."""
        return self.before + (self.least + more) * self.period + self.after

    def taken(self, layers: Sequence[int], more: int) -> tuple[int, ...]:
        """The numbers of the layers of a corner, out of those of the stage."""
        front = self.before + (self.least + more) * self.period
        return tuple([*layers[:front], *layers[len(layers) - self.after :]])

    @property
    def from_bottom(self) -> int:
        """So many layers of a corner are named by their place from the bottom, the others from the top."""
        return self.before + -(-self.least * self.period // 2)

    def repeats(self, n: int) -> float:
        """Where a stage of n layers lies between the corners: 0 is the smaller one, 1 the larger one."""
        return (n - self.layers(0)) / self.period


@dataclass(frozen=True)
class Corner:
    """A run that is traced.

    Attributes:
        run: with the layers of this corner as the stage of ``rank``.
        rank: of its world.
        from_bottom: see :class:`Pattern`.
    """

    run: Run
    rank: int
    from_bottom: int


@dataclass(frozen=True)
class Reduced:
    """What stands for one or more stages of a run.

    Attributes:
        corners: ``corners[i][j]``; i counts layers, j micro-batches; one of a dimension that is not reduced.
        stages: (stage, repeats, in flight, micro-batches): the pipeline rank, and where it lies between the corners.
    """

    corners: tuple[tuple[Corner, ...], ...]
    stages: tuple[tuple[int, float, float, float], ...]


def rank_of(run: Run, stage: int) -> int:
    """The first rank of a pipeline rank."""
    sizes = run.sizes
    return list(RankGenerator(sizes.tp, 1, sizes.dp, sizes.pp, sizes.cp, sizes.order).get_ranks("pp")[0])[
        stage
    ]


def reduced(run: Run) -> list[Reduced]:
    """The smaller runs that stand for all pipeline ranks of a run."""
    pp, count = run.sizes.pp, run.batch.accumulation
    schedule = run.config.pipeline_schedule or "1f1b"
    if pp > 1 and (schedule not in _SIMPLE or len(run.stages) != pp):
        # Every order of several stages a rank is its own: the ranks are traced with the micro-batches of two rounds.
        few = min(count, 2 * pp)
        at = 0.0 if few == count else count - few
        return [
            Reduced(((Corner(_with_batches(run, few), rank_of(run, stage), 0),),), ((stage, 0.0, 0.0, at),))
            for stage in range(pp)
        ]
    kinds = {layer.number: dataclasses.replace(layer, number=0) for layer in run.layers}
    families: dict[tuple, list[int]] = {}
    for stage in range(pp):
        own = run.stages[stage]
        pattern = Pattern.of([kinds[number] for number in own.layers])
        same = tuple(kinds[n] for n in (own.layers if pattern is None else pattern.taken(own.layers, 1)))
        flights = in_flight(run, stage)
        key = (own.first, own.last, pattern, same, flights == 1, count > flights)
        families.setdefault(key, []).append(stage)
    return [_family(run, stages, pattern) for (_, _, pattern, *_), stages in families.items()]


def in_flight(run: Run, stage: int) -> int:
    """Micro-batches whose activations a stage holds at most, with one stage a rank."""
    count, pp = run.batch.accumulation, run.sizes.pp
    if pp == 1:
        return 1
    return count if run.config.pipeline_schedule == "gpipe" else min(count, pp - stage)


def _family(run: Run, stages: list[int], pattern: Pattern | None) -> Reduced:
    """The corners of stages that differ only in equal layers and in micro-batches in flight."""
    count, flights = run.batch.accumulation, in_flight(run, stages[0])
    if flights == 1:
        pairs = [(1, count)] if count <= 3 else [(1, 2), (1, 3)]
    else:
        steady = count > flights
        pairs = [(2, 2 + steady), (3, 3 + steady)]
    first = run.stages[stages[0]]
    corners = tuple(
        tuple(_corner(run, first, pattern, more, flight, batches) for flight, batches in pairs)
        for more in ((0,) if pattern is None else (0, 1))
    )
    places = tuple(
        (
            stage,
            0.0 if pattern is None else pattern.repeats(len(run.stages[stage].layers)),
            float(in_flight(run, stage) - pairs[0][0]),
            float(count - pairs[0][1]),
        )
        for stage in stages
    )
    return Reduced(corners, places)


def _corner(run: Run, stage: Stage, pattern: Pattern | None, more: int, flight: int, batches: int) -> Corner:
    layers = stage.layers if pattern is None else pattern.taken(stage.layers, more)
    small = _with_batches(run, batches)
    if run.sizes.pp == 1:
        return Corner(
            dataclasses.replace(small, stages=(dataclasses.replace(stage, layers=layers),)),
            0,
            0 if pattern is None else pattern.from_bottom,
        )
    # A stage behind the first one has one micro-batch fewer in flight than stages from it on, so it is stage 1.
    index = 0 if stage.first else 1
    ranks = max(2, flight) if stage.first else 2 if stage.last else 1 + max(2, flight)
    small = dataclasses.replace(small, sizes=dataclasses.replace(small.sizes, pp=ranks))
    held = [Stage(i, (), i == 0, i == ranks - 1) for i in range(ranks)]
    held[index] = dataclasses.replace(stage, index=index, layers=layers)
    small = dataclasses.replace(small, stages=tuple(held))
    return Corner(small, rank_of(small, index), 0 if pattern is None else pattern.from_bottom)


def _with_batches(run: Run, count: int) -> Run:
    """The run with so many micro-batches a step; stages stay."""
    config = run.config
    batch = dataclasses.replace(
        run.batch, accumulation=count, global_size=run.batch.global_size // run.batch.accumulation * count
    )
    config = config.model_copy(
        update={"gradient_accumulation_steps": count, "global_batch_size": batch.global_size}
    )
    return dataclasses.replace(run, config=config, batch=batch)
