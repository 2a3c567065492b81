"""The files of a tokenizer's folder: read and changed together, so that they do not contradict each other.

tokenizer.json             vocabulary, and the tokens that a post-processor puts before a text
tokenizer_config.json      bos_token, eos_token ...; older files also have a chat template, or several by name
special_tokens_map.json    the same tokens again, which some programs read first
chat_template.jinja        the chat template; additional_chat_templates/NAME.jinja holds others
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longspan.config.json_text import parse_json
from longspan.errors import UserError
from longspan.files import write_whole

SETTINGS, TOKENS_MAP, VOCABULARY = "tokenizer_config.json", "special_tokens_map.json", "tokenizer.json"
TEMPLATE, MORE_TEMPLATES = "chat_template.jinja", "additional_chat_templates"

#: The files that belong to a tokenizer and are copied with it.
TOKENIZER_FILES = (
    *(VOCABULARY, SETTINGS, TOKENS_MAP, "added_tokens.json", TEMPLATE, "chat_template.json"),
    *("tokenizer.model", "vocab.json", "vocab.txt", "merges.txt"),
)


def folder_of(path: str | Path) -> Path:
    """The folder of a tokenizer.

    Args:
        path: this folder, or a ``tokenizer.json`` in it.
    """
    path = Path(path).expanduser()
    return path.parent if path.is_file() else path


def read_tokenizer_files(path: str | Path) -> dict[str, bytes]:
    """All files of a tokenizer: name (relative to its folder) -> content.

    Args:
        path: a ``tokenizer.json`` or its folder.

    Raises:
        UserError: a file cannot be read.
    """
    given, folder = Path(path).expanduser(), folder_of(path)
    paths = [folder / name for name in TOKENIZER_FILES]
    paths += sorted((folder / MORE_TEMPLATES).glob("*.jinja"))
    try:
        files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in paths if p.is_file()}
        # A file whose path the user names may have any name.
        return files | ({VOCABULARY: given.read_bytes()} if given.is_file() else {})
    except OSError as error:
        raise UserError(
            f"tokenizer: {error.filename} cannot be read ({error.strerror}), and an export needs it. Put its permissions right."
        ) from None


def write_tokenizer_files(files: Mapping[str, bytes], folder: Path) -> None:
    """Writes files into a folder, ``tokenizer.json`` last: its presence shows that all files are there."""
    for name in sorted(files, key=lambda n: n == VOCABULARY):
        write_whole(folder / name, files[name])


def json_object(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    """The JSON object in one of the files; empty if there is no such file.

    Raises:
        UserError: the file is not a JSON object.
    """
    if name not in files:
        return {}
    try:
        found = parse_json(files[name].decode("utf-8"))
    except ValueError as error:
        raise UserError(
            f"{name} of the tokenizer is not JSON ({error}). Put it right or remove it."
        ) from None
    if not isinstance(found, dict):
        raise UserError(
            f"{name} of the tokenizer holds {type(found).__name__}, not an object. Put it right or remove it."
        )
    return found


def to_bytes(data: Any) -> bytes:
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()


def with_tokens(files: Mapping[str, bytes], tokens: Mapping[str, str]) -> dict[str, bytes]:
    """The files with other special tokens (bos_token ... -> the token), in every file that names them."""
    changed = dict(files)
    if tokens:
        changed[SETTINGS] = to_bytes(json_object(files, SETTINGS) | dict(tokens))
        if TOKENS_MAP in files:
            changed[TOKENS_MAP] = to_bytes(json_object(files, TOKENS_MAP) | dict(tokens))
    return changed


def named_templates(settings: Mapping[str, Any], where: str | Path) -> dict[str, str]:
    """The chat templates in a tokenizer's settings, by name; a template without a name is "default".

    Args:
        where: the place of the settings, for messages.

    Raises:
        UserError: a template is not text.
    """
    given = settings.get("chat_template")
    named = [{"name": "default", "template": given}] if isinstance(given, str) else given or []
    if isinstance(named, list) and all(
        isinstance(one, dict) and all(isinstance(one.get(key), str) for key in ("name", "template"))
        for one in named
    ):
        return {one["name"]: one["template"] for one in named}
    raise UserError(
        f"{where}: chat_template is neither text nor a list of objects with a name and a template, both text. Put it right or "
        "remove it."
    )


def with_template(files: Mapping[str, bytes], template: str) -> dict[str, bytes]:
    """The files with another chat template; templates that have names stay."""
    changed = dict(files)
    settings = json_object(files, SETTINGS)
    for name, text in named_templates(settings, SETTINGS).items():
        if name != "default" and re.fullmatch(r"\w[\w.-]*", name):
            changed.setdefault(f"{MORE_TEMPLATES}/{name}.jinja", text.encode())
    settings.pop("chat_template", None)
    if SETTINGS in files:
        changed[SETTINGS] = to_bytes(settings)
    changed.pop("chat_template.json", None)
    changed[TEMPLATE] = template.encode()
    return changed


def with_begin(files: Mapping[str, bytes], old: int, new: tuple[str, int]) -> dict[str, bytes]:
    """The files with another token that the post-processor puts before a text.

    Args:
        old: the number of the present token.
        new: the new token, and its number.
    """
    data = json_object(files, VOCABULARY)
    processors = [data.get("post_processor")]
    # The list grows in this loop.
    for processor in processors:
        if not isinstance(processor, dict):
            continue
        processors += processor.get("processors") or []
        if processor.get("type") != "TemplateProcessing":
            continue
        known = processor["special_tokens"]
        names = [name for name, about in known.items() if about["ids"] == [old]]
        for piece in [*processor["single"], *processor["pair"]]:
            if piece.get("SpecialToken", {}).get("id") in names:
                piece["SpecialToken"]["id"] = new[0]
        for name in names:
            del known[name]
            known[new[0]] = {"id": new[0], "ids": [new[1]], "tokens": [new[0]]}
    return {**files, VOCABULARY: to_bytes(data)}


def changed_copy(
    path: Path, tokens: Mapping[str, str], template: str | None, has: Mapping[str, str], cache_dir: Path
) -> Path:
    """A tokenizer with other special tokens and another chat template; `path` itself if nothing changes.

    Args:
        path: a ``tokenizer.json`` or its folder.
        tokens: name of each special token to change (bos_token ...) -> a token of the vocabulary.
        template: the jinja text; None keeps the present template.
        has: the present special tokens.
        cache_dir: the copy is a folder in this folder.
    """
    if template is None and tokens.items() <= has.items():
        return path
    files = with_tokens(read_tokenizer_files(path), tokens)
    if template is not None:
        files = with_template(files, template)
    digest = hashlib.blake2b(digest_size=6)
    for name in sorted(files):
        digest.update(name.encode() + b"\0" + files[name] + b"\0")
    folder = cache_dir.expanduser() / f"tokenizer-{digest.hexdigest()}"
    if not (folder / VOCABULARY).is_file():
        write_tokenizer_files(files, folder)
    return folder
