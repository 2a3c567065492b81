"""Records and texts from JSON files, which hold JSON lines or one list."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from longspan.config.json_text import parse_json
from longspan.errors import UserError, did_you_mean

ONE_A_LINE = "Each line must be one JSON object."


def json_records(source: Path) -> Iterator[tuple[str, object]]:
    """Yields (place, JSON value) from a file of JSON lines or of one JSON list."""
    with source.open("rb") as file:
        start = file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n")
        file.seek(0)
        if start.startswith(b"[") and source.suffix.lower() == ".json":
            text = _decoded(file.read(), "utf-8-sig", str(source))
            for number, record in enumerate(_parse(text, str(source)), start=1):
                yield f"{source}, object {number}", record
            return
        first = True
        for number, line in enumerate(file, start=1):
            where = f"{source}, line {number}"
            text = _decoded(line, "utf-8-sig" if number == 1 else "utf-8", where).strip()
            if not text:
                continue
            if first and _goes_on(text):
                kind = "list" if text[0] == "[" else "object"
                remedy = (
                    "name the file .json"
                    if kind == "list"
                    else "or make the file one list of objects in a .json"
                )
                raise UserError(
                    f"{where}: a JSON {kind} that goes on over several lines. {ONE_A_LINE} Write it so (jq -c "
                    f"{'.[]' if kind == 'list' else '.'}), {'or ' if kind == 'list' else ''}{remedy}."
                )
            first = False
            record = _parse(text, where)
            if isinstance(record, list):
                raise UserError(
                    f"{where}: a JSON list. {ONE_A_LINE} Write it so (jq -c .[]), or put the one list of all records into "
                    "a file whose name ends with .json."
                )
            yield where, record


def _decoded(data: bytes, encoding: str, where: str) -> str:
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where}: not UTF-8 (byte {error.start}). JSON is: write the file anew in it."
        ) from None


def _parse(text: str, where: str):
    try:
        return parse_json(text)
    except ValueError as error:
        raise UserError(f"{where}: not JSON ({error}). {ONE_A_LINE}") from error


def _goes_on(line: str) -> bool:
    """Whether a line is the beginning of a JSON value that ends in a later line."""
    try:
        parse_json(line)
    except json.JSONDecodeError as error:
        return line[0] in "{[" and error.pos >= len(line)
    except ValueError:
        pass
    return False


def text_of(record: object, field: str, where: str) -> str:
    if not isinstance(record, dict):
        raise UserError(f"{where}: a JSON {type(record).__name__}, not an object with a field {field!r}.")
    if field not in record:
        names = ", ".join(map(repr, record)) or "none"
        raise UserError(f"{where}: no field {field!r}. The fields are {names}.{did_you_mean(field, record)}")
    text = record[field]
    if not isinstance(text, str):
        raise UserError(f"{where}: the field {field!r} holds a {type(text).__name__}; it must be a string.")
    return valid_text(text)


def valid_text(text: str) -> str:
    """The text with a question mark for each half of a surrogate pair (``\\ud800``), which JSON may hold."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-8", errors="replace").decode("utf-8")
    return text
