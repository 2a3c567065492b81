"""The sinks for the records of a run: files in its folder, and others that the config names."""

from __future__ import annotations

from pathlib import Path

from longspan.config.run import Run
from longspan.training.lock import mark_begun
from longspan.training.metrics import (
    JsonLines,
    Metrics,
    Sink,
    TensorBoard,
    Wandb,
    free_name,
    keep_until,
    set_aside,
)


def open_sinks(
    run: Run, output: Path, step: int, resumed: Path | None, again: bool = False
) -> tuple[Metrics, list[str]]:
    """The sinks, and new names of moved files: a resumed run continues its files, other runs move files.

    Args:
        again: the launcher has started this run again after a failure, so all that is there is its own.
    """
    kept = []
    # Weights & Biases comes first, because nothing must have been moved if it refuses the run.
    wandb = wandb_sinks(run, output)
    old = ["metrics.jsonl", "checkpoints", "hf", "tensorboard"]
    if not again:
        mark_begun(output, _places(output, resumed))
    if again or (goes_on_in(output, resumed) and step):
        keep_until(output / "metrics.jsonl", step)
        # Only the export is moved, because it holds earlier weights.
        old = ["hf"]
    for name in old:
        if aside := set_aside(output / name):
            kept.append(aside.name)
    return Metrics([*file_sinks(run, output, step), *wandb]), kept


def _places(output: Path, resumed: Path | None) -> list[str]:
    """Where the resumed checkpoint is, and where it will be if this run moves its folder aside."""
    if resumed is None:
        return []
    moved = [str(free_name(resumed.parent) / resumed.name)] if goes_on_in(output, resumed) else []
    return [str(resumed), *moved]


def wandb_sinks(run: Run, output: Path) -> list[Sink]:
    c = run.config
    if not c.use_wandb:
        return []
    names = {"project": c.wandb_project, "name": c.wandb_name, "entity": c.wandb_entity}
    return [Wandb(names, c.wandb_mode, c.model_dump(), output)]


def file_sinks(run: Run, output: Path, step: int) -> list[Sink]:
    """metrics.jsonl and TensorBoard's files, which continue after step ``step``."""
    files: list[Sink] = [JsonLines(output / "metrics.jsonl")]
    if run.config.use_tensorboard:
        files.append(TensorBoard(tensorboard_folder(run, output), step + 1))
    return files


def tensorboard_folder(run: Run, output: Path) -> Path:
    return Path(run.config.tensorboard_dir) if run.config.tensorboard_dir else output / "tensorboard"


def goes_on_in(output: Path, resumed: Path | None) -> bool:
    """Whether the resumed checkpoint lies in this output folder."""
    return resumed is not None and resumed.resolve().parent.parent == output.resolve()
