"""``longspan layout``: shows for one pack what each rank holds and computes, and what the ranks exchange.

No processes are started and no attention is computed. All numbers follow from the layout's integers, so a
laptop can show the layout of 512 GPUs.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from longspan.cli import layout_recurrent
from longspan.cli.options import key_help, number, read_config, read_picture, take_options
from longspan.config.data import keeps_documents_apart
from longspan.config.resolve import resolve
from longspan.config.run import Checked
from longspan.data.checks import missing_sources
from longspan.errors import UserError
from longspan.runs.prepare import prepare_data
from longspan.training.schedule import training_steps

if TYPE_CHECKING:
    from rich.console import JustifyMethod
    from rich.table import Table

    from longspan.context_parallel.costs import AlikeLayers, Costs
    from longspan.context_parallel.layout import SequenceLayout

USAGE = f"""\
usage: longspan layout CONFIG [--any-key value] [--lengths N,N,...] [--step N] [--window W] [--png FILE] [--json]

Shows for one pack of documents which tokens each rank of the context parallel group holds, what it
computes and what it receives in a forward pass, and the same figures for the other layouts. Needs no
GPU, no weights and, with --lengths, no data.
  --lengths N,N,...  tokens of each document. Without it: the documents of the config's first micro-batch,
                     tokenised as for training; one document where sample_packing is off
  --step N           take the documents of training step N, from 0 (default 0)
  --window W         short for --sliding-window W
  --num-processes N  processes to check the parallel sizes against
  --png FILE         draw it (pip install 'longspan[plot]')
  --json             print one JSON object:
      layout, asked, why        the layout, what the config asks for, and why auto takes it
      key                       the config's key for it: cp_layout, or attention_cp_layout
      tokens, padding, documents, sequence_len, ranks, rows (of a rank, padding included)
      layers                    [{{comm_type, window, together, count}}]: attention layers that are alike; together: ranks
                                that move heads among themselves. All figures are summed over the layers listed here;
                                where all are alike it is one layer
      imbalance, of_ring        busiest rank's work / mean; what travels / what a plain ring would move
      received_rows, ring_rows  key/value rows, summed over the ranks
      head_rows                 rows of q, k, v and out each that every rank sends (and receives) to move heads
      per_rank                  [{{rank, spans, padding, pairs, share, received_rows, sent_rows, of_ring, hears_from,
                                steps}}]: spans are [start, stop), from tokens on padding; share: pairs / mean
      layouts                   [{{layout, padding, imbalance, received_rows, most_received_rows, of_ring}}] of all
      notes                     remarks; png: the picture's path
{layout_recurrent.USAGE}"""

OPTIONS = {
    "--lengths": True,
    "--step": True,
    "--window": True,
    "--num-processes": True,
    "--png": True,
    "--json": False,
}
#: most tokens of a pack: with more tokens, sums of pairs over layers do not fit into 64 bits
MOST_TOKENS = 1 << 28
#: the most spans and the most ranks that a line of the table names
NAMED_SPANS, NAMED_RANKS = 3, 8

WHY = {
    "balanced": "runs of equal length would be uneven: chunks are dealt out so that work is even and few rows travel",
    "zigzag": "one document: each rank takes an early chunk, with little work, and a late one with much",
    "contiguous": "runs of equal length are even already, and only neighbours talk",
}
WHY_RECURRENT = "recurrent layers hand a state from token to token, so a rank holds one run"


def run(arguments: Sequence[str]) -> int:
    if "--help" in arguments or "-h" in arguments:
        print(USAGE)
        print(key_help())
        return 0
    resolved, lengths, picture, as_json = read(arguments)
    layers, costs, result = figures_of(resolved, lengths)
    if picture is not None:
        from longspan.cli.layout_picture import draw

        draw(costs, layers, result, picture)
        result["png"] = str(picture)
    if as_json:
        print(json.dumps(result, indent=2))
    else:
        report(result, layers)
    return 0


def figures_of(resolved: Checked, lengths: list[int]) -> tuple[list[AlikeLayers], Costs, dict]:
    """(attention layers, the costs of the layout that the run takes, the content of ``--json``) of a pack.

    Args:
        lengths: tokens of each document.
    """
    from longspan.context_parallel.costs import Costs
    from longspan.context_parallel.layout import LAYOUTS

    layers, model = alike_layers(resolved, max(lengths)), resolved.model
    n, m = (count // resolved.sizes.tp for count in (model.num_attention_heads, model.num_query_groups))
    names = LAYOUTS if layers else ("contiguous",)
    stream = make_stream(resolved, lengths) if model.recurrent else None
    costs = {name: Costs.of(make_layout(resolved, lengths, name, stream), layers, n, m) for name in names}
    result = describe(resolved, lengths, layers, costs, stream)
    return layers, costs[result["layout"]], result


# --- reading the arguments ---------------------------------------------------------------------


def read(arguments: Sequence[str]) -> tuple[Checked, list[int], Path | None, bool]:
    """Reads the command's arguments.

    Returns:
        (the run, the tokens of each document, the path of the picture or None, whether to print JSON).

    Raises:
        UserError: with all problems at once.
    """
    taken, rest, problems = take_options(arguments, OPTIONS)
    world = number(taken, "--num-processes", problems)
    step = number(taken, "--step", problems, least=0)
    lengths = read_lengths(taken["--lengths"], problems) if "--lengths" in taken else None
    picture = read_picture(taken["--png"], problems) if "--png" in taken else None
    if "--window" in taken:
        rest.append(f"--sliding-window={taken['--window']}")
    reading = read_config("layout", rest, list(OPTIONS), problems)
    config, problems, bad = reading.config, reading.problems, reading.bad
    assert config is not None
    if "--step" in taken and "--lengths" in taken:
        problems.append("--step takes the documents from the data, --lengths gives them. Keep one.")
    elif "--step" in taken and not keeps_documents_apart(config):
        problems.append(
            "--step with sample_packing: false: every sequence is one document. Leave --step out."
        )
    if "--lengths" in taken or not keeps_documents_apart(config):
        # The datasets are not read, so they may be missing.
        bad.add("datasets")
    elif "datasets" not in bad:
        problems += [f"{text} Or give --lengths, which needs no data." for text in missing_sources(config)]
    run = resolve(config, world, bad_keys=bad, earlier=problems)
    if lengths is None:
        lengths = lengths_of_step(run, step or 0) if keeps_documents_apart(config) else [config.sequence_len]
    if sum(lengths) > MOST_TOKENS:
        raise UserError(f"a pack of {sum(lengths):,} tokens: at most {MOST_TOKENS:,}. Give fewer tokens.")
    return run, lengths, picture, "--json" in taken


def read_lengths(text: str, problems: list[str]) -> list[int] | None:
    """The tokens of each document; for a wrong list, None and a message in ``problems``."""
    parts = [part.strip() for part in text.split(",")]
    for place, part in enumerate(parts, 1):
        if not re.fullmatch("[1-9][0-9]{0,17}", part):
            problems.append(
                f"--lengths: document {place} has {part!r} tokens: a whole number from 1 on. Give the documents with commas "
                "and no spaces between them, e.g. --lengths 1886,83,811."
            )
            return None
    return [int(part) for part in parts]


def lengths_of_step(run: Checked, step: int) -> list[int]:
    """The tokens of each document in the first data parallel rank's first micro-batch of a training step."""
    from longspan.data import make_batch
    from longspan.data.splits import open_datasets

    prepared = prepare_data(run, show=True)
    data, *_ = open_datasets(prepared)
    if step >= (steps := training_steps(prepared, len(data))):
        raise UserError(f"--step {step}: the config trains {steps} steps, so it is from 0 to {steps - 1}.")
    samples = data.global_batch(step, run.batch.global_size)[: run.batch.micro]
    pack = make_batch([data.row(i) for i in samples], apart=True)
    assert pack.cu_seqlens is not None
    return pack.cu_seqlens.diff().tolist()


