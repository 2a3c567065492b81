"""Qwen2 (biases of query, key and value) and Qwen3 (normalised heads); a window in some layers or in none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from longspan.config.architecture import Architecture
from longspan.config.families.family import layer_types, one_window, windows_by_type, windows_of
from longspan.config.families.rotary_decoder import RotaryDecoder, read_biases


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
        return super().fields(model, positions) | {
            "use_sliding_window": one_window(model) is not None,
            "sliding_window": one_window(model),
            # transformers reads this number if it reads no layer_types.
            "max_window_layers": next((i for i, w in enumerate(windows) if w is not None), len(windows)),
            "layer_types": layer_types(model),
        }


class Qwen3(Qwen2):
    model_type, architecture = "qwen3", "Qwen3ForCausalLM"
    defaults = Qwen2.defaults | {"head_dim": 128}
    needs = RotaryDecoder.needs | {"add_bias_linear": False, "qk_layernorm": True, "add_qkv_bias": False}

    def read_pieces(self, data: Mapping[str, Any], where: str) -> dict[str, Any]:
        return read_biases(bool(data.get("attention_bias")), False, where) | {"qk_layernorm": True}

    def fields(self, model: Architecture, positions: int) -> dict[str, Any]:
        return super().fields(model, positions) | {"attention_bias": False}
