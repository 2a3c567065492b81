"""OLMo Hybrid: the gated delta rule and attention, mostly in a ratio of 3 to 1; attention's norms come behind its parts.

    longspan                                           Hugging Face                                        also read
    decoder.layers.I.mixer.in_proj                     model.layers.I.linear_attn.{q,k,v,g,b,a}_proj
    decoder.layers.I.mixer.conv1d                      model.layers.I.linear_attn.{q,k,v}_conv1d           conv1d
    decoder.layers.I.self_attention.{q,k}_layernorm    model.layers.I.self_attn.{q,k}_norm, of all heads together
    decoder.layers.I.input_layernorm                   model.layers.I.attention_layer_norm                 input_layernorm
    decoder.layers.I.pre_mlp_layernorm                 model.layers.I.feedforward_layer_norm               post_attention_layernorm
    decoder.layers.I.post_attention_layernorm          model.layers.I.feedforward_layer_norm               post_attention_layernorm
    decoder.layers.I.post_mlp_layernorm                model.layers.I.post_feedforward_layernorm

A rope_theta of null means a model without rotary positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from longspan.config.architecture import Architecture
from longspan.config.families.family import Place
from longspan.config.families.recurrent import WithGatedDelta, read_layer_types
from longspan.config.families.rotary_decoder import RotaryDecoder, read_rotary
from longspan.config.recurrent import LayerParts

#: the constant in the norm of the mixers, which the config does not name
_MIXER_EPSILON = 1e-5


class OlmoHybrid(WithGatedDelta, RotaryDecoder):
    model_type, architecture = "olmo_hybrid", "OlmoHybridForCausalLM"
    kinds = (LayerParts("gated_delta", "dense"), LayerParts("attention", "dense"))
    keys = (
        RotaryDecoder.keys
        | WithGatedDelta.delta_keys
        | {"linear_allow_neg_eigval": "linear_allow_neg_eigval"}
    )
    defaults = {"rms_norm_eps": 1e-6, "linear_conv_kernel_dim": 4, "linear_allow_neg_eigval": True}
    supported = {"hidden_act": ("silu", "swish"), "attention_bias": (False,), "attention_dropout": (0,)}
    needs = {
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": "silu",
        "add_bias_linear": False,
        "add_qkv_bias": False,
        "qk_layernorm": True,
        "qk_layernorm_over_heads": True,
        "attention_post_norm": True,
        "sliding_window": None,
    }
    projections = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "z": "g_proj", "b": "b_proj", "a": "a_proj"}
    inside = RotaryDecoder.inside | {
        "mixer": "linear_attn",
        "mixer.norm": "linear_attn.o_norm",
        "mixer.out_proj": "linear_attn.o_proj",
        "input_layernorm": "attention_layer_norm",
        "pre_mlp_layernorm": "feedforward_layer_norm",
        "post_attention_layernorm": "feedforward_layer_norm",
        "post_mlp_layernorm": "post_feedforward_layernorm",
    }

    def read(self, data: Mapping[str, Any], where: str) -> dict[str, Any]:
        layers, heads = data.get("num_hidden_layers") or 0, data.get("num_attention_heads") or 1
        default = ["full_attention" if i % 4 == 3 else "linear_attention" for i in range(layers)]
        if layers and "full_attention" not in default:
            default[-1] = "full_attention"
        keys = data.get("linear_num_key_heads") or heads
        key_size = data.get("linear_key_head_dim") or int(0.75 * (data.get("hidden_size") or 0) / keys)
        found = {
            "qk_layernorm": True,
            "qk_layernorm_over_heads": True,
            "attention_post_norm": True,
            "layer_types": read_layer_types(data, default, where),
            "linear_num_key_heads": keys,
            "linear_num_value_heads": data.get("linear_num_value_heads") or heads,
            "linear_key_head_dim": key_size,
            "linear_value_head_dim": data.get("linear_value_head_dim") or 2 * key_size,
            "linear_norm_epsilon": _MIXER_EPSILON,
        }
        rope = data.get("rope_parameters") or data.get("rope_scaling") or {}
        if rope.get("rope_theta", data.get("rope_theta", 10000.0)) is None:
            return found | {"position_embedding_type": "none"}
        return found | read_rotary(data, where)

    def missing(self, model: Architecture) -> list[str]:
        found = super().missing(model)
        if model.position_embedding_type not in ("rope", "none"):
            found.append(f"position_embedding_type {model.position_embedding_type} (needs rope or none)")
        if "gated_delta" in model.mixers and model.linear_norm_epsilon != _MIXER_EPSILON:
            found.append(f"linear_norm_epsilon {model.linear_norm_epsilon} (needs {_MIXER_EPSILON})")
        if not {"gated_delta", "attention"} <= set(model.mixers):
            found.append("layers of one kind (needs gated_delta and attention)")
        return found

    def fields(self, model: Architecture, positions: int) -> dict[str, Any]:
        found = super().fields(model, positions) | self.delta_fields(model)
        if model.kv_channels * model.num_attention_heads == model.hidden_size:
            del found["head_dim"]
        if model.position_embedding_type == "none":
            rope = {"rope_type": "default", "rope_theta": None}
            found |= {"rope_parameters": rope, "rope_theta": None, "rope_scaling": None}
        return found | {"attention_bias": False, "linear_allow_neg_eigval": model.linear_allow_neg_eigval}

    def adapter_modules(self, target: str) -> tuple[str, ...]:
        # The projections of both mixers have the same names.
        if target == "out_proj":
            return ("linear_attn.o_proj",)
        attention = ("q_proj", "k_proj", "v_proj", "o_proj")
        if target in attention:
            return (f"self_attn.{target}",)
        return (
            tuple(f"linear_attn.{name}" for name in super().adapter_modules(target))
            if target == "in_proj"
            else (target,)
        )

    def places(self, name: str, model: Architecture) -> list[Place]:
        places = super().places(name, model)
        if ".mixer.conv1d." not in name:
            return places
        keys = model.linear_num_key_heads * model.linear_key_head_dim
        return _in_three(places, [keys, keys])

    def ways(self, name: str, model: Architecture) -> list[list[Place]]:
        """transformers writes other names than those of its modules, and the convolution in three equal pieces."""
        written = self.places(name, model)
        if ".mixer.conv1d." in name:
            whole = super().places(name, model)
            third = -(-(whole[0].total or 0) // 3)
            return [written, _in_three(whole, [third, third]), whole]
        others = {
            "attention_layer_norm": "input_layernorm",
            "feedforward_layer_norm": "post_attention_layernorm",
        }
        for theirs, other in others.items():
            if f".{theirs}." in written[0].name:
                return [written, [written[0]._replace(name=written[0].name.replace(theirs, other))]]
        return [written]


def _in_three(places: list[Place], sizes: list[int]) -> list[Place]:
    """Places in the tensor ``conv1d`` -> places in the tensors that it is cut into: q, k and v.

    Args:
        sizes: rows of the first and the second tensor; the third has the others.
    """
    total = places[0].total or 0
    starts = dict(zip("qkv", (0, sizes[0], sum(sizes))))
    ends = dict(zip("qkv", (sizes[0], sum(sizes), total)))
    found = []
    for place in places:
        assert isinstance(place.rows, slice)
        for letter, start in starts.items():
            first, last = (
                max(place.first, start),
                min(place.first + place.rows.stop - place.rows.start, ends[letter]),
            )
            if first < last:
                row = place.rows.start + first - place.first
                name = place.name.replace(".conv1d.", f".{letter}_conv1d.")
                rows = slice(row, row + last - first)
                found.append(Place(name, rows, first - start, ends[letter] - start, thin=place.thin))
    return found
