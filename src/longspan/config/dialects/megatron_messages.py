"""Messages at Megatron's entry point: every key is named by its flag, every value is written as after a flag.

The messages of rules name keys, and write ``key: value`` if they quote a config. This module replaces
``micro_batch_size: 3`` by ``--micro-batch-size 3`` before a message is printed, so no rule has two texts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, get_args

from longspan.config.model import CP_COMM_TYPES
from longspan.config.schema import Key, keys

#: beginning of a message about keys that a Megatron-LM user does not use -> the message at this entry point
_WHOLE = {
    "datasets: missing.": "--data-path: missing. Give a .bin/.idx prefix (longspan prepare makes one), or --mock-data.",
}
_NUMBER = r"[+-]?\d+(?:\.\d+)?(?:e[+-]?\d+)?"
_QUOTED = r"'[^']*'|\[[^\]]*\]|\{[^}]*\}"


def by_flags(problem: str, defaults: Mapping[str, Any] | None = None) -> str:
    """The message, with Megatron-LM's flags instead of keys.

    Args:
        defaults: key -> Megatron-LM's default, for keys that the user did not set. A message that names such
            a value gets the remark that it is the default.
    """
    for begin, text in _WHOLE.items():
        if problem.startswith(begin):
            return text
    table = sorted(keys(), key=lambda k: -len(k.name))
    for k in table:
        problem = _translated(problem, k)
    problem = re.sub(r"(--[\w-]+) \(\1\)", r"\1", problem)
    problem = re.sub(r"^(--[\w-]+): True (?=is )", r"\1 ", problem)
    problem = re.sub(rf"^(--[\w-]+): (?=({_NUMBER}|{_QUOTED}) is )", r"\1 ", problem)
    for k in table:
        if defaults and k.name in defaults and defaults[k.name] is not None:
            shown = as_flag(k, defaults[k.name])
            if shown in problem and re.search(rf"(?<![\w-]){re.escape(shown)}(?![\w-])", problem):
                problem += f" ({shown} is Megatron-LM's default.)"
    return problem


def as_flag(k: Key, value: Any) -> str:
    """A key and its value as flags: ``--seq-length 128``, ``--disable-bias-linear``."""
    for switch, stands_for in k.switches.items():
        if value == stands_for and type(value) is type(stands_for):
            return switch
    if value is True:
        return k.flag
    if value is False:
        return "--no-" + k.name.replace("_", "-")
    return f"{k.flag} {value}"


def _translated(text: str, k: Key) -> str:
    # The patterns of all keys are too many for the cache of compiled ones.
    if k.name not in text:
        return text
    name = rf"(?<![\w.-]){k.name}"
    words = "|".join(map(re.escape, sorted(_words(k), key=len, reverse=True)))
    values = rf"(true|false|null|{_NUMBER}|{_QUOTED}{'|' + words if words else ''})"

    def pair(match: re.Match) -> str:
        value = {"true": True, "false": False}.get(match[1], match[1])
        return as_flag(k, value)

    text = re.sub(rf"{name}: {values}(?![\w+-])", pair, text)
    if "_" in k.name:
        return re.sub(rf"{name}(?![\w-])", k.flag, text)
    # A name of one word is also an English word. It is the key only at the beginning of a message, before a
    # value, and after a word such as "give".
    text = re.sub(rf"^{k.name}(?![\w-])", k.flag, text)
    text = re.sub(rf"{name}(?= (?:'|\d+(?:,\d+)+))", k.flag, text)
    return re.sub(rf"(?<![\w.-])(by|give|without|beside|leave) {k.name}(?=[,.;: ]|$)", rf"\1 {k.flag}", text)


def _words(k: Key) -> set[str]:
    """The words that a key accepts as its value."""

    def inside(annotation: Any) -> set[str]:
        if isinstance(annotation, str):
            return {annotation}
        return set().union(*map(inside, get_args(annotation)))

    return inside(k.annotation) | (set(CP_COMM_TYPES) if k.name == "cp_comm_type" else {"auto", "jinja"})
