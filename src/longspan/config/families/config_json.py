"""Reads a Hugging Face ``config.json`` as keys of TrainConfig, and writes a model's ``config.json``.

A file is read as transformers reads it. What transformers would compute and longspan cannot is refused by
name. Each model type has its own class in ``families``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from longspan.config.architecture import Architecture
from longspan.config.experts import ONLY_WITH_EXPERTS
from longspan.config.families.experts import WithExperts
from longspan.config.families.family import ACTIVATIONS, Family, windows_of
from longspan.config.families.gpt2 import GPT2
from longspan.config.families.gpt_oss import GptOss
from longspan.config.families.llama import Llama
from longspan.config.families.mamba import Mamba2, NemotronH
from longspan.config.families.mistral import Ministral, Mistral, Mixtral
from longspan.config.families.olmo import OlmoHybrid
from longspan.config.families.qwen import Qwen2, Qwen2Moe, Qwen3, Qwen3Moe
from longspan.config.families.qwen_hybrid import Qwen3Next, Qwen35, Qwen35Moe
from longspan.config.families.recurrent import WithMixers
from longspan.config.families.rotary_decoder import RotaryDecoder
from longspan.config.recurrent import ONLY_WITH, mixers_of
from longspan.config.rope import reach
from longspan.errors import UserError

#: model_type -> family; a model without a base model is written as the first family that can hold it
FAMILIES: dict[str, Family] = {
    one.model_type: one
    for one in (
        *(Llama(), Mistral(), Ministral(), Qwen2(), Qwen3(), GPT2(), Mixtral(), Qwen2Moe(), Qwen3Moe()),
        *(Mamba2(), Qwen3Next(), Qwen35(), Qwen35Moe(), OlmoHybrid(), NemotronH(), GptOss()),
    )
}
#: model_type of a model that reads images too -> the type of its text model, which is read alone
TEXT_MODELS = {"qwen3_5": "qwen3_5_text", "qwen3_5_moe": "qwen3_5_moe_text"}

_REAL = (
    *("router_aux_loss_coef", "router_jitter_noise"),
    *("rms_norm_eps", "layer_norm_epsilon", "initializer_range", "rope_theta", "partial_rotary_factor"),
    *("time_step_min", "routed_scaling_factor", "swiglu_alpha", "swiglu_limit"),
)
_FLAGS = (
    *("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window"),
    *("scale_attn_weights", "scale_attn_by_inverse_layer_idx", "add_cross_attention", "norm_topk_prob"),
    *("use_bias", "use_conv_bias", "linear_allow_neg_eigval"),
)
#: field that holds a whole number -> (the smallest, the largest number that is accepted)
_WHOLE = {
    name: (1, 1 << 31)
    for name in (
        *(name for one in FAMILIES.values() for name in one.keys),
        "sliding_window",
        "decoder_sparse_step",
        "num_local_experts",
        *("expand", "n_group", "topk_group", "full_attention_interval"),
    )
    if name not in (*_REAL, *_FLAGS)
}
_WHOLE |= dict.fromkeys(("num_hidden_layers", "n_layer"), (1, 1 << 14)) | {"max_window_layers": (0, 1 << 31)}


def keys_of(data: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The architecture keys of a ``config.json``.

    Args:
        data: the fields of the file.
        where: the name of the file, for messages.

    Raises:
        UserError: the model type is not supported, a field has an impossible value, or the model needs
            something that longspan does not have.
    """
    data, where = text_model(data, where)
    kind = data.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise UserError(
            f"base_model: {where} is of model_type {kind!r}; supported: {', '.join([*FAMILIES, *TEXT_MODELS])}. "
            "longspan train computes other types by transformers' own class (model_implementation: transformers)."
        )
    family = FAMILIES[kind]
    if (method := quant_method(data)) is not None and method not in family.quantised:
        raise UserError(
            f"base_model: {where} has a quantization_config: its weights are quantised, and only whole ones are read. Give the "
            "model it was made of."
        )
    data = family.renamed(data)
    data = _whole_numbers(
        {k: v for k, v in data.items() if k not in family.nothing or v != family.nothing[k]}
    )
    if odd := _odd_values(data):
        raise UserError(
            f"base_model: {where} sets {'; '.join(odd)}. Put the file right, or download it again."
        )
    for field, values in family.supported.items():
        if data.get(field) is not None and data[field] not in values:
            named = " or ".join("null" if one is None else str(one).lower() for one in values)
            raise UserError(
                f"base_model: {where} sets {field} {data[field]!r}, which is not supported for {kind}: only {named}."
            )
    data = {**family.defaults, **{k: v for k, v in data.items() if v is not None or k not in family.required}}
    found = {ours: data[theirs] for theirs, ours in family.keys.items() if data.get(theirs) is not None}
    found["activation_func"] = _activation(data, family.activation, where)
    return _with_effect(found | family.read(data, where))


