"""Which layers a pipeline stage has, and which rank holds a stage. Integers only.

A model of n layers is cut into ``pp x virtual`` stages, numbered from 0. The embedding is in the first one, the final
norm and the output layer in the last. With a loop, rank i of p holds the stages i, p + i, 2p + i, ..; with the two
stages a rank of ``zbv``, i and 2p - 1 - i, so that both ends of the model lie on the first rank.

A layout written out (Megatron-LM's ``--pipeline-model-parallel-layout``):

    E embedding    t a layer    L output and loss    | the next stage    x*n, (..)*n repeats    commas mean nothing
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

#: the schedules, and whether they take several stages a rank
SCHEDULES = {"gpipe": False, "1f1b": False, "interleaved": True, "interleaved_zero_bubble": True, "zbv": True}
#: the schedules that compute the gradients of weights later than those of activations
SPLIT_BACKWARD = ("interleaved_zero_bubble", "zbv")


@dataclass(frozen=True)
class Stage:
    """A stage of a pipeline.

    Attributes:
        index: from 0.
        layers: numbers of its layers in the whole model, from 1; a stage may have none.
        first, last: whether it has the embedding, and the final norm and the output layer.
    """

    index: int
    layers: tuple[int, ...]
    first: bool
    last: bool


def stages_of_sizes(sizes: Sequence[int]) -> list[Stage]:
    """Stages with so many layers each."""
    found, at = [], 0
    for index, size in enumerate(sizes):
        layers = tuple(range(at + 1, at + size + 1))
        found.append(Stage(index, layers, index == 0, index == len(sizes) - 1))
        at += size
    return found


def split_by_cost(costs: Sequence[float], stages: int, before: float = 0.0, after: float = 0.0) -> list[int]:
    """Layers of each stage, so that the dearest stage is as cheap as possible.

    Args:
        costs: of each layer.
        before, after: of the embedding and of the output, which are in the first and in the last stage.

    Returns:
        The sizes. Among equally good splits it is the one whose earlier stages are as cheap as possible too.
    """
    n = len(costs)
    sums = [0.0]
    for cost in costs:
        sums.append(sums[-1] + cost)

    def cost_of(start: int, stop: int, index: int) -> float:
        ends = (before if index == 0 else 0.0) + (after if index == stages - 1 else 0.0)
        return sums[stop] - sums[start] + ends

    # best[k][i]: the dearest stage when the first i layers are in the first k stages
    best = [[float("inf")] * (n + 1) for _ in range(stages + 1)]
    cut = [[0] * (n + 1) for _ in range(stages + 1)]
    best[0][0] = 0.0
    for k in range(1, stages + 1):
        for i in range(n + 1):
            for j in range(i + 1):
                value = max(best[k - 1][j], cost_of(j, i, k - 1))
                if value < best[k][i]:
                    best[k][i], cut[k][i] = value, j
    sizes, i = [], n
    for k in range(stages, 0, -1):
        sizes.append(i - cut[k][i])
        i = cut[k][i]
    return sizes[::-1]


def rank_of_stage(index: int, pp: int, schedule: str) -> int:
    """The pipeline rank that holds a stage."""
    turn, place = divmod(index, pp)
    return pp - 1 - place if schedule == "zbv" and turn % 2 else place


class LayoutError(ValueError):
    """A written layout that is none; the message has what was found and the rule."""


def parse_layout(text: str, num_layers: int, pp: int) -> list[int]:
    """A written layout -> the layers of each stage.

    Raises:
        LayoutError: it cannot be read, or does not fit the model or the ranks.
    """
    flat = _expand(re.sub(r"[,\s]", "", text))
    if "m" in flat:
        raise LayoutError("m stands for multi-token prediction, which is not supported. Leave it out.")
    if wrong := sorted(set(flat) - set("EtL|")):
        raise LayoutError(
            f"{wrong[0]!r} is none of E (embedding), t (a layer), L (output and loss), |, *, ( and )."
        )
    stages = flat.split("|")
    if stages[0].find("E") != 0 or flat.count("E") != 1:
        raise LayoutError("there is one E (embedding), and it comes first.")
    if not stages[-1].endswith("L") or flat.count("L") != 1:
        raise LayoutError("there is one L (output and loss), and it comes last.")
    if flat.count("t") != num_layers:
        raise LayoutError(
            f"it has {flat.count('t')} layers (t), and num_layers is {num_layers}. Give each layer once."
        )
    if len(stages) % pp:
        raise LayoutError(
            f"it has {len(stages)} stages, which do not divide by pipeline_parallel_size {pp}: every rank holds equally many. "
            "A stage may be empty (||)."
        )
    return [stage.count("t") for stage in stages]


def _expand(text: str) -> str:
    """Repeats written out: ``t*3`` and ``(tt|)*2``."""
    found, at = _group(text, 0, nested=False)
    assert at == len(text)
    return found


def _group(text: str, at: int, nested: bool) -> tuple[str, int]:
    found = ""
    while at < len(text):
        if text[at] == ")":
            if not nested:
                raise LayoutError("a ) without its (.")
            return found, at + 1
        if text[at] == "(":
            part, at = _group(text, at + 1, nested=True)
        else:
            part, at = text[at], at + 1
        if at < len(text) and text[at] == "*":
            digits = re.match(r"\d+", text[at + 1 :])
            if part == "*" or digits is None:
                raise LayoutError(
                    f"after {text[:at]!r} comes a * without a number, or without what it repeats."
                )
            part, at = part * int(digits[0]), at + 1 + len(digits[0])
        found += part
    if nested:
        raise LayoutError("a ( without its ).")
    return found, at


def pipeline_line(stages: Sequence[Stage], pp: int, schedule: str, micro_batches: int) -> str:
    """The stages of a pipeline, and how long its ranks wait, in one line for the banner."""
    texts = [
        f"{s.layers[0]}-{s.layers[-1]}" if len(s.layers) > 1 else "".join(map(str, s.layers)) or "none"
        for s in stages
    ]
    virtual = len(stages) // pp
    line = (
        f"{schedule}, {virtual} stage{'s' * (virtual > 1)} on each of {pp} ranks; layers {' | '.join(texts)}"
    )
    if schedule in SPLIT_BACKWARD:
        return f"{line}; {micro_batches} micro-batches a step"
    waiting = (pp - 1) / (micro_batches * virtual + pp - 1)
    return (
        f"{line}; of {micro_batches} micro-batches a step ranks wait {waiting:.0%} of the time (the bubble)"
    )
