"""A config as the arguments that a script written for Megatron-LM reads, such as ``args.seq_length``."""

from __future__ import annotations

from typing import Any

from longspan.config.architecture import Architecture
from longspan.config.model import padded_vocab_size
from longspan.config.run import sizes_of
from longspan.config.schema import TrainConfig, keys
from longspan.config.sizes import MeshSizes

#: Megatron-LM prints every so many steps if no number is given.
LOG_INTERVAL = 100


def argument_name(flag: str) -> str:
    """``--seq-length`` -> ``seq_length``"""
    return flag.removeprefix("--").replace("-", "_")


def as_arguments(config: TrainConfig) -> dict[str, Any]:
    """The values of a complete config by the names of Megatron-LM's arguments, and by those of the keys.

    An argument's name is that of its flag, with underscores. A flag without a value, such as
    ``--untie-embeddings-and-output-weights``, is true or false. Sizes of the model that follow from other
    sizes are filled in if the config has a model. A value that Megatron-LM writes otherwise is written in its
    way.
    """
    values = {k.name: getattr(config, k.name) for k in keys()}
    if None not in (config.num_layers, config.hidden_size, config.num_attention_heads):
        model = Architecture.of(config)
        values |= {name: model_value for name, model_value in model.keys("shapes").items() if name in values}
    values["logging_steps"] = config.logging_steps or LOG_INTERVAL
    values["min_lr"] = _min_lr(config)
    # A script that finds no folder saves nothing, so that the default of a run's folder does not count.
    values["output_dir"] = config.output_dir if "output_dir" in config.model_fields_set else None
    found: dict[str, Any] = {}
    for k in keys():
        found |= dict.fromkeys((k.name, argument_name(k.flag)), values[k.name])
        found |= {argument_name(switch): values[k.name] == fixed for switch, fixed in k.switches.items()}
    return found | _of_megatron(config, sizes_of(config))


def _min_lr(config: TrainConfig) -> float:
    """The end of the schedule: ``min_lr``, or the share of the peak that stands for it."""
    return (
        config.cosine_min_lr_ratio * (config.learning_rate or 0.0) if config.min_lr is None else config.min_lr
    )


def _of_megatron(config: TrainConfig, sizes: MeshSizes) -> dict[str, Any]:
    """Arguments of Megatron-LM that no key has, or whose values are written otherwise there."""
    virtual = config.virtual_pipeline_parallel_size or 1
    recompute = config.gradient_checkpointing
    return {
        "world_size": sizes.world_size,
        "data_parallel_size": sizes.dp,
        "virtual_pipeline_model_parallel_size": virtual if virtual > 1 else None,
        "sequence_parallel": bool(config.sequence_parallel),
        "expert_tensor_parallel_size": sizes.etp or sizes.tp,
        "optimizer": "adam",
        "fp16": False,
        "recompute_granularity": "full" if recompute is True else recompute or None,
        "swiglu": config.gated_linear_unit and config.activation_func == "silu",
        "padded_vocab_size": None if config.vocab_size is None else padded_vocab_size(config.vocab_size),
    }
