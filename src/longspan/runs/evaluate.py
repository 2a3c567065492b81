"""What a trained model makes of long context: loss by position and needles, at any layout."""

from __future__ import annotations

import json
from pathlib import Path

from longspan.config.run import Run
from longspan.errors import UserError
from longspan.runs.prepare import check_weights


def with_weights(run: Run, checkpoint: str | None) -> Run:
    """The run that starts from the weights in question.

    Raises:
        UserError: there are none, or they are of another model.
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
    check_fits(path, describe_run(run, data), weights_only=True)
    return run.with_keys(resume=str(path), no_load_optim=True, no_load_rng=True)


def work(run: Run, trials: int, result: Path) -> int:
    """One rank; the first writes the result."""
    import torch.distributed as dist

    from longspan.runs.start import joined
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
