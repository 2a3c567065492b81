"""Qwen3-Next and the text models of Qwen3.5: the gated delta rule and gated attention, mostly in a ratio of 3 to 1.

Their attention stores the rows of each query head beside those of its gate:

    decoder.layers.I.self_attention.linear_q     [n d, h]    model.layers.I.self_attn.q_proj [2 n d, h], rows 0 .. d-1
    decoder.layers.I.self_attention.linear_gate  [n d, h]    of each 2 d rows; the gate has rows d .. 2d-1

Their norms are stored minus 1, except the mixers' norms. Weights that predict several tokens (``mtp.*``) are left out,
as transformers leaves them out. Of a Qwen3.5 that also reads images, the text model alone is taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from longspan.config.architecture import Architecture
from longspan.config.families.family import Place
from longspan.config.families.qwen import EXPERT_KEYS, SHARED_EXPERT, QwenWithExperts
from longspan.config.families.recurrent import WithGatedDelta, read_layer_types
from longspan.config.families.rotary_decoder import RotaryDecoder
from longspan.config.recurrent import LayerParts

_DELTA = {
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
}


class _QwenHybrid(WithGatedDelta, RotaryDecoder):
    """What the three types have in common."""

    rotary_percent = 0.25
    zero_centered = True
    left_out: ClassVar[tuple[str, ...]] = ("mtp.",)
    keys = RotaryDecoder.keys | WithGatedDelta.delta_keys
    supported = {"hidden_act": ("silu", "swish"), "attention_bias": (False,), "attention_dropout": (0,)}
    free = ("rotary_percent",)
    needs = RotaryDecoder.needs | {
        "activation_func": "silu",
        "add_bias_linear": False,
        "add_qkv_bias": False,
        "qk_layernorm": True,
        "attention_output_gate": True,
        "sliding_window": None,
        "linear_allow_neg_eigval": False,
    }
    inside = (
        RotaryDecoder.inside | WithGatedDelta.of_mixer | {"self_attention.linear_gate": "self_attn.q_proj"}
    )

    def read_pieces(self, data: Mapping[str, Any], where: str) -> dict[str, Any]:
        layers, interval = data.get("num_hidden_layers") or 0, data.get("full_attention_interval") or 4
        default = ["full_attention" if (i + 1) % interval == 0 else "linear_attention" for i in range(layers)]
        return {
            "qk_layernorm": True,
            "attention_output_gate": True,
            "layernorm_zero_centered_gamma": True,
            "layer_types": read_layer_types(data, default, where),
        }

    def missing(self, model: Architecture) -> list[str]:
        found, epsilon = super().missing(model), model.linear_norm_epsilon
        if epsilon not in (None, model.layernorm_epsilon):
            found.append(
                f"linear_norm_epsilon {epsilon} (needs layernorm_epsilon's {model.layernorm_epsilon})"
            )
        return found

    def fields(self, model: Architecture, positions: int) -> dict[str, Any]:
        return super().fields(model, positions) | self.delta_fields(model) | {"attention_bias": False}

    def places(self, name: str, model: Architecture) -> list[Place]:
        part = name.split(".")[-2]
        if part not in ("linear_q", "linear_gate") or ".self_attention." not in name:
            return super().places(name, model)
        tensor, d, heads = self.tensor_name(name), model.kv_channels, model.num_attention_heads
        offset = d if part == "linear_gate" else 0
        return [
            Place(tensor, slice(i * d, (i + 1) * d), 2 * i * d + offset, 2 * heads * d) for i in range(heads)
        ]


class Qwen3Next(QwenWithExperts, _QwenHybrid):
    model_type, architecture = "qwen3_next", "Qwen3NextForCausalLM"
    kinds = tuple(
        LayerParts(mixer, mlp) for mixer in ("gated_delta", "attention") for mlp in ("dense", "experts")
    )
    keys = (
        _QwenHybrid.keys
        | EXPERT_KEYS
        | {"shared_expert_intermediate_size": "moe_shared_expert_intermediate_size"}
    )
    defaults = _DELTA | {
        "rms_norm_eps": 1e-6,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "num_experts": 512,
        "num_experts_per_tok": 10,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
        "decoder_sparse_step": 1,
        "norm_topk_prob": True,
        "router_aux_loss_coef": 0.001,
    }
    projections = {
        **dict.fromkeys(("q", "k", "v", "z"), "in_proj_qkvz"),
        **dict.fromkeys(("b", "a"), "in_proj_ba"),
    }
    by_group = True
    inside = _QwenHybrid.inside | SHARED_EXPERT
    expert_needs = QwenWithExperts.expert_needs | {"moe_shared_expert_gate": True}

    def read_pieces(self, data: Mapping[str, Any], where: str) -> dict[str, Any]:
        return super().read_pieces(data, where) | self.read_shared(data)

    def fields(self, model: Architecture, positions: int) -> dict[str, Any]:
        shared = {"shared_expert_intermediate_size": model.moe_shared_expert_intermediate_size}
        return super().fields(model, positions) | self.sparse_fields(model) | shared


class Qwen35(_QwenHybrid):
    model_type, architecture = "qwen3_5_text", "Qwen3_5ForCausalLM"
    kinds = (LayerParts("gated_delta", "dense"), LayerParts("attention", "dense"))
    defaults = _DELTA | {"rms_norm_eps": 1e-6, "num_key_value_heads": 4, "head_dim": 256}
    left_out = ("mtp.", "model.visual.")
    # The rows and columns of an image have angles of their own; the tokens of a text have one position.
    rope_fields = ("mrope_section", "mrope_interleaved")
    projections = {
        **dict.fromkeys(("q", "k", "v"), "in_proj_qkv"),
        **{letter: f"in_proj_{letter}" for letter in "zba"},
    }

    def module_name(self, tensor: str) -> str:
        return tensor.replace("model.language_model.", "model.", 1)

    def ways(self, name: str, model: Architecture) -> list[list[Place]]:
        """The text model of a whole Qwen3.5 has a prefix of its own."""
        written = self.places(name, model)
        inner = [p._replace(name=p.name.replace("model.", "model.language_model.", 1)) for p in written]
        return [written, inner]


class Qwen35Moe(QwenWithExperts, Qwen35):
    model_type, architecture = "qwen3_5_moe_text", "Qwen3_5MoeForCausalLM"
    kinds = (LayerParts("gated_delta", "experts"), LayerParts("attention", "experts"))
    keys = {field: ours for field, ours in Qwen3Next.keys.items() if field != "intermediate_size"}
    defaults = _DELTA | {
        "rms_norm_eps": 1e-6,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "num_experts": 256,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
        "router_aux_loss_coef": 0.001,
        "decoder_sparse_step": 1,
    }
    inside = Qwen35.inside | SHARED_EXPERT
    expert_needs = Qwen3Next.expert_needs | {"moe_router_pre_softmax": False, "moe_layer_freq": 1}

    def read_pieces(self, data: Mapping[str, Any], where: str) -> dict[str, Any]:
        # transformers always divides by the sum of the chosen experts' scores, and has experts in every layer.
        fixed = {"norm_topk_prob": True, "mlp_only_layers": None, "decoder_sparse_step": 1}
        return super().read_pieces(data, where) | self.read_shared({**data, **fixed})

    def fields(self, model: Architecture, positions: int) -> dict[str, Any]:
        found = super().fields(model, positions) | self.sparse_fields(model)
        for name in ("intermediate_size", "norm_topk_prob", "decoder_sparse_step", "mlp_only_layers"):
            found.pop(name, None)
        return found | {"shared_expert_intermediate_size": model.moe_shared_expert_intermediate_size}
