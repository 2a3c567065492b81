"""The rules between the keys of low-rank adapters."""

from __future__ import annotations

from typing import Any

from longspan.config.lora import ALL_TARGETS, linear_targets, lora_of, read_peft_config
from longspan.config.recurrent import mixers_of
from longspan.config.schema import TrainConfig
from longspan.errors import Problem, UserError, did_you_mean

#: keys of adapters -> the value that has no effect
KEYS: dict[str, Any] = {
    "lora_r": None,
    "lora_alpha": None,
    "lora_dropout": 0.0,
    "lora_target_modules": None,
    "lora_target_linear": False,
    "lora_model_dir": None,
    "peft_use_rslora": False,
}


def lora_problems(config: TrainConfig) -> list[Problem]:
    """(keys, message) for each broken rule between the keys of adapters."""
    if config.adapter is None:
        return [
            ((key, "adapter"), f"{key} {getattr(config, key)!r} has no effect without adapter: lora. Set it, or leave it out.")
            for key, off in KEYS.items()
            if getattr(config, key) != off
        ]  # fmt: skip
    found: list[Problem] = []
    if config.base_model is None:
        text = "adapter: lora needs base_model, the model whose weights stay as they are. Give one, or train all weights."
        found.append((("adapter", "base_model"), text))
    elif config.reinit_weights:
        text = "adapter: lora with reinit_weights: true would leave random weights as they are. Drop one of the two."
        found.append((("adapter", "reinit_weights"), text))
    if config.position_embedding_type == "learned_absolute":
        text = (
            "adapter: lora on a GPT-2: its query, key and value lie in one layer (c_attn), which adapters here do not reach. "
            "Train all weights, or take a Llama, Mistral or Qwen."
        )
        found.append((("adapter", "base_model"), text))
    if config.lora_r is None:
        found.append((("lora_r",), "lora_r: missing. adapter: lora needs the rank, e.g. lora_r: 16."))
    if config.lora_dropout:
        text = (
            f"lora_dropout {config.lora_dropout}: only 0 is supported. What is dropped would depend on how tokens and "
            "features are cut, and the loss must not. Set 0; weight_decay regularises too."
        )
        found.append((("lora_dropout",), text))
    found += _target_problems(config)
    found += _expert_problems(config)
    mixers = mixers_of(config.layer_types, config.hybrid_override_pattern) or ()
    if "mamba" in mixers and "out_proj" in (config.lora_target_modules or ()):
        text = (
            "lora_target_modules: out_proj of a model with Mamba-2 layers: PEFT refuses such adapters, because kernels of these layers "
            "read the weight alone. Leave out_proj out; in_proj can have adapters."
        )
        found.append((("lora_target_modules",), text))
    if config.lora_model_dir is not None and not found:
        found += _start_problems(config)
    return found


def _target_problems(config: TrainConfig) -> list[Problem]:
    keys, given = ("lora_target_modules", "lora_target_linear"), config.lora_target_modules
    if given and config.lora_target_linear:
        text = "lora_target_modules and lora_target_linear are both given. Keep one: lora_target_linear stands for all."
        return [(keys, text)]
    if not given and not config.lora_target_linear:
        text = (
            "adapter: lora needs to know which layers get adapters. Give lora_target_linear: true for all, or "
            "lora_target_modules: [q_proj, v_proj], say."
        )
        return [(keys, text)]
    if config.model_implementation == "transformers":
        # Any linear layer of the class can be named; ``training.class_model`` compares the names with its layers.
        return []
    return [
        (keys[:1], f"lora_target_modules: {name!r} is none of {', '.join(ALL_TARGETS)}.{did_you_mean(name, ALL_TARGETS)}")
        for name in given or ()
        if name not in ALL_TARGETS
    ]  # fmt: skip


def _expert_problems(config: TrainConfig) -> list[Problem]:
    """Targets that only experts have: adapters belong to linear layers, and experts have none."""
    asked = set(linear_targets(config) if config.lora_target_linear else config.lora_target_modules or ())
    has_experts = config.num_moe_experts is not None
    of_mlp = [name for name in ("gate_proj", "up_proj", "down_proj") if name in asked]
    if not has_experts or config.moe_shared_expert_intermediate_size is not None or not of_mlp:
        return []
    text = (
        f"adapter: lora on {', '.join(of_mlp)} of a model with experts: adapters go to attention, and to a shared expert "
        "where there is one. Give lora_target_modules: [q_proj, k_proj, v_proj, o_proj]."
    )
    return [(("lora_target_modules", "lora_target_linear", "num_moe_experts"), text)]


def _start_problems(config: TrainConfig) -> list[Problem]:
    """Problems if the adapters in lora_model_dir are not the adapters that the config describes."""
    key = ("lora_model_dir",)
    try:
        there, _ = read_peft_config(config.lora_model_dir or "")
    except UserError as error:
        return [(key, f"lora_model_dir: {problem}") for problem in error.problems]
    here = lora_of(config)
    assert here is not None
    names = {"rank": "lora_r", "alpha": "lora_alpha", "targets": "the targets", "rslora": "peft_use_rslora"}
    shown = [(here.description()[field], there.description()[field], name) for field, name in names.items()]
    return [
        (key, f"lora_model_dir {config.lora_model_dir}: {name} there: {theirs}, in the config: {ours}. Give its own value.")
        for ours, theirs, name in shown
        if ours != theirs
    ]  # fmt: skip
