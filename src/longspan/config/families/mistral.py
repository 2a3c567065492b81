"""Mistral and Ministral: no biases; one sliding window in all layers, or (Ministral) in some layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from longspan.config.architecture import Architecture
from longspan.config.families.family import layer_types, one_window, windows_by_type, windows_of
from longspan.config.families.rotary_decoder import RotaryDecoder


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
