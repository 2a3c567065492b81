"""TransformerConfig: the architecture and how it is cut, in two frozen dataclasses.

Field names and defaults are Megatron-LM's. All rules between the fields are checked when
an object is made; a ValueError says what was found, the rule and the remedy.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from longspan.errors import did_you_mean

VOCAB_MULTIPLE = 128

#: names activation_func takes
ACTIVATIONS = ("silu", "gelu", "relu")

#: rope_scaling types and the fields each needs
ROPE_SCALING_FIELDS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}

#: the label of a token that has no target
IGNORE_INDEX = -100

CP_COMM_TYPES = ("p2p", "all_gather", "a2a", "a2a+p2p")
#: the types that exist so far
SUPPORTED_COMM_TYPES = ("p2p", "all_gather")


class AttnMaskType(enum.Enum):
    """Who sees whom. A padding mask is expressed by ``PackedSeqParams``, never by a tensor."""

    causal = "causal"
    no_mask = "no_mask"
    padding = "padding"
    padding_causal = "padding_causal"

    @property
    def is_causal(self) -> bool:
        return self in (AttnMaskType.causal, AttnMaskType.padding_causal)


def padded_vocab_size(vocab_size: int) -> int:
    """The next multiple of 128, whatever the tensor parallel size, so that checkpoints fit every layout."""
    return -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


@dataclass(frozen=True, kw_only=True)
class ModelParallelConfig:
    """How a model is cut. Sizes are numbers of ranks."""

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int | None = None
    context_parallel_size: int = 1
    hierarchical_context_parallel_sizes: tuple[int, ...] | None = None
    expert_model_parallel_size: int = 1
    expert_tensor_parallel_size: int | None = None
    sequence_parallel: bool = False
    perform_initialization: bool = True
    params_dtype: Any = None  # torch.dtype; None is float32
    bf16: bool = False
    init_method_std: float = 0.02

    def __post_init__(self) -> None:
        for name in (
            "tensor_model_parallel_size",
            "pipeline_model_parallel_size",
            "virtual_pipeline_model_parallel_size",
            "context_parallel_size",
            "expert_model_parallel_size",
            "expert_tensor_parallel_size",
        ):
            size = getattr(self, name)
            if size is not None and size < 1:
                raise ValueError(f"{name}={size}: a parallel size is at least 1.")
        sizes = self.hierarchical_context_parallel_sizes
        if sizes is not None:
            object.__setattr__(self, "hierarchical_context_parallel_sizes", tuple(sizes))
            if any(size < 1 for size in sizes):
                raise ValueError(
                    f"hierarchical_context_parallel_sizes {list(sizes)}: the size of a level is at least 1."
                )
            if math.prod(sizes) != self.context_parallel_size:
                raise ValueError(
                    f"hierarchical_context_parallel_sizes {list(sizes)}: their product is {math.prod(sizes)}, "
                    f"context_parallel_size is {self.context_parallel_size}. The two must be equal."
                )


@dataclass(frozen=True, kw_only=True)
class TransformerConfig(ModelParallelConfig):
    """The architecture of a decoder and how it is cut.

    Sizes are numbers of features, heads or layers. ``num_query_groups`` is the number of
    key/value heads (GQA); None means as many as query heads. ``kv_channels`` is the size of
    a head; None means hidden_size / num_attention_heads. ``activation_func`` is a name
    (``"gelu"``, ``"silu"``) or a callable.
    """

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_query_groups: int = None  # type: ignore[assignment]  # filled in below
    kv_channels: int = None  # type: ignore[assignment]
    ffn_hidden_size: int = None  # type: ignore[assignment]
    normalization: str = "LayerNorm"
    layernorm_epsilon: float = 1e-5
    layernorm_zero_centered_gamma: bool = False
    gated_linear_unit: bool = False
    activation_func: str | Callable = "gelu"
    add_bias_linear: bool = True
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.0
    position_embedding_type: str = "rope"
    rotary_base: float = 10000.0
    rope_scaling: Mapping[str, Any] | None = None
    share_embeddings_and_output_weights: bool = False

    cp_comm_type: str | list[str] | None = None
    attention_backend: str = "auto"
    deterministic_mode: bool = False

    num_moe_experts: int | None = None
    moe_router_topk: int = 2
    moe_aux_loss_coeff: float = 0.0
    moe_ffn_hidden_size: int | None = None
    moe_token_dispatcher_type: str = "allgather"

    def __post_init__(self) -> None:
        super().__post_init__()
        optional = ("num_query_groups", "kv_channels", "ffn_hidden_size")
        for name in ("num_layers", "hidden_size", "num_attention_heads", *optional):
            size = getattr(self, name)
            if size is not None and size < 1:
                raise ValueError(f"{name}={size}: a size is at least 1.")
        if self.num_query_groups is None:
            object.__setattr__(self, "num_query_groups", self.num_attention_heads)
        if self.kv_channels is None:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size {self.hidden_size} is not divisible by num_attention_heads "
                    f"{self.num_attention_heads}. Choose divisible sizes, or give kv_channels (the head size)."
                )
            object.__setattr__(self, "kv_channels", self.hidden_size // self.num_attention_heads)
        if self.ffn_hidden_size is None:
            object.__setattr__(self, "ffn_hidden_size", 4 * self.hidden_size)
        for _, message in architecture_problems(self):
            raise ValueError(message)

    def comm_type_of_layer(self, layer_number: int) -> str:
        """The communication type of layer ``layer_number`` (from 1); a list is cycled over the layers."""
        types = self.cp_comm_type or "p2p"
        chosen = types if isinstance(types, str) else types[(layer_number - 1) % len(types)]
        return normal_comm_type(chosen)


def architecture_problems(c: Any) -> list[tuple[tuple[str, ...], str]]:
    """All broken rules of an architecture and its cut, as (fields involved, message).

    Args:
        c: a TransformerConfig, or anything with its fields.
    """
    tp, tp_key = c.tensor_model_parallel_size, "tensor_model_parallel_size"
    heads, groups = c.num_attention_heads, c.num_query_groups or c.num_attention_heads
    ffn = c.ffn_hidden_size or 4 * c.hidden_size
    found: list[tuple[tuple[str, ...], str]] = []

    def rule(holds: bool, fields: tuple[str, ...], message: str) -> None:
        if not holds:
            found.append((fields, message))

    rule(
        heads % groups == 0,
        ("num_attention_heads", "num_query_groups"),
        f"num_attention_heads {heads} is not divisible by num_query_groups {groups} (key/value heads): "
        "each key/value head serves the same number of query heads.",
    )
    rule(
        heads % tp == 0,
        ("num_attention_heads", tp_key),
        f"num_attention_heads {heads} is not divisible by tensor_parallel_size {tp}: every tensor parallel "
        f"rank holds the same number of heads. Use one of {_divisors(heads)}.",
    )
    rule(
        groups % tp == 0,
        ("num_query_groups", tp_key),
        f"num_query_groups {groups} (key/value heads) is not divisible by tensor_parallel_size {tp}. "
        f"Use one of {_divisors(math.gcd(heads, groups))}, and context_parallel_size for the other ranks.",
    )
    rule(
        ffn % tp == 0,
        ("ffn_hidden_size", tp_key),
        f"ffn_hidden_size {ffn} is not divisible by tensor_parallel_size {tp}: choose a multiple.",
    )
    rule(
        VOCAB_MULTIPLE % tp == 0,
        (tp_key,),
        f"tensor_parallel_size {tp} does not divide {VOCAB_MULTIPLE}, the unit the vocabulary is padded to. "
        f"Use one of {_divisors(VOCAB_MULTIPLE)}.",
    )
    rule(
        c.kv_channels % 2 == 0 or c.position_embedding_type != "rope",
        ("kv_channels",),
        f"kv_channels {c.kv_channels} (head size) is odd: rotary embeddings turn pairs. Use an even size.",
    )
    rule(
        c.normalization in ("RMSNorm", "LayerNorm"),
        ("normalization",),
        f"normalization {c.normalization!r}: RMSNorm or LayerNorm.",
    )
    rule(
        c.position_embedding_type in ("rope", "none"),
        ("position_embedding_type",),
        f"position_embedding_type {c.position_embedding_type!r}: rope or none.",
    )
    for name in ("attention_dropout", "hidden_dropout"):
        rule(
            getattr(c, name) == 0.0,
            (name,),
            f"{name}={getattr(c, name)}: dropout is not supported yet, because its pattern would depend "
            "on the layout. Set it to 0.",
        )
    types = c.cp_comm_type or []
    for given in [types] if isinstance(types, str) else types:
        rule(
            normal_comm_type(given) in CP_COMM_TYPES,
            ("cp_comm_type",),
            f"cp_comm_type {given!r}: one of {', '.join(CP_COMM_TYPES)}.{did_you_mean(given, CP_COMM_TYPES)}",
        )
    rule(
        c.cp_comm_type != [],
        ("cp_comm_type",),
        f"cp_comm_type is an empty list: name one of {', '.join(CP_COMM_TYPES)}.",
    )
    rule(
        not isinstance(c.activation_func, str) or c.activation_func in ACTIVATIONS,
        ("activation_func",),
        f"activation_func {c.activation_func!r}: one of {', '.join(ACTIVATIONS)}, or a callable.",
    )
    if c.rope_scaling:
        kind = c.rope_scaling.get("rope_type", c.rope_scaling.get("type"))
        needs = ROPE_SCALING_FIELDS.get(kind) if isinstance(kind, str) else None
        rule(
            needs is not None,
            ("rope_scaling",),
            f"rope_scaling type {kind!r}: one of {', '.join(ROPE_SCALING_FIELDS)}.",
        )
        missing = [field for field in needs or () if field not in c.rope_scaling]
        rule(not missing, ("rope_scaling",), f"rope_scaling of type {kind}: {', '.join(missing)} missing.")
        numbers = {field: c.rope_scaling[field] for field in needs or () if field in c.rope_scaling}
        wrong = [f"{k} {v!r}" for k, v in numbers.items() if not _positive(v)]
        rule(not wrong, ("rope_scaling",), f"rope_scaling: {', '.join(wrong)}: a number above 0.")
        if kind == "llama3" and not missing and not wrong:
            low, high = numbers["low_freq_factor"], numbers["high_freq_factor"]
            rule(
                high > low,
                ("rope_scaling",),
                f"rope_scaling: high_freq_factor {high} must be larger than low_freq_factor {low}.",
            )
    return found


def _positive(value: Any) -> bool:
    return (
        isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0
    )


def normal_comm_type(name: str) -> str:
    """``allgather`` is accepted for ``all_gather``."""
    return "all_gather" if name == "allgather" else name


def _divisors(n: int) -> str:
    return ", ".join(str(d) for d in range(1, n + 1) if n % d == 0)
