"""One run from start to end on this rank: trainer, sinks, resuming, signals, what is printed."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
from safetensors import SafetensorError

from longspan.config.resolve import Run
from longspan.errors import UserError
from longspan.training.adapters import parameter_counts
from longspan.training.banner import banner, megatron_line
from longspan.training.checkpoint import SaveError
from longspan.training.export import export, prepare_export
from longspan.training.lock import CONFIG
from longspan.training.loop import NotFinite, Trainer
from longspan.training.metrics import (
    JsonLines,
    Metrics,
    Sink,
    TensorBoard,
    Wandb,
    keep_until,
    records,
    set_aside,
)
from longspan.training.model_files import Files
from longspan.training.progress import Progress, loss_text, make_progress
from longspan.training.stopping import Stopping
from longspan.training.waiting import Watch, calls_of, late, lost, place, timed_out


def train(run: Run, device: torch.device, stopping: Stopping) -> int:
    """Trains; rank 0 speaks and writes. Returns the exit code.

    Args:
        stopping: hears the signals; before the first step is done they end the process, for there is nothing to save.
    """
    config, output = run.config, Path(run.config.output_dir)
    first = dist.get_rank() == 0
    trainer: Trainer | None = None

    def step() -> int | None:
        return None if trainer is None else trainer.step

    # an exchange of NCCL that is not answered ends the process from within
    watch = Watch(config.ddp_timeout, dist.get_rank(), step) if device.type == "cuda" else None
    progress: Progress = Progress()
    metrics = Metrics([])
    try:
        # read now: what lies beside the weights is that of the run's start, whatever becomes of those folders meanwhile
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
            notes = [f"  resume     {resumed}, {how}"] if resumed else []
            metrics, kept = open_sinks(run, output, trainer.step, resumed)
            trainer.metrics = metrics
            notes += [f"  an earlier run's {', '.join(kept)} are kept beside"] if kept else []
            print("\n".join([describe(trainer, output), *notes]), flush=True)
            megatron = config.log_format == "megatron"
            progress = make_progress(trainer.steps, trainer.step, run.global_batch_size if megatron else None)
        stop = trainer.stop
        summary = trainer.train(output, progress, started=lambda: stopping.saves(stop))
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
        progress.close()  # a bar hides the cursor
        leave(error, output, config.ddp_timeout, step())
    finally:
        progress.close()
        metrics.close()
        if watch is not None:
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


def finish(
    trainer: Trainer, resumed: Path, output: Path, beside: tuple[torch.dtype, Files] | None = None
) -> int:
    """A run whose last step was done before: says so, and makes up for what comes after that step and is missing.

    Args:
        beside: see ``export``.

    Returns:
        The exit code.
    """
    first = dist.get_rank() == 0
    missing: list[list[str]] = [[]]
    if first and trainer.step == trainer.steps:
        missing = [unfinished(trainer, resumed, output)]
    dist.broadcast_object_list(missing)  # one rank looks: folders differ where machines do not share them
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
    """What comes after the last step and is not in the run's folder: eval, test, summary, hf."""
    found = []
    # of a run in another folder the records are there
    if goes_on_in(output, resumed) and (done := records(output / "metrics.jsonl", trainer.step)):
        kinds = {record.get("split", record["kind"]) for record in done}
        wanted = {"eval": trainer.valid_data, "test": trainer.test_data, "summary": trainer.train_data}
        found = [name for name, data in wanted.items() if data is not None and name not in kinds]
    return found + ["hf"] * (trainer.run.config.export_hf and not (output / "hf").exists())


def make_up(trainer: Trainer, lacking: list[str], output: Path) -> None:
    """Writes the records that the last step lacks; the summary, which is the last one, is written anew."""
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
            # those of a run that was killed before it wrote them are not known
            **{name: before.get(name) for name in ("train_time", "tokens_per_second", "peak_memory_gib")},
        )
    finally:
        progress.close()
        trainer.metrics.close()


def goes_on_in(output: Path, resumed: Path | None) -> bool:
    """Is this checkpoint of the run whose folder this is?"""
    return resumed is not None and resumed.resolve().parent.parent == output.resolve()


def missing_output(output: Path, metrics: Metrics, exported: bool) -> list[str]:
    """What a run has written and is not there at its end: its folder vanished, or the disk was full."""
    found = list(metrics.trouble)
    if not (output / CONFIG).is_file():
        found.append(f"{output / CONFIG} is gone: output_dir was removed or moved while the run went on")
    if exported and not (output / "hf").is_dir():
        found.append(f"{output / 'hf'} is gone")
    return found


