"""The picture of ``longspan layout --png``: the pack, the causal area, and the rows that ranks exchange.

Everything is drawn from spans, so the cost depends on the number of chunks, not of tokens.
"""

from __future__ import annotations

import bisect
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator

from longspan.cli.colours import EIGHT, INK, PALE
from longspan.context_parallel.costs import AlikeLayers, Costs
from longspan.context_parallel.layout import Segment, SequenceLayout
from longspan.files import write_whole

#: with more ranks than this, the ribbon has no numbers and the matrix no values
NUMBERED = 16
#: with more documents than this, no borders are drawn
BORDERS = 300
#: with more segments than this, a sample is drawn, because they would be thinner than the picture's points
STRIPS = 1000
LOOK = {
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": "#888888",
    "axes.labelcolor": INK,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.titlepad": 9,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
}


def draw(costs: Costs, layers: Sequence[AlikeLayers], result: dict, path: Path) -> None:
    """Writes the picture, whole or not at all.

    Args:
        layers: attention layers; without any, the picture shows only which rank holds which tokens.
        result: the content of ``longspan layout --json`` for the same layout.
    """
    with style.context(["default", LOOK]):
        figure = Figure(figsize=(12.5, 9 if layers else 2.6))
        documents, ranks = len(result["documents"]), result["ranks"]
        heading = (
            f"{result['layout']} layout: {result['tokens']:,} tokens in {documents:,} document{'s'[: documents - 1]} on "
            f"{ranks} rank{'s'[: ranks - 1]}"
        )
        if layers:
            ribbon(figure.add_axes((0.075, 0.755, 0.905, 0.11)), costs.layout)
            causal_area(figure.add_axes((0.075, 0.065, 0.43, 0.6)), costs, layers)
            traffic(figure.add_axes((0.575, 0.065, 0.415, 0.6), anchor="NW"), costs, layers)
            types = " and ".join(dict.fromkeys(layer.comm_type for layer in layers))
            figures = f"the busiest rank computes {result['imbalance']:.2f} x the mean"
            if ranks > 1:
                figures += f",  {result['of_ring']:.0%} of a plain ring's rows travel,  {types}"
            figure.text(0.012, 0.936, figures, fontsize=11, va="top")
        else:
            ribbon(figure.add_axes((0.075, 0.16, 0.905, 0.42)), costs.layout)
        if result["stream"] and layers:
            heading = f"attention's {heading}; the other layers' is {result['stream']['layout']}"
        figure.text(0.012, 0.975, heading, fontsize=15, fontweight="bold", va="top")
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=100)
    write_whole(path, picture.getvalue())


def colours(ranks: int) -> np.ndarray:
    """[P, 3] red, green, blue: a colour for each rank; more than eight ranks go from dark to light."""
    if ranks <= len(EIGHT):
        return np.array([matplotlib.colors.to_rgb(c) for c in EIGHT[:ranks]])
    return matplotlib.colormaps["viridis"](np.linspace(0, 1, ranks))[:, :3]


def ink_on(colour: np.ndarray) -> str:
    """Black or white, whichever is easier to read on a colour."""
    return INK if colour @ (0.299, 0.587, 0.114) > 0.55 else "white"


def short(value: float, longest: float = 100_000) -> str:
    """A number of rows or tokens as a short text."""
    return f"{value:,.0f}" if value < longest else f"{value / 1000:,.0f}k"


def token_axis(axis: Axis, total: int, ticks: int) -> None:
    """Puts a few token numbers along an axis."""
    axis.set_major_locator(MaxNLocator(ticks, integer=True))
    axis.set_major_formatter(
        FuncFormatter(lambda x, _: short(x) if total < 100_000 or x == 0 else f"{x / 1000:,g}k")
    )


def strips(layout: SequenceLayout) -> list[tuple[int, Segment]]:
    """The ranks' segments in the order of the pack; if there are many, those at evenly spaced tokens, as wide
    as the spacing."""
    found = sorted(
        ((rank, s) for rank in range(layout.ranks) for s in layout.segments(rank)), key=lambda x: x[1].start
    )
    if len(found) <= STRIPS:
        return found
    starts, space, sampled = [s.start for _, s in found], layout.total / STRIPS, []
    for i in range(STRIPS):
        rank, s = found[bisect.bisect_right(starts, (i + 0.5) * space) - 1]
        first, last = layout.cu_seqlens[s.document : s.document + 2]
        start, stop = max(first, round(i * space)), min(last, round((i + 1) * space))
        sampled.append((rank, s._replace(start=start, stop=stop)))
    return sampled


