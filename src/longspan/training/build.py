"""Builds the parts of a run on this rank from its config: groups, model, and the sharder that cuts data."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from longspan.config.run import Run
from longspan.config.stages import SPLIT_BACKWARD
from longspan.context_parallel import SequenceLayout
from longspan.mesh.mesh import ParallelMesh, ProcessGroupCollection
from longspan.models import GPTModel
from longspan.models.peft import attach
from longspan.parallelize import parallelize
from longspan.pipeline import Compute, Pipeline
from longspan.training.sharding import HybridSharder, LocalBatch, Sharder
from longspan.weights import fill

if TYPE_CHECKING:
    from longspan.integrations.causal_lm import CausalLM


def groups_of(run: Run, mesh: ParallelMesh) -> ProcessGroupCollection:
    """The process groups of the run's model.

    In a hybrid run a sample may be cut over any of the dp x cp ranks, so all of these form the cp group.
    """
    if not run.config.hybrid_context_parallel:
        return mesh.groups
    return dataclasses.replace(mesh.groups, cp=mesh.groups.dp_cp, hcp=())


def build_model(
    run: Run,
    mesh: ParallelMesh,
    groups: ProcessGroupCollection,
    device: torch.device,
    filled: bool = True,
) -> GPTModel | CausalLM:
    """Builds the model, shards it over the mesh and fills its weights. Collective.

    Args:
        filled: False leaves the weights without values.

    Raises:
        UserError: the weights are not available or belong to another model; or there is no compiler for
            torch_compile.
    """
    config, memory = run.config, run.memory
    if device.type == "cuda":
        # PyTorch has this setting only for the whole process.
        torch.set_float32_matmul_precision("high" if run.precision.tf32 else "highest")
    compute_dtype = getattr(torch, run.precision.compute_dtype) if run.precision.mixed else None
    if run.by_class:
        from longspan.training.class_model import build_class_model

        return build_class_model(run, mesh, groups, device, compute_dtype)
    with torch.device("meta"):
        model = GPTModel(
            run.transformer_config(getattr(torch, run.precision.params_dtype)),
            run.vocab_size,
            run.batch.sequence_len,
            pg_collection=groups,
            stages=run.stages_of_rank(dist.get_rank(groups.pp)),
        )
    if run.lora is not None:
        attach(model, run.lora, frozen_dtype=compute_dtype)
    model = parallelize(
        model,
        mesh,
        seed=config.seed if filled and run.pretrained is None else None,
        device=device,
        compute_dtype=compute_dtype,
        recompute=memory.recompute,
        # A backward pass that is taken apart looks for the weights of the forward pass, so they stay gathered.
        reshard_after_forward=memory.reshard_after_forward
        and run.config.pipeline_schedule not in SPLIT_BACKWARD,
        activation_offloading=memory.activation_offloading,
        mlp_tiles=memory.mlp_tiles,
        offload_params=memory.offload_params,
        torch_compile=memory.torch_compile,
    )
    if filled:
        fill(model, run)
    return model


def make_pipeline(
    run: Run,
    model: GPTModel | CausalLM,
    groups: ProcessGroupCollection,
    device: torch.device,
    compute: Compute,
) -> Pipeline | None:
    """The pipeline of a run; None where one rank has all layers.

    Args:
        compute: what the model computes of a micro-batch in a stage.
    """
    if run.sizes.pp == 1:
        return None
    assert isinstance(model, GPTModel), "rules.implementation refuses a pipeline of transformers' class"

    def shape_of(batch: LocalBatch) -> tuple[int, ...]:
        rows = batch.layout.local_length // run.row_multiple
        return rows, batch.tokens.shape[0], run.model.hidden_size

    dtype = getattr(torch, run.precision.compute_dtype)
    schedule = run.config.pipeline_schedule
    assert schedule is not None
    return Pipeline(model, run.stages, groups.pp, schedule, compute, shape_of, dtype, device)


def make_sharder(
    run: Run, groups: ProcessGroupCollection, plan: Callable[[SequenceLayout], None]
) -> Sharder | HybridSharder:
    """The sharder that cuts the micro-batches for this rank.

    Args:
        groups: the result of :func:`groups_of`.
        plan: called with every new layout before the layout is used.
    """
    if run.config.hybrid_context_parallel:
        return HybridSharder(run, dist.get_rank(groups.cp), dist.get_world_size(groups.cp), plan)
    return Sharder(run, dist.get_rank(groups.dp), dist.get_rank(groups.cp), plan)
