"""Model types without a native implementation, which transformers' own class computes: their keys, and refusals.

A ``config.json`` is read as transformers reads it, by its own config class. The keys hold what longspan needs to cut
and to describe such a model; the class reads everything else itself. What the class computes and longspan cannot cut
over ranks is refused here, by type and reason, before any process starts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from longspan.errors import UserError, did_you_mean

#: kinds of layers that mix tokens in attention only, by transformers' names in ``layer_types``
LAYER_TYPES = {"full_attention", "sliding_attention", "attention"}

#: types with layers that hand a state from token to token, whether or not their config says so
RECURRENT = [
    "bamba",
    "falcon_h1",
    "falcon_mamba",
    "granitemoehybrid",
    "jamba",
    "kimi_linear",
    "lfm2",
    "lfm2_moe",
    "mamba",
    "nemotron_h",
    "recurrent_gemma",
    "rwkv",
    "xlstm",
    "zamba",
    "zamba2",
]
#: types that read their text in both directions, unless is_decoder says otherwise
BOTH_DIRECTIONS = [
    "bert",
    "bert-generation",
    "big_bird",
    "camembert",
    "data2vec-text",
    "electra",
    "ernie",
    "megatron-bert",
    "rembert",
    "roberta",
    "roberta-prelayernorm",
    "roc_bert",
    "roformer",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xmod",
]
COMPUTE_ATTENTION_BY_THEMSELVES = [
    "codegen",
    "cpmant",
    "doge",
    "gpt_neo",
    "gpt_neox_japanese",
    "gptj",
    "openai-gpt",
    "reformer",
    "trocr",
    "xglm",
    "xlm",
    "xlnet",
]
OWN_ATTENTION = "computes its attention by itself, not by an attention function that can be chosen"
#: types whose config does not say what their layers need -> why they cannot be cut
CANNOT_BE_CUT = {
    **dict.fromkeys(
        RECURRENT,
        "has recurrent or convolutional layers, which hand a state from token to token: each rank would begin anew",
    ),
    **dict.fromkeys(
        ("bloom", "mpt", "falcon"),
        "adds a bias by distance to its attention scores (ALiBi), or may, and no kernel here adds one",
    ),
    "mimo_v2_flash": "has value heads of another size than its query heads, which the kernels here do not take",
    **dict.fromkeys(
        COMPUTE_ATTENTION_BY_THEMSELVES,
        OWN_ATTENTION,
    ),
}

#: fields with "dropout" in their names that a language model's class does not use
_IDLE_DROPOUT = ("classifier_dropout", "summary_first_dropout", "cls_dropout", "head_dropout")


def config_of(data: Mapping[str, Any], where: str) -> Any:
    """transformers' config object of a ``config.json``.

    Args:
        data: the fields of the file.
        where: the name of the file, for messages.

    Raises:
        UserError: transformers is not installed or does not have the type, or it refuses the fields.
    """
    kind = data.get("model_type")
    try:
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    except ImportError:
        raise UserError(
            f"base_model: {where} is of model_type {kind!r}, which longspan has no implementation of; transformers' own class "
            "would be trained, and transformers is not installed. pip install 'longspan[hf]'."
        ) from None
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        own = " The repository's own code (auto_map) is never run." if data.get("auto_map") else ""
        near = did_you_mean(kind, list(CONFIG_MAPPING)) if isinstance(kind, str) else ""
        raise UserError(
            f"base_model: {where} is of model_type {kind!r}, which neither longspan nor the installed transformers has.{near}{own}"
        )
    from transformers.utils import logging

    # It warns of special tokens beyond the vocabulary, which have no part in training.
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        return CONFIG_MAPPING[kind].from_dict(dict(data))
    # A config class raises errors of many kinds for impossible values.
    except Exception as error:
        raise UserError(
            f"base_model: {where}: transformers cannot read it ({type(error).__name__}: {' '.join(str(error).split())})."
        ) from None
    finally:
        logging.set_verbosity(before)


def keys_of(data: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The keys of a model that transformers' class computes.

    Args:
        data, where: as for :func:`config_of`.

    Raises:
        UserError: with all reasons why the model cannot be trained.
    """
    config = config_of(data, where)
    if problems := _problems(data, config):
        raise UserError([f"base_model: {where} ({data['model_type']}) {problem}" for problem in problems])
    heads, hidden = config.num_attention_heads, config.hidden_size
    found = {
        "num_layers": config.num_hidden_layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_query_groups": field_of(config, "num_key_value_heads") or heads,
        "kv_channels": field_of(config, "head_dim") or hidden // heads,
        "ffn_hidden_size": _whole(getattr(config, "intermediate_size", None)),
        "vocab_size": config.vocab_size,
        "max_position_embeddings": _whole(getattr(config, "max_position_embeddings", None)),
        "tie_word_embeddings": bool(getattr(config, "tie_word_embeddings", False)),
        "sliding_window": _windows(config),
    }
    return {name: value for name, value in found.items() if value is not None}


def field_of(config: Any, name: str) -> Any:
    """A field of a config; None if it has none, and a text if its layers differ in it (then transformers raises)."""
    try:
        return getattr(config, name, None)
    except Exception:
        return "differs by layer"


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _windows(config: Any) -> int | list[int | None] | None:
    """The sliding window of each layer, by which the work of ranks is balanced; attention takes the class's own."""
    window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    if window is None or not kinds:
        return window if getattr(config, "use_sliding_window", True) else None
    return [window if kind == "sliding_attention" else None for kind in kinds]


