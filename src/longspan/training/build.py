"""The parts of a run on this rank, from its config: groups, model, optimizer, and who cuts the data."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
import torch.distributed as dist

from longspan.config.run import Run
from longspan.context_parallel import SequenceLayout
from longspan.mesh.mesh import ParallelMesh, ProcessGroupCollection
from longspan.models import GPTModel
from longspan.models.peft import attach
from longspan.parallelize import parallelize
from longspan.training.sharding import HybridSharder, Sharder
from longspan.weights import fill


def groups_of(run: Run, mesh: ParallelMesh) -> ProcessGroupCollection:
    """The process groups of the run's model.

    In a hybrid run a sample is cut over as many of all dp x cp ranks as it needs, so these are its cp group.
    """
    if not run.config.hybrid_context_parallel:
        return mesh.groups
    return dataclasses.replace(mesh.groups, cp=mesh.groups.dp_cp, hcp=())


def build_model(
    run: Run, mesh: ParallelMesh, groups: ProcessGroupCollection, device: torch.device
) -> GPTModel:
    """The model, sharded over the mesh and filled. Collective.

    Raises:
        UserError: its weights cannot be had, or are those of another model.
    """
    config, memory = run.config, run.memory
    if device.type == "cuda":  # for the whole process, as PyTorch has it
        torch.set_float32_matmul_precision("high" if run.precision.tf32 else "highest")
    compute_dtype = getattr(torch, run.precision.compute_dtype) if run.precision.mixed else None
    with torch.device("meta"):
        model = GPTModel(
            run.transformer_config(getattr(torch, run.precision.params_dtype)),
            run.vocab_size,
            run.batch.sequence_len,
            pg_collection=groups,
        )
    if run.lora is not None:
        attach(model, run.lora, frozen_dtype=compute_dtype)
    model = parallelize(
        model,
        mesh,
        seed=config.seed if run.pretrained is None else None,
        device=device,
        compute_dtype=compute_dtype,
        recompute=memory.recompute,
        reshard_after_forward=memory.reshard_after_forward,
        activation_offloading=memory.activation_offloading,
        mlp_tiles=memory.mlp_tiles,
        offload_params=memory.offload_params,
        torch_compile=memory.torch_compile,
    )
    fill(model, run)
    return model


def make_sharder(
    run: Run, groups: ProcessGroupCollection, plan: Callable[[SequenceLayout], None]
) -> Sharder | HybridSharder:
    """Who cuts the micro-batches for this rank.

    Args:
        groups: of :func:`groups_of`.
        plan: is called with every new layout, ahead of its use.
    """
    if run.config.hybrid_context_parallel:
        return HybridSharder(run, dist.get_rank(groups.cp), dist.get_world_size(groups.cp), plan)
    return Sharder(run, dist.get_rank(groups.dp), dist.get_rank(groups.cp), plan)
