"""Reads command-line options as values of keys, under longspan's own names, Megatron-LM's and axolotl's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, get_args, get_origin

from longspan.config.dialects.external import MANY
from longspan.config.dialects.table import EXTERNAL_NAMES
from longspan.config.schema import DatasetConfig, Key, keys
from longspan.config.yaml_file import read_value
from longspan.errors import did_you_mean


@dataclass
class Overrides:
    """What was read from command-line options.

    Attributes:
        values: key -> value.
        rest: arguments that are not options.
        problems: one message for each mistake.
        notes: options without effect in longspan, each with the reason.
    """

    values: dict[str, Any] = field(default_factory=dict)
    rest: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def parse_overrides(
    arguments: Sequence[str], other_options: Sequence[str] = (), positionals: int = 0
) -> Overrides:
    """Reads command-line options as values of keys.

    Each key is an option under its own name (``--learning-rate 1e-4``, ``--learning_rate=1e-4``)
    and under Megatron's name (``--lr 1e-4``). Values are read as YAML. A boolean needs no value, and
    ``--no-KEY`` switches it off. A key that may be a list takes several values (``--cp-comm-type p2p a2a``).
    ``dialects.table`` holds how options of Megatron-LM and axolotl that are not keys of longspan are handled.

    Args:
        other_options: options that the caller handles itself, for similar names in messages.
        positionals: number of expected arguments that are not options. As long as some of them have not been
            read, a list takes only one value, so that it does not take such an argument.
    """
    table = option_table()
    found = Overrides()
    left = list(arguments)
    # key -> the option that set it
    given: dict[str, str] = {}
    while left:
        argument = left.pop(0)
        if not argument.startswith("--") or argument == "--":
            found.rest.append(argument)
            continue
        option, equals, text = argument.partition("=")
        name = option[2:].replace("-", "_")
        if name not in table and name in EXTERNAL_NAMES:
            many = [text] if equals else _take(left, EXTERNAL_NAMES[name].values)
            read = [read_value(v) for v in many]
            read_external(option, read if len(read) > 1 else read[0] if read else True, found)
            continue
        if name not in table:
            known = [*("--" + n.replace("_", "-") for n in (*table, *EXTERNAL_NAMES)), *other_options]
            found.problems.append(f"{option}: unknown option.{did_you_mean(option.replace('_', '-'), known)}")
            if not equals and left and not left[0].startswith("--"):
                left.pop(0)
            continue
        k, fixed = table[name]
        if fixed is not _VALUE:
            if equals:
                found.problems.append(f"{option} takes no value; found {text!r}.")
            value = fixed
        elif equals:
            value = _value(k, text)
        elif _is_switch(k, name) and (not left or left[0].startswith("--") or _no_bool(left[0])):
            value = True
        elif not left or left[0].startswith("--"):
            found.problems.append(f"{option} needs a value: {k.text}")
            continue
        else:
            value = _value(k, left.pop(0))
            if _is_list(k) and len(found.rest) >= positionals:
                more = [_value(k, v) for v in _take(left, MANY)]
                if not isinstance(value, list):
                    value = [value] if more or not _may_be_single(k) else value
                value = [*value, *more] if more else value
        if _is_list(k) and not _may_be_single(k) and not isinstance(value, list | type(None)):
            value = [value]
        if k.name in found.values and found.values[k.name] != value and given[k.name] != option:
            found.problems.append(
                f"{option} and {given[k.name]} are the same key, {k.name}, with two values. Keep one."
            )
        found.values[k.name], given[k.name] = value, option
    return found


def option_table() -> dict[str, tuple[Key, Any]]:
    """Name of every option -> (its key, the value that it sets; ``_VALUE`` if a value follows the option).

    The names have no leading dashes, and underscores instead of dashes.
    """
    table: dict[str, tuple[Key, Any]] = {}
    for k in keys():
        for spelling in (k.name, *k.aliases):
            table[spelling] = (k, _VALUE)
            if _is_bool(k):
                table["no_" + spelling] = (k, False)
        table[k.flag[2:].replace("-", "_")] = (k, _VALUE)
        for switch, value in k.switches.items():
            table[switch[2:].replace("-", "_")] = (k, value)
    return table


def _take(left: list[str], count: int) -> list[str]:
    """Removes up to ``count`` values (MANY: all values) that follow an option, and returns them."""
    taken: list[str] = []
    while left and not left[0].startswith("--") and (count == MANY or len(taken) < count):
        taken.append(left.pop(0))
    return taken


def read_external(spelling: str, value: Any, found: Overrides) -> None:
    """Reads a name that is not a key of longspan, and adds keys, a note or a problem to ``found``."""
    entry = EXTERNAL_NAMES[spelling.removeprefix("--").replace("-", "_")]
    try:
        values = entry.read(spelling, value)
    except ValueError as error:
        found.problems.append(str(error))
        return
    if values is None:
        found.notes.append(f"{spelling}: {entry.why}")
    found.values.update(values or {})


_VALUE: Any = object()


def _is_bool(k: Key) -> bool:
    return bool in (k.annotation, *getattr(k.annotation, "__args__", ()))


def _is_switch(k: Key, spelling: str) -> bool:
    """Whether the option of a boolean key may have no value; a Megatron flag of another name needs one."""
    return _is_bool(k) and (spelling in (k.name, *k.aliases) or k.flag == "--" + k.name.replace("_", "-"))


def _is_list(k: Key) -> bool:
    """Whether the key may be a list of plain values."""
    members = (k.annotation, *get_args(k.annotation))
    return any(get_origin(m) is list and get_args(m)[0] is not DatasetConfig for m in members)


def _may_be_single(k: Key) -> bool:
    """Whether a key that may be a list may also be one plain value."""
    return any(
        get_origin(m) is not list and m is not type(None) for m in (get_args(k.annotation) or (k.annotation,))
    )


def _no_bool(text: str) -> bool:
    return text.lower() not in (
        "true",
        "false",
        "yes",
        "no",
        "on",
        "off",
        "auto",
        "full",
        "selective",
        "offload",
    )


def _value(k: Key, text: str) -> Any:
    """A value as YAML reads it; for a key that holds text, the text itself."""
    members = set(getattr(k.annotation, "__args__", ()))
    if k.annotation is str or members == {str, type(None)}:
        return text
    if members == {list[str], type(None)} and not text.startswith("["):
        # A path may look like a number or a date.
        return text
    return read_value(text)
