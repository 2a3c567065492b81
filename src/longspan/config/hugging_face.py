"""A Hugging Face ``config.json`` as keys of TrainConfig, and keys as a ``config.json``.

    model_type        pieces
    llama             RMSNorm, rotary, gated MLP; biases in all linear layers or in none
    mistral           as llama without biases; one sliding window in all layers, or none
    ministral         likewise; the window in some layers
    qwen2             as llama; biases of query, key and value; a window in some layers, or none
    qwen3             as llama without biases; normalised heads; a window in some layers, or none
    gpt2              LayerNorm, learned positions, plain MLP, biases, as many key/value as query heads

What is read is what transformers would compute with; what it would compute and cannot be done here
is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from longspan.config.architecture import Architecture
from longspan.config.rope import ROPE_TYPES, reach, rope_type
from longspan.errors import UserError

SUPPORTED_MODEL_TYPES = ("llama", "mistral", "ministral", "qwen2", "qwen3", "gpt2")

#: Hugging Face's name -> ours
_KEYS = {
    "num_hidden_layers": "num_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_query_groups",
    "head_dim": "kv_channels",
    "intermediate_size": "ffn_hidden_size",
    "vocab_size": "vocab_size",
    "rms_norm_eps": "layernorm_epsilon",
    "tie_word_embeddings": "tie_word_embeddings",
    "initializer_range": "init_method_std",
    "max_position_embeddings": "max_position_embeddings",
}
_GPT2_KEYS = {
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

#: what transformers takes where a config.json does not name a field
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048},
    "mistral": {"rms_norm_eps": 1e-6, "num_key_value_heads": 8, "sliding_window": 4096},
    "ministral": {"rms_norm_eps": 1e-6, "num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"rms_norm_eps": 1e-6, "num_key_value_heads": 32, "sliding_window": 4096},
    "qwen3": {"rms_norm_eps": 1e-6, "num_key_value_heads": 32, "sliding_window": 4096, "head_dim": 128},
    "gpt2": {"activation_function": "gelu_new", "n_positions": 1024, "tie_word_embeddings": True},
}

#: fields that hold whole numbers -> the smallest and the largest that makes sense
_WHOLE = dict.fromkeys((*_KEYS, *_GPT2_KEYS, "sliding_window", "max_window_layers"), (1, 1 << 31))
_WHOLE |= dict.fromkeys(("num_hidden_layers", "n_layer"), (1, 1 << 14))
_WHOLE["max_window_layers"] = (0, 1 << 31)
_REAL = ("rms_norm_eps", "layer_norm_epsilon", "initializer_range", "rope_theta", "partial_rotary_factor")
_FLAGS = (
    *("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window"),
    *("scale_attn_weights", "scale_attn_by_inverse_layer_idx", "add_cross_attention"),
)
for _name in (*_REAL, *_FLAGS):
    _WHOLE.pop(_name, None)

#: fields of a rope_scaling that are not of its type
_ROPE_OWN = ("rope_type", "type", "rope_theta", "partial_rotary_factor")

#: Hugging Face's activation -> ours
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "relu": "relu"}


def keys_of(data: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The architecture keys of a ``config.json``.

    Args:
        data: what it holds.
        where: its name, for messages.

    Raises:
        UserError: it is of a model type that is not supported, or asks for what the type can but longspan cannot.
    """
    kind = data.get("model_type")
    if not isinstance(kind, str) or kind not in SUPPORTED_MODEL_TYPES:
        raise UserError(
            f"base_model: {where} is of model_type {kind!r}; supported: {', '.join(SUPPORTED_MODEL_TYPES)}."
        )
    if data.get("quantization_config"):
        raise UserError(
            f"base_model: {where} has a quantization_config: its weights are quantised, and only whole ones are read. Give the "
            "model it was made of."
        )
    data = _whole_numbers(data)
    if odd := _odd_values(data):
        raise UserError(
            f"base_model: {where} sets {'; '.join(odd)}. Put the file right, or download it again."
        )
    data = {**_DEFAULTS[kind], **data}
    table = _GPT2_KEYS if kind == "gpt2" else _KEYS
    found = {ours: data[theirs] for theirs, ours in table.items() if data.get(theirs) is not None}
    found["activation_func"] = _activation(data, where)
    if kind == "gpt2":
        return found | _gpt2(data, where)
    if kind in ("llama", "qwen3"):
        found |= _biases(data, kind, where)
    if kind == "qwen2":
        found["add_qkv_bias"] = True
    if kind == "qwen3":
        found["qk_layernorm"] = True
    if window := _window(data, kind, where):
        found["sliding_window"] = window
    return found | _rotary(data, where)


