"""Makes a TrainConfig from keys and values, and reports all problems at once."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from longspan.config.dialects.axolotl_datasets import LISTS, read_datasets
from longspan.config.dialects.table import EXTERNAL_NAMES
from longspan.config.keys.data import InstructionType
from longspan.config.options import Overrides, option_table, parse_overrides, read_external
from longspan.config.rope import rope_type, with_original_length
from longspan.config.schema import TrainConfig, names
from longspan.config.yaml_file import read_yaml
from longspan.errors import UserError, did_you_mean

#: With this number of problems or more, the message of an unknown key names no similar key.
MAX_NEAR = 50


@dataclass
class Reading:
    """The result of reading keys and values.

    Attributes:
        config: the config of the valid keys; None if they make no config.
        problems, notes: as in :class:`Overrides`.
        bad: the keys with problems.
    """

    config: TrainConfig | None
    problems: list[str]
    bad: set[str]
    notes: list[str]


def make_config(values: Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> Reading:
    """Makes a TrainConfig from values under any accepted spelling of their keys.

    Args:
        values: spelling -> value; a mapping in ``NESTED`` holds keys of its own.
        overrides: key -> value, which replace ``values``.
    """
    table, bad = names(), set()
    found = Overrides()
    merged: dict[str, Any] = {}
    spelled: dict[str, str] = {}
    for spelling, value in _flat(values):
        name = table.get(spelling)
        if name is not None and _asks_for_nothing(name, value):
            value = None
        if name is None and spelling in EXTERNAL_NAMES:
            # An empty value has no effect.
            if value is not None and value not in ("", [], {}):
                read_external(spelling, value, found)
        elif name is None:
            # Each search for a similar name takes milliseconds, too long for thousands of wrong keys.
            near = _nearest(spelling, table) if len(found.problems) < MAX_NEAR else ""
            found.problems.append(f"{spelling}: unknown key.{near}")
        elif name in merged and merged[name] != value:
            found.problems.append(
                f"{spelling} and {spelled[name]} are the same key with two values, {value!r} and {merged[name]!r}. "
                "Keep one."
            )
            bad.add(name)
        else:
            merged[name], spelled[name] = value, spelling
    for name, value in found.values.items():
        if merged.setdefault(name, value) != value:
            found.problems.append(f"{name}: {merged[name]!r} here, and {value!r} by another key. Keep one.")
            bad.add(name)
    for name, value in (overrides or {}).items():
        merged[name] = None if _asks_for_nothing(name, value) else value
    merged = {name: value for name, value in merged.items() if value is not None}
    for name in [name for name, value in merged.items() if _has_zero(value)]:
        found.problems.append(f"{name}: {str(merged.pop(name))[:60]!r} holds a zero byte (\\0). Take it out.")
        bad.add(name)
    for name in set(LISTS) & merged.keys():
        merged[name], problems, notes = read_datasets(name, merged[name])
        found.problems += problems
        found.notes += notes
        bad |= {name} if problems else set()
    problems, config = found.problems, None
    while True:
        try:
            config = TrainConfig(**merged)
            break
        except ValidationError as error:
            wrong = {str(e["loc"][0]) for e in error.errors()}
            problems += _explain(error, merged)
            bad |= wrong
            if not wrong & merged.keys():
                break
            merged = {name: value for name, value in merged.items() if name not in wrong}
    return Reading(config, problems, bad, found.notes)


def _nearest(spelling: str, table: Mapping[str, str]) -> str:
    """The remedy for an unknown key: the key that an option without a value sets, or a similar name."""
    key, value = option_table().get(spelling.replace("-", "_"), (None, None))
    if key is not None and isinstance(value, bool | str):
        return f" It is an option without a value; in a file write {key.name}: {json.dumps(value).strip(chr(34))}."
    return did_you_mean(spelling, [*table, *EXTERNAL_NAMES])


def _has_zero(value: Any) -> bool:
    """Whether a text in the value contains a zero byte, which the operating system allows in no path."""
    if isinstance(value, Mapping):
        return any(map(_has_zero, value)) or any(map(_has_zero, value.values()))
    if isinstance(value, list | tuple):
        return any(map(_has_zero, value))
    return isinstance(value, str) and "\0" in value


#: Keys for which an empty value is a mistake and does not mean null.
_NOT_EMPTY = ("base_model", "tokenizer_config")


def _asks_for_nothing(name: str, value: Any) -> bool:
    """Whether a value means null: false, or an empty value, for a key whose default is null."""
    info = TrainConfig.model_fields[name]
    kinds = get_args(info.annotation)
    if type(None) not in kinds or info.default is not None or name in _NOT_EMPTY:
        return False
    if value is False:
        return not {bool, int, float} & set(kinds)
    return value in ("", [], {})


#: Mappings whose members are keys of longspan: fsdp_config: {offload_params: true}.
NESTED = ("fsdp_config",)


def _flat(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Pairs of spelling and value; a member of a mapping in ``NESTED`` has the spelling ``outer.inner``."""
    for outer, value in values.items():
        if outer in NESTED and isinstance(value, Mapping):
            yield from ((f"{outer}.{str(inner).removeprefix('fsdp_')}", v) for inner, v in value.items())
        else:
            yield str(outer), value


