"""The tables of ``longspan profile``, as text, for the terminal and for the page."""

from __future__ import annotations

from typing import Any


def tables(result: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """The tables of a profile: (heading, columns, rows of text). Every number is one of the result's, rounded."""
    found = [
        (
            "time of a step",
            ["", "min", "mean", "max"],
            [
                [WORDS[name], *(milliseconds(values[which]) for which in ("min", "mean", "max"))]
                for name, values in result["balance"].items()
            ],
        )
    ]
    if result["axes"]:
        rows = [
            [
                axis,
                *(milliseconds(of[figure]["mean"]) for figure in ("seconds", "exposed", "hidden")),
                milliseconds(of["exposed"]["max"]),
                f"{of['calls']['mean']:.1f}",
                mebibytes(of["bytes"]["mean"]),
            ]
            for axis, of in result["axes"].items()
        ]
        columns = ["axis", "exchanging", "exposed", "hidden", "exposed, max", "calls", "MiB"]
        found.append(("exchanges of a step by axis, means over ranks", columns, rows))
    found.append(("attention", ["", "min", "mean", "max"], attention_rows(result)))
    memory = result["ranks"][result["memory"]["busiest_rank"]]["memory"]
    peak = memory["peak_bytes"] or 1
    found.append(
        (
            f"the peak of memory, on rank {result['memory']['busiest_rank']}",
            ["component", "MiB", "share"],
            [[name, mebibytes(size), f"{size / peak:.1%}"] for name, size in memory["at_peak"].items()]
            + [["together", mebibytes(memory["peak_bytes"]), ""]],
        )
    )
    return found


#: a figure of a step -> how it is named
WORDS = {
    "step": "whole step",
    "compute": "compute",
    "exposed": "exchanges, exposed",
    "hidden": "exchanges, hidden",
    "idle": "idle",
}


def attention_rows(result: dict[str, Any]) -> list[list[str]]:
    """The rows about attention's tiles beside a product of matrices."""
    of, which = result["attention"], ("min", "mean", "max")
    product = ["matrix product, a rank", *(rate(result["matmul_tflop_per_s"][w]) for w in which)]
    if of is None:
        return [product]
    return [
        [f"tiles ({result['attention_kernel']}), a rank", *(rate(of["tflop_per_s"][w]) for w in which)],
        product,
        ["tiles / matrix product", *(f"{of['share_of_matmul'][w]:.1%}" for w in which)],
        ["time inside tiles", *(milliseconds(of["seconds"][w]) for w in which)],
    ]


def rate(tflop_per_s: float) -> str:
    return f"{tflop_per_s:.1f} TFLOP/s" if tflop_per_s >= 1 else f"{1e3 * tflop_per_s:.2f} GFLOP/s"


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.2f} ms"


def mebibytes(size: float) -> str:
    return f"{size / 2**20:,.2f}"


def heading(result: dict[str, Any]) -> str:
    plain = result["step_without_profiler"]
    more = "" if plain is None else f"; a step without the profiler took {milliseconds(plain)}"
    return (
        f"{result['layout']} processes on {result['device']}, {result['dtype']}: {result['steps']} steps after "
        f"{result['warmup']} of warm-up, {result['tokens_of_step']:,} tokens a step{more}"
    )