def _whole_numbers(data: Mapping[str, Any]) -> dict[str, Any]:
    """The fields with 4096.0 as 4096 where a whole number belongs."""
    return {
        k: int(v) if k in _WHOLE and isinstance(v, float) and v.is_integer() else v for k, v in data.items()
    }


def _odd_values(data: Mapping[str, Any]) -> list[str]:
    """Fields whose value can be meant by nobody, each with what it must be; null stands for the default everywhere."""
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
        elif name == "layer_types":
            good = isinstance(value, list) and all(isinstance(each, str) for each in value)
            layers = data.get("num_hidden_layers")
            fits = good and (not isinstance(layers, int) or len(value) == layers)
            check(name, fits, "a list of one name a layer")
    return found


def ignored_fields(data: Mapping[str, Any]) -> list[str]:
    """Fields of a config.json's rope_scaling that its type does not have: transformers ignores them, and so do we."""
    rope = data.get("rope_scaling") or data.get("rope_parameters") or {}
    known = (
        ROPE_TYPES.get(kind) if isinstance(rope, dict) and isinstance(kind := rope_type(rope), str) else None
    )
    if known is None:
        return []
    names = [*known[0], *known[1], *_ROPE_OWN]
    return [name for name, value in rope.items() if name not in names and value is not None]


def _activation(data: Mapping[str, Any], where: str) -> str:
    field = "activation_function" if data["model_type"] == "gpt2" else "hidden_act"
    given = data.get(field) or "silu"
    if given not in _ACTIVATIONS:
        text = f"base_model: {where} sets {field} {given!r}; only {', '.join(_ACTIVATIONS)} are supported"
        raise UserError(f"{text} (gelu is the exact one)." if "gelu" in str(given) else f"{text}.")
    return _ACTIVATIONS[given]


def _biases(data: Mapping[str, Any], kind: str, where: str) -> dict[str, Any]:
    attention, mlp = bool(data.get("attention_bias")), kind == "llama" and bool(data.get("mlp_bias"))
    if attention != mlp:
        only = "attention_bias" if attention else "mlp_bias"
        raise UserError(
            f"base_model: {where} sets {only}: biases of "
            f"{'query, key, value and output projection' if attention else 'the MLP'} alone are not supported, only those of all "
            "linear layers (add_bias_linear) or of query, key and value (add_qkv_bias)."
        )
    return {"add_bias_linear": True} if attention else {}


def _window(data: Mapping[str, Any], kind: str, where: str) -> int | list[int | None] | None:
    """The sliding window as transformers' class of this type reads it: one for all layers, or a list of each layer's."""
    window, layers = data.get("sliding_window"), data.get("num_hidden_layers") or 0
    if kind == "llama":  # transformers' Llama has none, whatever its config.json says
        return None
    if kind.startswith("qwen") and not data.get("use_sliding_window"):
        return None
    if window is None:
        return None
    types = data.get("layer_types") if kind != "mistral" else None
    if types is None and kind.startswith("qwen"):
        first = 28 if data.get("max_window_layers") is None else data["max_window_layers"]
        types = ["full_attention" if i < first else "sliding_attention" for i in range(layers)]
    if types is None:
        return window
    if others := sorted(set(types) - {"full_attention", "sliding_attention"}):
        raise UserError(
            f"base_model: {where} has layers of type {', '.join(others)}; only full_attention and sliding_attention are "
            "supported."
        )
    windows = [window if each == "sliding_attention" else None for each in types]
    return windows if len(set(windows)) > 1 else windows[0] if windows else None


