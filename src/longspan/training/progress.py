"""The output of a run for a person: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import datetime
import math
import sys
from pathlib import Path


def loss_text(loss: float | None) -> str:
    """A step's loss as text; None means that no token of the step counted."""
    return "none" if loss is None else f"{loss:.4f}"


class Progress:
    """Prints nothing; for all ranks but the first."""

    def step(self, record: dict, show: bool) -> None: ...

    def compiling(self) -> None:
        """Called before a first step that waits for the compiler."""

    def evaluation(self, record: dict) -> None: ...

    def saving(self, folder: Path) -> None:
        """Called when a save begins; without a later report that it is saved, the checkpoint is not whole."""

    def saved(self, folder: Path) -> None: ...

    def warn(self, text: str) -> None: ...

    def close(self) -> None: ...


class Lines(Progress):
    """One line for each shown step, for logs. Each number has its name, so that logs can be searched."""

    def __init__(self, steps: int):
        self.steps = steps

    def emit(self, text: str) -> None:
        print(text, flush=True)

    def step(self, record: dict, show: bool) -> None:
        if show:
            norm = "none" if record["grad_norm"] is None else f"{record['grad_norm']:.3f}"
            self.emit(
                f"step {record['step']}/{self.steps} | loss {loss_text(record['loss'])} | grad_norm {norm} | "
                f"lr {record['learning_rate']:.2e} | {record['tokens_per_second']:,.0f} tokens/s | "
                f"{record['step_time']:.2f} s | {record['peak_memory_gib']:.2f} GiB"
            )

    def compiling(self) -> None:
        self.emit("compiling: the first step takes a minute or more, later ones do not")

    def evaluation(self, record: dict) -> None:
        what = record.get("split", "eval")
        self.emit(
            f"{what} at step {record['step']} | loss {record['loss']:.4f} | {record['tokens']:,} tokens"
        )

    def saving(self, folder: Path) -> None:
        self.emit(f"saving {folder} (under way)")

    def saved(self, folder: Path) -> None:
        self.emit(f"saved {folder}")

    def warn(self, text: str) -> None:
        self.emit(f"warning: {text}")


class MegatronLines(Lines):
    """Megatron-LM's lines, for parsers of its logs; elapsed time is the mean since the last line."""

    def __init__(self, steps: int, global_batch_size: int):
        super().__init__(steps)
        self.batch, self.seconds, self.since, self.skipped = global_batch_size, 0.0, 0, 0

    def step(self, record: dict, show: bool) -> None:
        self.seconds, self.since = self.seconds + record["step_time"], self.since + 1
        self.skipped += record["loss"] is None
        if not show:
            return
        step, loss, norm = record["step"], "", ""
        # Megatron-LM leaves out the loss and the norm of a skipped iteration, too.
        if record["loss"] is not None:
            loss, norm = f"lm loss: {record['loss']:.6E} | ", f"grad norm: {record['grad_norm']:.3f} | "
        weights = f"params norm: {record['params_norm']:.3f} | " if "params_norm" in record else ""
        self.emit(
            f" [{datetime.datetime.now():%Y-%m-%d %H:%M:%S.%f}] iteration {step:8d}/{self.steps:8d} | "
            f"consumed samples: {step * self.batch:12d} | "
            f"elapsed time per iteration (ms): {1000 * self.seconds / self.since:.1f} | "
            f"learning rate: {record['learning_rate']:.6E} | global batch size: {self.batch:5d} | "
            f"{loss}loss scale: 1.0 | {norm}{weights}"
            f"number of skipped iterations: {self.skipped:3d} | number of nan iterations:   0 |"
        )
        self.seconds, self.since, self.skipped = 0.0, 0, 0

    def evaluation(self, record: dict) -> None:
        loss = record["loss"]
        self.emit(
            f" {record.get('split', 'validation')} loss at iteration {record['step']} | lm loss value: {loss:.6E} | "
            f"lm loss PPL: {math.exp(min(20, loss)):.6E} | "
        )

    def saving(self, folder: Path) -> None:
        self.emit(
            f"saving checkpoint at iteration {int(folder.name.rpartition('_')[2]):7d} to {folder.parent}"
        )

    def saved(self, folder: Path) -> None:
        self.emit(
            f"  successfully saved checkpoint from iteration {int(folder.name.rpartition('_')[2]):7d} to {folder.parent}"
        )


class Bar(Lines):
    """A bar with the time left, and the same lines above it."""

    def __init__(self, steps: int, done: int):
        super().__init__(steps)
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
        from rich.progress import Progress as RichProgress

        self.bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        self.task = self.bar.add_task("training", total=steps, completed=done, loss="-")
        self.bar.start()

    def emit(self, text: str) -> None:
        self.bar.console.print(text, highlight=False)

    def compiling(self) -> None:
        super().compiling()
        self.bar.update(self.task, description="compiling")

    def step(self, record: dict, show: bool) -> None:
        self.bar.update(
            self.task, description="training", completed=record["step"], loss=loss_text(record["loss"])
        )
        super().step(record, show)

    def close(self) -> None:
        self.bar.stop()


def make_progress(steps: int, done: int = 0, megatron_batch: int | None = None) -> Progress:
    """A bar on a terminal, lines elsewhere.

    Args:
        done: number of steps that were trained before.
        megatron_batch: the global batch size, for Megatron-LM's lines; None prints longspan's own.
    """
    if megatron_batch is not None:
        return MegatronLines(steps, megatron_batch)
    return Bar(steps, done) if sys.stdout.isatty() else Lines(steps)
