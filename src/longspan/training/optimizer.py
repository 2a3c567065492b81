"""AdamW, the norm of the whole gradient, and clipping by this norm."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from longspan.config.schema import TrainConfig


class LocalAdamW(torch.optim.AdamW):
    """AdamW in which each rank updates the elements that it holds; its state are DTensors like the parameters.

    The update of an element needs no other element. For DTensors torch would still look for the placement of each
    call's results, which costs more than the update of a small model.
    """

    def _init_group(self, group: dict, *tensors: list[torch.Tensor]) -> bool:
        has_complex = super()._init_group(group, *tensors)
        for held in tensors:
            held[:] = [t.to_local() if isinstance(t, DTensor) else t for t in held]
        return has_complex


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW for the trained parameters; weight decay acts only on matrices, not on norms and biases."""
    assert config.learning_rate is not None
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [p for name, p in named if p.dim() > 1 and not name.endswith("bias")]
    others = [p for name, p in named if p.dim() <= 1 or name.endswith("bias")]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return LocalAdamW(
        # A stage of a pipeline may have no adapter.
        [group for group in groups if group["params"]] or groups[:1],
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        fused=config.optimizer == "adamw_torch_fused",
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = value


def gradient_norm(model: nn.Module, stages: int = 1) -> torch.Tensor:
    """The L2 norm of the whole gradient, each element counted once, by one all-reduce of one number.

    A rank sums the squares of the elements that it holds, divided by the number of ranks that hold the same
    elements (copies over dp_replicate; norm weights over tp; without FSDP every weight over dp and cp).

    Args:
        model: this rank's part of the model, in a pipeline its stage.
        stages: number of pipeline stages; a parameter is on the ranks of only one stage.

    Returns:
        A scalar.
    """
    gradients = [p.grad for p in _counted(model) if p.grad is not None]
    assert gradients or stages > 1, "no parameter has a gradient"
    return _norm(gradients, stages)


@torch.no_grad()
def parameter_norm(model: nn.Module, stages: int = 1) -> torch.Tensor:
    """The L2 norm of all weights, computed like :func:`gradient_norm`; tied weights count once."""
    return _norm(_counted(model), stages)


def _counted(model: nn.Module) -> list[nn.Parameter]:
    own = getattr(model, "own_parameters", None)
    return list(model.parameters()) if own is None else own()


def _norm(tensors: Sequence[torch.Tensor], stages: int) -> torch.Tensor:
    total = None
    world = dist.get_world_size()
    holders = world // stages
    for whole in tensors:
        assert isinstance(whole, DTensor)
        held, mesh = whole.to_local(), whole.device_mesh
        shards = 1
        for axis, placement in enumerate(whole.placements):
            # A test for ``Shard`` would miss ``_StridedShard``, which is no ``Shard``.
            shards *= 1 if placement.is_replicate() else mesh.size(axis)
        wide = torch.promote_types(held.dtype, torch.float32)
        square = torch.linalg.vector_norm(held, dtype=wide).square() * (shards / holders)
        total = square if total is None else total + square
    if stages > 1:
        # A stage may be empty, and then it has neither a dtype nor a device to agree with the others on.
        total = torch.zeros((), dtype=torch.float64) if total is None else total.double().cpu()
    assert total is not None
    if world > 1:
        dist.all_reduce(total)
    return total.sqrt()


@torch.no_grad()
def clip_gradients(model: nn.Module, norm: torch.Tensor, max_norm: float) -> None:
    """Scales all gradients so that the norm of the whole gradient is at most ``max_norm``; 0 changes nothing.

    Args:
        norm: the present norm of the whole gradient, a scalar.
    """
    if max_norm <= 0:
        return
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    grads = [
        p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad
        for p in model.parameters()
        if p.grad is not None
    ]
    if grads:
        torch._foreach_mul_(grads, scale.to(grads[0]))
