"""Completes a run whose last step was done earlier: makes the missing evaluations, summary and export."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from longspan.training.export import export
from longspan.training.metrics import Metrics, keep_until, records
from longspan.training.model_files import Files
from longspan.training.progress import Progress, make_progress
from longspan.training.sinks import file_sinks, goes_on_in, wandb_sinks
from longspan.training.trainer import Trainer


def finish(
    trainer: Trainer, resumed: Path, output: Path, beside: tuple[torch.dtype, Files] | None = None
) -> int:
    """Completes a run whose last step was done earlier, and prints that nothing else is left to do.

    Args:
        beside: on the first rank, the result of ``prepare_export`` at the run's start; None makes it now.

    Returns:
        The exit code.
    """
    first = dist.get_rank() == 0
    missing: list[list[str]] = [[]]
    if first and trainer.step == trainer.steps:
        missing = [unfinished(trainer, resumed, output)]
    # Only the first rank looks, because folders differ if the machines do not share them.
    dist.broadcast_object_list(missing)
    if lacking := [name for name in missing[0] if name != "hf"]:
        make_up(trainer, lacking, output)
    if "hf" in missing[0]:
        export(trainer, output / "hf", beside)
    if first:
        print(
            f"done before: {resumed} has trained {trainer.step} steps, and {trainer.steps} are asked for. Nothing is left to do; "
            "the same command with more steps goes on."
        )
        if lacking:
            print(
                f"metrics: {output / 'metrics.jsonl'}, which lacked {' and '.join(lacking)} of the last step"
            )
        if "hf" in missing[0]:
            print(f"model: {output / 'hf'}, which was missing")
    return 1 if trainer.metrics.trouble else 0


def unfinished(trainer: Trainer, resumed: Path, output: Path) -> list[str]:
    """The results after the last step that the run's folder lacks: eval, test, summary, hf."""
    found = []
    # If the run was in another folder, its records are in that folder and not missing in this one.
    if goes_on_in(output, resumed) and (done := records(output / "metrics.jsonl", trainer.step)):
        kinds = {record.get("split", record["kind"]) for record in done}
        wanted = {"eval": trainer.valid_data, "test": trainer.test_data, "summary": trainer.train_data}
        found = [name for name, data in wanted.items() if data is not None and name not in kinds]
    return found + ["hf"] * (trainer.run.config.export_hf and not (output / "hf").exists())


def make_up(trainer: Trainer, lacking: list[str], output: Path) -> None:
    """Writes the records that the last step lacks; the summary, which comes last, is always written again."""
    done = records(output / "metrics.jsonl", trainer.step) if dist.get_rank() == 0 else []
    if dist.get_rank() == 0:
        keep_until(output / "metrics.jsonl", trainer.step)
        trainer.metrics = Metrics(
            [*file_sinks(trainer.run, output, trainer.step), *wandb_sinks(trainer.run, output)]
        )
    progress = Progress() if dist.get_rank() else make_progress(trainer.steps, trainer.step)
    evaluation = next((r for r in done if r["kind"] == "eval" and "split" not in r), {"loss": None})
    try:
        if "eval" in lacking:
            evaluation = trainer.evaluate()
            progress.evaluation(evaluation)
        if "test" in lacking:
            progress.evaluation(trainer.evaluate(trainer.test_data, split="test"))
        last = next((r for r in done if r["kind"] == "train"), {})
        before = next((r for r in done if r["kind"] == "summary"), {})
        trainer.metrics.write(
            "summary",
            trainer.step,
            loss=last.get("loss"),
            eval_loss=evaluation["loss"],
            tokens=trainer.tokens,
            # These values are unknown if the run was killed before it wrote its summary.
            **{name: before.get(name) for name in ("train_time", "tokens_per_second", "peak_memory_gib")},
        )
    finally:
        progress.close()
        trainer.metrics.close()
