"""The pictures of ``longspan profile --png``: the timeline of a step, the memory stack, and who attends to what."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from longspan.cli.colours import INK, colours_of
from longspan.cli.layout import figures_of
from longspan.cli.layout_picture import LOOK
from longspan.cli.layout_picture import draw as draw_layout
from longspan.cli.profile_page import COMPUTE, RANKS
from longspan.config.run import Run
from longspan.files import write_whole


def draw(run: Run, result: dict[str, Any], folder: Path) -> list[Path]:
    """Writes the pictures into a folder, and returns their paths.

    Args:
        result: the content of ``profile.json``.
    """
    paths = [folder / f"{name}.png" for name in ("timeline", "memory", "attention")]
    lanes = sum(len(rank["lanes"]) for rank in result["ranks"][:RANKS])
    _write(paths[0], 1.5 + 0.22 * lanes, timeline, result)
    _write(paths[1], 5.5, memory, result)
    layers, costs, layout = figures_of(run, result["documents"])
    draw_layout(costs, layers, layout, paths[2])
    return paths


def _write(path: Path, height: float, draw_on: Callable[[Axes, dict[str, Any]], None], result: dict) -> None:
    with style.context(["default", LOOK]):
        figure = Figure(figsize=(12.5, height), layout="constrained")
        draw_on(figure.add_subplot(), result)
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=100)
    write_whole(path, picture.getvalue())


def timeline(axes: Axes, result: dict[str, Any]) -> None:
    """Draws the last step, rank under rank: a lane of computation, and one for each axis."""
    ranks = result["ranks"][:RANKS]
    names = ["compute", *sorted({lane for rank in ranks for lane in rank["lanes"] if lane != "compute"})]
    colours = colours_of(names, COMPUTE)
    place, ticks = 0.0, []
    for rank in ranks:
        ticks.append(place)
        for name in (name for name in names if name in rank["lanes"]):
            spans = [(a, b - a) for a, b in rank["lanes"][name]]
            axes.broken_barh(spans, (place - 0.4, 0.8), color=colours[name], linewidth=0)
            place += 1
        place += 0.6
    longest = 1e3 * max(rank["steps"][-1]["step"] for rank in ranks)
    axes.set(ylim=(place, -1), xlim=(0, longest), xlabel="ms since the step began")
    axes.set_yticks(ticks, [f"rank {rank['rank']}" for rank in ranks])
    axes.set_title(f"the last step: {result['layout']} processes on {result['device']}")
    for name in names:
        axes.plot([], [], color=colours[name], linewidth=6, label=name)
    _finish(axes, len(names))


def memory(axes: Axes, result: dict[str, Any]) -> None:
    """Draws the memory of the busiest rank in the last step, a layer for each component."""
    rank = result["ranks"][result["memory"]["busiest_rank"]]
    found = rank["memory"]
    components = found["points"]["components"]
    colours = colours_of(list(components))
    sizes = [[size / 2**20 for size in part] for part in components.values()]
    look: dict[str, Any] = dict(labels=list(components), colors=list(colours.values()), linewidth=0)
    axes.stackplot(found["points"]["ms"], sizes, step="post", **look)
    axes.axvline(found["peak_ms"], color=INK, linewidth=0.8, linestyle="--")
    axes.set(xlim=(0, found["points"]["ms"][-1]), xlabel="ms since the step began", ylabel="MiB")
    axes.set_title(f"memory of rank {rank['rank']}: at most {found['peak_bytes'] / 2**20:,.2f} MiB")
    _finish(axes, 4)


def _finish(axes: Axes, columns: int) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.figure.legend(ncols=min(columns, 6), loc="outside lower center", frameon=False)
