"""Gradients of a model in your own training loop: summed over the ranks that have different tokens.

In the trainer FSDP2 sums them (``parallelize``); a model without FSDP2 needs one call after backward.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from longspan.mesh.default_groups import process_groups
from longspan.mesh.mesh import ProcessGroupCollection


@torch.no_grad()
def finalize_model_grads(
    model: nn.Module | Iterable[nn.Module],
    num_tokens: Tensor | int | None = None,
    pg_collection: ProcessGroupCollection | None = None,
) -> None:
    """Sums a model's gradients over the data and context parallel ranks, each of which has a part of the sum (those of
    experts over the expert data parallel ranks).

    Call it on every rank after the last backward of a step, before the gradient norm, clipping and the
    optimizer. Gradients are summed, never averaged, in at least float32. They need no sum over tensor
    parallel ranks, with or without sequence parallelism, because the layers compute it in backward.

    The loss decides what the sum means. Each rank's loss covers its own tokens, and there are two ways:

    - each rank divides the *sum* of its losses by the number of valid tokens of the whole step, over all
      micro-batches and all data and context parallel ranks (the sum of ``(labels != -100)`` over
      ``pg_collection.dp_cp``); or
    - each rank's loss is a plain sum and ``num_tokens`` is given (Megatron's ``calculate_per_token_loss``):
      this function then divides the gradients by the sum of ``num_tokens`` over the same ranks.

    Both give the gradient of the mean over all valid tokens at every layout. Each rank's own *mean* would be
    wrong, because ranks have different numbers of valid tokens. (For that reason Megatron's other convention
    weights tokens unevenly: a mean for each micro-batch, divided by the number of micro-batches and averaged
    over data parallel ranks.)

    Args:
        model: a module without FSDP2 or DDP, or several modules. A parameter that they share is summed once.
            A parameter without a gradient on this rank (which ran no backward) counts as zero, if other ranks
            have its gradient. Frozen parameters are not changed.
        num_tokens: valid tokens of this rank in the step; None if the losses are already divided. If no rank
            has a valid token, the gradients are not divided.
        pg_collection: None takes the installed groups.

    Raises:
        ValueError: FSDP2 or DDP reduces the model's gradients already.
    """
    groups = process_groups(pg_collection)
    group = groups.dp_cp
    modules = [model] if isinstance(model, nn.Module) else list(model)
    parameters = list({id(p): p for module in modules for p in module.parameters()}.values())
    for part in (part for module in modules for part in module.modules()):
        if isinstance(part, FSDPModule | nn.parallel.DistributedDataParallel):
            raise ValueError(
                f"finalize_model_grads: {type(part).__name__} reduces gradients in backward already; to sum them again would "
                "count them twice. Leave the call out. Models of longspan.parallelize sum; a fully_shard of your own averages, "
                "unless set_gradient_divide_factor(1.0) and set_force_sum_reduction_for_comms(True) are called, and DDP "
                "averages always."
            )
        if num_tokens is not None and getattr(part, "adds_loss", False):
            raise ValueError(
                "finalize_model_grads(num_tokens=...) divides all gradients, and with them those of the balancing losses of "
                "experts, which are means already. Divide each rank's loss by the step's number of tokens before backward, and "
                "leave num_tokens out; or set moe_aux_loss_coeff and moe_z_loss_coeff to 0."
            )
    scale = None
    if num_tokens is not None:
        total = torch.as_tensor(num_tokens).detach().clone().to(torch.float64)
        if parameters:
            total = total.to(parameters[0].device)
        dist.all_reduce(total, group=group)
        scale = 1 / total.clamp(min=1)
    trained = [p for p in parameters if p.requires_grad]
    experts = [p for p in trained if is_expert(p)]
    sum_gradients([p for p in trained if not is_expert(p)], group, scale)
    # Experts of a rank compute for the tokens of all ranks that share them: only the ranks with the same experts add up.
    sum_gradients(experts, groups.edp, scale)


def is_expert(parameter: nn.Parameter) -> bool:
    """Whether a parameter lies on the grid of experts."""
    return isinstance(parameter, DTensor) and "ep" in (parameter.device_mesh.mesh_dim_names or ())


@torch.no_grad()
def sum_gradients(
    parameters: Collection[nn.Parameter], group: dist.ProcessGroup, scale: Tensor | None = None
) -> None:
    """Sums the gradients over the ranks of a group, in at least float32, and multiplies them by ``scale``.

    A gradient that only some ranks have counts as zero on the other ranks. A parameter without a gradient on
    any rank gets none.
    """
    if not parameters:
        return
    device = next(iter(parameters)).device
    used = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32).to(device)
    dist.all_reduce(used, op=dist.ReduceOp.MAX, group=group)
    for parameter, somewhere in zip(parameters, used.tolist()):
        if not somewhere:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        held = parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad
        wide = held.to(torch.promote_types(held.dtype, torch.float32)).contiguous()
        dist.all_reduce(wide, group=group)
        # In float32 and float64, wide may be the same tensor as held.
        held.copy_(wide if scale is None else wide * scale)
