"""``longspan eval``: measures how well a trained model uses long context, at any layout."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from longspan.cli.launch import HELP
from longspan.cli.options import key_help, number, take_options
from longspan.cli.train import read_checked
from longspan.errors import UserError
from longspan.runs.evaluate import evaluate_run, nothing_held_out, work
from longspan.runs.prepare import prepare_data
from longspan.runs.start import WORKER, ProcessesFailed, quiet_logs, read_run, under_torchrun

USAGE = f"""\
usage: longspan eval CONFIG [--checkpoint PATH] [--any-key value] [--needles N] [--json]

Loss by position on the held-out documents, and a needle test: a made-up pair of random tokens stands somewhere in
held-out text, and the text ends with its first half. At any layout, whatever layout it was trained at.
  --checkpoint PATH  a checkpoint or a folder of them (default: the newest in output_dir, else base_model)
  --needles N        texts for each length and depth (default 2; 0 leaves the test out)
  --json             print the result as JSON: checkpoint, step, loss, tokens, positions (from, to, tokens, loss,
                     right), needles (length, depth, right, probability)
{HELP}"""

OPTIONS = {"--checkpoint": True, "--needles": True, "--json": False, WORKER: True}


def run(arguments: Sequence[str]) -> int:
    if "--help" in arguments or "-h" in arguments:
        print(USAGE)
        print(key_help())
        return 0
    own: dict[str, str] = {}
    if WORKER in arguments:
        taken, rest, _ = take_options(arguments, OPTIONS)
        return work(read_run(rest[0]), int(taken["--needles"]), Path(taken[WORKER]))
    checked, launch = read_checked("eval", arguments, OPTIONS, own)
    problems: list[str] = []
    trials = number(own, "--needles", problems, least=0)
    trials = 2 if trials is None else trials
    if problem := nothing_held_out(checked):
        problems.append(problem)
    if problems:
        raise UserError(problems)
    if under_torchrun() or launch.machines > 1:
        raise UserError("longspan eval starts its processes itself, on one machine: run it without torchrun.")
    quiet_logs()
    run = prepare_data(checked, show="--json" not in own)
    try:
        found = evaluate_run(run, launch, own.get("--checkpoint"), trials)
    except ProcessesFailed as error:
        return error.code
    if "--json" in own:
        print(as_json(found))
    else:
        report(found)
    return 0


def as_json(found: dict) -> str:
    """The result as JSON, with null for NaN, which JSON does not have."""
    from longspan.training.metrics import finite

    lists = {name: [finite(record) for record in found[name]] for name in ("positions", "needles")}
    return json.dumps(finite(found | lists), indent=2, allow_nan=False)


def report(found: dict) -> None:
    """Prints the result as tables."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 120)
    loss = "none" if found["loss"] is None else f"{found['loss']:.4f}"
    print(f"{found['checkpoint']}\nloss {loss} over {found['tokens']:,} held-out tokens")
    table = Table(title="loss by position in the document")
    for column in ("positions", "tokens", "loss", "more than half sure and right"):
        table.add_column(column, justify="right")
    for p in found["positions"]:
        numbers = (f"{p['loss']:.4f}", f"{100 * p['right']:.1f} %") if p["tokens"] else ("", "")
        table.add_row(f"{p['from']:,} .. {p['to'] - 1:,}", f"{p['tokens']:,}", *numbers)
    console.print(table)
    if not found["needles"]:
        return
    depths = sorted({needle["depth"] for needle in found["needles"]})
    table = Table(title="needles found (share of their tokens) by length and depth")
    table.add_column("tokens", justify="right")
    for depth in depths:
        table.add_column(f"{100 * depth:.0f} %", justify="right")
    for length in sorted({needle["length"] for needle in found["needles"]}):
        row = [n["right"] for n in found["needles"] if n["length"] == length]
        table.add_row(f"{length:,}", *(f"{100 * right:.0f} %" for right in row))
    console.print(table)
