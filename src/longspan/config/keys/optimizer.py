"""The optimizer's constants."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

from longspan.config.keys.declare import key


class OptimizerKeys(BaseModel):
    """The optimizer's constants."""

    optimizer: Literal["adamw_torch_fused", "adamw_torch"] = key("adamw_torch_fused", "AdamW, fused or not.")
    learning_rate: float | None = key(None, "Peak learning rate.", flag="--lr", ge=0)
    weight_decay: float = key(0.0, "AdamW's, on matrices only.", megatron_default=0.01, ge=0)
    adam_beta1: float = key(0.9, "AdamW's beta 1.", ge=0, lt=1)
    adam_beta2: float = key(0.999, "AdamW's beta 2.", ge=0, lt=1)
    adam_epsilon: float = key(1e-8, "AdamW's epsilon.", flag="--adam-eps", ge=0)
    max_grad_norm: float = key(
        1.0,
        "Gradients are scaled down to this norm; 0 switches clipping off.",
        flag="--clip-grad",
        ge=0,
    )
    nan_policy: Literal["stop", "skip", "roll_back"] = key(
        "stop",
        "What a step does whose loss or gradients are infinite or NaN: stop ends the run, skip leaves the weights as they are (not "
        "ten times in a row), roll_back returns to the last checkpoint and leaves the batch out (not twice before the next one).",
    )
