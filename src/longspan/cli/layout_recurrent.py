"""What ``longspan layout`` shows of a model with recurrent layers: its stream, the rows that move, and the two ways.

The stream of such a model is contiguous, and attention works on a layout of its own. Rows travel there and back
around every attention layer. A recurrent layer hands on states, or moves features to heads. No process is started.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

from longspan.config.data import keeps_documents_apart
from longspan.config.recurrent import RECURRENT, heads_problem
from longspan.config.run import Checked

if TYPE_CHECKING:
    import numpy as np

    from longspan.context_parallel.layout import SequenceLayout

#: keys of ``--json`` that a model with recurrent layers has in addition
USAGE = """\
      In a model with recurrent layers, all of the above is of its attention layers and their layout
      (attention_cp_layout); without attention, figures are null and layouts is empty. In addition:
      stream                    {layout, padding, rows, per_rank: [{rank, spans, padding}]}: the layout of all other layers;
                                null in a model of attention alone
      moved_rows                {there, back, share, most_there, most_back}: rows that travel to attention's layout and back
                                around one attention layer, over all ranks; their share of the tokens; the most that one
                                rank sends. null without a layout of its own for attention
      recurrent                 [{mixer, count, way, why, state_bytes, pack_state_bytes, a2a_bytes, tail_rows}] for each kind
                                of recurrent layer: the layers, the way (state or a2a; null on one rank) and why; the bytes
                                that a rank sends at most in a layer's forward pass, for any documents, for those of this
                                pack, and by a2a (null where heads cannot be shared); tail_rows: the most rows that a rank
                                sends to the convolutions of later ranks
"""


def stream_of(layout: SequenceLayout) -> dict:
    """The content of ``stream``."""
    from longspan.context_parallel.runs_of_tokens import runs_of

    runs = runs_of(layout)
    return {
        "layout": layout.name,
        "padding": layout.padded_total - layout.total,
        "rows": layout.local_length,
        "per_rank": [
            {"rank": rank, "spans": layout.spans(rank), "padding": layout.local_length - (stop - start)}
            for rank, (start, stop) in enumerate(runs)
        ],
    }


def moved_rows(stream: SequenceLayout, attention: SequenceLayout) -> dict | None:
    """The content of ``moved_rows``; None where one layout serves both."""
    from longspan.context_parallel.move_rows import rows_between

    if attention is stream:
        return None
    there, back = (_of_others(rows_between(*pair)) for pair in ((stream, attention), (attention, stream)))
    return {
        "there": int(there.sum()),
        "back": int(back.sum()),
        "share": round(float(there.sum()) / stream.total, 4),
        "most_there": int(there.max()),
        "most_back": int(back.max()),
    }


def _of_others(counts: np.ndarray) -> np.ndarray:
    """[senders] rows that each rank sends to other ranks, of [senders, receivers]."""
    return counts.sum(1) - counts.diagonal()


def recurrent_kinds(run: Checked, stream: SequenceLayout) -> list[dict]:
    """The content of ``recurrent``."""
    import torch

    from longspan.context_parallel import recurrent_costs as costs
    from longspan.context_parallel.move_rows import tail_rows

    counts = Counter(layer.mixer for layer in run.layers if layer.mixer in RECURRENT)
    ranks, asked = stream.ranks, run.config.ssm_cp_type
    # Documents that are kept apart make one pack of a whole micro-batch.
    batch = 1 if keeps_documents_apart(run.config) else run.batch.micro
    element = getattr(torch, run.precision.compute_dtype).itemsize
    wide, found = max(4, element), []
    for mixer, count in counts.items():
        sizes = costs.recurrent_sizes(run.model, mixer, run.sizes.tp)
        shared = heads_problem(sizes.groups, sizes.heads, ranks) is None
        rows = stream.local_length
        way = None if ranks == 1 else costs.chosen_way(asked, sizes, rows, batch, ranks, element)
        if way is None:
            why = "one rank holds everything"
        elif asked != "auto":
            why = f"ssm_cp_type {asked}"
        elif not shared:
            why = f"{ranks} ranks cannot share {sizes.heads} heads in {sizes.groups} groups"
        else:
            why = "fewer bytes"
        found.append(
            {
                "mixer": mixer,
                "count": count,
                "way": way,
                "why": why,
                "state_bytes": costs.state_bytes(sizes, batch, ranks, wide),
                "pack_state_bytes": max(costs.planned_state_bytes(sizes, batch, stream, wide)),
                "a2a_bytes": costs.a2a_bytes(sizes, rows, batch, ranks, element) if shared else None,
                "tail_rows": int(tail_rows(stream, sizes.kernel - 1).max()),
            }
        )
    return found


def lines(result: dict) -> list[str]:
    """The text about the stream and the rows that move."""
    stream, moved, ranks = result["stream"], result["moved_rows"], result["ranks"]
    padding = f" and {stream['padding']:,} of padding" if stream["padding"] else ""
    found = [f"stream: {stream['layout']}, {stream['rows']:,} rows a rank{padding}"]
    if not result["layers"]:
        found.append("no layer has attention, so no row moves to another layout")
    elif moved is None:
        found.append(
            "attention works on the stream's layout, so no row moves" if ranks > 1 else "no row moves"
        )
    else:
        found.append(
            f"around each attention layer {moved['there']:,} of {result['tokens']:,} rows ({moved['share']:.0%}) travel to its "
            f"layout, and {moved['back']:,} back; one rank sends at most {moved['most_there']:,} and {moved['most_back']:,}"
        )
    return found


def columns() -> dict[str, Callable[[dict], str] | None]:
    """The columns of the table of recurrent layers."""
    return {
        "layers": lambda kind: f"{kind['count']} x {kind['mixer']}",
        "way": lambda kind: kind["way"] or "-",
        "state": lambda kind: size_text(kind["state_bytes"]),
        "this pack": lambda kind: size_text(kind["pack_state_bytes"]),
        "a2a": lambda kind: size_text(kind["a2a_bytes"]),
        "tail rows": lambda kind: f"{kind['tail_rows']:,}",
        "why": lambda kind: kind["why"],
    }


def size_text(size: int | None) -> str:
    """Bytes as text with a unit; a dash for None."""
    if size is None:
        return "-"
    if size < 1024:
        return f"{size} bytes"
    number, unit = size / 1024, "KiB"
    for larger in ("MiB", "GiB"):
        if number >= 1024:
            number, unit = number / 1024, larger
    return f"{number:,.1f} {unit}"