def notes_of(data: Mapping[str, Any], where: str) -> list[str]:
    """Lines about fields of a ``config.json`` that have no effect on training."""
    if not data.get("output_router_logits"):
        return []
    return [
        f"output_router_logits of {where}: the class would balance the tokens of one rank, so it trains without this loss"
    ]


def _problems(data: Mapping[str, Any], config: Any) -> list[str]:
    """Why a model cannot be trained by transformers' class, each as the end of a sentence that begins with its type."""
    if data.get("quantization_config"):
        return ["has a quantization_config: only whole weights are read. Give the model it was made of."]
    kind = data["model_type"]
    if getattr(config, "is_encoder_decoder", False) or getattr(config, "add_cross_attention", False):
        return ["has cross-attention, and only decoders without it are trained."]
    text = config.get_text_config(decoder=True)
    if text is not config or data.get("vision_config") or data.get("audio_config"):
        return [
            f"is a multimodal model. Its text part, {getattr(text, 'model_type', '?')}, can be trained alone: save it as a model of "
            "its own (docs/models.md, 'The text part of a multimodal model') and give that folder."
        ]
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return [
            "has no causal language model in transformers: only heads that predict the next token are trained."
        ]
    if kind in BOTH_DIRECTIONS and not getattr(config, "is_decoder", False):
        return [
            "reads its text in both directions (is_decoder is false): only causal language models are trained."
        ]
    if getattr(config, "use_bidirectional_attention", False):
        return [
            "attends in both directions (use_bidirectional_attention): only causal language models are trained."
        ]
    if kind in CANNOT_BE_CUT:
        return [f"{CANNOT_BE_CUT[kind]}. It cannot be trained here."]
    return [*_layer_problems(config), *_random_problems(data, config)]


def _layer_problems(config: Any) -> list[str]:
    found = []
    others = sorted({*map(str, getattr(config, "layer_types", None) or ())} - LAYER_TYPES)
    if others:
        found.append(
            f"has layers of type {', '.join(others)}: only full_attention and sliding_attention can be cut over ranks."
        )
    cap = getattr(config, "attn_logit_softcapping", None)
    if cap is not None:
        found.append(f"caps its attention scores (attn_logit_softcapping {cap}), and no kernel here does.")
    if getattr(config, "alibi", False):
        found.append("adds a bias by distance to its attention scores (alibi), and no kernel here adds one.")
    queries, values = getattr(config, "qk_head_dim", None), getattr(config, "v_head_dim", None)
    if queries is None and getattr(config, "qk_nope_head_dim", None) is not None:
        queries = config.qk_nope_head_dim + getattr(config, "qk_rope_head_dim", 0)
    if values is not None and queries is not None and queries != values:
        found.append(
            f"has query heads of {queries} features and value heads of {values} (MLA), and no kernel here takes unequal sizes."
        )
    sizes = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")
    odd = [name for name in sizes if _whole(field_of(config, name)) is None]
    odd += [
        name
        for name in ("head_dim", "num_key_value_heads")
        if (value := field_of(config, name)) is not None and _whole(value) is None
    ]
    if odd:
        found.append(
            f"has no single number for {', '.join(odd)}: models whose layers differ in size are not trained."
        )
    return found


def _random_problems(data: Mapping[str, Any], config: Any) -> list[str]:
    """What draws random numbers while training, whose pattern would depend on the layout."""
    if not (drawn := drawn_fields(data, config)):
        return []
    named = ", ".join(f"{name} {value}" for name, value in sorted(drawn.items()))
    return [
        f"sets {named}: what is drawn would depend on the layout, and the loss must not. Set 0.0 in its config.json."
    ]


def drawn_fields(data: Mapping[str, Any], config: Any) -> dict[str, float]:
    """The fields of dropout and of noise that are not 0, with their values."""
    fields = {**vars(config), **data}
    return {
        name: value
        for name, value in fields.items()
        if isinstance(value, float | int) and not isinstance(value, bool) and value > 0
        and (any(word in name for word in ("dropout", "pdrop", "layerdrop")) or name.endswith("jitter_noise"))
        and name not in _IDLE_DROPOUT
    }  # fmt: skip


def length_problem(data: Mapping[str, Any], where: str, sequence_len: int) -> str | None:
    """Why a sequence is too long for the model; None if it is not.

    Angles of the types ``dynamic`` and ``longrope`` follow the largest position that a call sees, and ranks would differ.
    """
    config = config_of(data, where)
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    for one in [each for each in rope.values() if isinstance(each, dict)] or [rope]:
        name = str(one.get("rope_type", one.get("type", "default")))
        limit = getattr(config, "max_position_embeddings", None)
        if name == "longrope":
            original = getattr(config, "original_max_position_embeddings", None)
            limit = one.get("original_max_position_embeddings") or original or limit
        elif "dynamic" not in name:
            continue
        if limit is not None and sequence_len > limit:
            return (
                f"sequence_len {sequence_len} with rope_type {name!r} of {where}: beyond {limit} tokens its angles follow the "
                f"largest position that a rank holds, so ranks would disagree. At most {limit}, or a fixed type in config.json "
                "(yarn, linear, llama3)."
            )
    return None
