"""The page of ``longspan profile --html``: tables and pictures in one file, which needs neither network nor script."""

from __future__ import annotations

from html import escape
from typing import Any

from longspan import __version__
from longspan.cli.colours import colours_of
from longspan.cli.profile_tables import heading, mebibytes, milliseconds, tables

#: width of a picture and height of a lane, in pixels
WIDTH, LANE = 1000, 14
#: with more ranks than this, the timeline shows the first ones
RANKS = 64
#: the lane of computation has one colour on all pages
COMPUTE = {"compute": "#7F7F7F"}
STYLE = """\
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1100px; margin: 2em auto; padding: 0 1em }
h1 { font-size: 1.5em } h2 { font-size: 1.15em; margin-top: 2em }
table { border-collapse: collapse } th, td { padding: .2em .9em; text-align: right; border-bottom: 1px solid #ddd }
th:first-child, td:first-child { text-align: left } svg { width: 100%; height: auto; background: #fafafa }
.key { display: inline-block; margin-right: 1.2em } .key i { display: inline-block; width: .8em; height: .8em; margin-right: .3em }
"""


def page(result: dict[str, Any]) -> str:
    """The page as text.

    Args:
        result: the content of ``profile.json``.
    """
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8"><title>longspan profile</title>',
        f"<style>{STYLE}</style></head><body>",
        f"<h1>longspan profile</h1><p>{escape(heading(result))}</p>",
    ]
    for title, columns, rows in tables(result):
        parts.append(f"<h2>{escape(title)}</h2>{table(columns, rows)}")
        if title == "time of a step":
            parts.append(
                "<p>Exposed: exchanges are under way and the device does not compute. Idle: neither.</p>"
            )
    parts += [timeline(result), memory(result)]
    parts.append(f"<p>longspan {escape(__version__)}</p></body></html>")
    return "\n".join(parts) + "\n"


def table(columns: list[str], rows: list[list[str]]) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    lines = ("".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def keys(colours: dict[str, str]) -> str:
    """The legend of a picture."""
    found = (
        f'<span class="key"><i style="background:{c}"></i>{escape(n)}</span>' for n, c in colours.items()
    )
    return f"<p>{''.join(found)}</p>"


def timeline(result: dict[str, Any]) -> str:
    """The last step, rank under rank: a lane of computation, and one for each axis."""
    ranks = result["ranks"][:RANKS]
    names = ["compute", *sorted({lane for rank in ranks for lane in rank["lanes"] if lane != "compute"})]
    colours = colours_of(names, COMPUTE)
    longest = max(rank["steps"][-1]["step"] for rank in ranks)
    scale = (WIDTH - 90) / (1e3 * longest)
    drawn, y = [], 18.0
    for rank in ranks:
        drawn.append(f'<text x="0" y="{y + 11:g}" font-size="12">rank {rank["rank"]}</text>')
        for name in names:
            spans = rank["lanes"].get(name, [])
            path = "".join(
                f"M{80 + a * scale:.2f} {y:g}h{max(0.3, (b - a) * scale):.2f}v{LANE - 2}H{80 + a * scale:.2f}z"
                for a, b in spans
            )
            if path:
                drawn.append(f'<path d="{path}" fill="{colours[name]}"><title>{escape(name)}</title></path>')
            y += LANE
        y += 8
    drawn.append(f'<text x="{WIDTH}" y="12" font-size="12" text-anchor="end">{milliseconds(longest)}</text>')
    left = len(result["ranks"]) - len(ranks)
    more = f"<p>The first ranks; ranks left out: {left}.</p>" if left else ""
    return (
        f"<h2>the last step, by rank</h2>{keys(colours)}{more}"
        f'<svg viewBox="0 0 {WIDTH} {y:g}">{"".join(drawn)}</svg>'
    )


def memory(result: dict[str, Any]) -> str:
    """The memory of the busiest rank in the last step, a layer for each component."""
    rank = result["ranks"][result["memory"]["busiest_rank"]]
    found = rank["memory"]
    points = found["points"]
    colours = colours_of(list(points["components"]))
    highest, last = found["peak_bytes"] or 1, points["ms"][-1] or 1
    height = 320
    xs = [ms / last * WIDTH for ms in points["ms"]]
    below = [0] * len(xs)
    drawn = []
    for name, sizes in points["components"].items():
        above = [low + size for low, size in zip(below, sizes)]
        there = [f"{x:.2f} {18 + height * (1 - y / highest):.2f}" for x, y in zip(xs, above)]
        back = [f"{x:.2f} {18 + height * (1 - y / highest):.2f}" for x, y in zip(xs, below)][::-1]
        path = "M" + "L".join([*there, *back]) + "z"
        drawn.append(f'<path d="{path}" fill="{colours[name]}"><title>{escape(name)}</title></path>')
        below = above
    at = found["peak_ms"] / last * WIDTH
    anchor = "end" if at > WIDTH / 2 else "start"
    drawn.append(f'<path d="M{at:.2f} 14V{18 + height}" stroke="#222" stroke-dasharray="4 3"/>')
    drawn.append(
        f'<text x="{at:.2f}" y="11" font-size="12" text-anchor="{anchor}">peak {mebibytes(highest)} MiB</text>'
    )
    return (
        f"<h2>memory in the last step, rank {rank['rank']}</h2>{keys(colours)}"
        f'<svg viewBox="0 0 {WIDTH} {18 + height}">{"".join(drawn)}</svg>'
    )
