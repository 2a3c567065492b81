"""Measures how a trained model uses long context: loss by position and needles, at any layout."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from longspan.config.data import evaluates, has_validation
from longspan.config.load import to_yaml
from longspan.config.run import Checked, Run
from longspan.errors import UserError
from longspan.runs.prepare import check_weights
from longspan.runs.start import WORKER, Launch, ProcessesFailed, joined, start


def evaluate_run(run: Run, launch: Launch, checkpoint: str | None, trials: int) -> dict:
    """Starts the run's processes, which measure loss by position and needles. Returns their result.

    Args:
        checkpoint: a checkpoint or a folder of checkpoints; None takes the newest one in output_dir, or else
            base_model.
        trials: number of needles for each length and depth; 0 omits the needle test.

    Returns:
        A dict of checkpoint, step, layout, loss (nats), tokens, positions and needles.

    Raises:
        UserError: nothing is held out to evaluate on, or there are no weights that fit.
        ProcessesFailed: a process failed; its message is on stderr.
    """
    if problem := nothing_held_out(run):
        raise UserError(problem)
    run = with_weights(run, checkpoint)
    with tempfile.TemporaryDirectory() as folder:
        path, result = Path(folder) / "config.yaml", Path(folder) / "result.json"
        path.write_text(to_yaml(run.config), encoding="utf-8")
        worker = ["eval", str(path), "--needles", str(trials), WORKER, str(result)]
        if code := start(launch, run.sizes.world_size, worker, run.device):
            raise ProcessesFailed(code)
        return json.loads(result.read_text())


def nothing_held_out(run: Checked) -> str | None:
    """The reason why there is nothing to evaluate on; None if documents are held out."""
    if evaluates(run.config):
        return None
    if run.config.eval_iters == 0 and has_validation(run.config):
        return "longspan eval: eval_iters is 0, which switches evaluation off. Give --eval-iters 100, say, or leave it out."
    return (
        "longspan eval needs held-out documents: val_set_size is 0. Give --val-set-size 0.02, say, or test_datasets (for "
        "data_path: --split 99,1,0)."
    )


def with_weights(run: Run, checkpoint: str | None) -> Run:
    """The run, changed to start from the weights to evaluate: a checkpoint's, or those of base_model.

    Args:
        checkpoint: as for :func:`evaluate_run`.

    Raises:
        UserError: there are no weights, or they belong to another model.
    """
    from longspan.data.checks import check_data
    from longspan.training.checkpoint import check_fits, find, newest
    from longspan.training.description import describe_run

    data = check_data(run)
    check_weights(run)
    folder = Path(run.config.output_dir) / "checkpoints"
    verify = run.config.verify_checkpoint
    if checkpoint is None:
        path = newest(folder, "--checkpoint", verify=verify)
    else:
        path = find(Path(checkpoint), "--checkpoint", verify=verify)
    if path is None:
        if run.pretrained is not None:
            return run.with_keys(resume=None, no_load_optim=False, no_load_rng=False)
        raise UserError(
            f"there is no checkpoint in {folder}. Train first, or give --checkpoint PATH or base_model."
        )
    check_fits(path, describe_run(run, data), weights_only=True, option="--checkpoint")
    return run.with_keys(resume=str(path), no_load_optim=True, no_load_rng=True)


def work(run: Run, trials: int, result: Path) -> int:
    """Evaluates on one rank; the first rank writes the result as JSON. Returns the exit code."""
    import torch.distributed as dist

    from longspan.training.checkpoint import describe
    from longspan.training.evaluate import loss_by_position, needles
    from longspan.training.trainer import Trainer

    with joined(run) as device:
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
