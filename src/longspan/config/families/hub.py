"""Finds a ``base_model``: in a local folder, in the table of known architectures, or on the hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from longspan.config.families import any_type
from longspan.config.families.config_json import (
    FAMILIES,
    TEXT_MODELS,
    keys_of,
    quant_method,
    text_model,
)
from longspan.config.families.known import known_model
from longspan.config.families.rotary_decoder import ignored_fields
from longspan.config.json_text import parse_json
from longspan.errors import UserError


def model_file(base_model: str, name: str, network: bool = True) -> Path:
    """A file of a model: in a local folder, or fetched from the hub for an id such as ``org/name``.

    Args:
        network: False uses only the files that were fetched earlier, and no network.

    Raises:
        UserError: the file is in neither.
    """
    path = Path(base_model) / name
    if path.is_file():
        return path
    if not Path(base_model).exists() and is_hub_id(base_model):
        try:
            from huggingface_hub import hf_hub_download

            return Path(hf_hub_download(base_model, name, local_files_only=not network))
        # The remedy is the same without a network, without such a model and without access.
        except Exception as error:
            raise UserError(_not_fetched(base_model, name, error)) from None
    raise UserError(
        f"base_model {base_model!r}: there is no {name} in it. Give a folder that holds a Hugging Face "
        "config.json, or leave base_model out and give num_layers, hidden_size and num_attention_heads."
    )


def is_hub_id(base_model: str) -> bool:
    """Whether a name has the form ``org/name``."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", base_model) is not None


def _not_fetched(base_model: str, what: str, error: Exception) -> str:
    name = base_model.split("/")[-1]
    reason = "huggingface_hub is not installed" if isinstance(error, ImportError) else type(error).__name__
    return (
        f"base_model {base_model!r} is no local folder and {what} could not be fetched from the hub ({reason}). Download the "
        f"model where the hub can be reached, with 'hf download {base_model} --local-dir {name}', and give base_model: {name}."
    )


def model_folder(base_model: str) -> Path:
    """The folder of a model with its weights and tokenizer.

    For an id on the hub, all its safetensors, tokenizer and JSON files are fetched.

    Raises:
        UserError: the model is not a folder and cannot be fetched.
    """
    if Path(base_model).is_dir():
        return Path(base_model)
    if not is_hub_id(base_model):
        # model_file raises the error that there is no such model.
        return model_file(base_model, "config.json").parent
    try:
        from huggingface_hub import snapshot_download

        patterns = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "merges.txt"]
        return Path(snapshot_download(base_model, allow_patterns=patterns))
    # The remedy is the same without a network, without such a model and without access.
    except Exception as error:
        remedy = " To start from random weights of this architecture: reinit_weights: true."
        raise UserError(_not_fetched(base_model, "its weights", error) + remedy) from None


def model_config(base_model: str, network: bool = True) -> tuple[dict[str, Any], str]:
    """(the fields of a model's ``config.json``, its name for messages), from a folder, the table, or the hub.

    Args:
        network: as in :func:`model_file`.

    Raises:
        UserError: the file is in none of these places, cannot be read, or holds no JSON object.
    """
    if not Path(base_model).exists() and (known := known_model(base_model)) is not None:
        return known, f"the known architecture of {base_model}"
    path = model_file(base_model, "config.json", network)
    try:
        data = parse_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"base_model: {path} cannot be read ({error.strerror}). Put its permissions right."
        ) from None
    except ValueError as error:
        raise UserError(f"base_model: {path} is not valid JSON ({error}).") from None
    if not isinstance(data, dict):
        raise UserError(f"base_model: {path} holds {type(data).__name__}, not an object of fields.")
    return data, str(path)


def implementation_of(base_model: str, asked: str = "auto", network: bool = True) -> str:
    """What computes a model: ``native`` or ``transformers``.

    Args:
        asked: ``model_implementation``.
        network: as in :func:`model_file`.

    Raises:
        UserError: as :func:`model_config`.
    """
    if asked != "auto":
        return asked
    kind = model_config(base_model, network)[0].get("model_type")
    native = not isinstance(kind, str) or kind in FAMILIES or kind in TEXT_MODELS
    return "native" if native else "transformers"


def architecture_of(base_model: str, network: bool = True, implementation: str = "native") -> dict[str, Any]:
    """The architecture keys of a model; a known model needs neither its folder nor a network.

    Args:
        network: as in :func:`model_file`.
        implementation: as of :func:`implementation_of`.

    Raises:
        UserError: there is no such folder or no config.json, or the model is not supported.
    """
    data, where = model_config(base_model, network)
    return any_type.keys_of(data, where) if implementation == "transformers" else keys_of(data, where)


def sequence_problem(base_model: str, sequence_len: int) -> str | None:
    """Why transformers' class cannot train on so many tokens, as ``any_type.length_problem``; nothing is fetched."""
    return any_type.length_problem(*model_config(base_model, network=False), sequence_len)


def unused_fields(base_model: str, implementation: str = "native") -> list[str]:
    """A line that lists the fields of a model's ``config.json`` that are ignored, if any, and of what is left out; nothing is fetched.

    Args:
        base_model: a model whose architecture was read already.
        implementation: as of :func:`implementation_of`; ``auto`` finds it.
    """
    data, where = model_config(base_model, network=False)
    if implementation_of(base_model, implementation, network=False) == "transformers":
        return any_type.notes_of(data, where)
    text, where_text = text_model(data, where)
    family = FAMILIES[text["model_type"]]
    named = ", ".join(ignored_fields(text, family.rope_fields))
    found = [f"rope_scaling of {where_text}: {named} (transformers ignores it too)"] if named else []
    if (method := quant_method(text)) is not None:
        found.append(
            f"quantization_config of {where_text}: weights in {method} are read as bfloat16, and an export holds whole weights of export_dtype (auto: bfloat16)"
        )
    if text is not data:
        found.append(f"vision_config of {where}: the text model alone is taken")
    return found


def vocabulary_of(values: dict[str, Any], base_model: str) -> int:
    """The size of the vocabulary, from the architecture keys of a model.

    Args:
        values: the keys, as :func:`architecture_of` returns them.
        base_model: the model's name, for messages.

    Raises:
        UserError: the config.json names no vocab_size; transformers' default would hardly fit the weights.
    """
    if values.get("vocab_size") is None:
        raise UserError(
            f"base_model {base_model}: its config.json names no vocab_size. Download the model again."
        )
    return values["vocab_size"]