def ribbon(axes: Axes, layout: SequenceLayout) -> None:
    """Draws the pack from its first to its last token, coloured by rank, and the documents above it."""
    total, palette, bounds = layout.total, colours(layout.ranks), layout.cu_seqlens
    for rank, s in strips(layout):
        axes.broken_barh([(s.start, s.stop - s.start)], (0, 1), color=palette[rank], linewidth=0.3)
        if layout.ranks <= NUMBERED and s.stop - s.start > total * 0.011:
            look: dict[str, Any] = dict(ha="center", va="center", color=ink_on(palette[rank]), fontsize=9)
            axes.text((s.start + s.stop) / 2, 0.5, str(rank), **look)
    for start, stop in zip(bounds, bounds[1:]) if len(bounds) <= BORDERS else [(0, total)]:
        axes.broken_barh([(start, stop - start)], (1.12, 0.5), facecolor=PALE, edgecolor="white", linewidth=1)
        if stop - start > total * 0.032:
            axes.text((start + stop) / 2, 1.37, short(stop - start), ha="center", va="center", fontsize=9)
        for colour, width in (("white", 1.8), (INK, 0.7)):
            axes.plot([stop, stop], [0, 1.62], color=colour, linewidth=width, solid_capstyle="butt")
    axes.set(xlim=(0, total), ylim=(0, 1.64), yticks=(0.5, 1.37), yticklabels=("rank", "document"))
    token_axis(axes.xaxis, total, 9)
    axes.tick_params(axis="y", length=0)
    axes.set_title("who holds which tokens")
    for side in axes.spines.values():
        side.set_visible(False)


def causal_area(axes: Axes, costs: Costs, layers: Sequence[AlikeLayers]) -> None:
    """Draws each unmasked (query, key) pair in its rank's colour, and each rank's work in the free corner."""
    layout, together = costs.layout, min(layer.together for layer in layers)
    held, palette = layout, colours(layout.ranks)
    # The widest window is drawn first and palest, so that the pairs of all layers are dark.
    windows = {layer.window for layer in layers if layer.together == together}
    widest_first = sorted(windows, key=lambda w: w or layout.total, reverse=True)
    shades = np.linspace(0.35 if len(windows) > 1 else 1, 1, len(windows))
    label = "key (token)" if len(windows) == 1 else "key (token); pale: layers with a wider window"
    # The ranks of a group compute the same rows, with some heads each.
    if together > 1:
        held = layout.merged([range(r, r + together) for r in range(0, layout.ranks, together)])
        palette = palette[::together] if held.ranks > 1 else np.array([[0.7, 0.7, 0.7]])
        label += f"; a colour: {together} ranks with some heads each"
    whole = [(0, 0), (layout.total, layout.total), (0, layout.total)]
    # the pairs of one document without a window
    axes.add_collection(PolyCollection([whole], facecolor="#F5F5F5"))
    ranks, segments = zip(*strips(held))
    for window, shade in zip(widest_first, shades):
        shapes = [band(s, layout.cu_seqlens[s.document], window) for s in segments]
        colour = 1 - shade * (1 - palette[list(ranks)])
        # The outlines hide the gaps between shapes.
        axes.add_collection(PolyCollection(shapes, facecolors=colour, edgecolors=colour, linewidths=0.3))
    axes.set(
        xlim=(0, layout.total), ylim=(layout.total, 0), aspect="equal", xlabel=label, ylabel="query (token)"
    )
    for axis in (axes.xaxis, axes.yaxis):
        token_axis(axis, layout.total, 5)
    axes.set_title("who computes which (query, key) pairs")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    work(axes.inset_axes((0.63, 0.6, 0.37, 0.37)), costs)


