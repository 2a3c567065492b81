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

from longspan.config.rope import rope_problems
from longspan.errors import Problem, did_you_mean

VOCAB_MULTIPLE = 128

#: names activation_func takes
ACTIVATIONS = ("silu", "gelu", "relu")

#: how a model knows positions
POSITION_EMBEDDINGS = ("rope", "learned_absolute", "none")

#: the label of a token that has no target
IGNORE_INDEX = -100

CP_COMM_TYPES = ("p2p", "all_gather", "a2a", "a2a+p2p")


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


#: fields of Megatron-LM's configs that stand for what is not there yet, by the beginnings of their names
NOT_YET = {
    "experts": ("moe_", "expert_"),
    "pipelines": (
        *(
            "pipeline_",
            "num_layers_in_first_pipeline_stage",
            "num_layers_in_last_pipeline_stage",
            "account_for_",
        ),
        *(
            "microbatch_group_size_per_vp_stage",
            "overlap_p2p_comm",
            "batch_p2p_",
            "deallocate_pipeline_outputs",
        ),
        *("variable_seq_lengths", "first_pipeline_num_layers", "last_pipeline_num_layers"),
    ),
    "several predicted tokens (MTP)": ("mtp_",),
    "compressed keys and values (MLA)": (
        "q_lora_rank",
        "kv_lora_rank",
        "qk_head_dim",
        "qk_pos_emb_head_dim",
        "v_head_dim",
    ),
    "state-space and linear attention layers": (
        *("mamba_", "linear_", "is_hybrid_model", "hybrid_override_pattern", "layer_types", "ssm_cp_type"),
        "experimental_attention_variant",
    ),
    "8-bit and 4-bit numbers": ("fp8", "fp4"),
    "layers that differ in size": ("heterogeneous_",),
}


@dataclass(frozen=True, kw_only=True)
class ModelParallelConfig:
    """How a model is cut. Sizes are numbers of ranks.

    Raises:
        ValueError: a field of Megatron-LM's that stands for what is not there yet, or values that break a rule.
        TypeError: a field that nobody has.
    """

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

    def __new__(cls, *args: Any, **fields: Any) -> ModelParallelConfig:
        for name in fields.keys() - cls.__dataclass_fields__.keys():
            for part, beginnings in NOT_YET.items():
                if name.startswith(beginnings):
                    raise ValueError(f"{name}: {part} are not supported yet. Leave it out.")
        return super().__new__(cls)

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
            if problem := hierarchy_problem(sizes, self.context_parallel_size):
                raise ValueError(problem)


