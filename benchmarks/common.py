"""What the benchmarks share: two gloo processes, paired runs, medians and ratios.

Every figure is a ratio of medians over pairs that ran alternately in one process tree, so that
a machine whose speed drifts changes both sides alike.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _rank(rank: int, world: int, store: str, function: Callable, args: tuple) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=rank, world_size=world)
    function(*args)
    dist.barrier()
    dist.destroy_process_group()


def run_ranks(world: int, function: Callable, *args) -> None:
    """Runs ``function(*args)`` on ``world`` gloo ranks of one thread each."""
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count() or 1))
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (world, str(Path(folder) / "store"), function, args), nprocs=world, join=True)


def timed(function: Callable, threads: int, everyone: bool) -> tuple[float, float]:
    """(elapsed seconds, processor seconds) of one call, each of the rank that took most.

    Args:
        everyone: all ranks take part; else rank 0 alone with ``threads``, others wait.
    """
    dist.barrier()
    seconds = (0.0, 0.0)
    if everyone or dist.get_rank() == 0:
        torch.set_num_threads(threads)
        start = time.perf_counter(), time.process_time()
        function()
        seconds = time.perf_counter() - start[0], time.process_time() - start[1]
        torch.set_num_threads(1)
    if everyone:
        slowest = torch.tensor(seconds, dtype=torch.float64)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        return tuple(slowest.tolist())
    dist.barrier()
    return seconds


def compare(
    contestants: dict[str, tuple[Callable, int, bool]], pairs: int, warmup: int = 2
) -> dict[str, list[float]]:
    """The elapsed times of :func:`compare_clocks`."""
    return compare_clocks(contestants, pairs, warmup)[0]


def compare_clocks(
    contestants: dict[str, tuple[Callable, int, bool]], pairs: int, warmup: int = 2
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Times each contestant in turn, ``pairs`` times after ``warmup`` rounds.

    Other work on the machine changes processor time less than elapsed time.

    Args:
        contestants: name -> (function, threads, whether all ranks take part).

    Returns:
        Elapsed seconds and processor seconds of each contestant.
    """
    elapsed: dict[str, list[float]] = {name: [] for name in contestants}
    processor: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(warmup + pairs):
        for name, (function, threads, everyone) in contestants.items():
            seconds = timed(function, threads, everyone)
            if turn >= warmup:
                elapsed[name].append(seconds[0])
                processor[name].append(seconds[1])
    return elapsed, processor


def report_clocks(title: str, times: tuple[dict[str, list[float]], ...], ours: str) -> None:
    """:func:`report` of what :func:`compare_clocks` returns."""
    for clock, measured in zip(("elapsed", "processor time of the busiest rank"), times):
        report(f"{title}, {clock}", measured, ours)


def report(title: str, times: dict[str, list[float]], ours: str) -> None:
    """Medians in ms, and for each peer its time over ours (above 1: we are faster), median of the pairs."""
    if dist.is_initialized() and dist.get_rank() != 0:
        return
    print(f"\n{title}")
    for name, seconds in times.items():
        line = f"  {name:<44} {1e3 * statistics.median(seconds):10.1f} ms"
        if name != ours:
            ratios = [peer / own for peer, own in zip(seconds, times[ours])]
            line += f"   x {statistics.median(ratios):.3f}  ({min(ratios):.3f} .. {max(ratios):.3f})"
        print(line, flush=True)


def device_ms(function: Callable, device: torch.device) -> float:
    """Milliseconds of one call, by the device's own clock on CUDA."""
    if device.type != "cuda":
        start = time.perf_counter()
        function()
        return 1e3 * (time.perf_counter() - start)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def make_trainer(folder: str, values: dict):
    """A trainer on the CPU with these keys. Its data are a few tokens, because benchmarks make batches of their own.

    Collective.
    """
    import numpy as np

    from longspan.config.load import make_config
    from longspan.config.resolve import resolve
    from longspan.config.run import Run
    from longspan.data import IndexedDatasetWriter
    from longspan.training.trainer import Trainer

    if dist.get_rank() == 0:
        with IndexedDatasetWriter(Path(folder) / "data", np.uint16) as writer:
            writer.add_document(np.arange(100))
    dist.barrier()
    reading = make_config(values | {"datasets": [{"path": f"{folder}/data"}]})
    assert reading.config is not None, reading.problems
    return Trainer(Run.of(resolve(reading.config, dist.get_world_size()).config), torch.device("cpu"))


class Rows:
    """What a check found, a JSON object a line: written at once, so that a crash later loses none of it.

    Args:
        path: the file; None only prints.
        part: the part that adds them.
    """

    def __init__(self, path: Path | None, part: str):
        self.path, self.part = path, part

    def add(self, case: str, ok: bool | None = None, note: str = "", **numbers: float | None) -> None:
        """One row: ``ok`` None where there is nothing to pass or fail; ``numbers`` by name, units in the name."""
        row = {"part": self.part, "case": case, "ok": ok, "note": note, "numbers": numbers}
        text = "  ".join(f"{name} {show(value)}" for name, value in numbers.items())
        print(f"{case:<58} {verdict(ok)}  {text}  {note}".rstrip(), flush=True)
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")

    def failed(self, case: str, error: BaseException, ok: bool | None = False) -> None:
        """A row for what raised: out of memory is a result, anything else a failure with its traceback in the log.

        Args:
            ok: of the row; None for a peer, whose failure is not ours.
        """
        if isinstance(error, torch.OutOfMemoryError):
            self.add(case, None, "out of memory")
        else:
            traceback.print_exception(error)
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            self.add(case, ok, f"{type(error).__name__}: {first[:200]}")


def verdict(ok: bool | None) -> str:
    return "" if ok is None else "ok" if ok else "WRONG"


def show(value: float | None) -> str:
    """A number for a table: whole ones with thousands, others with four digits."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 1000 else f"{value:.4g}"


def machine() -> str:
    """The machine and versions, for the record."""
    return f"{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}, python {sys.version.split()[0]}"
