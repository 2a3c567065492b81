"""What Llama, Mistral and Qwen have in common: RMSNorm, rotary positions, gated MLPs, and the tensor names.

    longspan                                                   Hugging Face
    embedding.word_embeddings.weight     [v padded, h]         model.embed_tokens.weight  [v, h]
    decoder.layers.I.input_layernorm                           model.layers.I.input_layernorm
    decoder.layers.I.self_attention.linear_{q,k,v}             model.layers.I.self_attn.{q,k,v}_proj
    decoder.layers.I.self_attention.{q,k}_layernorm            model.layers.I.self_attn.{q,k}_norm
    decoder.layers.I.self_attention.linear_proj                model.layers.I.self_attn.o_proj
    decoder.layers.I.pre_mlp_layernorm                         model.layers.I.post_attention_layernorm
    decoder.layers.I.mlp.linear_{gate,up,down}                 model.layers.I.mlp.{gate,up,down}_proj
    decoder.final_layernorm                                    model.norm
    output_layer.weight                  [v padded, h]         lm_head.weight  [v, h]

each with .weight and, if the model has it, .bias.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from longspan.config.architecture import Architecture
from longspan.config.families.family import Family, activation_name
from longspan.config.rope import ROPE_TYPES, rope_type
from longspan.errors import UserError

#: the fields that a rope_scaling of any type may have
_OF_ALL_TYPES = ("rope_type", "type", "rope_theta", "partial_rotary_factor")


class RotaryDecoder(Family):
    """The base class of these model types; each type adds its biases, norms and windows."""

    keys = {
        "num_hidden_layers": "num_layers",
        "hidden_size": "hidden_size",
        "num_attention_heads": "num_attention_heads",
        "num_key_value_heads": "num_query_groups",
        "head_dim": "kv_channels",
        "intermediate_size": "ffn_hidden_size",
        "vocab_size": "vocab_size",
        "rms_norm_eps": "layernorm_epsilon",
        "tie_word_embeddings": "tie_word_embeddings",
        "initializer_range": "init_method_std",
        "max_position_embeddings": "max_position_embeddings",
    }
    needs = {"position_embedding_type": "rope", "normalization": "RMSNorm", "gated_linear_unit": True}
    #: transformers' default of partial_rotary_factor; None for a type that rotates whole heads only
    rotary_percent: ClassVar[float | None] = None
    layers = "model.layers"
    outside = {
        "embedding.word_embeddings": "model.embed_tokens",
        "decoder.final_layernorm": "model.norm",
        "output_layer": "lm_head",
    }
    inside = {
        "input_layernorm": "input_layernorm",
        "self_attention.linear_q": "self_attn.q_proj",
        "self_attention.linear_k": "self_attn.k_proj",
        "self_attention.linear_v": "self_attn.v_proj",
        "self_attention.q_layernorm": "self_attn.q_norm",
        "self_attention.k_layernorm": "self_attn.k_norm",
        "self_attention.linear_proj": "self_attn.o_proj",
        "pre_mlp_layernorm": "post_attention_layernorm",
        "mlp.linear_gate": "mlp.gate_proj",
        "mlp.linear_up": "mlp.up_proj",
        "mlp.linear_down": "mlp.down_proj",
    }

    def read(self, data: Mapping[str, Any], where: str) -> dict[str, Any]:
        found = self.read_pieces(data, where)
        if window := self.read_window(data, where):
            found["sliding_window"] = window
        return found | read_rotary(data, where, self.rotary_percent, self.rope_fields)

    def read_pieces(self, data: Mapping[str, Any], where: str) -> dict[str, Any]:
        """The keys of biases and norms."""
        return {}

    def read_window(self, data: Mapping[str, Any], where: str) -> int | list[int | None] | None:
        """The sliding window as transformers' class reads it: one for all layers, or a list of all layers."""
        return None

    def fields(self, model: Architecture, positions: int) -> dict[str, Any]:
        scaled = rope_type(model.rope_scaling) != "default"
        # transformers 5 reads rope_parameters, 4 reads rope_theta and rope_scaling, so all three are written.
        scaling = {k: v for k, v in (model.rope_scaling or {}).items() if k != "type"} if scaled else {}
        scaling = {"rope_type": rope_type(model.rope_scaling), **scaling}
        part = {} if self.rotary_percent is None else {"partial_rotary_factor": model.rotary_percent}
        return {
            "num_hidden_layers": model.num_layers,
            "hidden_size": model.hidden_size,
            "num_attention_heads": model.num_attention_heads,
            "num_key_value_heads": model.num_query_groups,
            "head_dim": model.kv_channels,
            "intermediate_size": model.ffn_hidden_size,
            "rms_norm_eps": model.layernorm_epsilon,
            "rope_theta": model.rotary_base,
            "rope_scaling": scaling if scaled else None,
            "rope_parameters": {"rope_theta": model.rotary_base, **scaling, **part},
            **part,
            "max_position_embeddings": positions,
            "hidden_act": activation_name(model.activation_func),
        }


