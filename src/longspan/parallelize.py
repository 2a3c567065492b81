"""Makes a model that trains from a model on ``meta``, in this order:

    1. recompute     attributes of each layer, with tiles and offloading
    2. compile       the code between the exchanges, compiled when it first runs (``longspan.compiled``)
    3. shard         FSDP2 over dp_shard x cp, copies over dp_replicate (HSDP)
    4. materialise   memory for this rank's shards only
    5. initialise    by (seed, name, shape), the same at every layout

Tensor parallelism is in the layers already (their weights are DTensors on the tp axis).

Gradients are summed over all ranks, never averaged, because each rank's loss is already its
share of the global mean (invariant I1).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import Shard

from longspan.compiled import check_compiler, compile_parts
from longspan.expert_parallel import GroupedMLP
from longspan.mesh.mesh import ParallelMesh
from longspan.models.gpt import GPTModel
from longspan.models.memory.offload import Offload
from longspan.tensor_parallel.initial import init_buffers, init_weights
from longspan.tensor_parallel.layers import local


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
    torch_compile: bool | str = False,
) -> GPTModel:
    """Shards a model that was made on ``meta``, and fills its weights.

    Args:
        seed: seed of the initial weights; None leaves the weights to ``load_pretrained``.
        compute_dtype: dtype of the computation, such as bfloat16; weights and optimizer keep the parameters'
            dtype, and gradients are reduced in float32. None computes in the parameters' dtype.
        recompute: ``none``, ``selective`` or ``full``, see ``models.layer.Layer``; ``offload`` is full with
            ``activation_offloading``.
        reshard_after_forward: frees a layer's gathered weights after its forward pass and
            gathers them again for backward.
        activation_offloading: moves the tensors that layers keep for backward to the CPU's memory. It has no
            effect on the CPU, where they are in that memory already: a copy would cost time and memory.
        mlp_tiles: see MLP.tiles.
        offload_params: keeps this rank's shards of weights and gradients, and so the optimizer's state, in
            the CPU's memory; a layer's weights are copied to the device when they are gathered.
        torch_compile: compiles the code between the exchanges when it first runs; as in ``compile_parts``.

    Raises:
        UserError: this machine has no compiler for ``torch_compile``.
    """
    moved = (activation_offloading or recompute == "offload") and device.type != "cpu"
    offload = Offload(device) if moved else None
    for layer in model.decoder.layers.values():
        layer.recompute = "full" if recompute == "offload" else recompute
        layer.offload, layer.tiles = offload, mlp_tiles
    if torch_compile:
        check_compiler(device)
        compile_parts(model, torch_compile)
    layers = list(model.decoder.layers.values())
    shard(model, layers, mesh, compute_dtype, reshard_after_forward, offload_policy(offload_params, device))
    model.to_empty(device=torch.device("cpu") if offload_params else device)
    init_buffers(model)
    if seed is not None:
        init_weights(model, seed)
    return model


def offload_policy(offload_params: bool, device: torch.device) -> OffloadPolicy:
    """Where FSDP2 keeps this rank's shards, as ``offload_params`` of :func:`parallelize` says."""
    # Pinned memory can be copied while the device computes; without a GPU there is no pinned memory.
    return CPUOffloadPolicy(pin_memory=device.type != "cpu") if offload_params else OffloadPolicy()


def shard(
    model: nn.Module,
    layers: Iterable[nn.Module],
    mesh: ParallelMesh,
    compute_dtype: torch.dtype | None,
    reshard_after_forward: bool,
    offload_policy: OffloadPolicy,
) -> None:
    """Applies FSDP2 to each of the model's layers, and to the rest of the model."""
    axes = ("dp_replicate", "fsdp") if mesh.sizes.dp_replicate > 1 else ("fsdp",)
    kwargs = {
        "mesh": mesh.device_mesh[axes],
        # Inputs are not cast, because the rotary table among them must stay float32.
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=compute_dtype,
            reduce_dtype=torch.float32 if compute_dtype is not None else None,
            cast_forward_inputs=False,
        ),
        "offload_policy": offload_policy,
    }
    for layer in layers:
        for module in layer.modules():
            if isinstance(module, GroupedMLP):
                _shard_experts(module, mesh, reshard_after_forward, kwargs)
        fully_shard(layer, reshard_after_forward=reshard_after_forward, **kwargs)
    fully_shard(model, reshard_after_forward=False, **kwargs)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            # Otherwise FSDP takes an average or a sum with a factor, which gloo does not have.
            module.set_force_sum_reduction_for_comms(True)


def _shard_experts(
    experts: GroupedMLP, mesh: ParallelMesh, reshard_after_forward: bool, kwargs: dict
) -> None:
    """FSDP2 around the experts of a layer, over the ranks that hold the same ones: before the layer, which has its own axis."""
    axes = ("edp_replicate", "edp") if mesh.sizes.dp_replicate > 1 else ("edp",)
    ranks = mesh.expert_mesh["edp"].size()

    def place(parameter: nn.Parameter) -> Shard:
        sizes = local(parameter).shape
        if sizes[0] >= ranks:
            return Shard(0)
        # More ranks than experts of one rank: another dim leaves no rank without a part, but FSDP2 cuts only dim 0
        # into unequal parts.
        return Shard(next((dim for dim in range(1, len(sizes)) if sizes[dim] % ranks == 0), 0))

    fully_shard(
        experts,
        reshard_after_forward=reshard_after_forward,
        shard_placement_fn=place,
        **kwargs | {"mesh": mesh.expert_mesh[axes]},
    )