def quant_method(data: Mapping[str, Any]) -> str | None:
    """How the weights beside a config.json are quantised; None if they are not."""
    config = data.get("quantization_config")
    return str(config.get("quant_method")) if isinstance(config, Mapping) else str(config) if config else None


def text_model(data: Mapping[str, Any], where: str) -> tuple[Mapping[str, Any], str]:
    """(the fields of the text model in a config.json, the name of where they stand, for messages).

    These are the fields themselves, except for a model that reads images too.

    Raises:
        UserError: such a model has no text_config.
    """
    kind = data.get("model_type")
    if not isinstance(kind, str) or kind not in TEXT_MODELS:
        return data, where
    text = data.get("text_config")
    if not isinstance(text, Mapping):
        raise UserError(
            f"base_model: {where} is of model_type {kind} and has no text_config, the object that describes its text model. "
            "Download it again."
        )
    outer = {name: data[name] for name in ("tie_word_embeddings", "quantization_config") if name in data}
    return {**outer, **text, "model_type": TEXT_MODELS[kind]}, f"text_config of {where}"


def _with_effect(keys: dict[str, Any]) -> dict[str, Any]:
    """The keys without those of mixers and experts that the model does not have."""
    mixers = mixers_of(keys.get("layer_types"), keys.get("hybrid_override_pattern")) or ()
    without = [name for kind, names in ONLY_WITH.items() if kind not in mixers for name in names]
    if keys.get("num_moe_experts") is None:
        without += ONLY_WITH_EXPERTS
    return {name: value for name, value in keys.items() if name not in without or value is None}


def _whole_numbers(data: Mapping[str, Any]) -> dict[str, Any]:
    """The fields, with 4096 instead of 4096.0 in a field for whole numbers."""
    return {
        k: int(v) if k in _WHOLE and isinstance(v, float) and v.is_integer() else v for k, v in data.items()
    }


def _odd_values(data: Mapping[str, Any]) -> list[str]:
    """The fields with impossible values, each with the rule; null means the default in every field."""
    found = []

    def check(name: str, good: bool, rule: str) -> None:
        if not good:
            shown = repr(data[name])
            found.append(f"{name} {shown if len(shown) < 60 else shown[:57] + '...'}: {rule}")

    for name, value in data.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is None:
            continue
        if name in _WHOLE:
            least, most = _WHOLE[name]
            whole = isinstance(value, int) and number and least <= value <= most
            check(name, whole, f"a whole number from {least} to {most}")
        elif name in _REAL:
            check(name, number and math.isfinite(value) and value >= 0, "a number from 0 on")
        elif name in _FLAGS:
            check(name, isinstance(value, bool), "true or false")
        elif name in ("hidden_act", "activation_function"):
            check(name, isinstance(value, str), "a name")
        elif name == "mlp_only_layers":
            good = isinstance(value, list) and all(type(each) is int for each in value)
            check(name, good, "a list of the numbers of layers")
        elif name == "layer_types":
            good = isinstance(value, list) and all(isinstance(each, str) for each in value)
            layers = data.get("num_hidden_layers")
            fits = good and (not isinstance(layers, int) or len(value) == layers)
            check(name, fits, "a list of one name a layer")
    return found


def _activation(data: Mapping[str, Any], field: str, where: str) -> str:
    given = data.get(field) or "silu"
    if given not in ACTIVATIONS:
        text = f"base_model: {where} sets {field} {given!r}; only {', '.join(ACTIVATIONS)} are supported"
        raise UserError(f"{text} (gelu is the exact one)." if "gelu" in str(given) else f"{text}.")
    return ACTIVATIONS[given]


# --- writing config.json --------------------------------------------------------------------


def family_of(model: Architecture, base_type: str | None = None) -> Family | None:
    """The family that a model is written as: the base model's or else the first that can hold it, or None.

    Args:
        base_type: the model_type of the base model.
    """
    families, base_type = list(FAMILIES.values()), TEXT_MODELS.get(base_type or "", base_type)
    if base_type in FAMILIES:
        families.insert(0, FAMILIES[base_type])
    return next((one for one in families if one.holds(model)), None)