def band(s: Segment, first: int, window: int | None) -> list[tuple[float, float]]:
    """The outline (key, query) of the pairs of a segment of queries; its document begins at ``first``."""
    far = first if window is None else max(first, s.start - window)
    near = first if window is None else max(first, s.stop - window)
    turn = s.start if window is None else min(max(first + window, s.start), s.stop)
    return [(far, s.start), (s.start, s.start), (s.stop, s.stop), (near, s.stop), (far, turn)]


def work(axes: Axes, costs: Costs) -> None:
    """Draws a bar for each rank, its pairs over the mean; it is the legend of the colours, too."""
    P, share = costs.layout.ranks, costs.pairs / costs.pairs.mean()
    axes.barh(np.arange(P), share, height=0.8 if P <= NUMBERED else 1, color=colours(P))
    axes.axvline(1, color=INK, linewidth=0.8)
    if P <= NUMBERED:
        for rank in range(P):
            axes.text(share.max() + 0.04, rank, f"{share[rank]:.2f} x", va="center", fontsize=9)
        axes.set_yticks(range(P), [f"rank {r}" for r in range(P)], fontsize=9)
    else:
        axes.set_yticks((0, P - 1), ("rank 0", f"rank {P - 1}"), fontsize=9)
    axes.set(ylim=(P - 0.5, -0.5), xlim=(0, share.max() * 1.3), xticks=())
    axes.set_title("work of a rank / mean", fontsize=10)
    axes.tick_params(axis="y", length=0)
    for side in ("top", "right", "bottom"):
        axes.spines[side].set_visible(False)


def traffic(axes: Axes, costs: Costs, layers: Sequence[AlikeLayers]) -> None:
    """Draws the matrix [users, owners] of the rows sent in a forward pass, with each rank's received sum."""
    P, wire = costs.layout.ranks, costs.wire
    shown = np.ma.masked_array(wire, np.eye(P, dtype=bool))
    colourmap = matplotlib.colormaps["Blues"].with_extremes(bad=PALE)
    axes.imshow(shown, cmap=colourmap, vmin=0, vmax=max(1.0, wire.max() * 1.15))
    # the ranks' colours along the matrix
    edge, strip = -0.5, 0.035 * P
    for rank, colour in enumerate(colours(P)):
        axes.add_patch(Rectangle((edge - 1.4 * strip, rank - 0.5), strip, 1, color=colour, linewidth=0))
        axes.add_patch(Rectangle((rank - 0.5, P + edge + 0.4 * strip), 1, strip, color=colour, linewidth=0))
    ticks = range(0, P, 1 if P <= NUMBERED else P // 8)
    axes.set(xticks=ticks, yticks=ticks)
    if P == 1:
        axes.text(0, 0, "nothing travels", ha="center", va="center")
    elif P <= NUMBERED:
        for line in np.arange(P + 1) - 0.5:
            axes.plot([line, line], [-0.5, P - 0.5], color="white", linewidth=1.5)
            axes.plot([-0.5, P - 0.5], [line, line], color="white", linewidth=1.5)
        size, longest = (10, 100_000) if P <= 6 else (9, 100_000) if P <= 8 else (7, 10_000)
        for user, owner in zip(*np.nonzero(wire)):
            dark = wire[user, owner] > 0.6 * wire.max()
            text = short(wire[user, owner], longest)
            axes.text(
                owner, user, text, ha="center", va="center", fontsize=size, color="white" if dark else INK
            )
        look: dict[str, Any] = dict(x=P - 0.5 + 0.17 * P, ha="right", va="center", fontsize=max(size, 8))
        for user in range(P):
            axes.text(y=user, s=short(wire[user].sum(), 1_000_000), **look)
        axes.text(y=-0.5 - 0.035 * P, s="in all", **look)
    axes.set(xlim=(-0.5 - 1.4 * strip, P - 0.5 + 0.18 * P), ylim=(P - 0.5 + 1.4 * strip, -0.5))
    axes.set(xlabel="sent by rank", ylabel="received by rank")
    what = (
        "rows of q, k, v and out, in key/value rows by size"
        if costs.head_rows
        else "key/value rows that travel"
    )
    summed = f", {sum(layer.count for layer in layers)} layers" if len(layers) > 1 else ""
    axes.set_title(what + summed)
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
