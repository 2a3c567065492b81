"""Recurrent layers of a model: which layers they are, their sizes, and the rules for both. Needs no torch.

A layer has a *mixer*, which mixes tokens (attention, Mamba-2 or the gated delta rule), and an MLP or experts. A
hybrid model is written in one of two ways:

    layer_types              a mixer for each layer; every layer has an MLP (or experts) too
    hybrid_override_pattern  Megatron-LM's letters; every layer has one part alone:
                             M Mamba-2   G gated delta rule   * attention   - MLP   E experts
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from longspan.errors import Problem, did_you_mean

if TYPE_CHECKING:
    from longspan.config.architecture import Architecture
    from longspan.config.schema import TrainConfig

#: the mixers of ``layer_types``
MIXERS = ("attention", "mamba", "gated_delta")
#: the mixers that hand a state from token to token
RECURRENT = ("mamba", "gated_delta")
#: names of other vocabularies -> the mixer
_OTHER_NAMES = {
    "full_attention": "attention",
    "linear_attention": "gated_delta",
    "gated_delta_net": "gated_delta",
    "mamba2": "mamba",
}
#: how a recurrent layer works on a sequence that is cut over ranks
SSM_CP_TYPES = ("auto", "state", "a2a")
#: mixer -> the package with a kernel for its scan
PACKAGES = {"mamba": "mamba-ssm", "gated_delta": "fla"}
#: the values of ``recurrent_backend``
RECURRENT_BACKENDS = ("auto", "torch", *PACKAGES.values())


class LayerParts(NamedTuple):
    """The parts of a layer.

    Attributes:
        mixer: one of ``MIXERS``; None if the layer has no mixer.
        mlp: ``dense`` or ``experts``; None if the layer has neither.
    """

    mixer: str | None
    mlp: str | None


#: letter of a pattern -> the layer's parts
LETTERS = {
    "M": LayerParts("mamba", None),
    "G": LayerParts("gated_delta", None),
    "*": LayerParts("attention", None),
    "-": LayerParts(None, "dense"),
    "E": LayerParts(None, "experts"),
}

#: fields that have an effect only with layers of a kind -> their value without
ONLY_WITH: dict[str, dict[str, Any]] = {
    "mamba": {
        "mamba_num_heads": None,
        "mamba_head_dim": 64,
        "mamba_num_groups": 8,
        "mamba_state_dim": 128,
        "mamba_conv_kernel_dim": 4,
        "mamba_conv_bias": True,
        "mamba_grouped_norm": True,
        "mamba_dt_min": 0.0,
    },
    "gated_delta": {
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4,
        "linear_allow_neg_eigval": False,
        "linear_norm_epsilon": None,
    },
}
#: the same fields of attention; a model without it does not read its sizes and rotary_base, which others always have
_ONLY_WITH_ATTENTION: dict[str, Any] = {
    "sliding_window": None,
    "softmax_scale": None,
    "rope_scaling": None,
    "rotary_percent": 1.0,
    "add_qkv_bias": False,
    "qk_layernorm": False,
    "attention_output_gate": False,
    "attention_post_norm": False,
    "softmax_type": "vanilla",
}
#: the fields of ``ONLY_WITH`` that are sizes
_SIZES = ("_heads", "_dim", "_groups")


class MixerSizes(NamedTuple):
    """The sizes of a recurrent mixer.

    The rows of its input projection are in groups of heads, so that tensor parallel ranks hold whole groups:

        Mamba-2             z [n/g p]   x [n/g p]   B [d]   C [d]   dt [n/g]    for each of g groups
        gated delta rule    q [d_k]   k [d_k]   v [r d_v]   z [r d_v]   b [r]   a [r]    for each of n_k key heads,
                            with r = n_v / n_k

    Attributes:
        groups: g, or n_k.
        inputs: rows of the input projection in a group.
        channels: those that the convolution reads: x, B and C, or q, k and v. Their order is the projection's.
        kernel: tokens that the convolution reads.
        conv_bias: whether it has a bias.
        heads: heads of the output, n or n_v.
        head_dim: their size, p or d_v.
        norm: weights of the norm before the output projection: one for each feature, or of one head for all.
        of_heads: names of the parameters of one number a head.
    """

    groups: int
    inputs: int
    channels: int
    kernel: int
    conv_bias: bool
    heads: int
    head_dim: int
    norm: int
    of_heads: tuple[str, ...]


def mixer_sizes(model: Architecture, mixer: str) -> MixerSizes:
    """The sizes of a recurrent mixer of a model, one of ``RECURRENT``."""
    if mixer == "mamba":
        heads, p, g, d = (
            model.mamba_num_heads,
            model.mamba_head_dim,
            model.mamba_num_groups,
            model.mamba_state_dim,
        )
        each = heads // g
        return MixerSizes(
            groups=g,
            inputs=2 * each * p + 2 * d + each,
            channels=each * p + 2 * d,
            kernel=model.mamba_conv_kernel_dim,
            conv_bias=model.mamba_conv_bias,
            heads=heads,
            head_dim=p,
            norm=heads * p,
            of_heads=("dt_bias", "A_log", "D"),
        )
    groups, heads = model.linear_num_key_heads, model.linear_num_value_heads
    d_k, d_v, each = model.linear_key_head_dim, model.linear_value_head_dim, heads // groups
    return MixerSizes(
        groups=groups,
        inputs=2 * d_k + 2 * each * d_v + 2 * each,
        channels=2 * d_k + each * d_v,
        kernel=model.linear_conv_kernel_dim,
        conv_bias=False,
        heads=heads,
        head_dim=d_v,
        norm=d_v,
        of_heads=("dt_bias", "A_log"),
    )


def is_recurrent(layer_types: Sequence[str] | None, pattern: str | None) -> bool:
    """Whether one of the layers hands a state from token to token."""
    return any(mixer in RECURRENT for mixer in mixers_of(layer_types, pattern) or ())


def mixers_of(layer_types: Sequence[str] | None, pattern: str | None) -> list[str] | None:
    """The mixers of the layers that have one, in order; None for attention in all layers.

    A letter that is none has no mixer: the rules refuse it.
    """
    if isinstance(pattern, str):
        mixers = [LETTERS[letter].mixer for letter in pattern if letter in LETTERS]
        return [mixer for mixer in mixers if mixer is not None]
    return list(layer_types) if isinstance(layer_types, list | tuple) else None


def recurrent_problems(model: Architecture) -> list[Problem]:
    """All broken rules of a model's mixers, as (fields involved, message)."""
    found = list(_stack(model))
    if found:
        return found
    for kind in RECURRENT:
        if kind in model.mixers:
            found += mixer_problems(model, kind)
    return found


