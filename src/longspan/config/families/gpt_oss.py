"""gpt-oss (OpenAI 2025, arXiv 2508.10925): attention sinks, alternating windows, experts with biases, and a clamped gate.

    decoder.layers.I.self_attention.sinks.weight    [n]         model.layers.I.self_attn.sinks
    decoder.layers.I.mlp.router                                 model.layers.I.mlp.router, .weight and .bias
    decoder.layers.I.mlp.experts.gate_weight        [E, f, h]   ... .mlp.experts.gate_up_proj [E, h, 2f], columns 0, 2, ..
    decoder.layers.I.mlp.experts.up_weight          [E, f, h]   columns 1, 3, .. of the same
    decoder.layers.I.mlp.experts.down_weight        [E, h, f]   ... .mlp.experts.down_proj [E, f, h]
    decoder.layers.I.mlp.experts.{gate,up,down}_bias            ... gate_up_proj_bias [E, 2f], down_proj_bias [E, h]

The published weights of the experts are MXFP4, gate_up_proj_blocks and gate_up_proj_scales in place of gate_up_proj, with
a row for each column of it. They are read as bfloat16, and are written as they are here: whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from longspan.config.architecture import Architecture
from longspan.config.families.experts import WithExperts
from longspan.config.families.family import Place, layer_types, one_window, windows_by_type
from longspan.config.families.rotary_decoder import RotaryDecoder

#: our tensor of experts -> (theirs, which of the rows in turn, of how many)
_EXPERTS = {
    "gate_weight": ("gate_up_proj", (0, 2)),
    "up_weight": ("gate_up_proj", (1, 2)),
    "down_weight": ("down_proj", (0, 1)),
    "gate_bias": ("gate_up_proj_bias", (0, 2)),
    "up_bias": ("gate_up_proj_bias", (1, 2)),
    "down_bias": ("down_proj_bias", (0, 1)),
}
_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


class GptOss(WithExperts, RotaryDecoder):
    model_type, architecture = "gpt_oss", "GptOssForCausalLM"
    count = "num_local_experts"
    quantised = ("mxfp4",)
    keys = RotaryDecoder.keys | {
        "num_local_experts": "num_moe_experts",
        "num_experts_per_tok": "moe_router_topk",
        "swiglu_limit": "activation_func_clamp_value",
    }
    defaults = {
        "rms_norm_eps": 1e-5,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "sliding_window": 128,
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
        "router_aux_loss_coef": 0.001,
        "swiglu_limit": 7.0,
        "rope_theta": 150000.0,
        "max_position_embeddings": 131072,
    }
    required: ClassVar[tuple[str, ...]] = (
        "num_local_experts",
        "num_experts_per_tok",
        "swiglu_limit",
        "rope_theta",
    )
    # transformers reads neither hidden_act nor a switch for the biases of the experts.
    supported = {
        "hidden_act": ("silu", "swish"),
        "attention_bias": (True,),
        "attention_dropout": (0,),
        "swiglu_alpha": (1.702,),
    }
    free = ("activation_func_clamp_value",)
    needs = RotaryDecoder.needs | {
        "activation_func": "quick_gelu",
        "glu_linear_offset": 1.0,
        "add_bias_linear": True,
        "qk_layernorm": False,
        "softmax_type": "learnable",
    }
    expert_needs = WithExperts.expert_needs | {
        "moe_router_bias": True,
        "moe_router_pre_softmax": False,
        "moe_router_enable_expert_bias": False,
        "moe_layer_freq": 1,
        "moe_shared_expert_intermediate_size": None,
    }
    inside = RotaryDecoder.inside | {"mlp.router": "mlp.router", "self_attention": "self_attn"}

    def renamed(self, data: Mapping[str, Any]) -> Mapping[str, Any]:
        """Published files name the number of chosen experts twice, the first time as ``experts_per_token``."""
        older = data.get("experts_per_token")
        return data if older is None else {"num_experts_per_tok": older, **data}

    def read_pieces(self, data: Mapping[str, Any], where: str) -> dict[str, Any]:
        found = {name: self.needs[name] for name in ("glu_linear_offset", "add_bias_linear", "softmax_type")}
        found |= {"activation_func": "quick_gelu", "moe_router_bias": True}
        return found | self.read_experts(data, list(range(data.get("num_hidden_layers") or 1)))

    def read(self, data: Mapping[str, Any], where: str) -> dict[str, Any]:
        if data.get("rope_scaling") is None and data.get("rope_parameters") is None:
            data = {**data, "rope_parameters": _ROPE}
        return super().read(data, where)

    def read_window(self, data: Mapping[str, Any], where: str) -> int | list[int | None] | None:
        window, types = data.get("sliding_window"), data.get("layer_types")
        if types is None:
            kinds = ("sliding_attention", "full_attention")
            types = [kinds[index % 2] for index in range(data.get("num_hidden_layers") or 0)]
        return None if window is None else windows_by_type(types, window, where)

    def missing(self, model: Architecture) -> list[str]:
        found = super().missing(model)
        if model.activation_func_clamp_value is None:
            found.append("activation_func_clamp_value null (needs a number)")
        return found

    def fields(self, model: Architecture, positions: int) -> dict[str, Any]:
        found = super().fields(model, positions) | self.expert_fields(model)
        return found | {
            "intermediate_size": model.moe_ffn_hidden_size,
            "hidden_act": "silu",
            "attention_bias": True,
            "swiglu_alpha": 1.702,
            "swiglu_limit": model.activation_func_clamp_value,
            "sliding_window": one_window(model),
            "layer_types": layer_types(model),
        }

    def places(self, name: str, model: Architecture) -> list[Place]:
        module, _, part = name.rpartition(".")
        if module.endswith("mlp.experts"):
            theirs, turn = _EXPERTS[part]
            tensor = self.tensor_name(f"{module.removesuffix('.experts')}.router.{theirs}")
            matrix = part.endswith("weight")
            return [Place(tensor.replace(".router.", ".experts."), transposed=matrix, turn=turn)]
        if module.endswith(".sinks"):
            return [Place(self.tensor_name(module))]
        return super().places(name, model)

    def ways(self, name: str, model: Architecture) -> list[list[Place]]:
        """As whole weights, or in MXFP4, whose rows and columns are those of a linear layer."""
        (place,) = written = self.places(name, model)
        if not name.endswith(("mlp.experts.gate_weight", "experts.up_weight", "experts.down_weight")):
            return [written]
        packed = Place(f"{place.name}_blocks", turn=place.turn, scales=f"{place.name}_scales")
        return [written, [packed]]
