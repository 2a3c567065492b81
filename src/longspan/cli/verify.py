"""``longspan verify``: compares the first steps at the config's layout with the same steps on one process."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from longspan.cli.launch import HELP
from longspan.cli.options import key_help, number, take_options
from longspan.cli.train import read_checked
from longspan.errors import UserError
from longspan.runs.prepare import prepare_data
from longspan.runs.start import WORKER, ProcessesFailed, quiet_logs, read_run, under_torchrun
from longspan.runs.verify import TOLERANCES, relative, variants, verify_run, work

USAGE = f"""\
usage: longspan verify CONFIG [--any-key value] [--steps N] [--dtype float64|float32] [--all] [--json]

Runs the first steps and an evaluation at the config's layout and on one process and compares them.
  --steps N    training steps to compare (default 2)
  --dtype D    precision of both runs (default float64)
  --all        every communication type and sequence layout that fits the mesh, not only the config's
  --json       print the result as JSON
Exit code 0: within tolerance, 1: not.
{HELP}"""

OPTIONS = {"--steps": True, "--dtype": True, "--all": False, "--json": False, WORKER: True}


def run(arguments: Sequence[str]) -> int:
    if "--help" in arguments or "-h" in arguments:
        print(USAGE)
        print(key_help())
        return 0
    own: dict[str, str] = {}
    if WORKER in arguments:
        taken, rest, _ = take_options(arguments, OPTIONS)
        runs = variants(read_run(rest[0]), "--all" in taken)
        return work(runs, int(taken["--steps"]), Path(taken[WORKER]))
    checked, launch = read_checked("verify", arguments, OPTIONS, own)
    problems: list[str] = []
    steps = number(own, "--steps", problems) or 2
    dtype = own.get("--dtype", "float64")
    if dtype not in TOLERANCES:
        problems.append(f"--dtype {dtype!r}: one of {', '.join(TOLERANCES)}.")
    if problems:
        raise UserError(problems)
    if under_torchrun() or launch.machines > 1:
        raise UserError(
            "longspan verify starts its processes itself, on one machine: run it without torchrun."
        )
    quiet_logs()
    run, say = prepare_data(checked, show=True), quiet if "--json" in own else partial(print, flush=True)
    try:
        results = verify_run(run, launch, steps, dtype, "--all" in own, say)
    except ProcessesFailed as error:
        return error.code
    if "--all" in own:
        return report_all(results, "--json" in own)
    return report(results[0], "--json" in own)


def quiet(text: str) -> None:
    """Prints nothing."""


#: what may differ between the runs of ``--all``, in the order of the table
VARIED = ("cp_comm_type", "cp_layout", "ssm_cp_type", "attention_cp_layout")


def report_all(results: list[dict], as_json: bool) -> int:
    """Prints one line for each run; returns exit code 0 if all runs passed, otherwise 1."""
    from longspan.training.metrics import finite

    passed = all(result["passed"] for result in results)
    if as_json:
        print(json.dumps(finite({"passed": passed, "runs": results}), indent=2, allow_nan=False))
        return 0 if passed else 1
    from rich.console import Console
    from rich.table import Table

    first = results[0]
    table = Table(title=f"{first['layout']}  against  {first['reference']}  ({first['dtype']})")
    varied = [name for name in VARIED if name in first]
    for column in (*varied, "loss", "gradient norm", "worst gradient", ""):
        table.add_column(column, justify="left" if column in varied else "right")
    for r in results:
        numbers = (f"{r[name]:.1e}" for name in ("loss_error", "grad_norm_error", "max_gradient_error"))
        table.add_row(*(r[name] for name in varied), *numbers, "passed" if r["passed"] else "FAILED")
    Console(width=None if sys.stdout.isatty() else 140).print(table)
    word = "passed" if passed else "FAILED"
    print(f"{word}: every relative error must be within {first['tolerance']:.0e}")
    return 0 if passed else 1


def report(result: dict, as_json: bool) -> int:
    """Prints the result of one run; returns exit code 0 if it passed, otherwise 1."""
    from longspan.training.metrics import finite

    if as_json:
        print(json.dumps(finite(result), indent=2, allow_nan=False))
        return 0 if result["passed"] else 1
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{result['layout']}  against  {result['reference']}  ({result['dtype']})")
    for column in ("quantity", "layout", "one process", "relative error"):
        table.add_column(column, justify="left" if column == "quantity" else "right")
    for i, (a, b) in enumerate(zip(result["losses"], result["reference_losses"]), 1):
        table.add_row(f"loss, step {i}", f"{a:.12f}", f"{b:.12f}", f"{relative(a, b):.1e}")
    if result["eval_loss"] is not None:
        a, b = result["eval_loss"], result["reference_eval_loss"]
        table.add_row("evaluation loss", f"{a:.12f}", f"{b:.12f}", f"{relative(a, b):.1e}")
    table.add_row("gradient norm", "", "", f"{result['grad_norm_error']:.1e}")
    table.add_row(
        f"worst gradient: {result['worst_parameter']}", "", "", f"{result['max_gradient_error']:.1e}"
    )
    Console(width=None if sys.stdout.isatty() else 140).print(table)
    word = "passed" if result["passed"] else "FAILED"
    print(f"{word}: every error must be within {result['tolerance']:.0e}")
    if result["eval_loss"] is None:
        why = "no documents are held out (val_set_size: 0, no test_datasets)"
        if result["eval_tokens"] == 0:
            why = "no token of what is held out counts in the loss"
        print(f"evaluation was not compared: {why}")
    return 0 if result["passed"] else 1