def make_stream(run: Checked, lengths: Sequence[int], name: str | None = None) -> SequenceLayout:
    """The layout that training makes for a pack of documents.

    Args:
        lengths: tokens of each document.
        name: as for ``run_layout``.
    """
    from longspan.context_parallel.run_layout import run_layout

    return run_layout(run, sum(lengths), [0, *itertools.accumulate(lengths)], name)


def make_layout(
    run: Checked, lengths: Sequence[int], name: str, stream: SequenceLayout | None
) -> SequenceLayout:
    """The layout on which attention works.

    Args:
        lengths: tokens of each document.
        name: ``auto`` or one of ``LAYOUTS``.
        stream: the layout of a model with recurrent layers; None if attention's layout is that of all layers.
    """
    from longspan.context_parallel.two_layouts import attention_layout

    if stream is None:
        return make_stream(run, lengths, name)
    return attention_layout(run.transformer_config(), stream, name)


def alike_layers(run: Checked, longest: int) -> list[AlikeLayers]:
    """The attention layers, grouped by their costs; if all are alike, one layer with the count 1.

    Args:
        longest: tokens of the longest document; a window that is not shorter has no effect and is left out.
    """
    from longspan.context_parallel.costs import AlikeLayers

    found: Counter[tuple] = Counter()
    for layer in run.attention_layers:
        window = layer.window if layer.window is not None and layer.window < longest else None
        found[layer.comm_type, window, run.head_group(layer)] += 1
    return [
        AlikeLayers(comm_type, window, together, count=count if len(found) > 1 else 1)
        for (comm_type, window, together), count in found.items()
    ]


