"""One record a step, written to several sinks.

``metrics.jsonl`` holds one JSON object a line, ``kind`` in train | eval | summary (the test at the end
is an eval with ``split: test``); TensorBoard gets the same numbers. Units: loss in nats a token,
step_time in seconds, memory in GiB.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch

from longspan.errors import UserError
from longspan.files import write_whole


class Sink(Protocol):
    """A place that takes records."""

    def write(self, record: dict[str, Any]) -> None: ...

    def rewind(self, step: int) -> None:
        """Forgets the steps after ``step``, which are run again."""

    def close(self) -> None: ...


def finite(record: dict[str, Any]) -> dict[str, Any]:
    """The record with null for numbers that JSON cannot represent."""
    bad = (k for k, v in record.items() if isinstance(v, float) and not math.isfinite(v))
    return record | dict.fromkeys(bad)


class JsonLines:
    """``metrics.jsonl``: flushed line by line, so that it can be followed while it grows."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.file = path, path.open("a", encoding="utf-8")

    def write(self, record: dict[str, Any]) -> None:
        self.file.write(json.dumps(finite(record), allow_nan=False) + "\n")
        self.file.flush()

    def rewind(self, step: int) -> None:
        self.file.close()
        keep_until(self.path, step)
        self.file = self.path.open("a", encoding="utf-8")

    def close(self) -> None:
        """Closes the file.

        Raises:
            OSError: the file is incomplete: the disk is full, or the file was removed or moved meanwhile.
        """
        try:
            there = os.path.samestat(os.fstat(self.file.fileno()), os.stat(self.path))
        except FileNotFoundError:
            there = False
        self.file.close()
        if not there:
            raise FileNotFoundError(
                errno.ENOENT, "was removed or moved while the run wrote to it", str(self.path)
            )


class TensorBoard:
    """One scalar a number, tagged ``train/loss`` and the like.

    The load of a layer's experts is a histogram whose bins are the experts, ``train/moe_load/layer_N``.
    """

    def __init__(self, folder: Path, first_step: int = 0):
        from torch.utils.tensorboard import SummaryWriter

        self.folder, self._make = folder, SummaryWriter
        # Steps that are run again replace their old values.
        self.writer = SummaryWriter(str(folder), purge_step=first_step)

    def write(self, record: dict[str, Any]) -> None:
        for name, value in record.items():
            for tag, number in _curves(name, value, record):
                if isinstance(number, int | float) and math.isfinite(number):
                    self.writer.add_scalar(f"{_group(record)}/{tag}", number, record["step"])
            if name == "moe_load":
                for layer, shares in _loads(value, record):
                    self._write_load(f"{_group(record)}/moe_load/layer_{layer}", shares, record["step"])

    def _write_load(self, tag: str, shares: list[float], step: int) -> None:
        """A histogram with a bin for each expert, from its number to the next, as high as its share."""
        places = range(len(shares))
        self.writer.add_histogram_raw(
            tag,
            min=0,
            max=len(shares),
            num=sum(shares),
            sum=sum(place * share for place, share in zip(places, shares)),
            sum_squares=sum(place**2 * share for place, share in zip(places, shares)),
            bucket_limits=[place + 1 for place in places],
            bucket_counts=shares,
            global_step=step,
        )

    def rewind(self, step: int) -> None:
        self.writer.close()
        self.writer = self._make(str(self.folder), purge_step=step + 1)

    def close(self) -> None:
        self.writer.close()


