"""Saves checkpoints during a run: announces complete checkpoints, and reports failures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from longspan.config.run import Run
from longspan.training.checkpoint import Checkpointer, SaveError
from longspan.training.lock import mark_saved
from longspan.training.progress import Progress


class Saving:
    """Saves checkpoints and reports on them.

    A checkpoint is announced when it is complete on disk, which may be some steps after its save began.

    Args:
        folder: the folder of the checkpoints.
        save: begins a checkpoint with this Checkpointer and returns its path.
    """

    def __init__(self, run: Run, folder: Path, save: Callable[[Checkpointer], Path], progress: Progress):
        config = run.config
        self.checkpointer = Checkpointer(folder, config.save_total_limit, config.async_save)
        self._save, self.progress = save, progress
        self.announced: Path | None = None

    def settle(self) -> None:
        """Gives a checkpoint that is being saved its final name, if it is complete by now."""
        self.checkpointer.settle()
        self._announce()

    def save(self, last: bool) -> None:
        """Saves a checkpoint; if an earlier save has failed, it reports that and goes on.

        Raises:
            SaveError: the ``last`` checkpoint could not be written. For earlier ones a failure is a warning.
        """
        self.finish()
        try:
            self.progress.saving(self._save(self.checkpointer))
            self._announce()
        except SaveError as error:
            if last:
                raise
            self.progress.warn(f"{error}. Training goes on; earlier checkpoints are as they were.")

    def finish(self, last: bool = False) -> None:
        """Waits for the present save to end; its failure is a warning, or with ``last`` a SaveError."""
        try:
            self.checkpointer.finish()
        except SaveError as error:
            if last:
                raise
            self.progress.warn(f"{error}. Earlier checkpoints are as they were.")
        self._announce()

    def _announce(self) -> None:
        """Announces a checkpoint that was completed since the last check; on the first rank only."""
        if self.checkpointer.named is not None and self.checkpointer.named != self.announced:
            self.announced = self.checkpointer.named
            mark_saved(self.announced.parent.parent, self.announced.name)
            self.progress.saved(self.announced)