def mixer_problems(model: Architecture, kind: str) -> list[Problem]:
    """All broken rules of the sizes of a recurrent mixer, as (fields involved, message)."""
    found: list[Problem] = []
    for name in ONLY_WITH[kind]:
        value = getattr(model, name)
        if name.endswith(_SIZES) and value is not None and value < 1:
            found.append(((name,), f"{name} {value}: a size is at least 1."))
    return found or list((_mamba if kind == "mamba" else _gated_delta)(model))


def idle_fields(config: TrainConfig) -> Iterator[Problem]:
    """Keys of a mixer in a model that has no such layer, as (keys involved, message)."""
    mixers = mixers_of(config.layer_types, config.hybrid_override_pattern)
    mixers = ["attention"] if mixers is None else mixers
    for kind, fields in (ONLY_WITH | {"attention": _ONLY_WITH_ATTENTION}).items():
        for name, off in fields.items():
            if kind not in mixers and (value := getattr(config, name)) != off:
                text = (
                    f"{name} {value} has no effect without layers of type {kind}. Name some in layer_types or "
                    f"hybrid_override_pattern, or leave {name} out."
                )
                yield (name, "layer_types"), text


def _stack(model: Architecture) -> Iterator[Problem]:
    """Broken rules of the two ways to write a hybrid model."""
    types, pattern, layers = model.layer_types, model.hybrid_override_pattern, model.num_layers
    for name, value, kind, what in (
        ("layer_types", types, (list, tuple), "a list of mixers"),
        ("hybrid_override_pattern", pattern, str, "text of one letter a layer"),
    ):
        if value is not None and not isinstance(value, kind):
            yield (name,), f"{name} {value!r}: it is {what}."
            return
    for name, value in (("layer_types", types), ("hybrid_override_pattern", pattern)):
        if value is not None and len(value) != layers:
            what = "entries" if name == "layer_types" else "letters"
            text = f"{name} has {len(value)} {what}, and num_layers is {layers}: each layer has one. Give {layers}."
            yield (name, "num_layers"), text
    for one in dict.fromkeys(types or ()):
        if one not in MIXERS:
            hint = (
                f" Did you mean {_OTHER_NAMES[one]}?"
                if one in _OTHER_NAMES
                else did_you_mean(str(one), MIXERS)
            )
            yield ("layer_types",), f"layer_types names {one!r}: a layer is one of {', '.join(MIXERS)}.{hint}"
    if wrong := [letter for letter in dict.fromkeys(pattern or "") if letter not in LETTERS]:
        text = (
            f"hybrid_override_pattern has the letter {wrong[0]!r}: a layer is M (Mamba-2), G (gated delta rule), * (attention), "
            "- (MLP) or E (experts)."
        )
        yield ("hybrid_override_pattern",), text
    elif pattern is not None and types is not None and len(pattern) == len(types) == layers:
        for number, (letter, one) in enumerate(zip(pattern, types), 1):
            if LETTERS[letter].mixer != one:
                of_letter = LETTERS[letter].mixer or "no mixer"
                text = (
                    f"layer_types and hybrid_override_pattern disagree: layer {number} is {one} in the list and {letter} "
                    f"({of_letter}) in the pattern. Give one of the two."
                )
                yield ("layer_types", "hybrid_override_pattern"), text
                return
    if pattern is not None and not wrong:
        if ("E" in pattern) != (model.num_moe_experts is not None):
            has = "has layers of experts (E)" if "E" in pattern else "has no layer of experts (E)"
            text = (
                f"hybrid_override_pattern {has}, and num_moe_experts is {model.num_moe_experts}. Set num_moe_experts where the "
                "pattern has an E, and only there."
            )
            yield ("hybrid_override_pattern", "num_moe_experts"), text
        if model.moe_layer_freq != 1:
            text = (
                f"moe_layer_freq {model.moe_layer_freq} has no effect with hybrid_override_pattern, whose letter E places the "
                "experts. Leave it out."
            )
            yield ("moe_layer_freq", "hybrid_override_pattern"), text


