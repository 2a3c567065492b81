"""A profile from its config to its result: starts the ranks, which train a few steps through the training's loop."""

from __future__ import annotations

import json
import statistics
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longspan.config.load import to_yaml
from longspan.config.run import Run
from longspan.files import write_whole
from longspan.runs.prepare import check_weights, resume_point
from longspan.runs.start import WORKER, Launch, ProcessesFailed, joined, start

if TYPE_CHECKING:
    import torch

#: the file of a profile's figures, in its folder, and what else a profile may leave there
RESULT = "profile.json"
FILES = (RESULT, "trace-rank-*.json.gz", "report.html", "timeline.png", "memory.png", "attention.png")
#: times that the product of matrices is measured, of which the median counts, and its size by device
TIMES, PRODUCT = 5, {"cpu": 1024, "cuda": 8192}
#: what a profile does not write, and what would end it before its last step
QUIET: dict[str, Any] = {
    "save_last": False,
    "save_steps": None,
    "saves_per_epoch": None,
    "eval_steps": None,
    "evals_per_epoch": None,
    "exit_interval": None,
    "exit_duration_in_mins": None,
    "use_tensorboard": False,
    "use_wandb": False,
    "export_hf": False,
    "straggler_interval": 0,
}
#: variables that hide what the profiler logs for its own developers, on every rank
SILENT = {"KINETO_LOG_LEVEL": "99", "TORCH_CPP_LOG_LEVEL": "ERROR"}


def profile_run(run: Run, launch: Launch, warmup: int, steps: int, folder: Path) -> dict[str, Any]:
    """Profiles a run in processes of its own, and writes the result and the traces into a folder.

    Args:
        warmup, steps: steps before the profiler starts, and steps that are counted.

    Returns:
        The content of ``profile.json``; on another machine than the first, an empty dict.

    Raises:
        UserError: the data, weights or checkpoint do not fit.
        ProcessesFailed: the processes failed.
    """
    from longspan.data.checks import check_data

    run = run.with_keys(**QUIET)
    check_data(run)
    check_weights(run)
    run = run.with_keys(resume=resume_point(run))
    folder.mkdir(parents=True, exist_ok=True)
    # An earlier profile's files would be taken for this one's.
    for old in [path for name in FILES for path in folder.glob(name)]:
        old.unlink()
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "config.yaml"
        path.write_text(to_yaml(run.config), encoding="utf-8")
        options = ["--warmup", str(warmup), "--steps", str(steps), WORKER, str(folder.resolve())]
        arguments = ["profile", str(path), *options]
        if code := start(launch, run.sizes.world_size, arguments, run.device, variables=SILENT):
            raise ProcessesFailed(code)
    if launch.machine_rank:
        return {}
    return json.loads((folder / RESULT).read_text(encoding="utf-8"))


def work(run: Run, warmup: int, steps: int, folder: Path) -> int:
    """Trains on one rank and writes its trace; rank 0 writes the result of all. Returns the exit code."""
    import torch.distributed as dist

    with joined(run) as device:
        own = measure(run, device, warmup, steps, folder)
        ranks: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object(own, ranks)
        if ranks is not None:
            from longspan.runs.profiling.summary import summarise

            # The pack of the first rank is shown.
            result = described(run, warmup, steps, own) | summarise(ranks)
            of_all = ("documents", "first_step", "step_without_profiler", "attention_kernel")
            result["ranks"] = [{k: v for k, v in rank.items() if k not in of_all} for rank in ranks]
            write_whole(folder / RESULT, json.dumps(result, indent=1))
    return 0


def described(run: Run, warmup: int, steps: int, first: dict[str, Any]) -> dict[str, Any]:
    """What was profiled."""
    tokens = run.batch.global_size * run.batch.sequence_len
    return {
        "layout": run.sizes.equation(),
        "device": run.device,
        "dtype": run.precision.compute_dtype,
        "attention_kernel": first["attention_kernel"],
        "warmup": warmup,
        "steps": steps,
        "tokens_of_step": tokens,
        "first_step": first["first_step"],
        "step_without_profiler": first["step_without_profiler"],
        "documents": first["documents"],
        "traces": "trace-rank-N.json.gz",
    }


def measure(run: Run, device: torch.device, warmup: int, steps: int, folder: Path) -> dict[str, Any]:
    """Trains the steps on this rank, writes its trace, and returns its figures. Collective."""
    import socket

    import torch.distributed as dist

    from longspan.runs.profiling.memory import timeline
    from longspan.runs.profiling.record import Recorder
    from longspan.runs.profiling.summary import efficiency, mean_of_steps
    from longspan.runs.profiling.trace import figures_of_step, lanes_of_step, read_events, times_of
    from longspan.training import loop
    from longspan.training.progress import Progress
    from longspan.training.trainer import Trainer

    trainer = Trainer(run, device)
    if run.config.resume:
        trainer.resume(Path(run.config.resume))
    # The held-out data would be evaluated after the last step.
    trainer.valid_data = trainer.test_data = None
    begun = trainer.step
    recorder = Recorder(trainer, warmup, steps)
    trainer.steps = begun + recorder.all_steps
    loop.train(trainer, Path(run.config.output_dir), Progress(), after_step=recorder.after_step)
    rate = matmul_rate(device, run.precision.compute_dtype)
    rank = dist.get_rank()
    path = folder / f"trace-rank-{rank}.json.gz"
    recorder.export(path)
    events = read_events(path)
    times = times_of(events, recorder.axes)
    counted = []
    for number in range(1, 1 + steps):
        figures = figures_of_step(times, times.steps[number])
        for call in recorder.calls[number]:
            axis = figures["axes"].get(call.axis)
            if axis is not None:
                axis["calls"] = axis.get("calls", 0) + 1
                axis["bytes"] = axis.get("bytes", 0) + call.size
        counted.append(figures | {"attention_flops": recorder.flops[number]})
    mean = mean_of_steps(counted)
    tflop_per_s, share = efficiency(mean, rate)
    last = times.steps[-1]
    # The first micro-batch of the last step.
    bounds = trainer.micro_batches(trainer.step - 1)[0].layout.cu_seqlens
    documents = [int(stop - start) for start, stop in zip(bounds, bounds[1:])]
    device_type = 1 if device.type == "cuda" else 0
    return {
        "rank": rank,
        "host": socket.gethostname(),
        "mean": mean,
        "steps": counted,
        "attention_kernel": recorder.kernel_name,
        "attention_tflop_per_s": tflop_per_s,
        "attention_share_of_matmul": share,
        "matmul_tflop_per_s": rate,
        "memory": timeline(events, last, recorder.before, recorder.gradients, device_type),
        "lanes": lanes_of_step(times, last),
        # The first step that is counted, from 1.
        "first_step": begun + warmup + 2,
        "step_without_profiler": recorder.plain,
        "documents": documents,
    }


def matmul_rate(device: torch.device, dtype: str) -> float:
    """TFLOP/s of a product of matrices on this rank, while all ranks compute one. Collective.

    On the CPU it is the product that training uses (``longspan.matmul``), so that rates can be compared.
    """
    import time

    import torch
    import torch.distributed as dist

    from longspan.matmul import product

    size = PRODUCT[device.type]
    a, b = (torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in range(2))

    def once() -> float:
        begin = time.perf_counter()
        product(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - begin

    once()
    dist.barrier()
    taken = [once() for _ in range(TIMES)]
    return 2 * size**3 / statistics.median(taken) / 1e12