# --- the result ---------------------------------------------------------------------------------


def describe(
    run: Checked,
    lengths: list[int],
    layers: list[AlikeLayers],
    costs: dict[str, Costs],
    stream: SequenceLayout | None,
) -> dict:
    """The content of ``--json``.

    Args:
        stream: as for :func:`make_layout`.
    """
    key = "cp_layout" if stream is None or not layers else "attention_cp_layout"
    asked, total, ranks = getattr(run.config, key), sum(lengths), run.sizes.cp
    name = make_layout(run, lengths, asked, stream).name
    mine = costs[name]
    layout, mean = mine.layout, mine.pairs.mean()
    why = WHY.get(name, "") if layers else WHY_RECURRENT
    if ranks == 1:
        why = "one rank holds everything"
    return {
        "layout": name,
        "key": key,
        "asked": asked,
        "why": why if asked == "auto" else "",
        "tokens": total,
        "padding": layout.padded_total - total,
        "documents": lengths,
        "sequence_len": run.config.sequence_len,
        "ranks": ranks,
        "rows": layout.local_length,
        "layers": [dataclasses.asdict(layer) for layer in layers],
        "imbalance": round(mine.imbalance, 4) if layers else None,
        "of_ring": round(mine.of_ring, 4) if layers else None,
        "received_rows": exact(mine.keys.sum()),
        "ring_rows": mine.ring,
        "head_rows": exact(mine.head_rows),
        "per_rank": [
            {
                "rank": r,
                "spans": layout.spans(r),
                "padding": mine.padding(r),
                "pairs": exact(mine.pairs[r]),
                "share": round(float(mine.pairs[r] / mean), 4) if layers else None,
                "received_rows": exact(mine.keys[r].sum()),
                "sent_rows": exact(mine.keys[:, r].sum()),
                "of_ring": round(float(mine.rank_of_ring[r]), 4),
                "hears_from": mine.wire[r].nonzero()[0].tolist(),
                "steps": int(mine.steps[r]),
            }
            for r in range(ranks)
        ],
        "layouts": [
            {
                "layout": other,
                "padding": c.layout.padded_total - total,
                "imbalance": round(c.imbalance, 4),
                "received_rows": exact(c.keys.sum()),
                "most_received_rows": exact(c.keys.sum(1).max()),
                "of_ring": round(c.of_ring, 4),
            }
            for other, c in (costs.items() if layers else ())
        ],
        "notes": [*notes(run, lengths, layers, mine), *(better(name, key, costs) if layers else ())],
        "stream": None if stream is None else layout_recurrent.stream_of(stream),
        "moved_rows": None if stream is None else layout_recurrent.moved_rows(stream, layout),
        "recurrent": [] if stream is None else layout_recurrent.recurrent_kinds(run, stream),
    }


