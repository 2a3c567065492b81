"""What ``nan_policy: roll_back`` does: the last whole checkpoint, without the batch that was not finite."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist

from longspan.errors import UserError
from longspan.training.checkpoint import newest
from longspan.training.checkpoint_folder import newest_own
from longspan.training.lock import launch_of
from longspan.training.nonfinite import NotFinite
from longspan.training.trainer import Trainer


class RollBack:
    """Takes a run back, once between two checkpoints.

    Args:
        folder: the run's checkpoints.
    """

    def __init__(self, trainer: Trainer, folder: Path):
        self.trainer, self.folder = trainer, folder
        # The checkpoint that the run went back to last.
        self.used: Path | None = None

    def after(self, error: NotFinite) -> str:
        """Back to the last checkpoint, if the run's policy is this; collective. Returns what to print.

        Raises:
            NotFinite: the error itself, where the policy is another, or with the reason why there is no way back.
        """
        trainer = self.trainer
        if trainer.run.config.nan_policy != "roll_back":
            raise error
        found: list = [self._newest() if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(found, src=0)
        path, why = found[0]
        if path is not None and path == self.used:
            why = f"this is the second time since {path.name}"
        if why:
            raise NotFinite(f"{error} nan_policy roll_back ends the run: {why}.") from error
        self.used, step = path, trainer.step + 1
        batch = trainer.batch_of_step(trainer.step)
        passed = sorted({*trainer.passed_over, batch})
        trainer.resume(path, "nan_policy roll_back", weights_only=False)
        trainer.passed_over = passed
        trainer.metrics.rewind(trainer.step)
        trainer.metrics.write("roll_back", trainer.step, from_step=step, passed_over=batch, why=str(error))
        return f"{error} Back to {path.name}; the batch of step {step} is left out from now on."

    def _newest(self) -> tuple[Path | None, str]:
        """The newest checkpoint, or why there is none; every rank waits for this answer, so nothing is raised."""
        try:
            launch = launch_of(self.folder.parent)
            # Another run may have left checkpoints of later steps here.
            path = newest_own(self.folder, launch.saved) if launch.begun else newest(self.folder)
            if path is None and not self.trainer.run.config.no_load_optim:
                path = next((found for found in map(Path, launch.resumed) if found.is_dir()), None)
        except UserError as error:
            return None, str(error)
        return path, "" if path else "no checkpoint was saved yet"


def skipped_text(record: dict) -> str:
    """A line about a step that was skipped."""
    found = record["not_finite"]
    where = [f"the loss of rank {rank}" for rank in found["ranks"][:1]] + found["parameters"][:2]
    return f"step {record['step']} was skipped: {', '.join(where)} not finite; weights and optimizer are as before."
