"""``longspan eval``: what a trained model makes of long context, at any layout."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from longspan.cli.config import number
from longspan.cli.launch import HELP, start, under_torchrun
from longspan.cli.options import key_help
from longspan.cli.prepare import check_weights, prepare_config
from longspan.cli.train import quiet_logs, read_run
from longspan.config.load import to_yaml
from longspan.config.resolve import Run, resolve
from longspan.config.schedule import evaluates
from longspan.errors import UserError

USAGE = f"""\
usage: longspan eval CONFIG [--checkpoint PATH] [--any-key value] [--needles N] [--json]

Loss by position on the held-out documents, and a needle test: a made-up pair of random tokens stands somewhere in
held-out text, and the text ends with its first half. At any layout, whatever layout it was trained at.
  --checkpoint PATH  a checkpoint or a folder of them (default: the newest in output_dir, else base_model)
  --needles N        texts for each length and depth (default 2; 0 leaves the test out)
  --json             print the result as JSON: checkpoint, step, loss, tokens, positions (from, to, tokens, loss,
                     right), needles (length, depth, right, probability)
{HELP}"""

OPTIONS = {"--checkpoint": True, "--needles": True, "--json": False, "--worker": True}


def run(arguments: Sequence[str]) -> int:
    if "--help" in arguments or "-h" in arguments:
        print(USAGE)
        print(key_help())
        return 0
    own: dict[str, str] = {}
    resolved, launch, device = read_run("eval", arguments, OPTIONS, own)
    problems: list[str] = []
    trials = number(own, "--needles", problems, least=0)
    trials = 2 if trials is None else trials
    if not evaluates(resolved.config):
        problems.append(
            "longspan eval needs held-out documents: val_set_size is 0. Give --val-set-size 0.02, say, or test_datasets (for "
            "data_path: --split 99,1,0)."
        )
    if problems:
        raise UserError(problems)
    if "--worker" in own:
        return work(resolved, device, trials, Path(own["--worker"]))
    if under_torchrun() or launch.machines > 1:
        raise UserError("longspan eval starts its processes itself, on one machine: run it without torchrun.")
    quiet_logs()
    config = prepare_config(resolved.config, show="--json" not in own)
    resolved = resolve(config, resolved.world_size)
    config = config.model_copy(update=weights(resolved, own.get("--checkpoint")))
    with tempfile.TemporaryDirectory() as folder:
        path, result = Path(folder) / "config.yaml", Path(folder) / "result.json"
        path.write_text(to_yaml(config), encoding="utf-8")
        worker = ["eval", str(path), "--needles", str(trials), "--worker", str(result)]
        code = start(launch, resolved.world_size, worker, device)
        if code:
            return code
        found = json.loads(result.read_text())
    if "--json" in own:
        print(as_json(found))
    else:
        report(found)
    return 0


def weights(resolved: Run, checkpoint: str | None) -> dict:
    """The config's changes that make a run start from the weights in question.

    Raises:
        UserError: there are none, or they are of another model.
    """
    from longspan.training.checkpoint import check_fits, find, newest
    from longspan.training.loop import check_data, describe_run

    data = check_data(resolved)
    check_weights(resolved)
    folder = Path(resolved.config.output_dir) / "checkpoints"
    verify = resolved.config.verify_checkpoint
    if checkpoint is None:
        path = newest(folder, "--checkpoint", verify=verify)
    else:
        path = find(Path(checkpoint), "--checkpoint", verify=verify)
    if path is None:
        if resolved.pretrained:
            return {"resume": None, "no_load_optim": False, "no_load_rng": False}
        raise UserError(
            f"there is no checkpoint in {folder}. Train first, or give --checkpoint PATH or base_model."
        )
    check_fits(path, describe_run(resolved, data), weights_only=True)
    return {"resume": str(path), "no_load_optim": True, "no_load_rng": True}


def work(run: Run, device_type: str, trials: int, result: Path) -> int:
    """One rank; the first writes the result."""
    import torch.distributed as dist

    from longspan.cli.train import joined
    from longspan.training.checkpoint import describe
    from longspan.training.evaluate import loss_by_position, needles
    from longspan.training.loop import Trainer

    with joined(run.config, device_type) as device:
        trainer = Trainer(run, device)
        checkpoint = run.config.resume
        if checkpoint is not None:
            trainer.resume(Path(checkpoint), "--checkpoint")
        positions = loss_by_position(trainer)
        whole = run.config.sequence_len
        lengths = [n for n in (whole // 4, whole // 2, whole) if n >= 64]
        found = {
            "checkpoint": checkpoint or str(run.config.base_model),
            "step": None if checkpoint is None else describe(Path(checkpoint))["step"],
            "layout": run.sizes.equation(),
            "tokens": sum(p["tokens"] for p in positions),
            "positions": positions,
            "needles": needles(trainer, lengths, trials) if trials else [],
        }
        total = sum(p["loss"] * p["tokens"] for p in positions if p["tokens"])
        found["loss"] = total / found["tokens"] if found["tokens"] else None
        if dist.get_rank() == 0:
            result.write_text(json.dumps(found))
    return 0


def as_json(found: dict) -> str:
    """The result as JSON, which knows no NaN: null instead."""
    from longspan.training.metrics import finite

    lists = {name: [finite(record) for record in found[name]] for name in ("positions", "needles")}
    return json.dumps(finite(found | lists), indent=2, allow_nan=False)


def report(found: dict) -> None:
    """Prints the tables."""
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