def exact(value: float) -> int | float:
    """A whole number as an int; if heads move, there are also parts of rows and pairs, as floats."""
    return int(value) if value == int(value) else round(float(value), 2)


def notes(run: Checked, lengths: list[int], layers: list[AlikeLayers], costs: Costs) -> list[str]:
    """Remarks that a reader needs to understand the numbers."""
    config, found = run.config, []
    if config.hybrid_context_parallel:
        found.append(
            "hybrid_context_parallel is on: training deals the documents of a whole step out over all ranks of dp x cp"
        )
    rows = run.batch.micro if keeps_documents_apart(config) else 1
    if sum(lengths) != rows * config.sequence_len:
        text = f"{rows} x {config.sequence_len:,}" if rows > 1 else f"{config.sequence_len:,}"
        found.append(f"the pack has {sum(lengths):,} tokens; the config trains on {text} (sequence_len)")
    if len(lengths) > 1 and not keeps_documents_apart(config):
        found.append("sample_packing is off: in training these documents are one stream and see each other")
    if any(w is not None and w >= max(lengths) for w in run.windows):
        found.append("a sliding window that no document is longer than is left out: it changes nothing")
    if len(layers) > 1:
        kinds = ", ".join(f"{layer.count} x {kind_text(layer)}" for layer in layers)
        found.append(f"figures are summed over the layers: {kinds}")
    if costs.head_rows:
        whole = all(layer.together == run.sizes.cp for layer in layers)
        found.append(
            f"heads move: every rank sends, and receives, {costs.head_rows:,.0f} rows of q, k, v and out each"
            + (", and computes its heads of the whole pack, at every layout alike" if whole else "")
        )
    return found


def better(name: str, key: str, costs: dict[str, Costs]) -> list[str]:
    """A remark for each layout that is not worse in balance and communication, and better by 0.02 in one."""
    mine, found = costs[name], []
    for other, c in costs.items():
        even, less = mine.imbalance - c.imbalance, mine.of_ring - c.of_ring
        if min(even, less) >= 0 and max(even, less) > 0.02:
            figures = f"busiest / mean {c.imbalance:.2f}, {c.of_ring:.0%} of a ring"
            found.append(f"{other} would be better for this pack ({figures}): set {key}: {other}")
    return found


def kind_text(layer: AlikeLayers) -> str:
    inside = f" in groups of {layer.together}" if layer.comm_type == "a2a+p2p" else ""
    return layer.comm_type + inside + (f" window {layer.window:,}" if layer.window is not None else "")