def _rotary(data: Mapping[str, Any], where: str) -> dict[str, Any]:
    """rotary_base and rope_scaling; transformers 4 has rope_theta and rope_scaling, 5 keeps both in rope_parameters."""
    rope = data.get("rope_scaling") or data.get("rope_parameters") or {}
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise UserError(
            f"base_model: {where} sets rope_parameters {rope!r}, not an object of fields that hold for all layers."
        )
    part = rope.get("partial_rotary_factor", data.get("partial_rotary_factor", 1.0))
    if part not in (None, 1.0):
        raise UserError(
            f"base_model: {where} sets partial_rotary_factor {part}; only whole heads are rotated (1.0)."
        )
    theta = rope.get("rope_theta")
    if theta is not None and (isinstance(theta, bool) or not isinstance(theta, int | float)):
        raise UserError(f"base_model: {where} sets rope_theta {theta!r}: a number above 0.")
    found: dict[str, Any] = {"rotary_base": theta or data.get("rope_theta") or 10000.0}
    if rope_type(rope) != "default":
        out = ("rope_theta", "partial_rotary_factor", *ignored_fields(data))
        found["rope_scaling"] = {k: v for k, v in rope.items() if k not in out and v is not None}
    return found


def _gpt2(data: Mapping[str, Any], where: str) -> dict[str, Any]:
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


# --- out ------------------------------------------------------------------------------------


def windows_of(model: Architecture) -> list[int | None]:
    """The sliding window of each layer."""
    return [model.window_of_layer(number) for number in range(1, model.num_layers + 1)]


def export_problem(model: Architecture) -> str | None:
    """Why no architecture of Hugging Face holds this model; None where one does."""
    sizes = set(windows_of(model)) - {None}
    if len(sizes) > 1:
        return (
            f"sliding_window {model.sliding_window}: a model whose layers have windows of different sizes has no Hugging Face "
            "architecture (Ministral has one size, in some of its layers)."
        )
    if model.learned_positions:
        needs = {
            "normalization": "LayerNorm",
            "gated_linear_unit": False,
            "add_bias_linear": True,
            "qk_layernorm": False,
            "sliding_window": None,
            "num_query_groups": model.num_attention_heads,
            "kv_channels": model.hidden_size // model.num_attention_heads,
        }
        wrong = _others(model, needs)
        return (
            f"learned positions leave as a GPT-2, which has no place for {', '.join(wrong)}."
            if wrong
            else None
        )
    wrong = _others(
        model, {"position_embedding_type": "rope", "normalization": "RMSNorm", "gated_linear_unit": True}
    )
    if wrong:
        return (
            f"no Hugging Face architecture that longspan writes has {', '.join(wrong)}: Llama, Mistral and Qwen have rotary "
            "positions, RMSNorm and gated MLPs, and GPT-2 has learned positions, LayerNorm, plain MLPs and biases."
        )
    special = [k for k in ("add_bias_linear", "add_qkv_bias", "qk_layernorm") if getattr(model, k)]
    if "qk_layernorm" in special and len(special) > 1:
        return f"{' with '.join(special)} has no Hugging Face architecture: Qwen3 has normalised heads and no biases."
    if sizes and model.add_bias_linear:
        return "sliding_window with add_bias_linear has no Hugging Face architecture: Mistral has no biases."
    return None


def _others(model: Architecture, needs: Mapping[str, Any]) -> list[str]:
    """Fields of another value than needed, with both values."""
    return [
        f"{name} {_shown(getattr(model, name))} (needs {_shown(value)})"
        for name, value in needs.items()
        if getattr(model, name) != value
    ]


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _type_of(model: Architecture, base: Mapping[str, Any]) -> str:
    windows = set(windows_of(model))
    if model.learned_positions:
        return "gpt2"
    if model.qk_layernorm:
        return "qwen3"
    if model.add_bias_linear:
        return "llama"
    if model.add_qkv_bias:
        return "qwen2"
    if len(windows) > 1:
        return "ministral"
    return "mistral" if windows != {None} or base.get("model_type") == "mistral" else "llama"


