"""GPT-2: LayerNorm, learned positions, plain MLPs, biases, and as many key/value heads as query heads.

Its files hold query, key and value in one tensor, and linear weights as [input, output].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from longspan.config.architecture import Architecture
from longspan.config.families.family import Family, Place, activation_name
from longspan.errors import UserError


class GPT2(Family):
    model_type, architecture = "gpt2", "GPT2LMHeadModel"
    keys = {
        "n_layer": "num_layers",
        "n_embd": "hidden_size",
        "n_head": "num_attention_heads",
        "n_inner": "ffn_hidden_size",
        "vocab_size": "vocab_size",
        "layer_norm_epsilon": "layernorm_epsilon",
        "tie_word_embeddings": "tie_word_embeddings",
        "initializer_range": "init_method_std",
        "n_positions": "max_position_embeddings",
    }
    defaults = {"activation_function": "gelu_new", "n_positions": 1024, "tie_word_embeddings": True}
    activation = "activation_function"
    needs = {
        "normalization": "LayerNorm",
        "gated_linear_unit": False,
        "add_bias_linear": True,
        "qk_layernorm": False,
        "sliding_window": None,
    }
    layers = "transformer.h"
    outside = {
        "embedding.word_embeddings": "transformer.wte",
        "embedding.position_embeddings": "transformer.wpe",
        "decoder.final_layernorm": "transformer.ln_f",
        "output_layer": "lm_head",
    }
    inside = {
        "input_layernorm": "ln_1",
        "self_attention.linear_q": "attn.c_attn",
        "self_attention.linear_k": "attn.c_attn",
        "self_attention.linear_v": "attn.c_attn",
        "self_attention.linear_proj": "attn.c_proj",
        "pre_mlp_layernorm": "ln_2",
        "mlp.linear_up": "mlp.c_fc",
        "mlp.linear_down": "mlp.c_proj",
    }

    def read(self, data: Mapping[str, Any], where: str) -> dict[str, Any]:
        if data.get("scale_attn_weights") is False or data.get("scale_attn_by_inverse_layer_idx"):
            raise UserError(
                f"base_model: {where} scales attention in another way than by the size of a head (scale_attn_weights, "
                "scale_attn_by_inverse_layer_idx), which is not supported."
            )
        if data.get("add_cross_attention"):
            raise UserError(f"base_model: {where} sets add_cross_attention; only decoders are supported.")
        return {
            "normalization": "LayerNorm",
            "gated_linear_unit": False,
            "add_bias_linear": True,
            "position_embedding_type": "learned_absolute",
        }

    def missing(self, model: Architecture) -> list[str]:
        heads = {
            "num_query_groups": model.num_attention_heads,
            "kv_channels": model.hidden_size // model.num_attention_heads,
        }
        return super().missing(model) + [
            f"{name} {getattr(model, name)} (needs {value})"
            for name, value in heads.items()
            if getattr(model, name) != value
        ]

    def holds(self, model: Architecture) -> bool:
        return model.learned_positions and super().holds(model)

    def fields(self, model: Architecture, positions: int) -> dict[str, Any]:
        return {
            "n_layer": model.num_layers,
            "n_embd": model.hidden_size,
            "n_head": model.num_attention_heads,
            "n_inner": model.ffn_hidden_size,
            "n_positions": positions,
            "n_ctx": positions,
            "layer_norm_epsilon": model.layernorm_epsilon,
            "activation_function": activation_name(model.activation_func),
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False,
        }

    def places(self, name: str, model: Architecture) -> list[Place]:
        module, kind = name.rsplit(".", 1)
        if ".linear_" not in module:
            return super().places(name, model)
        which = module.rsplit(".linear_", 1)[1]
        place = Place(self.tensor_name(name), transposed=kind == "weight")
        if which in ("q", "k", "v"):
            size = model.num_attention_heads * model.kv_channels
            place = place._replace(first="qkv".index(which) * size, total=3 * size)
        return [place]
