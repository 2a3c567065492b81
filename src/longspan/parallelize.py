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

import torch
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)

from longspan.compiled import check_compiler, compile_parts
from longspan.mesh.mesh import ParallelMesh
from longspan.models.gpt import GPTModel
from longspan.models.memory.offload import Offload
from longspan.tensor_parallel.initial import init_weights


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
    """Shards a model made on ``meta`` and fills it.

    Args:
        seed: of the initial weights; None leaves them to ``load_pretrained``.
        compute_dtype: bfloat16 computes in it while weights, gradients' reductions and the
            optimizer stay in the parameters' own dtype; None computes in that.
        recompute: ``none``, ``selective`` or ``full``, see ``models.layer.Layer``; ``offload`` is full with
            ``activation_offloading``.
        reshard_after_forward: frees a layer's gathered weights after its forward pass and
            gathers them again for backward.
        activation_offloading: what the layers keep for backward goes to the CPU's memory. Without effect on
            the CPU, where it is in that memory already: a copy would cost time and memory.
        mlp_tiles: see MLP.tiles.
        offload_params: this rank's shards of weights and gradients, and so the optimizer's state, lie in the CPU's memory;
            a layer's weights are copied to the device to be gathered.
        torch_compile: compiles what lies between the exchanges, at first use; as in ``compile_parts``.

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
    for layer in model.decoder.layers.values():
        fully_shard(layer, reshard_after_forward=reshard_after_forward, **kwargs)
    fully_shard(model, reshard_after_forward=False, **kwargs)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # without it gloo is asked for an average
