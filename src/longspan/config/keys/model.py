"""The architecture, and the model to start from."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, field_validator

from longspan.config.keys.declare import key


class ModelKeys(BaseModel):
    """The architecture, and the model to start from."""

    base_model: str | None = key(
        None,
        "Hugging Face model to start from: a local folder, or a hub id when the hub can be reached (Llama, Mistral, Qwen2, "
        "Qwen3, GPT-2; docs/models.md).",
        flag="--base-model",
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
    activation_func: Literal["silu", "gelu", "relu"] = key(
        "silu", "Activation of the MLP.", megatron_default="gelu"
    )
    add_bias_linear: bool = key(
        False,
        "All linear layers have biases.",
        switches={"--disable-bias-linear": False},
        megatron_default=True,
    )
    add_qkv_bias: bool = key(False, "The projections to query, key and value have biases (Qwen2).")
    qk_layernorm: bool = key(False, "Each head of query and key is normalised before the rotation (Qwen3).")
    position_embedding_type: Literal["rope", "learned_absolute", "none"] = key(
        "rope",
        "How the model knows positions: rotary, a learned table of max_position_embeddings, or not at all.",
        switches={"--use-rotary-position-embeddings": "rope", "--no-position-embedding": "none"},
        megatron_default="learned_absolute",
    )
    max_position_embeddings: int | None = key(
        None,
        "The longest sequence the model is made for: the rows of a learned table, and where dynamic rope_scaling begins; "
        "default: sequence_len, or more where base_model says more.",
        unit="tokens",
        gt=0,
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
        "Linear layers that get adapters, by Hugging Face's names (q_proj, v_proj, down_proj, ...).",
    )
    lora_target_linear: bool = key(False, "All linear layers of attention and MLP get adapters.")
    lora_model_dir: str | None = key(None, "Folder of adapters in PEFT's format to start from.")
    peft_use_rslora: bool = key(False, "Scale adapters by lora_alpha / sqrt(lora_r) (rsLoRA).")

    @field_validator("adapter", mode="before")
    @classmethod
    def _plain_adapter(cls, value: Any) -> Any:
        if value == "qlora":
            raise ValueError(
                "needs quantised weights (load_in_4bit), which are not supported. Use lora; under bf16 its frozen weights are held in bfloat16"
            )
        return value
