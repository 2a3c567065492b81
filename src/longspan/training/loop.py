"""Runs all steps of a run, with their evaluations and checkpoints, the same at every layout."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from longspan.mesh.mesh import hold_waiting_time
from longspan.training.checkpoint import Checkpointer
from longspan.training.metrics import evaluated
from longspan.training.nonfinite import NotFinite
from longspan.training.progress import Progress
from longspan.training.rollback import RollBack, skipped_text
from longspan.training.saving import Saving
from longspan.training.schedule import interval
from longspan.training.trainer import Trainer

#: number of successive steps without a target after which a warning is printed
IDLE_STEPS = 4


def train(
    trainer: Trainer,
    output: Path,
    progress: Progress,
    started: Callable[[], None] = lambda: None,
    saved: Callable[[], None] = lambda: None,
    after_step: Callable[[], None] = lambda: None,
) -> dict:
    """Runs the remaining steps, with their evaluations and checkpoints. Returns the summary's record.

    A run that is asked to stop (``signalled``) finishes its step, saves and returns.

    Args:
        started: called once, after the first step.
        saved: called when what a signal asked to save is saved.
        after_step: called after each step, before its evaluation and checkpoint.

    Raises:
        SaveError: the last checkpoint could not be written. If an earlier checkpoint fails, this is reported
            and training goes on.
        NotFinite: the loss or the gradient norm of a step is infinite or NaN, and ``nan_policy`` ends the run.
    """
    run, config = trainer.run, trainer.run.config

    def save(checkpointer: Checkpointer) -> Path:
        return checkpointer.save(trainer.step, trainer.model, trainer.optimizer, trainer.description())

    saving = Saving(run, output / "checkpoints", save, progress)
    hold_waiting_time()
    begun, tokens = time.perf_counter(), trainer.tokens
    record = learned = evaluation = None
    # the number of successive steps in which no token counted
    idle = 0
    an_epoch = len(trainer.train_data) / run.batch.global_size
    eval_every = interval(config.eval_steps, config.evals_per_epoch, trainer.steps, an_epoch)
    save_every = interval(config.save_steps, config.saves_per_epoch, trainer.steps, an_epoch)
    every = config.logging_steps or min(10, max(1, trainer.steps // 200))
    if run.memory.torch_compile:
        progress.compiling()
    if _still_owed(trainer, output):
        evaluation = trainer.evaluate()
        progress.evaluation(evaluation)
    back = RollBack(trainer, output / "checkpoints")
    ahead = trainer.steps_ahead()
    while (batches := next(ahead, None)) is not None:
        try:
            first, record = record is None, trainer.train_step(batches)
        except NotFinite as error:
            # All ranks raise this at once, so they can wait together for a checkpoint that is being written.
            saving.finish()
            text = back.after(error)
            progress.warn(text)
            ahead.close()
            ahead = trainer.steps_ahead()
            continue
        if first:
            started()
        after_step()
        if record.get("skipped"):
            progress.warn(skipped_text(record))
        elif record["loss"] is not None:
            learned, idle = record, 0
        else:
            idle += 1
        if idle == IDLE_STEPS:
            progress.warn(
                f"no token has counted in the loss for {idle} steps, so they changed nothing. Look at the samples: "
                "longspan prepare CONFIG --show 3 prints what is learned."
            )
        if collapsed := trainer.experts.collapsed():
            more = f" and {len(collapsed) - 3} more" if len(collapsed) > 3 else ""
            progress.warn(
                f"no token has chosen {', '.join(collapsed[:3])}{more} for a while: they learn nothing any more. Raise "
                "moe_aux_loss_coeff, or lower learning_rate."
            )
        for text in trainer.remarks(record):
            progress.warn(text)
        last = trainer.step == trainer.steps or trainer.stop_asked
        progress.step(record, show=last or trainer.step == 1 or trainer.step % every == 0)
        saving.settle()
        scheduled = bool(eval_every) and trainer.step % eval_every == 0
        trainer.owed = trainer.stop_asked and scheduled and trainer.valid_data is not None
        # save_last concerns the last step; a run that stops earlier always saves, so that it can continue.
        to_save = trainer.stop_asked or trainer.save_asked or (config.save_last and last)
        to_save = to_save or bool(save_every and trainer.step % save_every == 0)
        # The sender of the signal may not wait for an evaluation, so the save comes first.
        if to_save and trainer.asked:
            saving.save(last)
            saving.finish(last)
            saved()
        if trainer.valid_data is not None and (last or scheduled) and not trainer.stop_asked:
            evaluation = trainer.evaluate()
            progress.evaluation(evaluation)
        if to_save and not trainer.asked:
            saving.save(last)
        if trainer.stop_asked:
            break
    saving.finish(last=True)
    assert record is not None
    elapsed = time.perf_counter() - begun
    if trainer.test_data is not None and trainer.step == trainer.steps and not trainer.stop_asked:
        progress.evaluation(trainer.evaluate(trainer.test_data, split="test"))
    return trainer.metrics.write(
        "summary",
        trainer.step,
        loss=learned["loss"] if learned else None,
        eval_loss=evaluation["loss"] if evaluation else None,
        tokens=trainer.tokens,
        train_time=elapsed,
        tokens_per_second=(trainer.tokens - tokens) / elapsed,
        peak_memory_gib=record["peak_memory_gib"],
    )


def _still_owed(trainer: Trainer, output: Path) -> bool:
    """Whether an evaluation was due where the run stopped, and is not recorded yet. Collective."""
    if not trainer.owed or trainer.valid_data is None:
        return False
    trainer.owed = False
    recorded = [dist.get_rank() == 0 and evaluated(output / "metrics.jsonl", trainer.step)]
    dist.broadcast_object_list(recorded, src=0)
    return not recorded[0]