@dataclass(frozen=True, kw_only=True)
class TransformerConfig(ModelParallelConfig):
    """The architecture of a decoder and how it is cut.

    Sizes are numbers of features, heads or layers. ``num_query_groups`` is the number of
    key/value heads (GQA); None means as many as query heads. ``kv_channels`` is the size of
    a head; None means hidden_size / num_attention_heads. ``activation_func`` is a name
    (``"gelu"``, ``"silu"``) or a callable. ``max_position_embeddings`` is the number of rows of a
    learned table of positions (None: GPTModel's max_sequence_length) and where ``dynamic``
    scaling of rotary embeddings begins. ``cp_comm_type`` and ``sliding_window`` (tokens a
    query sees, itself included; None is no limit) hold for all layers, or are a list cycled
    over the layers.
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
    add_qkv_bias: bool = False
    qk_layernorm: bool = False
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.0
    position_embedding_type: str = "rope"
    max_position_embeddings: int | None = None
    rotary_base: float = 10000.0
    rope_scaling: Mapping[str, Any] | None = None
    share_embeddings_and_output_weights: bool = False

    cp_comm_type: str | list[str] | None = None
    sliding_window: int | list[int | None] | None = None
    softmax_type: str = "vanilla"
    attn_logit_softcapping: float | None = None
    multi_latent_attention: bool = False
    attention_backend: str = "auto"
    deterministic_mode: bool = False

    num_moe_experts: int | None = None
    moe_router_topk: int = 2
    moe_aux_loss_coeff: float = 0.0
    moe_ffn_hidden_size: int | None = None
    moe_token_dispatcher_type: str = "allgather"

    def __post_init__(self) -> None:
        super().__post_init__()
        optional = ("num_query_groups", "kv_channels", "ffn_hidden_size", "max_position_embeddings")
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

    def window_of_layer(self, layer_number: int) -> int | None:
        """The sliding window of layer ``layer_number`` (from 1), None for none."""
        windows = self.windows
        return windows[(layer_number - 1) % len(windows)]

    @property
    def windows(self) -> list[int | None]:
        """The sliding windows that are cycled over the layers."""
        given = self.sliding_window
        return list(given) if isinstance(given, list | tuple) else [given]


def unsupported(config: TransformerConfig) -> list[str]:
    """Fields that ask for what is not there yet, in words; a layer refuses them."""
    found = []
    for part, names in {
        "pipelines": ("pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size"),
        "experts": (
            *(
                "expert_model_parallel_size",
                "expert_tensor_parallel_size",
                "num_moe_experts",
                "moe_router_topk",
            ),
            *("moe_aux_loss_coeff", "moe_ffn_hidden_size", "moe_token_dispatcher_type"),
        ),
    }.items():
        for name in names:
            value, default = getattr(config, name), type(config).__dataclass_fields__[name].default
            # A degree of 1 asks for nothing, and no more does an expert's tensor parallel size that is everybody's.
            harmless = (default, 1) if name.endswith("_size") and "parallel" in name else (default,)
            if name == "expert_tensor_parallel_size":
                harmless = (*harmless, config.tensor_model_parallel_size)
            if value not in harmless:
                found.append(f"{name}={value}: {part} are not supported yet. Leave it out.")
    return found


def architecture_problems(c: Any) -> list[Problem]:
    """All broken rules of an architecture and its cut, as (fields involved, message).

    Args:
        c: a TransformerConfig, or anything with its fields.
    """
    tp, tp_key = c.tensor_model_parallel_size, "tensor_model_parallel_size"
    heads, groups = c.num_attention_heads, c.num_query_groups or c.num_attention_heads
    ffn = c.ffn_hidden_size or 4 * c.hidden_size
    found: list[Problem] = []

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
        c.position_embedding_type in POSITION_EMBEDDINGS,
        ("position_embedding_type",),
        f"position_embedding_type {c.position_embedding_type!r}: one of {', '.join(POSITION_EMBEDDINGS)}.",
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
    found += _head_move_problems(c)
    windows = c.sliding_window if isinstance(c.sliding_window, list | tuple) else [c.sliding_window]
    rule(
        bool(windows) and all(w is None or (isinstance(w, int) and w >= 1) for w in windows),
        ("sliding_window",),
        f"sliding_window {c.sliding_window}: tokens a query sees, itself included, so 1 or more; null for no limit; or a "
        "list of these, cycled over the layers.",
    )
    for name, off, what in (
        ("softmax_type", "vanilla", "attention sinks are"),
        ("attn_logit_softcapping", None, "soft-capping of attention logits is"),
        ("multi_latent_attention", False, "multi-latent attention (MLA) is"),
    ):
        rule(
            getattr(c, name) == off,
            (name,),
            f"{name}={getattr(c, name)!r}: {what} not supported yet. Leave it {off!r}.",
        )
    rule(
        not isinstance(c.activation_func, str) or c.activation_func in ACTIVATIONS,
        ("activation_func",),
        f"activation_func {c.activation_func!r}: one of {', '.join(ACTIVATIONS)}, or a callable.",
    )
    rule(
        not c.rope_scaling or c.position_embedding_type == "rope",
        ("rope_scaling", "position_embedding_type"),
        f"rope_scaling has no effect with position_embedding_type {c.position_embedding_type}. Leave one out.",
    )
    if c.position_embedding_type == "rope":
        found += [(("rope_scaling",), message) for message in rope_problems(c)]
    return found


def _head_move_problems(c: Any) -> list[Problem]:
    """Broken rules of communication types that move heads."""
    cp, sizes = c.context_parallel_size, c.hierarchical_context_parallel_sizes
    given = [c.cp_comm_type] if isinstance(c.cp_comm_type, str) else c.cp_comm_type or []
    types = {normal_comm_type(name) for name in given}
    found: list[Problem] = []
    hierarchy = "hierarchical_context_parallel_sizes"
    if sizes and (problem := hierarchy_problem(sizes, cp)):
        return [((hierarchy, "context_parallel_size"), problem)]
    if cp == 1 or c.num_attention_heads % c.tensor_model_parallel_size:
        return found
    heads = c.num_attention_heads // c.tensor_model_parallel_size
    if "a2a+p2p" in types and (not sizes or len(sizes) != 2):
        found.append(
            (
                (hierarchy,),
                f"cp_comm_type 'a2a+p2p' needs {hierarchy} [inner a2a, outer p2p], two sizes whose product is "
                f"context_parallel_size {cp}; found {list(sizes) if sizes else 'none'}. For example {hierarchy_proposal(cp, heads)}.",
            )
        )
        return found
    for name, degree in (("a2a", cp), ("a2a+p2p", sizes[0] if sizes else 1)):
        if name in types and heads % degree:
            found.append(
                (
                    ("cp_comm_type", "num_attention_heads"),
                    f"cp_comm_type {name!r} moves heads over {degree} ranks, but each tensor parallel rank has {heads} query "
                    f"heads, which do not divide by {degree}. Use p2p or all_gather, or a2a+p2p with {hierarchy} "
                    f"{hierarchy_proposal(cp, heads)}.",
                )
            )
    return found


def hierarchy_problem(sizes: Any, cp: int) -> str | None:
    """What is wrong with hierarchical_context_parallel_sizes; None where nothing is."""
    sizes = list(sizes)
    if any(size < 1 for size in sizes):
        return f"hierarchical_context_parallel_sizes {sizes}: the size of a level is at least 1."
    if math.prod(sizes) != cp:
        return (
            f"hierarchical_context_parallel_sizes {sizes}: their product is {math.prod(sizes)}, "
            f"context_parallel_size is {cp}. The two must be equal."
        )
    return None


def hierarchy_proposal(cp: int, heads: int | None = None) -> list[int]:
    """Sizes [inner, outer] for ``cp`` ranks: the inner one divides the heads and lies near the square root."""
    good = [d for d in range(1, cp + 1) if cp % d == 0 and (heads is None or heads % d == 0)]
    inner = min(good, key=lambda d: (abs(math.log(d * d / cp)), d))
    return [inner, cp // inner]


def normal_comm_type(name: str) -> str:
    """``allgather`` is accepted for ``all_gather``."""
    return "all_gather" if name == "allgather" else name


def _divisors(n: int) -> str:
    return ", ".join(str(d) for d in range(1, n + 1) if n % d == 0)
