"""``longspan profile``: trains a few steps under PyTorch's profiler, and shows where time and memory go."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from longspan.cli.launch import HELP
from longspan.cli.options import key_help, number, take_options
from longspan.cli.profile_tables import heading, tables
from longspan.cli.train import read_checked
from longspan.config.packages import has_package
from longspan.errors import UserError
from longspan.runs.prepare import prepare_data
from longspan.runs.profiling.run import profile_run, work
from longspan.runs.start import WORKER, ProcessesFailed, quiet_logs, read_run, under_torchrun

USAGE = f"""\
usage: longspan profile CONFIG [--any-key value] [--steps N] [--warmup N] [--out FOLDER] [--png] [--html] [--json]

Trains a few steps as train does, on every rank under PyTorch's profiler, and shows the time of a step by
computation, exchanges of each axis (exposed or hidden behind computation) and idle time, how fast attention's
tiles are against a product of matrices, how even the ranks are, and what the peak of memory consists of. It writes no
checkpoint and no metrics; all it writes is in its own folder, output_dir/profile:
  profile.json, trace-rank-N.json.gz (for ui.perfetto.dev or chrome://tracing)
  --steps N      steps that are counted (default 3)
  --warmup N     steps before the profiler starts (default 2)
  --out FOLDER   another folder
  --png          pictures: timeline.png, memory.png and attention.png (pip install 'longspan[plot]')
  --html         report.html: all of it in one file that needs no network
  --json         print the content of profile.json
{HELP}"""

OPTIONS = {
    "--steps": True,
    "--warmup": True,
    "--out": True,
    "--png": False,
    "--html": False,
    "--json": False,
    WORKER: True,
}


def run(arguments: Sequence[str]) -> int:
    if "--help" in arguments or "-h" in arguments:
        print(USAGE)
        print(key_help())
        return 0
    if WORKER in arguments:
        taken, rest, _ = take_options(arguments, OPTIONS)
        return work(read_run(rest[0]), int(taken["--warmup"]), int(taken["--steps"]), Path(taken[WORKER]))
    own: dict[str, str] = {}
    problems: list[str] = []
    checked, launch = read_checked("profile", arguments, OPTIONS, own)
    steps, warmup = (
        number(own, "--steps", problems, most=100) or 3,
        number(own, "--warmup", problems, most=1000) or 2,
    )
    folder = Path(own["--out"]) if "--out" in own else Path(checked.config.output_dir) / "profile"
    check_folder(folder, problems)
    if checked.by_class:
        problems.append(
            f"model_implementation: {checked.config.base_model} is computed by transformers' own class, and only native models "
            "are profiled so far (docs/models.md has their types)."
        )
    if "--png" in own and not has_package("matplotlib"):
        problems.append("--png needs matplotlib, which is not installed. pip install 'longspan[plot]'.")
    if problems:
        raise UserError(problems)
    if under_torchrun():
        raise UserError(
            "longspan profile starts its processes itself: run it without torchrun, or give --launcher torchrun."
        )
    quiet_logs()
    prepared = prepare_data(checked, show=True)
    say = partial(print, file=sys.stderr if "--json" in own else sys.stdout, flush=True)
    say(f"profiling {steps} steps, after {warmup} of warm-up, at {prepared.sizes.equation()}")
    try:
        result = profile_run(prepared, launch, warmup, steps, folder)
    except ProcessesFailed as error:
        return error.code
    if not result:
        say(f"the first machine shows the result; the traces of this one are in {folder}")
        return 0
    if "--png" in own:
        from longspan.cli.profile_picture import draw

        result["png"] = [str(path) for path in draw(prepared, result, folder)]
    if "--html" in own:
        from longspan.cli.profile_page import page
        from longspan.files import write_whole

        result["html"] = str(folder / "report.html")
        write_whole(folder / "report.html", page(result))
    if "--json" in own:
        print(json.dumps(result, indent=1))
        return 0
    report(result)
    say(f"written to {folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")
    return 0


def check_folder(folder: Path, problems: list[str]) -> None:
    """Adds reasons why the folder of a profile cannot be written to ``problems``, before any step is run."""
    there = folder
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir():
        problems.append(f"--out {folder}: {there} is not a folder. Choose another.")
    elif not os.access(there, os.W_OK):
        problems.append(
            f"--out {folder}: {there} cannot be written. Check its permissions, or choose another."
        )


def report(result: dict[str, Any]) -> None:
    """Prints the tables."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 120)
    print(heading(result))
    for title, columns, rows in tables(result):
        table = Table(title=title, title_justify="left")
        for i, column in enumerate(columns):
            table.add_column(column, justify="right" if i else "left")
        for row in rows:
            table.add_row(*row)
        console.print(table)
