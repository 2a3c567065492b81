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
from longspan.mesh.mesh import ParallelMesh
from longspan.models.adapters import is_adapter, open_adapters, peft_name, read_adapter
from longspan.models.gpt import GPTModel
from longspan.models.huggingface import Names, SafetensorsFolder, read_part
from longspan.models.offload import Offload
from longspan.tensor_parallel.layers import TensorParallelModule
from longspan.tensor_parallel.random import draw_rows


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


def local_ranges(parameter: DTensor) -> list[tuple[int, int]]:
    """Which part of the whole tensor this rank holds: (start, stop) along each dim.

    Tensor parallelism cuts first, FSDP cuts dim 0 of what is left into even runs (the last
    ones shorter or empty).
    """
    ranges = [(0, size) for size in parameter.shape]
    names = parameter.device_mesh.mesh_dim_names or ()
    for axis in sorted(range(len(names)), key=lambda i: names[i] != "tp"):
        placement = parameter.placements[axis]
        if placement.is_replicate():
            continue
        dim = placement.dim
        start, stop = ranges[dim]
        size = parameter.device_mesh.size(axis)
        rows = -(-(stop - start) // size)
        first = min(start + parameter.device_mesh.get_local_rank(axis) * rows, stop)
        ranges[dim] = (first, min(first + rows, stop))
    assert [stop - start for start, stop in ranges] == list(parameter.to_local().shape)
    return ranges


@torch.no_grad()
def init_weights(
    model: nn.Module, seed: int, kind: type[TensorParallelModule] = TensorParallelModule
) -> None:
    """Fills every parameter by (seed, name, shape): the same model at every layout (invariant I2).

    Args:
        kind: fills the parameters of such modules only.
    """
    done: set[int] = set()
    for prefix, module in model.named_modules():
        if not isinstance(module, kind):
            continue
        for short, std in module.initial_std.items():
            parameter = getattr(module, short)
            if id(parameter) in done:  # tied
                continue
            done.add(id(parameter))
            held = parameter.to_local()
            if std is None:
                held.fill_(1.0)
            elif std == 0:
                held.zero_()
            else:
                ranges = local_ranges(parameter)
                shape = tuple(parameter.shape)
                columns = ranges[1] if len(shape) > 1 else None
                name = f"{prefix}.{short}"
                held.copy_(draw_rows(seed, name, shape, std, ranges[0], columns, held.dtype, module.uniform))


@torch.no_grad()
def load_pretrained(model: GPTModel, source: SafetensorsFolder) -> None:
    """Fills every parameter but adapters from a Hugging Face model; each rank reads only what it holds."""
    names = Names(model.config, model.vocab_size)
    for name, parameter in model.named_parameters():
        if is_adapter(name):
            continue
        part = read_part(source, names, name, parameter.shape, local_ranges(parameter))
        parameter.to_local().copy_(part)


@torch.no_grad()
def load_adapters(model: GPTModel, folder: str | Path) -> None:
    """Fills every adapter from a folder in PEFT's format; each rank reads only what it holds.

    Raises:
        UserError: the folder's adapters are of another model.
    """
    adapters = {name: p for name, p in model.named_parameters() if is_adapter(name)}
    with open_adapters(folder, map(peft_name, adapters)) as source:
        for name, parameter in adapters.items():
            part = read_adapter(source, name, parameter.shape, local_ranges(parameter))
            parameter.to_local().copy_(part)


def gradient_norm(model: nn.Module) -> torch.Tensor:
    """The norm of the whole gradient, each element counted once: one number, one all-reduce.

    A rank counts the squares of what it holds, divided by the number of ranks that hold the
    same (copies over dp_replicate; norm weights over tp).
    """
    total = None
    world = dist.get_world_size()
    for parameter in model.parameters():
        grad = parameter.grad
        if grad is None:
            continue
        held = grad.to_local()
        mesh = grad.device_mesh
        shards = 1
        for axis, placement in enumerate(grad.placements):
            shards *= 1 if placement.is_replicate() else mesh.size(axis)  # _StridedShard is no Shard
        wide = torch.promote_types(held.dtype, torch.float32)
        square = torch.linalg.vector_norm(held, dtype=wide).square() * (shards / world)
        total = square if total is None else total + square
    assert total is not None, "no parameter has a gradient"
    if world > 1:
        dist.all_reduce(total)
    return total.sqrt()