def _curves(name: str, value: Any, record: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """A record's entry as curves: of the load of experts, the share of the busiest one in each layer."""
    if name == "moe_load":
        loads = _loads(value, record)
        yield from ((f"moe_busiest_expert/layer_{layer}", max(shares)) for layer, shares in loads)
    elif name not in ("kind", "step", "split", "moe_layers"):
        yield name, value


def _loads(value: list[list[float]], record: dict[str, Any]) -> Iterator[tuple[int, list[float]]]:
    """(number of the layer, share of each of its experts) for each layer with experts."""
    return zip(record.get("moe_layers") or range(1, len(value) + 1), value)


class Wandb:
    """Weights & Biases, an optional extra; records become ``train/loss`` and the like.

    Raises:
        UserError: it refuses the run: nobody is logged in, the team does not exist, there is no network.
    """

    def __init__(self, names: dict[str, str | None], mode: str, config: dict[str, Any], folder: Path):
        import wandb

        try:
            self.run = wandb.init(**names, mode=mode, config=config, dir=str(folder))
        except wandb.Error as error:
            raise UserError(
                f"use_wandb: Weights & Biases does not take the run: {error} (wandb login, or WANDB_API_KEY, logs in; wandb_mode: "
                "offline keeps the run on this machine, for wandb sync.)"
            ) from None

    def write(self, record: dict[str, Any]) -> None:
        curves = (curve for name, value in record.items() for curve in _curves(name, value, record))
        values = {f"{_group(record)}/{name}": value for name, value in curves}
        self.run.log(values, step=record["step"])

    def rewind(self, step: int) -> None:
        """Weights & Biases keeps what it has, and ignores earlier steps."""

    def close(self) -> None:
        self.run.finish()


def _group(record: dict[str, Any]) -> str:
    """The beginning of a curve's name; the test at the end has another curve than the evaluations."""
    return record.get("split", record["kind"])


class Metrics:
    """All sinks as one; only the first rank has sinks.

    Training goes on when a sink cannot write; ``trouble`` holds the messages to print at the end of the run.
    """

    def __init__(self, sinks: list[Sink]):
        self.sinks = sinks
        self.trouble: list[str] = []

    def write(self, kind: str, step: int, **values: Any) -> dict[str, Any]:
        record = {"kind": kind, "step": step, **values}
        for sink in self.sinks:
            with self._noting(sink):
                sink.write(record)
        return record

    def rewind(self, step: int) -> None:
        """Forgets the steps after ``step``, which are run again."""
        for sink in self.sinks:
            with self._noting(sink):
                sink.rewind(step)

    def close(self) -> None:
        for sink in self.sinks:
            with self._noting(sink):
                sink.close()

    @contextlib.contextmanager
    def _noting(self, sink: Sink) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            name = error.filename or getattr(sink, "path", type(sink).__name__)
            text = f"{name}: {error.strerror or error}"
            if text not in self.trouble:
                self.trouble.append(text)
                print(
                    f"warning: {text}. Training goes on; the run ends as failed.", file=sys.stderr, flush=True
                )


def keep_until(path: Path, step: int) -> None:
    """Drops the lines of summaries and of steps after ``step``, which are run again; replaces the file."""
    if not path.is_file():
        return
    kept = [
        line + "\n"
        for line, record in _lines(path)
        if record.get("step", 0) <= step and record.get("kind") != "summary"
    ]
    write_whole(path, "".join(kept))


def evaluated(path: Path, step: int) -> bool:
    """Whether the evaluation of a step is recorded in this file."""
    return any(record["kind"] == "eval" and "split" not in record for record in records(path, step))


def records(path: Path, step: int) -> list[dict[str, Any]]:
    """The records of a step in this file; none if there is no file."""
    return [r for _, r in _lines(path) if r.get("step") == step and "kind" in r] if path.is_file() else []


def records_of_kind(path: Path, kind: str) -> list[dict[str, Any]]:
    """The records of a kind (train, eval, summary) in this file."""
    return [record for _, record in _lines(path) if record.get("kind") == kind]


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The lines of a file and their records, without the incomplete line that a killed process leaves."""
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError):
            if isinstance(record := json.loads(line), dict):
                yield line, record


def set_aside(path: Path) -> Path | None:
    """Renames an earlier run's file or folder to the next free ``NAME.1``, ``NAME.2`` ...; None if absent."""
    if not path.exists():
        return None
    kept = free_name(path)
    path.rename(kept)
    return kept


def free_name(path: Path) -> Path:
    """The path with the next free number: ``NAME.1``, ``NAME.2`` ..."""
    number = 1
    while (kept := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    return kept


def peak_memory_gib(device: torch.device) -> float:
    """The most memory this process has held: the CUDA allocator's, or resident memory on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    # Linux counts in KiB.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
