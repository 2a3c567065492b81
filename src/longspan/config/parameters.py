"""The names and shapes of a model's parameters, computed from its architecture; no tensor is made."""

from __future__ import annotations

import math

from longspan.config.architecture import Architecture
from longspan.config.model import padded_vocab_size
from longspan.config.recurrent import mixer_sizes

#: the tables whose dim 0 is the vocabulary
VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")
#: the table whose dim 0 is positions
POSITIONS = "embedding.position_embeddings.weight"


def parameter_shapes(model: Architecture, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every uncut parameter of a GPTModel; tied parameters are listed once.

    Args:
        vocab_size: number of tokens without padding; the shapes of the tables include padding.
    """
    h, ffn, vocabulary = model.hidden_size, model.ffn_hidden_size, padded_vocab_size(vocab_size)
    q, kv = (model.kv_channels * n for n in (model.num_attention_heads, model.num_query_groups))
    found: dict[str, tuple[int, ...]] = {VOCABULARY[0]: (vocabulary, h)}

    def norm(name: str, size: int) -> None:
        found[f"{name}.weight"] = (size,)
        if model.normalization == "LayerNorm":
            found[f"{name}.bias"] = (size,)

    def linear(name: str, inputs: int, outputs: int, bias: bool = model.add_bias_linear) -> None:
        found[f"{name}.weight"] = (outputs, inputs)
        if bias:
            found[f"{name}.bias"] = (outputs,)

    if model.learned_positions:
        assert model.max_position_embeddings is not None
        found[POSITIONS] = (padded_vocab_size(model.max_position_embeddings), h)
    for index in range(model.num_layers):
        layer = f"decoder.layers.{index}"
        mixer, mlp = model.parts_of_layer(index + 1)
        mixer_norm, mlp_norm = model.norms_of_layer(index + 1)
        if mixer is not None:
            norm(f"{layer}.{mixer_norm}", h)
        if mixer == "attention":
            bias = model.add_bias_linear or model.add_qkv_bias
            gate = [("gate", q)] if model.attention_output_gate else []
            for part, size in (("q", q), ("k", kv), ("v", kv), *gate):
                linear(f"{layer}.self_attention.linear_{part}", h, size, bias)
            linear(f"{layer}.self_attention.linear_proj", q, h)
            if model.softmax_type == "learnable":
                found[f"{layer}.self_attention.sinks.weight"] = (model.num_attention_heads,)
            of_heads = {"q": q, "k": kv} if model.qk_layernorm else {}
            for letter, size in of_heads.items():
                size = size if model.qk_layernorm_over_heads else model.kv_channels
                norm(f"{layer}.self_attention.{letter}_layernorm", size)
        elif mixer is not None:
            sizes = mixer_sizes(model, mixer)
            linear(f"{layer}.mixer.in_proj", h, sizes.groups * sizes.inputs)
            found[f"{layer}.mixer.conv1d.weight"] = (sizes.groups * sizes.channels, sizes.kernel)
            if sizes.conv_bias:
                found[f"{layer}.mixer.conv1d.bias"] = (sizes.groups * sizes.channels,)
            found |= {f"{layer}.mixer.{name}": (sizes.heads,) for name in sizes.of_heads}
            found[f"{layer}.mixer.norm.weight"] = (sizes.norm,)
            linear(f"{layer}.mixer.out_proj", sizes.heads * sizes.head_dim, h)
        if mlp is None:
            continue
        norm(f"{layer}.{mlp_norm}", h)
        parts = ("gate", "up") if model.gated_linear_unit else ("up",)
        if mlp == "experts":
            found |= _expert_shapes(model, f"{layer}.mlp", parts)
            continue
        for part in parts:
            linear(f"{layer}.mlp.linear_{part}", h, ffn)
        linear(f"{layer}.mlp.linear_down", ffn, h)
    norm("decoder.final_layernorm", h)
    if not model.share_embeddings_and_output_weights:
        found[VOCABULARY[1]] = (vocabulary, h)
    return found


def _expert_shapes(model: Architecture, mlp: str, parts: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    """Parameters of a layer's router, its experts and its shared expert."""
    h, ffn, experts = model.hidden_size, model.moe_ffn_hidden_size, model.num_moe_experts
    assert experts is not None
    found: dict[str, tuple[int, ...]] = {f"{mlp}.router.weight": (experts, h)}
    if model.moe_router_bias:
        found[f"{mlp}.router.bias"] = (experts,)
    found |= {f"{mlp}.experts.{part}_weight": (experts, ffn, h) for part in parts}
    found[f"{mlp}.experts.down_weight"] = (experts, h, ffn)
    if model.add_bias_linear:
        found |= {f"{mlp}.experts.{part}_bias": (experts, ffn) for part in parts}
        found[f"{mlp}.experts.down_bias"] = (experts, h)
    if (shared := model.moe_shared_expert_intermediate_size) is not None:
        sizes = {**dict.fromkeys(parts, (shared, h)), "down": (h, shared)}
        for part, (outputs, inputs) in sizes.items():
            found[f"{mlp}.shared_experts.linear_{part}.weight"] = (outputs, inputs)
            if model.add_bias_linear:
                found[f"{mlp}.shared_experts.linear_{part}.bias"] = (outputs,)
        if model.moe_shared_expert_gate:
            found[f"{mlp}.shared_experts.gate.weight"] = (1, h)
    return found


def buffer_shapes(model: Architecture) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the buffers of a GPTModel that are part of checkpoints; they begin as zeros."""
    found: dict[str, tuple[int, ...]] = {}
    for number in model.expert_layers:
        router = f"decoder.layers.{number - 1}.mlp.router"
        assert model.num_moe_experts is not None
        found[f"{router}.last_counts"] = (model.num_moe_experts,)
        if model.moe_router_enable_expert_bias:
            found[f"{router}.expert_bias"] = (model.num_moe_experts,)
    return found


def used_parameters(model: Architecture, vocab_size: int | None) -> tuple[list[float], float]:
    """Parameters that a token is multiplied with, in each layer and in the output: what their time is in proportion to.

    Args:
        vocab_size: None leaves the output out.
    """
    layers, output = [0.0] * model.num_layers, 0.0
    for name, shape in parameter_shapes(model, vocab_size or 1).items():
        count = float(math.prod(shape))
        if name.startswith("decoder.layers."):
            if ".experts." in name:
                count *= model.moe_router_topk / (model.num_moe_experts or 1)
            layers[int(name.split(".")[2])] += count
        elif name == VOCABULARY[model.share_embeddings_and_output_weights ^ 1] and vocab_size is not None:
            output += count
    return layers, output
