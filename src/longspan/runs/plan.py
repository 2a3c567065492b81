"""The plan of a run: what it will need, before it runs. Needs no GPU, no weights, no data and no network."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from typing import Any

from longspan.config.parameters import parameter_shapes, used_parameters
from longspan.config.run import Checked, Run
from longspan.errors import UserError
from longspan.planner.corners import memory_at, work_at
from longspan.planner.gpus import FRAMEWORK, PER_MACHINE, Gpu
from longspan.planner.memory import CUDA_UNIT, RankMemory, Traced, memory_of_rank, trace_rank
from longspan.planner.reduced import Corner, rank_of, reduced
from longspan.planner.step_time import Group, StepTime, step_time

GIB = 2**30


def planned_run(checked: Checked) -> Run:
    """The run with made-up documents in the place of its data, and without weights to load.

    Raises:
        UserError: transformers' own class computes the model, or the size of the vocabulary is not known without the
            tokenizer.
    """
    config = checked.config
    if checked.by_class:
        raise UserError(
            f"model_implementation: {config.base_model} is computed by transformers' own class, and only native models are "
            "planned so far (docs/models.md has their types)."
        )
    if config.vocab_size is None:
        raise UserError(
            "vocab_size is not known without reading the tokenizer, and a plan reads no data. Give --vocab-size."
        )
    return Run.of(
        config.model_copy(
            update={
                "datasets": [],
                "test_datasets": [],
                "data_path": None,
                "train_data_path": None,
                "valid_data_path": None,
                "test_data_path": None,
                "mock_data": True,
                "val_set_size": 0.0,
                "reinit_weights": True,
                "lora_model_dir": None,
                "resume": None,
                "max_steps": 2,
                "device": "cpu",
                "torch_compile": False,
                "use_tensorboard": False,
                "eod_token_id": 0 if config.eod_token_id is None else config.eod_token_id,
            }
        )
    )


@dataclass(frozen=True)
class StagePlan:
    """What the first rank of a pipeline rank needs, which is as much as the others or more."""

    memory: RankMemory
    time: StepTime | None


def plan_stages(
    run: Run,
    gpu: Gpu | None = None,
    unit: int = CUDA_UNIT,
    document_len: int | None = None,
    at_once: int | None = None,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> list[StagePlan]:
    """The plan of each pipeline rank of a run.

    Args:
        gpu: None plans no time.
        document_len: tokens of the documents of a pack; None is one document a row.
        at_once: processes that trace at the same time; None is one a core.
        progress: called with the number of steps that are traced, and of all.

    Raises:
        UserError: as in the processes.
    """
    families = reduced(run)
    corners = [corner for family in families for row in family.corners for corner in row]
    traced = dict(zip(map(id, corners), _traced(corners, unit, document_len, at_once, progress)))
    plans: dict[int, StagePlan] = {}
    for family in families:
        found = [[traced[id(corner)] for corner in row] for row in family.corners]
        for stage, repeats, in_flight, micro_batches in family.stages:
            memory = memory_at(rank_of(run, stage), found, repeats, in_flight, micro_batches)
            time = None
            if gpu is not None and run.precision.compute_dtype != "float64":
                work = work_at(found, repeats, micro_batches)
                groups = {axis: _group(ranks) for axis, ranks in found[0][0].groups.items()}
                time = step_time(
                    work, gpu, groups, _precision(run), run.sizes.pp, run.batch.accumulation, _virtual(run)
                )
            plans[stage] = StagePlan(memory, time)
    return [plans[stage] for stage in range(run.sizes.pp)]


def _virtual(run: Run) -> int:
    return max(1, len(run.stages) // run.sizes.pp)


def _precision(run: Run) -> str:
    if run.precision.compute_dtype == "float32":
        return "tf32" if run.precision.tf32 else "float32"
    return "bfloat16"


def _group(ranks: Sequence[int]) -> Group:
    machines = [rank // PER_MACHINE for rank in ranks]
    return Group(len(ranks), max(map(machines.count, set(machines))))


def _traced(
    corners: Sequence[Corner],
    unit: int,
    document_len: int | None,
    at_once: int | None,
    progress: Callable[[int, int], None],
) -> list[Traced]:
    """A traced step of each corner, each in a process of its own."""
    # What each process would import is imported once, before they are forked.
    import torch._dynamo
    import torch.testing._internal.distributed.fake_pg  # noqa: F401

    import longspan.training.trainer  # noqa: F401

    results: list[Traced] = []
    with ThreadPoolExecutor(at_once or len(os.sched_getaffinity(0))) as threads:
        waiting = [threads.submit(_in_process, _trace, corner, unit, document_len) for corner in corners]
        for one in waiting:
            results.append(one.result())
            progress(len(results), len(corners))
    return results


def memory_of_ranks(run: Run, ranks: Sequence[int], unit: int = 1) -> list[RankMemory]:
    """The memory of several ranks of the run's world, from whole steps on the run's own made-up documents.

    Raises:
        UserError: as in the processes.
    """
    return [_in_process(_whole, run, rank, unit) for rank in ranks]


def _in_process(function: Callable, *args: Any) -> Any:
    """What a function gives in a new process: the groups of a world are the process's own."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(theirs, function, args))
    process.start()
    theirs.close()
    try:
        result = ours.recv()
    except EOFError:
        raise UserError("a part of the plan ended without a result; its message is above.") from None
    finally:
        process.join()
    if isinstance(result, UserError):
        raise result
    return result


