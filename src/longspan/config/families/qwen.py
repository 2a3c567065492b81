"""Qwen2 (biases of query, key and value) and Qwen3 (normalised heads); a window in some layers or in none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from longspan.config.architecture import Architecture
from longspan.config.families.experts import WithExperts, layer_pattern
from longspan.config.families.family import layer_types, one_window, windows_by_type, windows_of
from longspan.config.families.rotary_decoder import RotaryDecoder, read_biases
from longspan.errors import UserError


class Qwen2(RotaryDecoder):
    model_type, architecture = "qwen2", "Qwen2ForCausalLM"
    defaults = {"rms_norm_eps": 1e-6, "num_key_value_heads": 32, "sliding_window": 4096}
    needs = RotaryDecoder.needs | {"add_bias_linear": False, "qk_layernorm": False, "add_qkv_bias": True}

    def read_pieces(self, data: Mapping[str, Any], where: str) -> dict[str, Any]:
        return {"add_qkv_bias": True}

    def read_window(self, data: Mapping[str, Any], where: str) -> int | list[int | None] | None:
        window, types = data.get("sliding_window"), data.get("layer_types")
        if not data.get("use_sliding_window") or window is None:
            return None
        if types is None:
            first = 28 if data.get("max_window_layers") is None else data["max_window_layers"]
            layers = data.get("num_hidden_layers") or 0
            types = ["full_attention" if i < first else "sliding_attention" for i in range(layers)]
        return windows_by_type(types, window, where)

    def fields(self, model: Architecture, positions: int) -> dict[str, Any]:
        windows = windows_of(model)
        return (
            super().fields(model, positions)
            | self.biases()
            | {
                "use_sliding_window": one_window(model) is not None,
                "sliding_window": one_window(model),
                # transformers reads this number if it reads no layer_types.
                "max_window_layers": next((i for i, w in enumerate(windows) if w is not None), len(windows)),
                "layer_types": layer_types(model),
            }
        )

    def biases(self) -> dict[str, Any]:
        """The fields about biases in a config.json."""
        return {}


class Qwen3(Qwen2):
    model_type, architecture = "qwen3", "Qwen3ForCausalLM"
    defaults = Qwen2.defaults | {"head_dim": 128}
    needs = RotaryDecoder.needs | {"add_bias_linear": False, "qk_layernorm": True, "add_qkv_bias": False}

    def read_pieces(self, data: Mapping[str, Any], where: str) -> dict[str, Any]:
        return read_biases(bool(data.get("attention_bias")), False, where) | {"qk_layernorm": True}

    def biases(self) -> dict[str, Any]:
        return {"attention_bias": False}


class QwenWithExperts(WithExperts):
    """What both have: the fields of the router, and layers that stay dense."""

    def read_sparse(self, data: Mapping[str, Any]) -> dict[str, Any]:
        layers, step = data.get("num_hidden_layers") or 0, data["decoder_sparse_step"]
        dense = set(data.get("mlp_only_layers") or ())
        sparse = {i for i in range(layers) if i not in dense and (i + 1) % step == 0}
        if not sparse:
            return dict.fromkeys(("num_moe_experts", "moe_ffn_hidden_size"))
        return {
            **self.read_experts(data, sorted(sparse)),
            "moe_ffn_hidden_size": data["moe_intermediate_size"],
            "moe_layer_freq": layer_pattern(sparse, layers),
            "moe_router_pre_softmax": not data.get("norm_topk_prob"),
        }

    def read_shared(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """As :meth:`read_sparse`, for a type whose experts stand beside a shared one."""
        found = self.read_sparse(data)
        if found["num_moe_experts"] is None:
            return found | {"moe_shared_expert_intermediate_size": None}
        return found | {"moe_shared_expert_gate": True}

    def sparse_fields(self, model: Architecture) -> dict[str, Any]:
        sparse = {number - 1 for number in model.expert_layers}
        return {
            "moe_intermediate_size": model.moe_ffn_hidden_size,
            "norm_topk_prob": not model.moe_router_pre_softmax,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [i for i in range(model.num_layers) if i not in sparse],
            **self.expert_fields(model),
        }


_DEFAULTS = {"decoder_sparse_step": 1, "norm_topk_prob": False, "router_aux_loss_coef": 0.001}
EXPERT_KEYS = {
    "num_experts": "num_moe_experts",
    "num_experts_per_tok": "moe_router_topk",
    "moe_intermediate_size": "moe_ffn_hidden_size",
}
#: the router and the shared expert of a layer with experts
SHARED_EXPERT = {
    "mlp.router": "mlp.gate",
    "mlp.shared_experts.linear_gate": "mlp.shared_expert.gate_proj",
    "mlp.shared_experts.linear_up": "mlp.shared_expert.up_proj",
    "mlp.shared_experts.linear_down": "mlp.shared_expert.down_proj",
    "mlp.shared_experts.gate": "mlp.shared_expert_gate",
}


class Qwen2Moe(QwenWithExperts, Qwen2):
    model_type, architecture = "qwen2_moe", "Qwen2MoeForCausalLM"
    keys = (
        Qwen2.keys | EXPERT_KEYS | {"shared_expert_intermediate_size": "moe_shared_expert_intermediate_size"}
    )
    defaults = (
        Qwen2.defaults
        | _DEFAULTS
        | {
            "num_key_value_heads": 16,
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
        }
    )
    nothing = {"sliding_window": 0}
    inside = Qwen2.inside | SHARED_EXPERT
    expert_needs = WithExperts.expert_needs | {"moe_shared_expert_gate": True, "sliding_window": None}

    def read_pieces(self, data: Mapping[str, Any], where: str) -> dict[str, Any]:
        return super().read_pieces(data, where) | self.read_shared(data)

    def read_window(self, data: Mapping[str, Any], where: str) -> int | list[int | None] | None:
        _refuse_window(data, where)
        return None

    def fields(self, model: Architecture, positions: int) -> dict[str, Any]:
        shared = {"shared_expert_intermediate_size": model.moe_shared_expert_intermediate_size}
        return super().fields(model, positions) | self.sparse_fields(model) | shared


class Qwen3Moe(QwenWithExperts, Qwen3):
    model_type, architecture = "qwen3_moe", "Qwen3MoeForCausalLM"
    keys = Qwen3.keys | EXPERT_KEYS
    defaults = (
        Qwen3.defaults
        | _DEFAULTS
        | {
            "num_key_value_heads": 4,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
        }
    )
    inside = Qwen3.inside | {"mlp.router": "mlp.gate"}
    expert_needs = WithExperts.expert_needs | {
        "moe_shared_expert_intermediate_size": None,
        "sliding_window": None,
    }

    def read_pieces(self, data: Mapping[str, Any], where: str) -> dict[str, Any]:
        return super().read_pieces(data, where) | self.read_sparse(data)

    def read_window(self, data: Mapping[str, Any], where: str) -> int | list[int | None] | None:
        _refuse_window(data, where)
        return None

    def fields(self, model: Architecture, positions: int) -> dict[str, Any]:
        return super().fields(model, positions) | self.sparse_fields(model)


def _refuse_window(data: Mapping[str, Any], where: str) -> None:
    if data.get("use_sliding_window"):
        raise UserError(
            f"base_model: {where} sets use_sliding_window, which is not supported for a Qwen with experts."
        )
