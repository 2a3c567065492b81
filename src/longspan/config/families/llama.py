"""Llama: biases in all linear layers or in none, and no windows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from longspan.config.architecture import Architecture
from longspan.config.families.family import one_window
from longspan.config.families.rotary_decoder import RotaryDecoder, read_biases


class Llama(RotaryDecoder):
    model_type, architecture = "llama", "LlamaForCausalLM"
    defaults = {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048}
    needs = RotaryDecoder.needs | {"qk_layernorm": False, "add_qkv_bias": False}

    def read_pieces(self, data: Mapping[str, Any], where: str) -> dict[str, Any]:
        return read_biases(bool(data.get("attention_bias")), bool(data.get("mlp_bias")), where)

    def holds(self, model: Architecture) -> bool:
        # transformers' Llama has no window, even if its config.json names one.
        return super().holds(model) and one_window(model) is None

    def fields(self, model: Architecture, positions: int) -> dict[str, Any]:
        biases = {"attention_bias": model.add_bias_linear, "mlp_bias": model.add_bias_linear}
        return super().fields(model, positions) | biases