def _work(connection: Any, function: Callable, args: tuple) -> None:
    try:
        result: Any = function(*args)
    except UserError as error:
        result = error
    connection.send(result)
    connection.close()


def _trace(corner: Corner, unit: int, document_len: int | None) -> Traced:
    from longspan.planner.documents import even_samples
    from longspan.tensor_parallel import cross_entropy
    from longspan.training.trainer import Trainer

    # This process computes for a GPU alone, whose chunks of logits are larger.
    cross_entropy.CHUNK_NUMEL_CPU = cross_entropy.CHUNK_NUMEL

    def make(run: Run, device: Any, mesh: Any) -> Trainer:
        return Trainer(run, device, mesh=mesh, filled=False, train_data=even_samples(run, document_len))

    return trace_rank(corner.run, corner.rank, make, unit, corner.from_bottom)


def _whole(run: Run, rank: int, unit: int) -> RankMemory:
    from longspan.training.trainer import Trainer

    return memory_of_rank(
        run, rank, lambda run, device, mesh: Trainer(run, device, mesh=mesh, filled=False), unit
    )


def model_flops(run: Run, document_len: int | None = None) -> float:
    """Floating-point operations that a step of training needs: products with weights, and attention to earlier tokens.

    Six for each weight and token (arXiv 2001.08361), twelve for each pair of a query and a key and each number of a
    head. What is computed again does not count, nor do pairs behind the causal mask.
    """
    layers, output = used_parameters(run.model, run.vocab_size)
    tokens = run.batch.tokens_a_step
    length = min(document_len or run.batch.sequence_len, run.batch.sequence_len)
    width = run.model.num_attention_heads * (run.model.kv_channels or 0)
    pairs = 0.0
    for layer in run.attention_layers:
        seen = length if layer.window is None else min(layer.window, length)
        # The first ``seen`` queries of a document have 1, 2, .. keys, the others ``seen``.
        pairs += tokens * (seen * (seen + 1) / 2 + (length - seen) * seen) / length
    return 6.0 * (sum(layers) + output) * tokens + 12.0 * pairs * width


def plan(
    checked: Checked,
    gpu: Gpu,
    document_len: int | None = None,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> dict[str, Any]:
    """The content of ``longspan plan --json``."""
    run = planned_run(checked).with_keys(attention_backend="cpu-flash")
    plans = plan_stages(run, gpu, CUDA_UNIT, document_len, progress=progress)
    heaviest = max(plans, key=lambda one: one.memory.peak).memory
    lightest = min(plans, key=lambda one: one.memory.peak).memory
    parameters = sum(map(prod, parameter_shapes(run.model, run.vocab_size).values()))
    total = heaviest.peak + FRAMEWORK
    # Parameters and AdamW's two moments, in the parameters' dtype; with adapters only those are saved.
    width = {"float64": 8, "float32": 4}.get(run.precision.params_dtype, 2)
    checkpoint = 3 * parameters * width / GIB if run.lora is None else None
    return {
        "fits": total <= gpu.memory,
        "memory_gib": {
            "total": total / GIB,
            "lightest": (lightest.peak + FRAMEWORK) / GIB,
            **{name: size / GIB for name, size in heaviest.components.items()},
            "framework (estimated)": FRAMEWORK / GIB,
        },
        "heaviest_rank": heaviest.rank,
        "lightest_rank": lightest.rank,
        "capacity_gib": gpu.memory / GIB,
        "gpu": gpu.name,
        "parameters": parameters,
        "checkpoint_gib": checkpoint,
        "mesh": run.sizes.equation(),
        "batch": run.batch.equation(run.sizes.dp),
        **_speed(run, gpu, plans, document_len),
    }


def _speed(run: Run, gpu: Gpu, plans: Sequence[StagePlan], document_len: int | None) -> dict[str, Any]:
    """The part of a plan about time: that of the slowest pipeline rank, for which the others wait."""
    times = [one.time for one in plans if one.time is not None]
    if not times:
        return {"step_s": None}
    slowest = max(times, key=lambda one: one.total)
    world, flops = run.sizes.world_size, model_flops(run, document_len)
    tflops = flops / slowest.total / world / 1e12
    return {
        "step_s": slowest.total,
        "time_s": {
            **slowest.compute,
            **{f"exposed {axis}": seconds for axis, seconds in slowest.exposed.items()},
            "bubble": slowest.bubble,
        },
        "communication_s": slowest.communication,
        "tokens_per_second_per_gpu": run.batch.tokens_a_step / slowest.total / world,
        "tflops_per_gpu": tflops,
        "mfu": tflops * 1e12 / gpu.flops[_precision(run)],
    }
