"""From a model on ``meta`` to one that trains: the order below is the documentation.

    1. recompute     switches on each layer, with tiles and offloading
    2. compile       a switch too: what lies between the exchanges (``longspan.compiled``)
    3. shard         FSDP2 over dp_shard x cp, copies over dp_replicate (HSDP)
    4. materialise   memory for this rank's shards only
    5. initialise    by (seed, name, shape), whatever the layout

Tensor parallelism is in the layers already (their weights are DTensors on the tp axis).

Gradients are summed over all ranks, never averaged: each rank's loss is its share of the
global mean already (invariant I1).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor

from longspan.compiled import check_compiler, compile_parts
from longspan.errors import UserError
from longspan.mesh.mesh import ParallelMesh
from longspan.models.adapters import is_adapter, open_adapters, peft_name, read_adapter
from longspan.models.gpt import GPTModel
from longspan.models.huggingface import Names, SafetensorsFolder, read_part
from longspan.models.offload import Offload
from longspan.tensor_parallel.initial import init_weights
from longspan.tensor_parallel.random import local_ranges


def parallelize(
    model: GPTModel,
    mesh: ParallelMesh,
    *,
    seed: int | None,
    device: torch.device,
    compute_dtype: torch.dtype | None = None,
    recompute: str = "none",
    reshard_after_forward: bool = True,
    activation_offloading: bool = False,
    mlp_tiles: int | None = 1,
    offload_params: bool = False,
    torch_compile: bool = False,
) -> GPTModel:
    """Shards a model made on ``meta`` and fills it.

    Args:
        seed: of the initial weights; None leaves them to ``load_pretrained``.
        compute_dtype: bfloat16 computes in it while weights, gradients' reductions and the
            optimizer stay in the parameters' own dtype; None computes in that.
        recompute: ``none``, ``selective`` or ``full``, see TransformerLayer; ``offload`` is full with
            ``activation_offloading``.
        reshard_after_forward: frees a layer's gathered weights after its forward pass and
            gathers them again for backward.
        activation_offloading: what the layers keep for backward goes to the CPU's memory. Without effect on
            the CPU, where it is in that memory already: a copy would cost time and memory.
        mlp_tiles: see MLP.tiles.
        offload_params: this rank's shards of weights and gradients, and so the optimizer's state, lie in the CPU's memory;
            a layer's weights are copied to the device to be gathered.
        torch_compile: compiles what lies between the exchanges, at first use.

    Raises:
        UserError: this machine has no compiler for ``torch_compile``.
    """
    moved = (activation_offloading or recompute == "offload") and device.type != "cpu"
    offload = Offload(device) if moved else None
    for layer in model.decoder.layers:
        layer.recompute = "full" if recompute == "offload" else recompute
        layer.offload, layer.mlp.tiles = offload, mlp_tiles
    if torch_compile:
        check_compiler(device)
        compile_parts(model)
    # pinned memory is copied while the device computes; there is none without a device
    policy = CPUOffloadPolicy(pin_memory=device.type != "cpu") if offload_params else OffloadPolicy()
    shard(model, mesh, compute_dtype, reshard_after_forward, policy)
    model.to_empty(device=torch.device("cpu") if offload_params else device)
    if seed is not None:
        init_weights(model, seed)
    return model


def shard(
    model: GPTModel,
    mesh: ParallelMesh,
    compute_dtype: torch.dtype | None,
    reshard_after_forward: bool,
    offload_policy: OffloadPolicy,
) -> None:
    """FSDP2 around each layer, and around the rest."""
    axes = ("dp_replicate", "fsdp") if mesh.sizes.dp_replicate > 1 else ("fsdp",)
    kwargs = {
        "mesh": mesh.device_mesh[axes],
        # inputs stay as they are: the rotary table beside them is float32 on purpose
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=compute_dtype,
            reduce_dtype=torch.float32 if compute_dtype is not None else None,
            cast_forward_inputs=False,
        ),
        "offload_policy": offload_policy,
    }
    for layer in model.decoder.layers:
        fully_shard(layer, reshard_after_forward=reshard_after_forward, **kwargs)
    fully_shard(model, reshard_after_forward=False, **kwargs)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # without it gloo is asked for an average


@torch.no_grad()
def load_pretrained(model: GPTModel, source: SafetensorsFolder) -> None:
    """Fills every parameter but adapters from a Hugging Face model; each rank reads only what it holds. Collective.

    Raises:
        UserError: on all ranks, with what any of them found: a tensor of another shape, or one with NaN or infinity.
    """
    names = Names(model.config, model.vocab_size)
    problems: list[str] = []
    for name, parameter in model.named_parameters():
        if is_adapter(name):
            continue
        try:
            part = read_part(source, names, name, parameter.shape, local_ranges(parameter))
        except UserError as error:
            problems += error.problems
        else:
            parameter.to_local().copy_(part)
    _agree(problems)


def _agree(problems: list[str]) -> None:
    """Raises UserError on all ranks with the problems of any, so that none waits for one that has stopped."""
    found: list = [None] * dist.get_world_size()
    dist.all_gather_object(found, problems)
    if together := list(dict.fromkeys(problem for each in found for problem in each)):
        more = [f"... and {len(together) - 3} more tensors."] if len(together) > 4 else []
        raise UserError([*together[: 3 if more else 4], *more])


@torch.no_grad()
def load_adapters(model: GPTModel, folder: str | Path) -> None:
    """Fills every adapter from a folder in PEFT's format; each rank reads only what it holds.

    Raises:
        UserError: on all ranks: the folder's adapters are of another model, or hold NaN or infinity.
    """
    adapters = {name: p for name, p in model.named_parameters() if is_adapter(name)}
    problems: list[str] = []
    try:
        with open_adapters(folder, map(peft_name, adapters)) as source:
            for name, parameter in adapters.items():
                part = read_adapter(source, name, parameter.shape, local_ranges(parameter))
                parameter.to_local().copy_(part)
    except UserError as error:
        problems = error.problems
    _agree(problems)


def gradient_norm(model: nn.Module) -> torch.Tensor:
    """The norm of the whole gradient, each element counted once: one number, one all-reduce.

    A rank counts the squares of what it holds, divided by the number of ranks that hold the
    same (copies over dp_replicate; norm weights over tp).
    """
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients, "no parameter has a gradient"
    return _norm(gradients)


@torch.no_grad()
def parameter_norm(model: nn.Module) -> torch.Tensor:
    """The norm of all weights, counted as :func:`gradient_norm` counts; tied ones count once."""
    return _norm(list(model.parameters()))


def _norm(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    total = None
    world = dist.get_world_size()
    for whole in tensors:
        assert isinstance(whole, DTensor)
        held, mesh = whole.to_local(), whole.device_mesh
        shards = 1
        for axis, placement in enumerate(whole.placements):
            shards *= 1 if placement.is_replicate() else mesh.size(axis)  # _StridedShard is no Shard
        wide = torch.promote_types(held.dtype, torch.float32)
        square = torch.linalg.vector_norm(held, dtype=wide).square() * (shards / world)
        total = square if total is None else total + square
    assert total is not None
    if world > 1:
        dist.all_reduce(total)
    return total.sqrt()
