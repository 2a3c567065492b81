"""Architecture: every field that describes a model, declared once. Needs no torch.

A field is declared here and in ``config/keys/model.py`` (its key). These follow from the fields:
TransformerConfig (``config.model``), the record of the model in a checkpoint (``longspan.json``), reading and
writing config.json (``config.families``), and the names and shapes of the parameters (``config.parameters``).

The metadata of a field holds what the field decides, and the name of its key if the two names differ:

    shapes      which weights there are and what they mean: a checkpoint with another value does not fit
    numbers     what is computed with the weights: a run can only be resumed with the same value
    training    how training begins or goes on: a resumed run may have another value
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, field, fields
from typing import TYPE_CHECKING, Any

from longspan.config.experts import expert_problems
from longspan.config.recurrent import (
    LETTERS,
    ONLY_WITH,
    LayerParts,
    is_recurrent,
    mixers_of,
    recurrent_problems,
)
from longspan.config.rope import rope_problems
from longspan.errors import Problem

if TYPE_CHECKING:
    from longspan.config.schema import TrainConfig

#: the names that activation_func accepts
ACTIVATIONS = ("silu", "gelu", "quick_gelu", "relu", "squared_relu")

#: what the softmax of attention has in its denominator beside the keys: nothing, a learned sink for each head, or 1
SOFTMAX_TYPES = ("vanilla", "learnable", "off-by-one")

#: how a model represents the positions of tokens
POSITION_EMBEDDINGS = ("rope", "learned_absolute", "none")


SHAPES, NUMBERS, TRAINING = ({"decides": what} for what in ("shapes", "numbers", "training"))


def key_of(one: Field) -> str:
    """The config key of a field of :class:`Architecture`."""
    return one.metadata.get("key") or one.name


@dataclass(frozen=True, kw_only=True)
class InitialValues:
    """The only field of a model that a single layer needs: how its weights are initialised."""

    init_method_std: float = field(default=0.02, metadata=TRAINING)


@dataclass(frozen=True, kw_only=True)
class Architecture(InitialValues):
    """The architecture of a decoder, with Megatron-LM's defaults.

    Sizes are numbers of features, heads or layers. ``num_query_groups`` is the number of
    key/value heads (GQA); None means as many as query heads. ``kv_channels`` is the size of
    a head; None means hidden_size / num_attention_heads. ``ffn_hidden_size`` None means
    4 x hidden_size. ``activation_func`` is a name (``"gelu"``, ``"silu"``) or a callable.
    ``max_position_embeddings`` is the number of rows of a learned table of positions (None:
    GPTModel's max_sequence_length) and the length beyond which ``dynamic`` scaling of rotary
    embeddings has an effect. ``sliding_window`` is the number of tokens that a query attends to,
    itself included; None means no limit. It is a number for all layers, or a list that is cycled
    over the layers. ``softmax_type`` ``learnable`` gives each query head a sink, a logit that joins the
    softmax's denominator; ``off-by-one`` is a sink of 0. ``activation_func_clamp_value`` c and
    ``glu_linear_offset`` o make a gated MLP of act(min(gate, c)) x (clamp(up, -c, c) + o). ``layer_types`` and ``hybrid_override_pattern`` name the layers of a hybrid
    model (``config.recurrent``); None is a model of attention alone.

    An object may break rules: :func:`architecture_problems` finds the broken rules.
    """

    num_layers: int = field(metadata=SHAPES)
    hidden_size: int = field(metadata=SHAPES)
    num_attention_heads: int = field(metadata=SHAPES)
    num_query_groups: int = field(default=None, metadata=SHAPES)  # type: ignore[assignment]
    kv_channels: int = field(default=None, metadata=SHAPES)  # type: ignore[assignment]
    ffn_hidden_size: int = field(default=None, metadata=SHAPES)  # type: ignore[assignment]
    normalization: str = field(default="LayerNorm", metadata=SHAPES)
    layernorm_zero_centered_gamma: bool = field(default=False, metadata=SHAPES)
    gated_linear_unit: bool = field(default=False, metadata=SHAPES)
    activation_func: str | Callable = field(default="gelu", metadata=SHAPES)
    add_bias_linear: bool = field(default=True, metadata=SHAPES)
    add_qkv_bias: bool = field(default=False, metadata=SHAPES)
    qk_layernorm: bool = field(default=False, metadata=SHAPES)
    qk_layernorm_over_heads: bool = field(default=False, metadata=SHAPES)
    softmax_type: str = field(default="vanilla", metadata=SHAPES)
    attention_output_gate: bool = field(default=False, metadata=SHAPES)
    attention_post_norm: bool = field(default=False, metadata=SHAPES)
    position_embedding_type: str = field(default="rope", metadata=SHAPES)
    share_embeddings_and_output_weights: bool = field(
        default=False, metadata=SHAPES | {"key": "tie_word_embeddings"}
    )
    # This field decides shapes only if there is a learned table of positions.
    max_position_embeddings: int | None = field(default=None, metadata=SHAPES)

    rotary_base: float = field(default=10000.0, metadata=NUMBERS)
    rotary_percent: float = field(default=1.0, metadata=NUMBERS)
    rope_scaling: Mapping[str, Any] | None = field(default=None, metadata=NUMBERS)
    sliding_window: int | list[int | None] | None = field(default=None, metadata=NUMBERS)
    activation_func_clamp_value: float | None = field(default=None, metadata=NUMBERS)
    glu_linear_offset: float = field(default=0.0, metadata=NUMBERS)
    layernorm_epsilon: float = field(default=1e-5, metadata=NUMBERS)
    softmax_scale: float | None = field(default=None, metadata=NUMBERS)

    num_moe_experts: int | None = field(default=None, metadata=SHAPES)
    moe_ffn_hidden_size: int = field(default=None, metadata=SHAPES)  # type: ignore[assignment]
    moe_layer_freq: int | list[int] = field(default=1, metadata=SHAPES)
    moe_shared_expert_intermediate_size: int | None = field(default=None, metadata=SHAPES)
    moe_shared_expert_gate: bool = field(default=False, metadata=SHAPES)
    moe_router_bias: bool = field(default=False, metadata=SHAPES)
    moe_router_enable_expert_bias: bool = field(default=False, metadata=SHAPES)
    moe_router_topk: int = field(default=2, metadata=NUMBERS)
    moe_router_score_function: str = field(default="softmax", metadata=NUMBERS)
    moe_router_pre_softmax: bool = field(default=False, metadata=NUMBERS)
    moe_router_num_groups: int | None = field(default=None, metadata=NUMBERS)
    moe_router_group_topk: int | None = field(default=None, metadata=NUMBERS)
    moe_router_topk_scaling_factor: float | None = field(default=None, metadata=NUMBERS)
    moe_expert_capacity_factor: float | None = field(default=None, metadata=NUMBERS)
    moe_pad_expert_input_to_capacity: bool = field(default=False, metadata=NUMBERS)
    moe_token_drop_policy: str = field(default="probs", metadata=NUMBERS)
    moe_router_load_balancing_type: str | list[str] = field(default="aux_loss", metadata=TRAINING)
    moe_aux_loss_coeff: float | list[float] = field(default=0.0, metadata=TRAINING)
    moe_z_loss_coeff: float | None = field(default=None, metadata=TRAINING)
    moe_router_bias_update_rate: float = field(default=1e-3, metadata=TRAINING)

    layer_types: list[str] | None = field(default=None, metadata=SHAPES)
    hybrid_override_pattern: str | None = field(default=None, metadata=SHAPES)
    mamba_num_heads: int = field(default=None, metadata=SHAPES)  # type: ignore[assignment]
    mamba_head_dim: int = field(default=64, metadata=SHAPES)
    mamba_num_groups: int = field(default=8, metadata=SHAPES)
    mamba_state_dim: int = field(default=128, metadata=SHAPES)
    mamba_conv_kernel_dim: int = field(default=4, metadata=SHAPES)
    mamba_conv_bias: bool = field(default=True, metadata=SHAPES)
    mamba_grouped_norm: bool = field(default=True, metadata=NUMBERS)
    mamba_dt_min: float = field(default=0.0, metadata=NUMBERS)
    linear_num_key_heads: int = field(default=16, metadata=SHAPES)
    linear_num_value_heads: int = field(default=32, metadata=SHAPES)
    linear_key_head_dim: int = field(default=128, metadata=SHAPES)
    linear_value_head_dim: int = field(default=128, metadata=SHAPES)
    linear_conv_kernel_dim: int = field(default=4, metadata=SHAPES)
    linear_allow_neg_eigval: bool = field(default=False, metadata=NUMBERS)
    linear_norm_epsilon: float | None = field(default=None, metadata=NUMBERS)

    attention_dropout: float = field(default=0.0, metadata=TRAINING)
    hidden_dropout: float = field(default=0.0, metadata=TRAINING)

    def __post_init__(self) -> None:
        heads = self.num_attention_heads
        if self.num_query_groups is None:
            object.__setattr__(self, "num_query_groups", heads)
        # If heads does not divide hidden_size, kv_channels stays None, and architecture_problems reports it.
        if self.kv_channels is None and heads >= 1 and self.hidden_size % heads == 0:
            object.__setattr__(self, "kv_channels", self.hidden_size // heads)
        if self.ffn_hidden_size is None:
            object.__setattr__(self, "ffn_hidden_size", 4 * self.hidden_size)
        pattern = self.moe_layer_freq
        if isinstance(pattern, list | tuple) and pattern and all(one == 1 for one in pattern):
            object.__setattr__(self, "moe_layer_freq", 1)
        if self.moe_ffn_hidden_size is None and self.num_moe_experts is not None:
            object.__setattr__(self, "moe_ffn_hidden_size", self.ffn_hidden_size)
        if self.mamba_num_heads is None and self.mamba_head_dim >= 1:
            object.__setattr__(self, "mamba_num_heads", max(1, 2 * self.hidden_size // self.mamba_head_dim))

    @classmethod
    def of(cls, config: TrainConfig) -> Architecture:
        """The architecture of a config in which num_layers, hidden_size and num_attention_heads are set."""
        values = {one.name: getattr(config, key_of(one)) for one in fields(Architecture)}
        if config.position_embedding_type == "learned_absolute":
            values["max_position_embeddings"] = config.max_position_embeddings or config.sequence_len
        return cls(**values)

    def keys(self, decides: str) -> dict[str, Any]:
        """Config key -> value of the fields that decide ``shapes``, ``numbers`` or ``training``."""
        found = {
            key_of(one): getattr(self, one.name)
            for one in fields(Architecture)
            if one.metadata["decides"] == decides
        }
        if not self.learned_positions:
            found.pop("max_position_embeddings", None)
        if self.num_moe_experts is None:
            found = {name: value for name, value in found.items() if not name.startswith("moe_")}
        for kind, names in ONLY_WITH.items():
            if kind not in self.mixers:
                found = {name: value for name, value in found.items() if name not in names}
        return found

    @property
    def learned_positions(self) -> bool:
        """Whether the model has a learned table of positions."""
        return self.position_embedding_type == "learned_absolute"

    @property
    def rotary_channels(self) -> int:
        """Features of each head that rotary embeddings rotate: the first ones."""
        return round(self.kv_channels * self.rotary_percent)

    @property
    def windows(self) -> list[int | None]:
        """The sliding windows that are cycled over the layers."""
        given = self.sliding_window
        return list(given) if isinstance(given, list | tuple) else [given]

    def window_of_layer(self, layer_number: int) -> int | None:
        """The sliding window of layer ``layer_number`` (from 1); None if the layer has no window."""
        windows = self.windows
        return windows[(layer_number - 1) % len(windows)]

    def parts_of_layer(self, layer_number: int) -> LayerParts:
        """The parts of layer ``layer_number`` (from 1)."""
        index = layer_number - 1
        if self.hybrid_override_pattern is not None:
            return LETTERS[self.hybrid_override_pattern[index]]
        mixer = "attention" if self.layer_types is None else self.layer_types[index]
        if self.num_moe_experts is None:
            return LayerParts(mixer, "dense")
        freq = self.moe_layer_freq
        sparse = index % freq == 0 if isinstance(freq, int) else bool(freq[index % len(freq)])
        return LayerParts(mixer, "experts" if sparse else "dense")

    def norms_of_layer(self, layer_number: int) -> tuple[str, str]:
        """The names of the norms of a layer's mixer and of its MLP, if the layer has these parts."""
        if self.attention_post_norm and self.parts_of_layer(layer_number).mixer == "attention":
            return "post_attention_layernorm", "post_mlp_layernorm"
        return "input_layernorm", "pre_mlp_layernorm"

    def has_experts(self, layer_number: int) -> bool:
        """Whether the MLP of layer ``layer_number`` (from 1) is a mixture of experts."""
        return self.parts_of_layer(layer_number).mlp == "experts"

    @property
    def mixers(self) -> list[str]:
        """The mixers of the layers that have one, in order."""
        mixers = mixers_of(self.layer_types, self.hybrid_override_pattern)
        return ["attention"] * self.num_layers if mixers is None else mixers

    @property
    def recurrent(self) -> bool:
        """Whether a layer hands a state from token to token."""
        return is_recurrent(self.layer_types, self.hybrid_override_pattern)

    @property
    def attention_windows(self) -> list[int | None]:
        """The sliding window of each attention layer; one without a window for a model without attention."""
        numbers = range(1, self.num_layers + 1)
        found = [self.window_of_layer(n) for n in numbers if self.parts_of_layer(n).mixer == "attention"]
        return found or [None]

    @property
    def expert_layers(self) -> list[int]:
        """The numbers of the layers with experts."""
        return [number for number in range(1, self.num_layers + 1) if self.has_experts(number)]

    @property
    def balancing(self) -> dict[str, float]:
        """The balancing losses of each layer with experts: kind -> coefficient, without those of coefficient 0."""
        kinds, coefficients = self.moe_router_load_balancing_type, self.moe_aux_loss_coeff
        kinds = [kinds] if isinstance(kinds, str) else kinds
        if not isinstance(coefficients, list | tuple):
            coefficients = [coefficients] * len(kinds)
        return {kind: value for kind, value in zip(kinds, coefficients) if kind != "none" and value}


#: the keys of the fields that decide shapes
SHAPE_KEYS = tuple(key_of(one) for one in fields(Architecture) if one.metadata["decides"] == "shapes")


def architecture_problems(model: Architecture) -> list[Problem]:
    """All rules that an architecture breaks, as (fields involved, message)."""
    found: list[Problem] = []

    def rule(holds: bool, names: tuple[str, ...], message: str) -> None:
        if not holds:
            found.append((names, message))

    sizes = ("num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "kv_channels")
    for name in (*sizes, "ffn_hidden_size", "max_position_embeddings"):
        size = getattr(model, name)
        rule(size is None or size >= 1, (name,), f"{name}={size}: a size is at least 1.")
    heads, groups = model.num_attention_heads, model.num_query_groups
    rule(
        model.kv_channels is not None or bool(found),
        ("hidden_size", "num_attention_heads"),
        f"hidden_size {model.hidden_size} is not divisible by num_attention_heads {heads}. Choose divisible sizes, or give "
        "kv_channels (the head size).",
    )
    if found:
        return found
    rule(
        heads % groups == 0,
        ("num_attention_heads", "num_query_groups"),
        f"num_attention_heads {heads} is not divisible by num_query_groups {groups} (key/value heads): "
        "each key/value head serves the same number of query heads.",
    )
    rule(
        model.kv_channels % 2 == 0 or model.position_embedding_type != "rope",
        ("kv_channels",),
        f"kv_channels {model.kv_channels} (head size) is odd: rotary embeddings turn pairs. Use an even size.",
    )
    turned = model.kv_channels * model.rotary_percent
    rule(
        model.rotary_percent == 1.0 or (0 < model.rotary_percent < 1 and turned >= 2 and turned % 2 == 0),
        ("rotary_percent", "kv_channels"),
        f"rotary_percent {model.rotary_percent} of kv_channels {model.kv_channels} is {turned:g} features: rotary embeddings turn "
        "an even number of them, at least 2 and at most all.",
    )
    rule(
        model.rotary_percent == 1.0 or model.position_embedding_type == "rope",
        ("rotary_percent", "position_embedding_type"),
        f"rotary_percent has no effect with position_embedding_type {model.position_embedding_type}. Leave it out.",
    )
    over_heads = model.qk_layernorm_over_heads
    rule(
        model.qk_layernorm or not over_heads,
        ("qk_layernorm_over_heads", "qk_layernorm"),
        "qk_layernorm_over_heads has no effect without qk_layernorm. Set qk_layernorm: true, or leave it out.",
    )
    rule(
        model.normalization == "RMSNorm" or not over_heads,
        ("qk_layernorm_over_heads", "normalization"),
        f"qk_layernorm_over_heads with normalization {model.normalization}: only RMSNorm is computed over all heads together. Use "
        "RMSNorm, or normalise each head.",
    )
    rule(
        model.normalization in ("RMSNorm", "LayerNorm"),
        ("normalization",),
        f"normalization {model.normalization!r}: RMSNorm or LayerNorm.",
    )
    rule(
        model.position_embedding_type in POSITION_EMBEDDINGS,
        ("position_embedding_type",),
        f"position_embedding_type {model.position_embedding_type!r}: one of {', '.join(POSITION_EMBEDDINGS)}.",
    )
    for name in ("attention_dropout", "hidden_dropout"):
        rule(
            getattr(model, name) == 0.0,
            (name,),
            f"{name}={getattr(model, name)}: dropout is not supported yet, because its pattern would depend "
            "on the layout. Set it to 0.",
        )
    windows = model.windows
    rule(
        bool(windows) and all(w is None or (isinstance(w, int) and w >= 1) for w in windows),
        ("sliding_window",),
        f"sliding_window {model.sliding_window}: tokens a query sees, itself included, so 1 or more; null for no limit; or a "
        "list of these, cycled over the layers.",
    )
    rule(
        not isinstance(model.activation_func, str) or model.activation_func in ACTIVATIONS,
        ("activation_func",),
        f"activation_func {model.activation_func!r}: one of {', '.join(ACTIVATIONS)}, or a callable.",
    )
    rule(
        model.softmax_type in SOFTMAX_TYPES,
        ("softmax_type",),
        f"softmax_type {model.softmax_type!r}: one of {', '.join(SOFTMAX_TYPES)}.",
    )
    clamp = model.activation_func_clamp_value
    rule(
        clamp is None or (math.isfinite(clamp) and clamp > 0),
        ("activation_func_clamp_value",),
        f"activation_func_clamp_value {clamp}: a number above 0, or null for no limit.",
    )
    rule(
        math.isfinite(model.glu_linear_offset),
        ("glu_linear_offset",),
        f"glu_linear_offset {model.glu_linear_offset}: a finite number.",
    )
    for name, off in (("activation_func_clamp_value", None), ("glu_linear_offset", 0.0)):
        rule(
            model.gated_linear_unit or getattr(model, name) == off,
            (name, "gated_linear_unit"),
            f"{name} {getattr(model, name)} has no effect without gated_linear_unit. Set it, or leave {name} out.",
        )
    rule(
        not model.rope_scaling or model.position_embedding_type == "rope",
        ("rope_scaling", "position_embedding_type"),
        f"rope_scaling has no effect with position_embedding_type {model.position_embedding_type}. Leave one out.",
    )
    if model.position_embedding_type == "rope":
        found += [(("rope_scaling",), message) for message in rope_problems(model)]
    found += recurrent_problems(model)
    return found if found else expert_problems(model)


def divisors(n: int) -> str:
    """The divisors of a number, for messages."""
    return ", ".join(str(d) for d in range(1, n + 1) if n % d == 0)


def common_divisors(a: int, b: int) -> str:
    """The divisors that two numbers have in common, for messages."""
    return divisors(math.gcd(a, b))