def report(result: dict, layers: list[AlikeLayers]) -> None:
    """Prints the result as text and tables."""
    from rich.console import Console

    lengths, padding, ranks = result["documents"], result["padding"], result["ranks"]
    pack = (
        "one document"
        if len(lengths) == 1
        else f"{len(lengths):,} documents of {shortest_to_longest(lengths)}"
    )
    head = f"{result['tokens']:,} tokens{f' and {padding:,} of padding' if padding else ''}, {pack}, "
    head += f"{ranks} rank{'s'[: ranks - 1]}"
    print(
        f"{result['layout']} layout: {', '.join([head, *filter(None, [' and '.join(map(kind_text, layers))])])}"
    )
    print(f"{result['key']} {result['asked']}{': ' + result['why'] if result['why'] else ''}")
    stream = result["stream"]
    for line in layout_recurrent.lines(result) if stream else ():
        print(line)
    for note in result["notes"]:
        print(f"note: {note}")
    print()

    keys = bool(layers) and (result["received_rows"] > 0 or not result["head_rows"])
    total = result["tokens"]
    by_rank: dict[str, Callable[[dict], str] | None] = {
        "rank": lambda r: str(r["rank"]),
        "stream": (lambda r: span_text(stream["per_rank"][r["rank"]]["spans"], total))
        if stream and layers
        else None,
        "tokens": lambda r: span_text(r["spans"], total),
        "rows": lambda r: f"{result['rows'] - r['padding']:,}",
        "work": (lambda r: f"{r['share']:.2f} x") if layers else None,
        "rows in": (lambda r: f"{r['received_rows']:,}") if keys else None,
        "rows out": (lambda r: f"{r['sent_rows']:,}") if keys else None,
        "head rows": (lambda r: f"{result['head_rows']:,}") if result["head_rows"] else None,
        "of ring": (lambda r: f"{r['of_ring']:.0%}") if layers else None,
        "from": (lambda r: rank_text(r["hears_from"])) if layers else None,
        "steps": (lambda r: str(r["steps"])) if layers else None,
    }
    by_layout = {
        "layout": lambda o: o["layout"] + (" *" if o["layout"] == result["layout"] else ""),
        "busiest": lambda o: f"{o['imbalance']:.2f} x",
        "rows": (lambda o: f"{o['received_rows']:,}") if keys else None,
        "most into a rank": (lambda o: f"{o['most_received_rows']:,}") if keys else None,
        "of ring": lambda o: f"{o['of_ring']:.0%}",
        "padding": lambda o: f"{o['padding']:,}",
    }
    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
    title = "a forward pass, rank by rank (work: of the mean; rows: keys and values)"
    if not layers:
        title = "rank by rank"
    elif stream:
        title = "a forward pass of attention, rank by rank (work: of the mean; rows in, out: keys and values)"
    console.print(table(title, by_rank, result["per_rank"]))
    if layers:
        print(
            f"the busiest rank computes {result['imbalance']:.2f} x the mean; what travels is {result['of_ring']:.0%} of a plain "
            f"ring's {result['ring_rows']:,} key/value rows{' by size' if result['head_rows'] else ''}\n"
        )
        console.print(table("the layouts side by side (* is this one)", by_layout, result["layouts"]))
    if stream:
        title = "recurrent layers (bytes that a rank sends at most in a layer's forward pass)"
        console.print(table(title, layout_recurrent.columns(), result["recurrent"]))
    if "png" in result:
        print(f"picture: {result['png']}")


def table(title: str, columns: dict[str, Callable[[dict], str] | None], lines: list[dict]) -> Table:
    """A table with one line for each dict of ``lines``; columns whose function is None are left out."""
    from rich import box
    from rich.table import Table

    made = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE, padding=(0, 1, 0, 0))
    shown = {name: text for name, text in columns.items() if text}
    for name in shown:
        # On a narrow terminal these columns are wrapped.
        gives_way = name in ("stream", "tokens", "from")
        justify: JustifyMethod = (
            "left" if gives_way or name in ("layout", "layers", "way", "why") else "right"
        )
        made.add_column(name, justify=justify, no_wrap=not gives_way, min_width=9 if gives_way else None)
    for line in lines:
        made.add_row(*(text(line) for text in shown.values()))
    return made


def shortest_to_longest(lengths: list[int]) -> str:
    low, high = min(lengths), max(lengths)
    return f"{low:,} to {high:,} tokens" if low < high else f"{low:,} tokens"


def span_text(spans: list[tuple[int, int]], total: int) -> str:
    """The first spans as text, without padding, and the number of spans if there are too many."""
    real = [f"{start}:{min(stop, total)}" for start, stop in spans if start < total]
    if len(real) <= NAMED_SPANS:
        return " ".join(real) or "none"
    return f"{' '.join(real[: NAMED_SPANS - 1])} .. {len(real)} spans"


def rank_text(ranks: list[int]) -> str:
    if len(ranks) > NAMED_RANKS:
        return f"{len(ranks)} ranks"
    return " ".join(map(str, ranks)) or "nobody"
