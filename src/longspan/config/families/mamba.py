"""Mamba-2, and Nemotron-H: Mamba-2, attention without positions, MLPs and experts, a part a layer.

longspan                                        Mamba-2 (backbone.)             Nemotron-H (backbone. or model.)
decoder.layers.I.input_layernorm                layers.I.norm                   layers.I.norm
decoder.layers.I.pre_mlp_layernorm                                              layers.I.norm
decoder.layers.I.mixer.in_proj                  layers.I.mixer.in_proj          layers.I.mixer.in_proj
decoder.layers.I.self_attention.linear_q                                        layers.I.mixer.q_proj
decoder.layers.I.mlp.linear_up                                                  layers.I.mixer.up_proj
decoder.layers.I.mlp.router                                                     layers.I.mixer.gate
decoder.layers.I.mlp.experts.up_weight                                          layers.I.mixer.experts.J.up_proj
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from longspan.config.architecture import Architecture
from longspan.config.families.experts import WithExperts
from longspan.config.families.family import Place, activation_name
from longspan.config.families.recurrent import WithMamba
from longspan.config.recurrent import LETTERS, LayerParts
from longspan.errors import UserError


class _Mamba(WithMamba):
    """What both types have in common."""

    layers = "backbone.layers"
    outside = {
        "embedding.word_embeddings": "backbone.embeddings",
        "decoder.final_layernorm": "backbone.norm_f",
        "output_layer": "lm_head",
    }
    inside = WithMamba.of_mixer | {"input_layernorm": "norm"}
    needs = {
        "position_embedding_type": "none",
        "normalization": "RMSNorm",
        "qk_layernorm": False,
        "add_qkv_bias": False,
        "sliding_window": None,
    }

    def missing(self, model: Architecture) -> list[str]:
        found = super().missing(model)
        if not model.mamba_grouped_norm and model.mamba_num_groups > 1:
            found += self.differences(model, {"mamba_grouped_norm": True})
        return found


class Mamba2(_Mamba):
    model_type, architecture = "mamba2", "Mamba2ForCausalLM"
    kinds = (LayerParts("mamba", None),)
    keys = {
        "num_hidden_layers": "num_layers",
        "hidden_size": "hidden_size",
        "vocab_size": "vocab_size",
        "layer_norm_epsilon": "layernorm_epsilon",
        "tie_word_embeddings": "tie_word_embeddings",
        "initializer_range": "init_method_std",
        "num_heads": "mamba_num_heads",
        "head_dim": "mamba_head_dim",
        "n_groups": "mamba_num_groups",
        "state_size": "mamba_state_dim",
        "conv_kernel": "mamba_conv_kernel_dim",
        "use_conv_bias": "mamba_conv_bias",
        "use_bias": "add_bias_linear",
    }
    defaults = {
        "layer_norm_epsilon": 1e-5,
        "num_heads": 128,
        "head_dim": 64,
        "n_groups": 8,
        "state_size": 128,
        "conv_kernel": 4,
        "use_conv_bias": True,
        "use_bias": False,
    }
    supported = {"hidden_act": ("silu", "swish")}

    def read(self, data: Mapping[str, Any], where: str) -> dict[str, Any]:
        inner, expanded = (
            data["num_heads"] * data["head_dim"],
            data.get("expand", 2) * (data.get("hidden_size") or 0),
        )
        if inner != expanded:
            raise UserError(
                f"base_model: {where} sets expand {data.get('expand', 2)}, which makes {expanded} features, and num_heads x head_dim "
                f"{inner}. The two must be equal."
            )
        return {
            "hybrid_override_pattern": "M" * (data.get("num_hidden_layers") or 0),
            "position_embedding_type": "none",
            # There is no attention, so these have no effect.
            "num_attention_heads": 1,
            "mamba_dt_min": _least_step(data.get("time_step_limit"), where),
        }

    def missing(self, model: Architecture) -> list[str]:
        found = super().missing(model)
        if "mamba" in model.mixers and (model.mamba_num_heads * model.mamba_head_dim) % model.hidden_size:
            found.append(
                f"mamba_num_heads {model.mamba_num_heads} x mamba_head_dim {model.mamba_head_dim} (needs a multiple of hidden_size)"
            )
        return found

    def fields(self, model: Architecture, positions: int) -> dict[str, Any]:
        inner = model.mamba_num_heads * model.mamba_head_dim
        own = {
            "expand": inner // model.hidden_size,
            "hidden_act": "silu",
            "time_step_limit": [model.mamba_dt_min, {"__float__": "Infinity"}],
        }
        return self.plain_fields(model) | own


#: Nemotron-H's names of layers in a list -> the letter in a pattern; the first name of a letter is written
_LETTERS = {
    "linear_attention": "M",
    "full_attention": "*",
    "mlp": "-",
    "moe": "E",
    "mamba": "M",
    "attention": "*",
}
#: names of fields in older files -> the names of today
_OLDER = {
    "mamba_n_groups": "n_groups",
    "mamba_d_conv": "conv_kernel",
    "mamba_dt_min": "time_step_min",
    "mamba_conv_bias": "use_conv_bias",
    "num_local_experts": "n_routed_experts",
    "layer_types": "layers_block_type",
}


class NemotronH(WithExperts, _Mamba):
    model_type, architecture = "nemotron_h", "NemotronHForCausalLM"
    sparse = (False, True)
    kinds = tuple(LETTERS[letter] for letter in "M*-E")
    count, prefix = "n_routed_experts", "mixer.experts"
    matrices = {"up_weight": "up_proj", "down_weight": "down_proj"}
    activation = "mlp_hidden_act"
    keys = {
        "hidden_size": "hidden_size",
        "vocab_size": "vocab_size",
        "num_attention_heads": "num_attention_heads",
        "num_key_value_heads": "num_query_groups",
        "head_dim": "kv_channels",
        "intermediate_size": "ffn_hidden_size",
        "layer_norm_epsilon": "layernorm_epsilon",
        "tie_word_embeddings": "tie_word_embeddings",
        "initializer_range": "init_method_std",
        "max_position_embeddings": "max_position_embeddings",
        "mamba_num_heads": "mamba_num_heads",
        "mamba_head_dim": "mamba_head_dim",
        "n_groups": "mamba_num_groups",
        "ssm_state_size": "mamba_state_dim",
        "conv_kernel": "mamba_conv_kernel_dim",
        "use_conv_bias": "mamba_conv_bias",
        "time_step_min": "mamba_dt_min",
        "moe_intermediate_size": "moe_ffn_hidden_size",
        "moe_shared_expert_intermediate_size": "moe_shared_expert_intermediate_size",
        "n_routed_experts": "num_moe_experts",
        "num_experts_per_tok": "moe_router_topk",
    }
    defaults = {
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 21504,
        "layer_norm_epsilon": 1e-5,
        "max_position_embeddings": 4096,
        "mlp_hidden_act": "relu2",
        "mamba_num_heads": 128,
        "mamba_head_dim": 64,
        "n_groups": 8,
        "ssm_state_size": 128,
        "conv_kernel": 4,
        "use_conv_bias": True,
        "time_step_min": 0.001,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 7688,
        "moe_shared_expert_intermediate_size": 7688,
    }
    supported = {
        "mamba_hidden_act": ("silu", "swish"),
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "use_bias": (False,),
        "mamba_proj_bias": (False,),
        "sliding_window": (None,),
        "attention_dropout": (0,),
        "hidden_dropout": (0,),
        "moe_latent_size": (None,),
        "norm_topk_prob": (True,),
    }
    left_out = ("mtp.", "backbone.mtp.")
    needs = _Mamba.needs | {"gated_linear_unit": False, "add_bias_linear": False}
    expert_needs = {
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_shared_expert_gate": False,
        "moe_expert_capacity_factor": None,
    }
    inside = _Mamba.inside | {
        "pre_mlp_layernorm": "norm",
        "self_attention.linear_q": "mixer.q_proj",
        "self_attention.linear_k": "mixer.k_proj",
        "self_attention.linear_v": "mixer.v_proj",
        "self_attention.linear_proj": "mixer.o_proj",
        "mlp.linear_up": "mixer.up_proj",
        "mlp.linear_down": "mixer.down_proj",
        "mlp.router": "mixer.gate",
        "mlp.shared_experts.linear_up": "mixer.shared_experts.up_proj",
        "mlp.shared_experts.linear_down": "mixer.shared_experts.down_proj",
    }

    def renamed(self, data: Mapping[str, Any]) -> dict[str, Any]:
        return {_OLDER.get(field, field): value for field, value in data.items()}

    def read(self, data: Mapping[str, Any], where: str) -> dict[str, Any]:
        pattern = _pattern(data, where)
        found = {
            "num_layers": len(pattern),
            "hybrid_override_pattern": pattern,
            "position_embedding_type": "none",
            "gated_linear_unit": False,
        }
        if "E" not in pattern:
            return found | {"num_moe_experts": None}
        topk, groups = data["num_experts_per_tok"], data.get("n_group") or 1
        if topk < 2:
            raise UserError(
                f"base_model: {where} sets num_experts_per_tok {topk}: the score of a single expert is divided by itself there, "
                "which is not supported. It is 2 or more."
            )
        if groups > 1 and topk != 2 * data["topk_group"]:
            raise UserError(
                f"base_model: {where} sets n_group {groups}, topk_group {data['topk_group']} and num_experts_per_tok {topk}: the score "
                "of a group is the sum of its two best experts, which is supported where num_experts_per_tok is 2 x topk_group."
            )
        factor = float(data.get("routed_scaling_factor") or 1.0)
        return found | {
            "moe_router_score_function": "sigmoid",
            "moe_router_enable_expert_bias": True,
            "moe_router_num_groups": groups if groups > 1 else None,
            "moe_router_group_topk": data["topk_group"] if groups > 1 else None,
            "moe_router_topk_scaling_factor": None if factor == 1.0 else factor,
        }

    def missing(self, model: Architecture) -> list[str]:
        found = super().missing(model)
        if model.hybrid_override_pattern is None:
            found.append("hybrid_override_pattern null (needs a part a layer)")
        if model.num_moe_experts is not None:
            if model.moe_shared_expert_intermediate_size is None:
                found.append("moe_shared_expert_intermediate_size null (needs a size)")
            best = model.moe_router_group_topk
            if model.moe_router_topk < 2 or (best is not None and model.moe_router_topk != 2 * best):
                found.append(
                    f"moe_router_topk {model.moe_router_topk} (needs 2 or more, and 2 x moe_router_group_topk)"
                )
        return found

    def fields(self, model: Architecture, positions: int) -> dict[str, Any]:
        names = {letter: name for name, letter in reversed(_LETTERS.items())}
        pattern = model.hybrid_override_pattern or ""
        found = self.plain_fields(model) | {
            "num_hidden_layers": model.num_layers,
            "layers_block_type": [names[letter] for letter in pattern],
            "mlp_hidden_act": activation_name(model.activation_func),
            "max_position_embeddings": positions,
            "mamba_hidden_act": "silu",
        }
        if model.mamba_num_heads is None:
            found = {field: value for field, value in found.items() if value is not None}
        if model.num_moe_experts is None:
            of_experts = ("n_routed_experts", "num_experts_per_tok", "moe_")
            return {field: value for field, value in found.items() if not field.startswith(of_experts)}
        groups = model.moe_router_num_groups
        return found | {
            "n_shared_experts": 1,
            "n_group": groups or 1,
            "topk_group": model.moe_router_group_topk or 1,
            "routed_scaling_factor": model.moe_router_topk_scaling_factor or 1.0,
            "norm_topk_prob": True,
        }

    def tensor_name(self, name: str) -> str:
        return super().tensor_name(name).replace(".gate.expert_bias", ".gate.e_score_correction_bias")

    def module_name(self, tensor: str) -> str:
        return tensor.replace("backbone.", "model.", 1)

    def ways(self, name: str, model: Architecture) -> list[list[Place]]:
        """transformers writes ``backbone``, as the published files have it, and names its own modules ``model``."""
        written = self.places(name, model)
        others = [place._replace(name=self.module_name(place.name)) for place in written]
        return [written, others]


def _pattern(data: Mapping[str, Any], where: str) -> str:
    """The letters of Nemotron-H's layers.

    Raises:
        UserError: there are no layers, or one has another type.
    """
    types, pattern = data.get("layers_block_type"), data.get("hybrid_override_pattern")
    if types is None:
        types = list(pattern) if isinstance(pattern, str) else None
    if not isinstance(types, list) or not types:
        raise UserError(
            f"base_model: {where} has no layers_block_type (a list of types) and no hybrid_override_pattern (letters), which name "
            "the layers. Download it again."
        )
    known = {**_LETTERS, **{letter: letter for letter in "M*-E"}}
    if others := sorted({str(one) for one in types} - known.keys()):
        field = "layers_block_type" if data.get("layers_block_type") else "hybrid_override_pattern"
        raise UserError(
            f"base_model: {where} has {', '.join(others)} in {field}; a layer is one of {', '.join(known)}."
        )
    return "".join(known[one] for one in types)


def _least_step(limits: Any, where: str) -> float:
    """The lower one of Mamba-2's ``time_step_limit``.

    Raises:
        UserError: there is an upper limit, or these are no limits.
    """
    if limits is None:
        return 0.0
    if isinstance(limits, list) and len(limits) == 2:
        low, high = (math.inf if one in ({"__float__": "Infinity"}, "Infinity") else one for one in limits)
        numbers = all(isinstance(one, int | float) and not isinstance(one, bool) for one in (low, high))
        if numbers and low >= 0 and high == math.inf:
            return float(low)
    raise UserError(
        f"base_model: {where} sets time_step_limit {limits!r}; only [a number from 0 on, Infinity] is supported: step sizes have no "
        "upper limit."
    )