def read_rotary(
    data: Mapping[str, Any], where: str, percent: float | None = None, without_effect: tuple[str, ...] = ()
) -> dict[str, Any]:
    """The keys rotary_base and rope_scaling, and rotary_percent for a type that has it.

    transformers 4 has the fields rope_theta and rope_scaling; 5 has both in rope_parameters.

    Args:
        percent: the type's default of partial_rotary_factor; None for a type that rotates whole heads only.
        without_effect: fields that have no effect on a text.

    Raises:
        UserError: the fields are not for all layers, or request something that is not supported.
    """
    rope = data.get("rope_scaling") or data.get("rope_parameters") or {}
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise UserError(
            f"base_model: {where} sets rope_parameters {rope!r}, not an object of fields that hold for all layers."
        )
    part = rope.get("partial_rotary_factor", data.get("partial_rotary_factor", percent or 1.0))
    if percent is None and part not in (None, 1.0):
        raise UserError(
            f"base_model: {where} sets partial_rotary_factor {part}; only whole heads are rotated (1.0)."
        )
    theta = rope.get("rope_theta")
    if theta is not None and (isinstance(theta, bool) or not isinstance(theta, int | float)):
        raise UserError(f"base_model: {where} sets rope_theta {theta!r}: a number above 0.")
    found: dict[str, Any] = {"rotary_base": theta or data.get("rope_theta") or 10000.0}
    if percent is not None:
        if isinstance(part, bool) or not isinstance(part, int | float) or not 0 < part <= 1:
            raise UserError(
                f"base_model: {where} sets partial_rotary_factor {part!r}: a number above 0, at most 1."
            )
        found["rotary_percent"] = float(part)
    if rope_type(rope) != "default":
        out = ("rope_theta", "partial_rotary_factor", *without_effect, *ignored_fields(data))
        found["rope_scaling"] = {k: v for k, v in rope.items() if k not in out and v is not None}
    return found


def ignored_fields(data: Mapping[str, Any], without_effect: tuple[str, ...] = ()) -> list[str]:
    """Fields of a config.json's rope_scaling that its type does not have; transformers ignores them too.

    Args:
        without_effect: as in :func:`read_rotary`; these are not listed.
    """
    rope = data.get("rope_scaling") or data.get("rope_parameters") or {}
    known = (
        ROPE_TYPES.get(kind) if isinstance(rope, dict) and isinstance(kind := rope_type(rope), str) else None
    )
    if known is None:
        return []
    names = [*known[0], *known[1], *_OF_ALL_TYPES, *without_effect]
    return [name for name, value in rope.items() if name not in names and value is not None]


def read_biases(attention: bool, mlp: bool, where: str) -> dict[str, Any]:
    """The key ``add_bias_linear`` of a model type whose attention and MLP may have biases.

    Raises:
        UserError: only one of the two has biases.
    """
    if attention != mlp:
        only = "attention_bias" if attention else "mlp_bias"
        raise UserError(
            f"base_model: {where} sets {only}: biases of "
            f"{'query, key, value and output projection' if attention else 'the MLP'} alone are not supported, only those of all "
            "linear layers (add_bias_linear) or of query, key and value (add_qkv_bias)."
        )
    return {"add_bias_linear": True} if attention else {}
