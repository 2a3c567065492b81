"""The plan of a run: what it will need, before it runs. Needs no GPU, no weights, no data and no network."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from math import prod
from typing import Any

from longspan.config.run import Checked, Run
from longspan.errors import UserError
from longspan.planner.gpus import FRAMEWORK, Gpu

GIB = 2**30


def planned_run(checked: Checked) -> Run:
    """The run with made-up documents in the place of its data, and without weights to load.

    Raises:
        UserError: the size of the vocabulary is not known without the tokenizer.
    """
    config = checked.config
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


def candidates(run: Run) -> list[int]:
    """A rank of each pipeline stage, among which the heaviest and the lightest rank are.

    The ranks of a stage have the same shapes, except where sizes do not divide; the first of a group has the larger part.
    """
    from longspan.mesh.topology import RankGenerator

    sizes = run.sizes
    dense = RankGenerator(sizes.tp, 1, sizes.dp, sizes.pp, sizes.cp, sizes.order)
    return list(dense.get_ranks("pp")[0])


def memory_of_ranks(run: Run, ranks: Sequence[int], unit: int = 1) -> list[Any]:
    """The memory of several ranks of the run's world, each in a process of its own.

    Raises:
        UserError: as in the processes.
    """
    context = multiprocessing.get_context("fork")
    found = []
    for rank in ranks:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(theirs, run, rank, unit))
        process.start()
        theirs.close()
        try:
            result = ours.recv()
        except EOFError:
            raise UserError(
                f"the plan of rank {rank} ended without a result; its message is above."
            ) from None
        finally:
            process.join()
        if isinstance(result, UserError):
            raise result
        found.append(result)
    return found


def _work(connection: Any, run: Run, rank: int, unit: int) -> None:
    from longspan.planner.memory import memory_of_rank
    from longspan.training.trainer import Trainer

    try:
        result: Any = memory_of_rank(
            run, rank, lambda run, device, mesh: Trainer(run, device, mesh=mesh, filled=False), unit
        )
    except UserError as error:
        result = error
    connection.send(result)
    connection.close()


def plan(checked: Checked, gpu: Gpu) -> dict[str, Any]:
    """The content of ``longspan plan --json``, with the mesh and the batch arithmetic."""
    from longspan.config.parameters import parameter_shapes
    from longspan.planner.memory import CUDA_UNIT

    run = planned_run(checked).with_keys(attention_backend="cpu-flash")
    memories = memory_of_ranks(run, candidates(run), CUDA_UNIT)
    heaviest, lightest = max(memories, key=lambda m: m.peak), min(memories, key=lambda m: m.peak)
    shapes = parameter_shapes(run.model, run.vocab_size)
    parameters = sum(map(prod, shapes.values()))
    components = {name: size / GIB for name, size in heaviest.components.items()}
    components["framework (estimated)"] = FRAMEWORK / GIB
    total = heaviest.peak + FRAMEWORK
    # Parameters and AdamW's two moments, in the parameters' dtype; with adapters only those are saved.
    width = (
        8 if run.precision.params_dtype == "float64" else 4 if run.precision.params_dtype == "float32" else 2
    )
    checkpoint = 3 * parameters * width if run.lora is None else None
    return {
        "fits": total <= gpu.memory,
        "memory_gib": {
            "total": total / GIB,
            "lightest": (lightest.peak + FRAMEWORK) / GIB,
            **components,
        },
        "heaviest_rank": heaviest.rank,
        "lightest_rank": lightest.rank,
        "capacity_gib": gpu.memory / GIB,
        "gpu": gpu.name,
        "parameters": parameters,
        "checkpoint_gib": None if checkpoint is None else checkpoint / GIB,
        "mesh": run.sizes.equation(),
        "batch": run.batch.equation(run.sizes.dp),
    }
