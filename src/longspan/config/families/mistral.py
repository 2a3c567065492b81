"""Mistral and Ministral: no biases; one sliding window in all layers, or (Ministral) in some layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from longspan.config.architecture import Architecture
from longspan.config.families.experts import WithExperts
from longspan.config.families.family import layer_types, one_window, windows_by_type, windows_of
from longspan.config.families.rotary_decoder import RotaryDecoder
from longspan.errors import UserError


class Mistral(RotaryDecoder):
    model_type, architecture = "mistral", "MistralForCausalLM"
    defaults = {"rms_norm_eps": 1e-6, "num_key_value_heads": 8, "sliding_window": 4096}
    needs = RotaryDecoder.needs | {"add_bias_linear": False, "qk_layernorm": False, "add_qkv_bias": False}

    def read_window(self, data: Mapping[str, Any], where: str) -> int | list[int | None] | None:
        return data.get("sliding_window")

    def holds(self, model: Architecture) -> bool:
        return super().holds(model) and len(set(windows_of(model))) == 1

    def fields(self, model: Architecture, positions: int) -> dict[str, Any]:
        return super().fields(model, positions) | {"sliding_window": one_window(model)}


class Ministral(Mistral):
    model_type, architecture = "ministral", "MinistralForCausalLM"

    def read_window(self, data: Mapping[str, Any], where: str) -> int | list[int | None] | None:
        window, types = data.get("sliding_window"), data.get("layer_types")
        return window if window is None or types is None else windows_by_type(types, window, where)

    def holds(self, model: Architecture) -> bool:
        return not self.missing(model)

    def fields(self, model: Architecture, positions: int) -> dict[str, Any]:
        return super().fields(model, positions) | {"layer_types": layer_types(model)}


class Mixtral(WithExperts, Mistral):
    model_type, architecture = "mixtral", "MixtralForCausalLM"
    count, prefix = "num_local_experts", "block_sparse_moe.experts"
    matrices = {"gate_weight": "w1", "up_weight": "w3", "down_weight": "w2"}
    keys = Mistral.keys | {"num_local_experts": "num_moe_experts", "num_experts_per_tok": "moe_router_topk"}
    defaults = {
        "rms_norm_eps": 1e-5,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "router_aux_loss_coef": 0.001,
        "rope_theta": 1e6,
    }
    inside = Mistral.inside | {"mlp.router": "block_sparse_moe.gate"}
    expert_needs = WithExperts.expert_needs | {
        "moe_router_pre_softmax": False,
        "moe_layer_freq": 1,
        "moe_shared_expert_intermediate_size": None,
    }

    def read_pieces(self, data: Mapping[str, Any], where: str) -> dict[str, Any]:
        if data.get("router_jitter_noise"):
            raise UserError(
                f"base_model: {where} sets router_jitter_noise {data['router_jitter_noise']}: noise on the router's input is not "
                "supported, because it would depend on the layout."
            )
        return self.read_experts(data, list(range(data.get("num_hidden_layers") or 1)))

    def fields(self, model: Architecture, positions: int) -> dict[str, Any]:
        sizes = {"intermediate_size": model.moe_ffn_hidden_size, "router_jitter_noise": 0.0}
        return super().fields(model, positions) | sizes | self.expert_fields(model)
