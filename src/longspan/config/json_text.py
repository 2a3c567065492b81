"""Reads JSON files that other programs or users wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from longspan.errors import UserError


def parse_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: the text is not JSON, or it is nested more deeply than Python can read.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a settings file; an empty object if there is no file.

    Raises:
        UserError: the file does not hold a JSON object.
    """
    if not file.is_file():
        return {}
    try:
        found = parse_json(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file}: not a JSON object ({error}). Put it right or remove it.") from None
    if not isinstance(found, dict):
        raise UserError(f"{file}: a JSON {type(found).__name__}, not an object. Put it right or remove it.")
    return found
