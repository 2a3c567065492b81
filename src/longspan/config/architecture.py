"""The architecture in a Hugging Face ``config.json``, as keys of TrainConfig."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from longspan.errors import UserError

SUPPORTED_MODEL_TYPES = ("llama", "mistral", "ministral")

#: what transformers takes where a Mistral's config.json names no sliding_window
MISTRAL_WINDOW = 4096

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
    "rope_theta": "rotary_base",
    "rope_scaling": "rope_scaling",
    "tie_word_embeddings": "tie_word_embeddings",
    "initializer_range": "init_method_std",
    "sliding_window": "sliding_window",
}


def model_file(base_model: str, name: str) -> Path:
    """A file of a model: in a local folder, or fetched from the hub for an id such as ``org/name``.

    Raises:
        UserError: it is in neither.
    """
    path = Path(base_model) / name
    if path.is_file():
        return path
    if not Path(base_model).exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", base_model):
        try:
            from huggingface_hub import hf_hub_download

            return Path(hf_hub_download(base_model, name))
        except Exception as error:  # offline, no such model, no access: the remedy is the same
            raise UserError(
                f"base_model {base_model!r} is no local folder and {name} could not be fetched from the hub "
                f"({type(error).__name__}). Download the model and give its folder."
            ) from None
    raise UserError(
        f"base_model {base_model!r}: there is no {name} in it. Give a folder that holds a Hugging Face "
        "config.json, or leave base_model out and give num_layers, hidden_size and num_attention_heads."
    )


def model_folder(base_model: str) -> Path:
    """The folder of a model with its weights and tokenizer; a hub id is fetched whole (safetensors and JSON only)."""
    if Path(base_model).is_dir():
        return Path(base_model)
    path = model_file(base_model, "config.json")
    from huggingface_hub import snapshot_download

    snapshot_download(base_model, allow_patterns=["*.json", "*.safetensors", "*.jinja", "tokenizer.model"])
    return path.parent


def architecture_of(base_model: str) -> dict[str, Any]:
    """Reads the architecture keys of a model folder.

    Raises:
        UserError: no such folder, no config.json, or a model type that is not supported.
    """
    path = model_file(base_model, "config.json")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"base_model: {path} is not valid JSON ({error}).") from None
    if not isinstance(data, dict):
        raise UserError(f"base_model: {path} holds {type(data).__name__}, not an object of fields.")
    if data.get("model_type") not in SUPPORTED_MODEL_TYPES:
        raise UserError(
            f"base_model: {path} is of model_type {data.get('model_type')!r}; supported: "
            f"{', '.join(SUPPORTED_MODEL_TYPES)}."
        )
    for flag in ("attention_bias", "mlp_bias"):
        if data.get(flag):
            raise UserError(f"base_model: {path} sets {flag}; models with biases are not supported yet.")
    if data.get("hidden_act", "silu") != "silu":
        raise UserError(f"base_model: {path} sets hidden_act {data['hidden_act']!r}; only silu is supported.")
    found = {ours: data[theirs] for theirs, ours in _KEYS.items() if data.get(theirs) is not None}
    if data["model_type"] in ("mistral", "ministral"):
        found.setdefault("sliding_window", data.get("sliding_window", MISTRAL_WINDOW))
        kinds = data.get("layer_types") or []
        if "full_attention" in kinds:
            found["sliding_window"] = [
                found["sliding_window"] if k == "sliding_attention" else None for k in kinds
            ]
    else:  # transformers' Llama has none, whatever its config says
        found.pop("sliding_window", None)
    nested = data.get("rope_parameters") or {}
    if not isinstance(nested, dict):
        raise UserError(f"base_model: {path} sets rope_parameters {nested!r}, not an object of fields.")
    # transformers 5 keeps both in one place
    if "rope_theta" in nested:
        found.setdefault("rotary_base", nested["rope_theta"])
    if nested.get("rope_type", "default") != "default":
        found.setdefault("rope_scaling", {k: v for k, v in nested.items() if k != "rope_theta"})
    return found
