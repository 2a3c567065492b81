"""One training from start to end on this rank: trainer, sinks, resuming, signals, and its end."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from typing import Literal, NoReturn

import torch
import torch.distributed as dist
from safetensors import SafetensorError

from longspan.config.run import Run
from longspan.errors import UserError
from longspan.runs.finish import finish
from longspan.runs.notes import NO_NOTES, Failure, Notes
from longspan.training import loop
from longspan.training.banner import last_lines, start_lines
from longspan.training.checkpoint import SaveError
from longspan.training.export import export, prepare_export
from longspan.training.lock import CONFIG
from longspan.training.metrics import Metrics
from longspan.training.nonfinite import NotFinite
from longspan.training.progress import Progress, make_progress
from longspan.training.sinks import open_sinks
from longspan.training.stopping import Stopping
from longspan.training.trainer import Trainer
from longspan.training.waiting import Watch, calls_of, late, lost, place, timed_out


def train(
    run: Run, device: torch.device, stopping: Stopping, notes: Notes = NO_NOTES, again: bool = False
) -> int:
    """Trains on this rank; rank 0 prints the output and writes the records. Returns the exit code.

    Args:
        stopping: handles the signals. Before the first step is done a signal ends the process, because there
            is nothing to save.
        notes: takes what the launcher should know of this rank.
        again: the launcher has started this run again after a failure.
    """
    config, output = run.config, Path(run.config.output_dir)
    first = dist.get_rank() == 0
    trainer: Trainer | None = None

    def step() -> int | None:
        return None if trainer is None else trainer.step

    rank = dist.get_rank()

    def waited(place: str) -> None:
        # NCCL is about to end this process, without an exception.
        notes.fail(rank, Failure("late", "", step(), place))

    watch = Watch(
        config.ddp_timeout,
        rank,
        step,
        # The launcher's store has room for some hundred notes a second.
        look=max(1.0, dist.get_world_size() / 256),
        put_place=lambda place: notes.put_place(rank, place),
        waited=None if device.type != "cuda" else waited,
    )
    progress: Progress = Progress()
    metrics = Metrics([])
    try:
        # The files beside the weights are read now, so that later changes in their folders have no effect.
        beside = prepare_export(run) if first and config.export_hf else None
        trainer = Trainer(run, device)
        resumed = Path(config.resume) if config.resume else None
        if resumed:
            trainer.resume(resumed)
            if trainer.step >= trainer.steps and not config.no_load_optim:
                return finish(trainer, resumed, output, beside)
        if first:
            how = "its weights alone: steps, schedule and data begin anew (no_load_optim)"
            how = how if config.no_load_optim else f"after step {trainer.step}"
            remarks = [f"  resume     {resumed}, {how}"] if resumed else []
            metrics, kept = open_sinks(run, output, trainer.step, resumed, again)
            trainer.metrics = metrics
            remarks += [f"  an earlier run's {', '.join(kept)} are kept beside"] if kept else []
            print("\n".join([start_lines(trainer, output), *remarks]), flush=True)
            megatron = config.log_format == "megatron"
            progress = make_progress(trainer.steps, trainer.step, run.batch.global_size if megatron else None)
        asked = (trainer.stop, trainer.save, trainer.stops)

        def started() -> None:
            stopping.saves(*asked)

        summary = loop.train(trainer, output, progress, started=started, saved=stopping.saved)
        exported = config.export_hf and not trainer.stop_asked
        if exported:
            export(trainer, output / "hf", beside)
    except SaveError as error:
        if first:
            print(
                f"longspan: error: {error}. Checkpoints that were there before are untouched.",
                file=sys.stderr,
            )
        return 1
    except NotFinite as error:
        if first:
            print(f"longspan: error: {error}", file=sys.stderr)
        return 1
    except UserError:
        raise
    except Exception as error:
        # A progress bar hides the cursor, and ``leave`` ends the process before ``finally``.
        progress.close()
        leave(error, output, config.ddp_timeout, step(), notes)
    finally:
        progress.close()
        metrics.close()
        watch.close()
    if first and (missing := missing_output(output, metrics, exported)):
        print(
            f"longspan: error: {summary['step']} steps were trained, but not all of it is kept:",
            file=sys.stderr,
        )
        print("\n".join(f"  {text}" for text in missing), file=sys.stderr, flush=True)
        return 1
    if first:
        print(last_lines(summary, trainer, output, exported), flush=True)
    return 1 if trainer.step < trainer.steps and not trainer.ran_out else 0


def missing_output(output: Path, metrics: Metrics, exported: bool) -> list[str]:
    """The output that is missing at a run's end, a text each: its folder is gone, or the disk was full."""
    found = list(metrics.trouble)
    if not (output / CONFIG).is_file():
        found.append(f"{output / CONFIG} is gone: output_dir was removed or moved while the run went on")
    if exported and not (output / "hf").is_dir():
        found.append(f"{output / 'hf'} is gone")
    return found


def leave(
    error: Exception, output: Path, seconds: float, step: int | None = None, notes: Notes = NO_NOTES
) -> NoReturn:
    """Prints the error and ends this process at once with exit code 1.

    The other ranks wait for this one in a collective, and torch's own tear-down may in turn wait for them.

    Args:
        output: the run's folder, for messages.
        seconds: ddp_timeout, for the message about an unanswered exchange.
        step: number of finished optimizer steps; None before there is a trainer.
        notes: takes the reason, for the launcher.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    many = dist.is_initialized() and dist.get_world_size() > 1
    name = f"rank {rank}: " if many else ""
    where = place(calls_of(error.__traceback__), step)
    notes.fail(rank, failure_of(error, step, many))
    if isinstance(error, OSError):
        print(
            f"longspan: error: {name}{error.strerror or error}: {error.filename or output}", file=sys.stderr
        )
    # All ranks raise this error at once, so only the first one prints it.
    elif isinstance(error, NotFinite):
        if rank == 0:
            print(f"longspan: error: {error}", file=sys.stderr)
    # An export raises this error when the disk is full.
    elif isinstance(error, SafetensorError):
        print(f"longspan: error: {name}{error}: {output}", file=sys.stderr)
    elif many and timed_out(error):
        print(f"longspan: error: {late(rank, where, seconds)}", file=sys.stderr)
    elif many and lost(error):
        why = str(error).partition("\n")[0]
        text = f"lost the connection to another rank, which ended, in {where} ({why})."
        print(f"longspan: {name}{text}", file=sys.stderr)
    else:
        traceback.print_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def failure_of(error: Exception, step: int | None, many: bool) -> Failure:
    """The note about a rank that ends with this error.

    Args:
        step: number of finished optimizer steps; None before there is a trainer.
        many: the run has several ranks.
    """
    last = traceback.extract_tb(error.__traceback__)[-1:]
    where = f" in {Path(last[0].filename).name}, line {last[0].lineno}" if last else ""
    kind: Literal["error", "lost", "late", "chosen"] = "error"
    if isinstance(error, NotFinite):
        kind = "chosen"
    elif many and timed_out(error):
        kind = "late"
    elif many and lost(error):
        kind = "lost"
    return Failure(kind, f"{type(error).__name__}{where}", step, str(error)[:1000])
