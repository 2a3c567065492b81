"""The keys that every run needs."""

from __future__ import annotations

from collections.abc import Iterator

from longspan.config.schema import TrainConfig
from longspan.errors import Problem


def missing_keys(config: TrainConfig) -> Iterator[Problem]:
    """(keys, message) for missing keys of the model, learning_rate, and reinit_weights without base_model."""
    if config.reinit_weights and config.base_model is None:
        yield ("reinit_weights",), "reinit_weights: true without base_model has no effect. Leave it out."
    missing = [k for k in ("num_layers", "hidden_size", "num_attention_heads") if getattr(config, k) is None]
    if missing:
        text = f"{', '.join(missing)}: missing. Give the architecture, or base_model: a folder that has it."
        yield tuple(missing), text
    if config.learning_rate is None:
        yield ("learning_rate",), "learning_rate: missing. A number such as 3e-4."