def family_of_tensors(model: Architecture, base_type: str | None = None) -> Family:
    """The family by whose names the weights of a model are read and written.

    It may not hold the model: what computes other numbers with the same weights is another model to transformers.

    Args:
        base_type: the model_type of the base model, whose names are taken if they fit.

    Raises:
        ValueError: no family has the model's kinds of layers.
    """
    base_type = TEXT_MODELS.get(base_type or "", base_type)
    exactly = family_of(model, base_type)
    if exactly is not None:
        return exactly
    fitting = [one for one in FAMILIES.values() if one.names(model)]
    if base_type in FAMILIES and FAMILIES[base_type] in fitting:
        return FAMILIES[base_type]
    exact = next((one for one in fitting if not one.differences(model, one.needs)), None)
    if exact is None and not fitting:
        raise ValueError("No model type of Hugging Face has layers of these kinds.")
    return exact or (FAMILIES["gpt2"] if model.learned_positions else fitting[0])


def export_problem(model: Architecture) -> str | None:
    """Why no architecture of Hugging Face can hold this model; None if one can."""
    sizes = set(windows_of(model)) - {None}
    if len(sizes) > 1:
        return (
            f"sliding_window {model.sliding_window}: a model whose layers have windows of different sizes has no Hugging Face "
            "architecture (Ministral has one size, in some of its layers)."
        )
    if family_of(model) is not None:
        return None
    dense = [one for one in FAMILIES.values() if not isinstance(one, WithMixers)]
    if (
        all(one.odd_layers(model) for one in dense)
        or model.attention_output_gate
        or model.attention_post_norm
    ):
        hybrids = [one for one in FAMILIES.values() if isinstance(one, WithMixers)]
        nearest = min(hybrids, key=lambda one: (not one.names(model), len(one.missing(model))))
        return (
            "a hybrid model is exported as Mamba-2, Qwen3-Next, Qwen3.5, OLMo Hybrid or Nemotron-H; the nearest of them, "
            f"{nearest.model_type}, has no place for {', '.join(nearest.missing(model))}."
        )
    if model.num_moe_experts is not None:
        wrong = min((one.missing(model) for one in dense if isinstance(one, WithExperts)), key=len)
        return f"a model with experts is exported as Mixtral, Qwen2-MoE, Qwen3-MoE or gpt-oss; the nearest of them has no place for {', '.join(wrong)}."
    if model.learned_positions:
        wrong = FAMILIES["gpt2"].missing(model)
        return f"learned positions leave as a GPT-2, which has no place for {', '.join(wrong)}."
    if wrong := RotaryDecoder().missing(model):
        return (
            f"no Hugging Face architecture that longspan writes has {', '.join(wrong)}: Llama, Mistral and Qwen have rotary "
            "positions, RMSNorm and gated MLPs, and GPT-2 has learned positions, LayerNorm, plain MLPs and biases."
        )
    special = [k for k in ("add_bias_linear", "add_qkv_bias", "qk_layernorm") if getattr(model, k)]
    if model.qk_layernorm:
        return f"{' with '.join(special)} has no Hugging Face architecture: Qwen3 has normalised heads and no biases."
    return "sliding_window with add_bias_linear has no Hugging Face architecture: Mistral has no biases."


def hugging_face_config(
    model: Architecture,
    *,
    vocab_size: int,
    sequence_len: int,
    dtype: str,
    base: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The ``config.json`` of a model.

    Args:
        vocab_size: tokens, without padding.
        sequence_len: tokens; the longest sequence that the model is made for, if it has no
            max_position_embeddings.
        dtype: of the written weights, such as ``bfloat16``.
        base: the config.json that the model started from; fields beside the architecture are kept.

    Raises:
        UserError: no architecture of Hugging Face can hold this model.
    """
    if problem := export_problem(model):
        raise UserError(problem)
    base = dict(text_model(base or {}, "base_model's config.json")[0])
    family = family_of(model, base.get("model_type"))
    assert family is not None
    base = dict(family.renamed(base))
    if base.get("model_type") != family.model_type:
        # The fields of another model type have no effect here, or a different effect.
        base = {k: v for k, v in base.items() if k.endswith("_token_id")}
    # auto_map names Python files, which are not exported; transformers' own class is named instead.
    windows = ("sliding_window", "layer_types", "use_sliding_window", "max_window_layers")
    # What is written is whole.
    for name in (*windows, "dtype", "auto_map", "quantization_config"):
        base.pop(name, None)
    common = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "vocab_size": vocab_size,
        "tie_word_embeddings": model.share_embeddings_and_output_weights,
        "initializer_range": model.init_method_std,
        "torch_dtype": dtype,
    }
    longest = max(model.max_position_embeddings or sequence_len, reach(model.rope_scaling))
    if family.model_type == "gpt2":
        # Without these fields transformers uses the special tokens of OpenAI's GPT-2.
        base = {"bos_token_id": None, "eos_token_id": None} | base
    return base | common | family.fields(model, longest)