def _mamba(model: Architecture) -> Iterator[Problem]:
    heads, groups = model.mamba_num_heads, model.mamba_num_groups
    if heads % groups:
        yield (
            ("mamba_num_heads", "mamba_num_groups"),
            f"mamba_num_heads {heads} is not divisible by mamba_num_groups {groups}: each group of B and C serves the same "
            "number of heads. Choose a divisor of the heads.",
        )
    if model.mamba_dt_min < 0:
        yield ("mamba_dt_min",), f"mamba_dt_min {model.mamba_dt_min}: a step size is not negative."


def _gated_delta(model: Architecture) -> Iterator[Problem]:
    keys, values = model.linear_num_key_heads, model.linear_num_value_heads
    if values % keys:
        yield (
            ("linear_num_key_heads", "linear_num_value_heads"),
            f"linear_num_value_heads {values} is not divisible by linear_num_key_heads {keys}: each key head serves the same "
            "number of value heads. Choose a multiple.",
        )


def recurrent_cut_problems(model: Architecture, tp: int, cp: int, ssm_cp_type: str) -> list[Problem]:
    """Broken rules of how recurrent layers are cut over tensor and context parallel ranks."""
    found: list[Problem] = []
    if ssm_cp_type not in SSM_CP_TYPES:
        text = f"ssm_cp_type {ssm_cp_type!r}: one of {', '.join(SSM_CP_TYPES)}.{did_you_mean(str(ssm_cp_type), SSM_CP_TYPES)}"
        return [(("ssm_cp_type",), text)]
    if ssm_cp_type != "auto" and not model.recurrent:
        text = (
            f"ssm_cp_type {ssm_cp_type} has no effect without recurrent layers (layer_types). Leave it out."
        )
        return [(("ssm_cp_type", "layer_types"), text)]
    for kind, groups_key, groups, heads_key, heads in head_groups(model):
        if groups % tp:
            text = (
                f"{groups_key} {groups} is not divisible by tensor_parallel_size {tp}: every tensor parallel rank holds whole "
                f"groups of a {kind} layer's heads. Use a divisor of {groups}, and context_parallel_size for the other ranks."
            )
            found.append(((groups_key, "tensor_parallel_size"), text))
        elif ssm_cp_type == "a2a" and (problem := heads_problem(groups // tp, heads // tp, cp)):
            text = f"ssm_cp_type a2a: {heads_key} {heads} and {groups_key} {groups} {problem}"
            found.append((("ssm_cp_type", groups_key, "context_parallel_size"), text))
    return found


def recurrent_backend_problems(model: Architecture, backend: str) -> list[Problem]:
    """Broken rules of ``recurrent_backend`` that depend on the model alone."""
    if backend not in RECURRENT_BACKENDS:
        names = ", ".join(RECURRENT_BACKENDS)
        text = (
            f"recurrent_backend {backend!r}: one of {names}.{did_you_mean(str(backend), RECURRENT_BACKENDS)}"
        )
        return [(("recurrent_backend",), text)]
    kinds = [kind for kind in RECURRENT if kind in model.mixers]
    if backend == "auto" or (backend == "torch" and kinds) or backend in (PACKAGES[kind] for kind in kinds):
        return []
    wanted = {name: kind for kind, name in PACKAGES.items()}.get(backend)
    layers = f"layers of type {wanted}" if wanted else "recurrent layers"
    text = f"recurrent_backend {backend} has no effect without {layers} (layer_types). Leave it out."
    return [(("recurrent_backend", "layer_types"), text)]


def head_groups(model: Architecture) -> Iterator[tuple[str, str, int, str, int]]:
    """(kind, key and number of its groups of heads, key and number of its heads) of each recurrent kind."""
    if "mamba" in model.mixers:
        yield "mamba", "mamba_num_groups", model.mamba_num_groups, "mamba_num_heads", model.mamba_num_heads
    if "gated_delta" in model.mixers:
        values = model.linear_num_value_heads
        yield (
            "gated_delta",
            "linear_num_key_heads",
            model.linear_num_key_heads,
            "linear_num_value_heads",
            values,
        )


def heads_problem(groups: int, heads: int, cp: int) -> str | None:
    """Why ``cp`` ranks cannot share the heads of a recurrent layer; None if they can.

    Args:
        groups, heads: of a tensor parallel rank.
    """
    if heads % cp:
        return (
            f"leave {heads} heads a tensor parallel rank, which do not divide by context_parallel_size {cp}. Use ssm_cp_type "
            "state, which moves no heads, or a context_parallel_size that divides them."
        )
    if groups % cp and cp % groups:
        return (
            f"leave {groups} groups a tensor parallel rank, and context_parallel_size is {cp}: one of the two must divide the "
            "other, so that a rank's heads are of whole groups or of one. Use ssm_cp_type state, which moves no heads."
        )
    return None


def recurrent_line(model: Architecture) -> str:
    """The mixers of a hybrid model and their sizes, for the banner."""
    counts = {kind: model.mixers.count(kind) for kind in MIXERS if kind in model.mixers}
    parts = ", ".join(f"{count} of {kind}" for kind, count in counts.items())
    sizes = []
    if "mamba" in counts:
        sizes.append(
            f"Mamba-2 {model.mamba_num_heads} heads of {model.mamba_head_dim} in {model.mamba_num_groups} groups, state "
            f"{model.mamba_state_dim}"
        )
    if "gated_delta" in counts:
        sizes.append(
            f"gated delta rule {model.linear_num_key_heads} key heads of {model.linear_key_head_dim}, "
            f"{model.linear_num_value_heads} value heads of {model.linear_value_head_dim}"
        )
    return "; ".join([f"{parts} of {model.num_layers} layers", *sizes])
