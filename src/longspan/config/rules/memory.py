"""The rules between the keys of memory and precision."""

from __future__ import annotations

from longspan.config.schema import TrainConfig
from longspan.errors import Problem


def memory_problems(config: TrainConfig) -> list[Problem]:
    """(keys, message) for keys that contradict or repeat each other, or have no effect."""
    found: list[Problem] = []
    shards = config.tiled_mlp_num_shards
    if shards is not None and not config.tiled_mlp:
        text = (
            f"tiled_mlp_num_shards {shards} has no effect without tiled_mlp: true. Set it, or leave it out."
        )
        found.append((("tiled_mlp_num_shards", "tiled_mlp"), text))
    if config.gradient_checkpointing == "offload" and config.activation_offloading:
        text = (
            "gradient_checkpointing: offload moves what it keeps already; activation_offloading: true adds nothing. Leave "
            "activation_offloading out, or keep it with gradient_checkpointing: selective or false."
        )
        found.append((("gradient_checkpointing", "activation_offloading"), text))
    if config.torch_compile is True and config.deterministic_mode:
        text = (
            "torch_compile: true with deterministic_mode: true: the compiler chooses kernels by timing them, so two runs may add "
            "numbers up in another order. Leave one of them out."
        )
        found.append((("torch_compile", "deterministic_mode"), text))
    if config.tf32 is True and config.params_dtype == "float64":
        text = (
            "tf32: true with params_dtype: float64 has no effect: TensorFloat-32 is for float32 products. Use float32, or leave "
            "tf32 out."
        )
        found.append((("tf32", "params_dtype"), text))
    if config.bf16 is True and config.params_dtype == "float64":
        found.append(
            (("bf16", "params_dtype"), "bf16: true with params_dtype: float64. Use float32, or bf16: false.")
        )
    return found
