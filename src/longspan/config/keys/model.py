"""The architecture, and the model to start from."""

from __future__ import annotations

import ast
from typing import Any, Literal

from pydantic import BaseModel, field_validator

from longspan.config.keys.declare import key


def _pattern_of(node: ast.expr) -> list[int]:
    """A list of numbers, or lists that are repeated and joined.

    Raises:
        ValueError: it is anything else.
    """
    match node:
        case ast.List(elts):
            numbers = [one.value for one in elts if isinstance(one, ast.Constant)]
            if len(numbers) == len(elts) and all(isinstance(n, int) for n in numbers):
                return [n for n in numbers if isinstance(n, int)]
        case ast.BinOp(left, ast.Add(), right):
            return _pattern_of(left) + _pattern_of(right)
        case ast.BinOp(left, ast.Mult(), ast.Constant(int(times))) if 0 <= times <= 10_000:
            return _pattern_of(left) * times
    raise ValueError(ast.dump(node))


class ModelKeys(BaseModel):
    """The architecture, and the model to start from."""

    base_model: str | None = key(
        None,
        "Hugging Face model to start from: a local folder, or a hub id when the hub can be reached (Llama, Mistral, Mixtral, "
        "Qwen2, Qwen3, Qwen2-MoE, Qwen3-MoE, Qwen3-Next, Qwen3.5, OLMo Hybrid, Nemotron-H, Mamba-2, gpt-oss, GPT-2, and other types by "
        "transformers' own class; docs/models.md).",
        flag="--base-model",
    )
    model_implementation: Literal["auto", "native", "transformers"] = key(
        "auto",
        "What computes base_model: longspan's layers (native), transformers' own class, or (auto) native where there is an "
        "implementation of its type.",
    )
    reinit_weights: bool = key(
        False, "Take only the architecture of base_model and start from random weights."
    )
    num_layers: int | None = key(None, "Transformer layers.", unit="layers", gt=0)
    hidden_size: int | None = key(None, "Size of the residual stream.", unit="features", gt=0)
    num_attention_heads: int | None = key(None, "Query heads.", unit="heads", gt=0)
    num_query_groups: int | None = key(
        None, "Key/value heads (GQA); default: as many as query heads.", unit="heads", gt=0
    )
    kv_channels: int | None = key(
        None,
        "Size of a head; default: hidden_size / num_attention_heads.",
        unit="features",
        gt=0,
    )
    ffn_hidden_size: int | None = key(
        None, "Size of the MLP; default: 4 x hidden_size.", unit="features", gt=0
    )
    vocab_size: int | None = key(
        None,
        "Tokens of the vocabulary, before padding to a multiple of 128; default: the tokenizer's.",
        unit="tokens",
        gt=0,
        le=1 << 24,
    )
    layernorm_epsilon: float = key(1e-5, "Added to the variance in norms.", flag="--norm-epsilon", gt=0)
    rotary_base: float = key(10000.0, "Base of the rotary frequencies (rope_theta).", gt=0)
    rope_scaling: dict[str, Any] | None = key(
        None,
        "Hugging Face's rope_scaling, for longer context: {rope_type: yarn | linear | dynamic | llama3, factor: ...}; default "
        "takes that of base_model away.",
    )
    sliding_window: int | list[int | None] | None = key(
        None,
        "Tokens a query sees, itself included; null for all before it; a list is cycled over the layers.",
        unit="tokens",
    )
    softmax_scale: float | None = key(
        None, "Attention scores are multiplied by it; default: 1 / sqrt(kv_channels).", gt=0
    )
    tie_word_embeddings: bool = key(
        False,
        "Embedding and output layer share their weight.",
        switches={"--untie-embeddings-and-output-weights": False},
        megatron_default=True,
    )
    normalization: Literal["RMSNorm", "LayerNorm"] = key(
        "RMSNorm", "Of the residual stream.", megatron_default="LayerNorm"
    )
    layernorm_zero_centered_gamma: bool = key(
        False, "Norms keep their weight minus 1.", switches={"--apply-layernorm-1p": True}
    )
    gated_linear_unit: bool = key(
        True, "The MLP has a gate: down(act(gate(x)) * up(x)).", megatron_default=False
    )
    activation_func: Literal["silu", "gelu", "quick_gelu", "relu", "squared_relu"] = key(
        "silu",
        "Activation of the MLP; quick_gelu is x sigmoid(1.702 x).",
        switches={"--squared-relu": "squared_relu"},
        megatron_default="gelu",
    )
    activation_func_clamp_value: float | None = key(
        None,
        "The largest value of a gate, and of up in either direction, before they are multiplied (gpt-oss: 7).",
        gt=0,
    )
    glu_linear_offset: float = key(
        0.0, "Added to up before it is multiplied by the activated gate (gpt-oss: 1)."
    )
    add_bias_linear: bool = key(
        False,
        "All linear layers have biases.",
        switches={"--disable-bias-linear": False},
        megatron_default=True,
    )
    add_qkv_bias: bool = key(False, "The projections to query, key and value have biases (Qwen2).")
    qk_layernorm: bool = key(False, "Each head of query and key is normalised before the rotation (Qwen3).")
    qk_layernorm_over_heads: bool = key(
        False, "qk_layernorm is over all heads of query, and of key, together (OLMo Hybrid)."
    )
    position_embedding_type: Literal["rope", "learned_absolute", "none"] = key(
        "rope",
        "How the model knows positions: rotary, a learned table of max_position_embeddings, or not at all.",
        switches={"--use-rotary-position-embeddings": "rope", "--no-position-embedding": "none"},
        megatron_default="learned_absolute",
    )
    rotary_percent: float = key(1.0, "Share of each head's features that rotary embeddings turn.", gt=0, le=1)
    softmax_type: Literal["vanilla", "learnable", "off-by-one"] = key(
        "vanilla",
        "learnable: each query head has a sink, a logit that joins the softmax's denominator and has no value (gpt-oss); off-by-one: "
        "a sink of 0.",
    )
    attention_output_gate: bool = key(
        False, "Each head's output is multiplied by a sigmoid of the layer's input (Qwen3-Next)."
    )
    attention_post_norm: bool = key(
        False,
        "A layer with attention normalises what its attention and its MLP add, instead of what they read (OLMo Hybrid). Layers "
        "without attention are not changed.",
    )
    max_position_embeddings: int | None = key(
        None,
        "The longest sequence the model is made for: the rows of a learned table, and where dynamic rope_scaling begins; "
        "default: sequence_len, or more where base_model says more.",
        unit="tokens",
        gt=0,
    )
    num_moe_experts: int | None = key(
        None,
        "Experts of a layer with experts; default: every MLP is dense.",
        unit="experts",
        flag="--num-experts",
        gt=0,
    )
    moe_ffn_hidden_size: int | None = key(
        None, "Size of an expert; default: ffn_hidden_size.", unit="features", gt=0
    )
    moe_layer_freq: int | list[int] = key(
        1,
        "Experts in every n-th layer, from the first on; or a list of 1 (experts) and 0 (dense), cycled over the layers.",
    )
    moe_router_topk: int = key(2, "Experts that a token chooses.", unit="experts", gt=0)
    moe_router_score_function: Literal["softmax", "sigmoid"] = key(
        "softmax", "From the router's logits to scores."
    )
    moe_router_pre_softmax: bool = key(
        False, "Softmax over all experts before the choice, instead of over the chosen ones after it."
    )
    moe_router_num_groups: int | None = key(
        None, "Experts are in so many groups, and a token chooses in the best of them.", unit="groups", gt=0
    )
    moe_router_group_topk: int | None = key(None, "Groups in which a token chooses.", unit="groups", gt=0)
    moe_router_topk_scaling_factor: float | None = key(
        None, "Scores of the chosen experts are multiplied by it.", gt=0
    )
    moe_router_load_balancing_type: str | list[str] = key(
        "aux_loss",
        "What keeps the load even: aux_loss (of each sequence), seq_aux_loss (of each document), global_aux_loss (by the choices "
        "of the last step) or none; or a list.",
    )
    moe_aux_loss_coeff: float | list[float] = key(
        0.0, "Coefficient of the balancing loss, which an even layer then adds; a list for a list of kinds."
    )
    moe_z_loss_coeff: float | None = key(None, "Coefficient of the router's z-loss.", ge=0)
    moe_router_bias: bool = key(False, "The router's logits have a learned bias for each expert (gpt-oss).")
    moe_router_enable_expert_bias: bool = key(
        False,
        "A bias of each expert takes part in the choice alone and is updated once a step, without a loss.",
    )
    moe_router_bias_update_rate: float = key(1e-3, "How far the bias of an expert moves in a step.", ge=0)
    moe_expert_capacity_factor: float | None = key(
        None,
        "An expert takes at most tokens x topk / experts x this factor of each sequence and drops the rest; default: nothing is "
        "dropped.",
        gt=0,
    )
    moe_pad_expert_input_to_capacity: bool = key(
        False,
        "Fills the rows of each expert up to its capacity, so that products have one shape in every step. It changes no result.",
    )
    moe_token_drop_policy: Literal["probs", "position"] = key(
        "probs", "Which tokens an expert keeps: those with the largest scores, or the first of the sequence."
    )
    moe_shared_expert_intermediate_size: int | None = key(
        None,
        "Size of an expert that every token goes through, beside the chosen ones.",
        unit="features",
        gt=0,
    )
    moe_shared_expert_gate: bool = key(
        False, "The shared expert's output is multiplied by a sigmoid of the input (Qwen2-MoE)."
    )
    layer_types: list[str] | None = key(
        None,
        "The mixer of each layer of a hybrid model: attention, mamba (Mamba-2) or gated_delta; default: attention in all. Every "
        "layer has an MLP too.",
    )
    hybrid_override_pattern: str | None = key(
        None,
        "The same in Megatron's letters, a part a layer: M Mamba-2, G gated delta rule, * attention, - MLP, E experts.",
    )
    mamba_num_heads: int | None = key(
        None, "Heads of a Mamba-2 layer; default: 2 x hidden_size / mamba_head_dim.", unit="heads", gt=0
    )
    mamba_head_dim: int = key(64, "Size of a head of a Mamba-2 layer.", unit="features", gt=0)
    mamba_num_groups: int = key(
        8, "Groups of a Mamba-2 layer's heads, each with a B and a C of its own.", unit="heads", gt=0
    )
    mamba_state_dim: int = key(
        128, "Size of the state of each feature of a Mamba-2 layer.", unit="features", gt=0
    )
    mamba_conv_kernel_dim: int = key(
        4, "Tokens that a Mamba-2 layer's convolution reads.", unit="tokens", gt=0, le=64
    )
    mamba_conv_bias: bool = key(True, "A Mamba-2 layer's convolution has a bias.")
    mamba_grouped_norm: bool = key(
        True, "A Mamba-2 layer normalises the heads of each group together; false: all heads together."
    )
    mamba_dt_min: float = key(0.0, "The smallest step size of a Mamba-2 layer.", ge=0)
    linear_num_key_heads: int = key(16, "Key heads of a gated delta rule.", unit="heads", gt=0)
    linear_num_value_heads: int = key(32, "Value heads of a gated delta rule.", unit="heads", gt=0)
    linear_key_head_dim: int = key(128, "Size of a key head of a gated delta rule.", unit="features", gt=0)
    linear_value_head_dim: int = key(
        128, "Size of a value head of a gated delta rule.", unit="features", gt=0
    )
    linear_conv_kernel_dim: int = key(
        4, "Tokens that the convolution of a gated delta rule reads.", unit="tokens", gt=0, le=64
    )
    linear_allow_neg_eigval: bool = key(
        False,
        "A gated delta rule corrects by up to twice the difference (OLMo Hybrid), so that a state may change its sign.",
    )
    linear_norm_epsilon: float | None = key(
        None, "Added to the variance in the norm of a gated delta rule; default: layernorm_epsilon.", gt=0
    )
    attention_dropout: float = key(
        0.0, "Share of attention weights dropped: only 0 is supported.", ge=0, le=1
    )
    hidden_dropout: float = key(0.0, "Share of activations dropped: only 0 is supported.", ge=0, le=1)
    init_method_std: float = key(0.02, "Standard deviation of initial weights.", gt=0)

    # --- adapters ---------------------------------------------------------------------------
    adapter: Literal["lora"] | None = key(
        None, "Train low-rank adapters (LoRA, Hu et al. 2021) beside frozen weights, instead of the weights."
    )
    lora_r: int | None = key(None, "Rank of the adapters.", unit="features", gt=0)
    lora_alpha: float | None = key(None, "Adapters are scaled by lora_alpha / lora_r; default: lora_r.", gt=0)
    lora_dropout: float = key(0.0, "Share of adapter inputs dropped: only 0 is supported.", ge=0, le=1)
    lora_target_modules: list[str] | None = key(
        None,
        "Linear layers that get adapters, by Hugging Face's names (q_proj, v_proj, down_proj, ...); in_proj and out_proj are those "
        "of recurrent layers.",
    )
    lora_target_linear: bool = key(
        False, "All linear layers of attention, recurrent layers and MLP get adapters."
    )
    lora_model_dir: str | None = key(None, "Folder of adapters in PEFT's format to start from.")
    peft_use_rslora: bool = key(False, "Scale adapters by lora_alpha / sqrt(lora_r) (rsLoRA).")

    @field_validator("moe_layer_freq", mode="before")
    @classmethod
    def _pattern(cls, value: object) -> object:
        """Megatron-LM's spelling of a pattern, ``([0]*1+[1]*26)``, which is Python there."""
        if not isinstance(value, str):
            return value
        try:
            return _pattern_of(ast.parse(value.strip(), mode="eval").body)
        except (ValueError, SyntaxError):
            return value

    @field_validator("adapter", mode="before")
    @classmethod
    def _plain_adapter(cls, value: Any) -> Any:
        if value == "qlora":
            raise ValueError(
                "needs quantised weights (load_in_4bit), which are not supported. Use lora; under bf16 its frozen weights are held in bfloat16"
            )
        return value