def _explain(error: ValidationError, values: Mapping[str, Any]) -> list[str]:
    """Pydantic's errors as longspan's messages, one line for each wrong key."""
    lines: dict[str, str] = {}
    for e in error.errors():
        place = ".".join(map(str, e["loc"]))
        top = str(e["loc"][0])
        # Pydantic's place contains the member of a union that was tried, which does not help the user.
        if top in LISTS:
            place = ".".join(str(part) for part in e["loc"] if part != "InstructionType")
            if isinstance(values[top], list) and str(e["loc"][-1]).startswith("literal["):
                continue
        if e["type"] == "extra_forbidden" and top in LISTS:
            name = str(e["loc"][-1])
            lines[place] = f"{place}: unknown key.{did_you_mean(name, InstructionType.model_fields)}"
            continue
        if e["type"] == "missing":
            lines[place] = f"{place}: missing."
            continue
        rule = e["msg"].replace("Input should be", "must be").replace("Value error, ", "")
        found = (
            e["input"]
            if len(e["loc"]) == 1
            else values.get(top)
            if isinstance(e["loc"][1], str)
            else e["input"]
        )
        base = top if top not in LISTS else place
        hint = ""
        if e["type"] == "literal_error" and isinstance(found, str):
            choices = (
                str(e.get("ctx", {}).get("expected", "")).replace("'", "").replace(" or ", ", ").split(", ")
            )
            hint = did_you_mean(found, choices)
        # The errors of all members of a union make one line.
        if base in lines:
            lines[base] = (
                lines[base].replace(".", f", or {rule.removeprefix('must be ')}.", 1)
                if not hint
                else (lines[base] + hint)
            )
        else:
            lines[base] = f"{base}: {found!r} {rule}.{hint}"
    return list(lines.values())


def load_config(path: str | Path, arguments: Sequence[str] = ()) -> TrainConfig:
    """Reads a YAML file and command-line options over it; ``config.resolve`` checks the rules between keys.

    Args:
        arguments: options, as :func:`parse_overrides` reads them.

    Raises:
        UserError: with all problems found.
    """
    given = parse_overrides(arguments)
    reading = make_config(read_yaml(path), given.values)
    problems = [*given.problems, *(f"{a!r}: unexpected argument." for a in given.rest), *reading.problems]
    if problems:
        raise UserError(problems)
    assert reading.config is not None
    return reading.config


def architecture_config(values: Mapping[str, Any], sequence_len: int | None = None) -> TrainConfig:
    """A config that holds only an architecture, for commands that do not train.

    Args:
        values: the architecture keys, as ``hub.architecture_of`` returns them.
        sequence_len: in tokens; None means the longest that the model is made for, or the key's default.

    Raises:
        UserError: with all problems found.
    """
    length = (
        sequence_len
        or values.get("max_position_embeddings")
        or TrainConfig.model_fields["sequence_len"].default
    )
    most, scaling = values.get("max_position_embeddings"), values.get("rope_scaling")
    values = dict(values)
    if scaling:
        values["rope_scaling"] = with_original_length(scaling, most)
    if most and values.get("position_embedding_type", "rope") == "rope" and rope_type(scaling) != "dynamic":
        values["max_position_embeddings"] = max(most, length)
    none = {"learning_rate": 0, "datasets": [{"path": "none"}], "sample_packing": False, "export_hf": False}
    reading = make_config({**values, "sequence_len": length, **none})
    if reading.config is None or reading.problems:
        raise UserError(reading.problems)
    return reading.config


def to_yaml(config: TrainConfig) -> str:
    """All keys with their values as YAML, in the order of the schema."""
    return yaml.safe_dump(config.model_dump(), sort_keys=False, allow_unicode=True, width=100)
