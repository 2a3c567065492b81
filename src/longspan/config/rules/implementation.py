"""The rules of models that transformers' own class computes (``model_implementation: transformers``)."""

from __future__ import annotations

from collections.abc import Iterator

from longspan.config.schema import TrainConfig
from longspan.errors import Problem

#: key -> (the value without effect, why transformers' class does not have it and what to do)
NOT_OF_A_CLASS = {
    "tensor_parallel_size": (1, "its weights are not cut. Use context_parallel_size and dp_shard_size"),
    "pipeline_parallel_size": (1, "its layers are not put into stages. Use context_parallel_size and dp_shard_size"),
    "expert_parallel_size": (1, "its experts stay together, and FSDP shards them. Use dp_shard_size"),
    "activation_offloading": (False, "its activations stay on the device. Use gradient_checkpointing: true"),
    "tiled_mlp": (False, "its MLPs are computed whole. Use gradient_checkpointing: true"),
    "torch_compile": (True, "it is not compiled. Leave it out"),
    "rope_scaling": (None, "it reads its own from config.json. Set it there"),
    "lora_model_dir": (None, "adapters start anew. Merge those into base_model first (longspan convert --lora or PEFT)"),
}  # fmt: skip


def implementation_problems(config: TrainConfig) -> Iterator[Problem]:
    """(keys, message) for keys that transformers' own class does not have."""
    key = "model_implementation"
    if config.model_implementation != "transformers":
        return
    if config.base_model is None:
        text = "model_implementation: transformers needs base_model, whose config.json names the class. Give it, or leave this out."
        yield (key, "base_model"), text
    name = f"this model is computed by transformers' own class ({key}: transformers), and"
    for asked, (off, why) in NOT_OF_A_CLASS.items():
        value = getattr(config, asked)
        # torch_compile asks for something only as true, the other keys by any value but the one without effect.
        if (value is True) if asked == "torch_compile" else value != off:
            yield (asked, key), f"{asked} {_shown(value)}: {name} {why}."
    if config.gradient_checkpointing in ("selective", "offload"):
        text = f"gradient_checkpointing: {config.gradient_checkpointing}: {name} recomputes whole layers only. Use true."
        yield ("gradient_checkpointing", key), text
    if config.reset_position_ids != config.reset_attention_mask:
        text = (
            f"reset_position_ids {_shown(config.reset_position_ids)} with reset_attention_mask {_shown(config.reset_attention_mask)}: "
            f"{name} takes the places where positions begin anew as ends of documents. Set both, or neither."
        )
        yield ("reset_position_ids", "reset_attention_mask", key), text


def _shown(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
