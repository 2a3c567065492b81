"""A small verify: two steps of a tiny model over all ranks, against one process on the CPU.

One layout has context parallelism alone; with an even number of ranks another one has tensor parallelism too.
Both have the same global batch, so that one reference serves both. The first rank computes the reference
after all other checks, because the ranks leave their groups for that.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist

from longspan.config.load import make_config
from longspan.config.resolve import resolve
from longspan.config.run import Run
from longspan.errors import UserError
from longspan.runs.machine.protocol import Check, Finding, Place
from longspan.runs.verify import errors, measure, one_process

STEPS, DTYPE = 2, "float64"
#: a rank's share of a sequence gets too small with more ranks
MOST_CP = 8
#: seconds for a layout, and for the reference: the first step imports much of torch
SECONDS = 75.0
REMEDY = "Single exchanges and kernels are checked above. Run longspan verify CONFIG --all, and report what it prints."
KEYS: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "ffn_hidden_size": 48,
    "vocab_size": 97,
    "init_method_std": 0.1,
    "mock_data": True,
    "sequence_len": 101,
    "val_set_size": 0.0,
    "micro_batch_size": 1,
    "max_steps": STEPS,
    "learning_rate": 1e-2,
    "params_dtype": DTYPE,
    "bf16": False,
    "tf32": False,
    "use_tensorboard": False,
    "torch_compile": False,
}


def tiny_run(world: int, device: str, **keys: Any) -> Run:
    """A run of the tiny model.

    Raises:
        UserError: the keys do not fit.
    """
    reading = make_config(KEYS | {"device": device} | keys)
    if reading.config is None or reading.problems:
        raise UserError(reading.problems)
    return Run.of(resolve(reading.config, world, device=device).config)


def layouts(world: int, device: str) -> dict[str, Run]:
    """The runs to compare, by name; all have the same global batch."""
    cp = max(size for size in range(1, MOST_CP + 1) if world % size == 0)
    batch = {"global_batch_size": world // cp}
    runs = {f"verify cp {cp}": tiny_run(world, device, context_parallel_size=cp, **batch)}
    if world % 2 == 0:
        inner = max(size for size in range(1, cp + 1) if (world // 2) % size == 0)
        sizes = {"tensor_parallel_size": 2, "context_parallel_size": inner}
        runs[f"verify tp 2, cp {inner}"] = tiny_run(world, device, **sizes, **batch)
    return runs


def checks_of_training(world: int, device: str) -> list[Check]:
    """The checks of the layouts, and last of all the one that compares them with one process."""
    measured: dict[str, dict] = {}
    runs = layouts(world, device)
    checks = []
    for name, run in runs.items():
        step = functools.partial(_steps, name, run, measured)
        judge = functools.partial(_judge_steps, f"{name}: {STEPS} steps")
        checks.append(Check(f"{name}: {STEPS} steps", step, judge, REMEDY, SECONDS, needs_sound=True))
    compare = functools.partial(_compare, runs, measured)
    checks.append(Check("verify", compare, _judge_errors, REMEDY, SECONDS, exchanges=False, needs_sound=True))
    return checks


def _steps(name: str, run: Run, measured: dict[str, dict], place: Place) -> list[float]:
    """Trains on all ranks. Returns the losses; what is compared later stays in ``measured``."""
    measured[name] = measure(run, place.device, STEPS)
    return measured[name]["losses"]


def _judge_steps(name: str, losses: list[list[float]], place: Place) -> list[Finding]:
    different = [rank for rank, own in enumerate(losses) if own != losses[0]]
    if different:
        return [Finding(name, "wrong", f"{place.named(different)}: another loss than rank 0", REMEDY)]
    return [Finding(name, "ok", "losses " + ", ".join(f"{loss:.6f}" for loss in losses[0]))]


def _compare(runs: dict[str, Run], measured: dict[str, dict], place: Place) -> dict[str, dict] | None:
    """On the first rank: the comparison of each layout with one process. All ranks leave their groups."""
    # Every rank has answered the checks before this one, so no exchange is under way.
    dist.destroy_process_group()
    if place.rank:
        return None
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    reference = one_process(next(iter(runs.values()))).with_keys(device="cpu")
    expected = measure(reference, torch.device("cpu"), STEPS)
    return {name: errors(run, STEPS, measured[name], expected) for name, run in runs.items()}


def _judge_errors(results: list[dict[str, dict] | None], place: Place) -> list[Finding]:
    assert results[0] is not None
    return [judge_result(name, result) for name, result in results[0].items()]


def judge_result(name: str, result: dict) -> Finding:
    """The finding of one comparison.

    Args:
        result: of :func:`longspan.runs.verify.errors`.
    """
    kinds = {"loss": "loss_error", "gradient norm": "grad_norm_error", "worst gradient": "max_gradient_error"}
    texts = ", ".join(f"{kind} {result[error]:.1e}" for kind, error in kinds.items())
    text = f"{texts}; allowed {result['tolerance']:.0e}"
    figures = {error: result[error] for error in kinds.values()}
    if result["passed"]:
        return Finding(name, "ok", f"against one process: {text}", figures=figures)
    text = f"differs from one process: {text}; the worst gradient is of {result['worst_parameter']}"
    return Finding(name, "wrong", text, REMEDY, figures)
