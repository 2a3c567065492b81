"""AdamW, and clipping by the one true gradient norm."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from longspan.config.schema import TrainConfig


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW of what is trained; weight decay acts on matrices only, not on norms and biases."""
    assert config.learning_rate is not None
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(
        groups,
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        fused=config.optimizer == "adamw_torch_fused",
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = value


@torch.no_grad()
def clip_gradients(model: nn.Module, norm: torch.Tensor, max_norm: float) -> None:
    """Scales all gradients so that the whole gradient's norm is at most ``max_norm`` (0: as they are)."""
    if max_norm <= 0:
        return
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    grads = [
        p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad
        for p in model.parameters()
        if p.grad is not None
    ]
    torch._foreach_mul_(grads, scale.to(grads[0].dtype))