_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "ministral": "MinistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
}


def hugging_face_config(
    model: Architecture,
    *,
    vocab_size: int,
    sequence_len: int,
    dtype: str,
    base: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The ``config.json`` of a model, by the pieces it has.

    Args:
        vocab_size: tokens, without padding.
        sequence_len: tokens, the longest the model is made for where it names no max_position_embeddings.
        dtype: of the written weights, such as ``bfloat16``.
        base: the config.json the model started from; fields beside the architecture are kept.

    Raises:
        UserError: no architecture of Hugging Face holds this model.
    """
    if problem := export_problem(model):
        raise UserError(problem)
    base = dict(base or {})
    kind = _type_of(model, base)
    if base.get("model_type") != kind:  # another type's fields would say nothing, or something else
        base = {k: v for k, v in base.items() if k.endswith("_token_id")}
    # auto_map names Python files, which do not come along; transformers' own class is named below
    for name in (
        "sliding_window",
        "layer_types",
        "use_sliding_window",
        "max_window_layers",
        "dtype",
        "auto_map",
    ):
        base.pop(name, None)
    common = {
        "architectures": [_CLASSES[kind]],
        "model_type": kind,
        "vocab_size": vocab_size,
        "tie_word_embeddings": model.share_embeddings_and_output_weights,
        "initializer_range": model.init_method_std,
        "torch_dtype": dtype,
    }
    longest = max(model.max_position_embeddings or sequence_len, reach(model.rope_scaling))
    if kind == "gpt2":
        no_tokens = {
            "bos_token_id": None,
            "eos_token_id": None,
        }  # else transformers takes those of the first GPT-2
        return no_tokens | base | common | _gpt2_fields(model, longest)
    scaled = rope_type(model.rope_scaling) != "default"
    # transformers 5 reads rope_parameters, 4 reads the other two; both are written
    scaling = {k: v for k, v in (model.rope_scaling or {}).items() if k != "type"} if scaled else {}
    scaling = {"rope_type": rope_type(model.rope_scaling), **scaling}
    fields = {
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups,
        "head_dim": model.kv_channels,
        "intermediate_size": model.ffn_hidden_size,
        "rms_norm_eps": model.layernorm_epsilon,
        "rope_theta": model.rotary_base,
        "rope_scaling": scaling if scaled else None,
        "rope_parameters": {"rope_theta": model.rotary_base, **scaling},
        "max_position_embeddings": longest,
        "hidden_act": model.activation_func,
    }
    if kind in ("llama", "qwen3"):
        fields["attention_bias"] = model.add_bias_linear
    if kind == "llama":
        fields["mlp_bias"] = model.add_bias_linear
    return base | common | fields | _window_fields(model, kind)


def _window_fields(model: Architecture, kind: str) -> dict[str, Any]:
    windows = windows_of(model)
    size = next((w for w in windows if w is not None), None)
    if kind == "llama":
        return {}
    if kind == "mistral":
        return {"sliding_window": size}
    types = ["full_attention" if w is None else "sliding_attention" for w in windows]
    if kind == "ministral":
        return {"sliding_window": size, "layer_types": types}
    full_first = next((i for i, w in enumerate(windows) if w is not None), len(windows))
    return {
        "use_sliding_window": size is not None,
        "sliding_window": size,
        "max_window_layers": full_first,  # what transformers reads without layer_types
        "layer_types": types,
    }


def _gpt2_fields(model: Architecture, positions: int) -> dict[str, Any]:
    return {
        "n_layer": model.num_layers,
        "n_embd": model.hidden_size,
        "n_head": model.num_attention_heads,
        "n_inner": model.ffn_hidden_size,
        "n_positions": positions,
        "n_ctx": positions,
        "layer_norm_epsilon": model.layernorm_epsilon,
        "activation_function": model.activation_func,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    }