def leave(error: Exception, output: Path, seconds: float, step: int | None = None) -> NoReturn:
    """Ends this process at once with exit code 1: the other ranks wait for it in a collective, and torch's own
    tear-down may wait for them in turn.

    Args:
        seconds: ddp_timeout, for the message of an exchange that was not answered.
        step: the optimizer steps that are done; None where there is no trainer yet.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    many = dist.is_initialized() and dist.get_world_size() > 1
    name = f"rank {rank}: " if many else ""
    where = place(calls_of(error.__traceback__), step)
    if isinstance(error, OSError):
        print(
            f"longspan: error: {name}{error.strerror or error}: {error.filename or output}", file=sys.stderr
        )
    elif isinstance(error, NotFinite):  # on all ranks at once
        if rank == 0:
            print(f"longspan: error: {error}", file=sys.stderr)
    elif isinstance(error, SafetensorError):  # how an export finds that the disk is full
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


def open_sinks(run: Run, output: Path, step: int, resumed: Path | None) -> tuple[Metrics, list[str]]:
    """The places records go; going on in the same folder goes on in its files, a new run keeps the old ones aside."""
    kept = []
    wandb = wandb_sinks(run, output)  # first: where it refuses, nothing has been moved
    old = ["metrics.jsonl", "checkpoints", "hf", "tensorboard"]
    if goes_on_in(output, resumed) and step:
        keep_until(output / "metrics.jsonl", step)
        old = ["hf"]  # of earlier weights
    for name in old:
        if aside := set_aside(output / name):
            kept.append(aside.name)
    return Metrics([*file_sinks(run, output, step), *wandb]), kept


def wandb_sinks(run: Run, output: Path) -> list[Sink]:
    c = run.config
    if not c.use_wandb:
        return []
    names = {"project": c.wandb_project, "name": c.wandb_name, "entity": c.wandb_entity}
    return [Wandb(names, c.wandb_mode, c.model_dump(), output)]


def file_sinks(run: Run, output: Path, step: int) -> list[Sink]:
    """metrics.jsonl and TensorBoard's files, which go on after a step."""
    files: list[Sink] = [JsonLines(output / "metrics.jsonl")]
    if run.config.use_tensorboard:
        files.append(TensorBoard(tensorboard_folder(run, output), step + 1))
    return files


def tensorboard_folder(run: Run, output: Path) -> Path:
    return Path(run.config.tensorboard_dir) if run.config.tensorboard_dir else output / "tensorboard"


def describe(trainer: Trainer, output: Path) -> str:
    parameters, trained = parameter_counts(trainer.model)
    first = megatron_line(trainer.run) + "\n" if trainer.run.config.log_format == "megatron" else ""
    return first + banner(
        trainer.run,
        parameters=parameters,
        trained=trained,
        samples=len(trainer.train_data),
        held_out=len(trainer.valid_data) if trainer.valid_data else 0,
        tested=len(trainer.test_data) if trainer.test_data else 0,
        steps=trainer.steps,
        warmup=trainer.warmup,
        device=trainer.device,
        local_rows=trainer.shard.local_rows(),
        filling=filling(trainer),
        learned=learned(trainer),
        output=output,
    )


def filling(trainer: Trainer) -> str:
    """What a sequence is made of, and which samples are missing in it."""
    data, config = trainer.train_data, trainer.run.config
    what = "samples and documents" if None in data.masks else "samples"
    if not data.has_samples:
        if config.sample_packing:
            return "documents packed and kept apart"
        begins = {"positions": config.reset_position_ids, "attention": config.reset_attention_mask}
        anew = " and ".join(name for name, on in begins.items() if on)
        return "one stream of documents" + (f", {anew} anew after each end of document" if anew else "")
    text = f"{what} packed and kept apart" if config.sample_packing else "one sample each"
    if not (excess := data.num_excess):
        return text
    done = "dropped" if config.excess_length_strategy == "drop" else "truncated"
    return f"{text}; {excess:,} of {data.num_documents + excess * (done == 'dropped'):,} samples were too long and are {done}"


def learned(trainer: Trainer) -> str:
    """How much there is to learn in the training data."""
    data = trainer.train_data
    what = "samples" if data.has_samples and None not in data.masks else "documents"
    what = "samples and documents" if data.has_samples and None in data.masks else what
    return f"{data.num_documents:,} {what}, {data.num_learned:,} of {data.num_tokens:,} tokens learned"


def last_lines(summary: dict, trainer: Trainer, output: Path, exported: bool) -> str:
    """What happened, where it is, and what to try next."""
    config = trainer.run.config
    stopped = trainer.step < trainer.steps
    loss = f"loss: {loss_text(summary['loss'])} in the last step"
    if summary["eval_loss"] is not None:
        loss += f", {summary['eval_loss']:.4f} held out"
    where = f"metrics: {output / 'metrics.jsonl'}"
    if exported:
        what = (
            "model: {}, for Hugging Face transformers"
            if trainer.run.lora is None
            else "adapters: {}, for PEFT"
        )
        where = f"{what.format(output / 'hf')}\n{where}"
    if config.use_tensorboard:
        where += f"   curves: tensorboard --logdir {tensorboard_folder(trainer.run, output)}"
    return "\n".join(
        [
            "",
            f"{'stopped' if stopped else 'done'}: {summary['step']} steps, {summary['tokens']:,} tokens in "
            f"{summary['train_time']:.0f} s ({summary['tokens_per_second']:,.0f} tokens/s), peak "
            f"{summary['peak_memory_gib']:.2f} GiB a rank",
            loss,
            where,
            *(
                [f"next: the same command with --resume auto goes on from step {summary['step']}"]
                if stopped
                else [
                    "next: --context-parallel-size 4 cuts each sequence over more ranks and gives the same losses;",
                    f"      longspan verify {output / CONFIG} shows that they are",
                    *([f"      longspan generate {output / 'hf'} lets the model write"] if exported else []),
                ]
            ),
        ]
    )
