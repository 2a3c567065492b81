"""Puts the figures of all ranks and steps together: means over steps, and minimum, mean and maximum over ranks."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

#: figures of a rank's step, in seconds
FIGURES = ("step", "compute", "exposed", "hidden", "idle")
#: figures of an axis in a rank's step
OF_AXIS = ("seconds", "exposed", "hidden", "calls", "bytes")


def mean_of_steps(steps: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The mean of a rank's steps, with the same fields; an axis that a step has not used counts as 0 in it."""
    axes: dict[str, Any] = {}
    for name in sorted({name for step in steps for name in step["axes"]}):
        parts = [step["axes"].get(name, {}) for step in steps]
        operations = sorted({o for part in parts for o in part.get("operations", {})})
        axes[name] = {
            **{figure: statistics.fmean(part.get(figure, 0) for part in parts) for figure in OF_AXIS},
            "operations": {
                o: statistics.fmean(part.get("operations", {}).get(o, 0.0) for part in parts)
                for o in operations
            },
        }
    directions = sorted({d for step in steps for d in step["attention"]})
    return {
        **{figure: statistics.fmean(step[figure] for step in steps) for figure in FIGURES},
        "axes": axes,
        "attention": {
            d: statistics.fmean(step["attention"].get(d, 0.0) for step in steps) for d in directions
        },
        "attention_flops": statistics.fmean(step["attention_flops"] for step in steps),
    }


def over_ranks(values: Sequence[float]) -> dict[str, float]:
    """min, mean and max."""
    return {"min": min(values), "mean": statistics.fmean(values), "max": max(values)}


def efficiency(mean: dict[str, Any], tflop_per_s: float) -> tuple[float | None, float | None]:
    """(TFLOP/s inside attention's tiles, its share of the rate of matrix products); None without a tile."""
    inside = sum(mean["attention"].values())
    if not inside:
        return None, None
    rate = mean["attention_flops"] / inside / 1e12
    return rate, rate / tflop_per_s


def summarise(ranks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The part of the result that is about all ranks.

    Args:
        ranks: of each rank: mean (the result of :func:`mean_of_steps`), matmul_tflop_per_s, and memory.

    Returns:
        balance (figure -> min, mean, max over ranks), axes (axis -> figure -> the same), attention, memory.
    """
    means = [rank["mean"] for rank in ranks]
    names = sorted({name for mean in means for name in mean["axes"]})
    axes = {
        name: {
            figure: over_ranks([mean["axes"].get(name, {}).get(figure, 0.0) for mean in means])
            for figure in OF_AXIS
        }
        for name in names
    }
    attention = None
    found = [efficiency(rank["mean"], rank["matmul_tflop_per_s"]) for rank in ranks]
    rates = [(rate, share) for rate, share in found if rate is not None and share is not None]
    if rates:
        attention = {
            "tflop_per_s": over_ranks([rate for rate, _ in rates]),
            "share_of_matmul": over_ranks([share for _, share in rates]),
            "seconds": over_ranks([sum(mean["attention"].values()) for mean in means]),
            "flops": over_ranks([mean["attention_flops"] for mean in means]),
        }
    peaks = [rank["memory"]["peak_bytes"] for rank in ranks]
    return {
        "balance": {figure: over_ranks([mean[figure] for mean in means]) for figure in FIGURES},
        "axes": axes,
        "attention": attention,
        "matmul_tflop_per_s": over_ranks([rank["matmul_tflop_per_s"] for rank in ranks]),
        "memory": {"peak_bytes": over_ranks(peaks), "busiest_rank": peaks.index(max(peaks))},
    }
