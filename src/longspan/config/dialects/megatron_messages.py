"""Messages at Megatron's entry point: every key by its flag, every value as a flag takes it.

Rules are written by key names, with ``key: value`` where they quote a config. Here, at the very end,
``micro_batch_size: 3`` becomes ``--micro-batch-size 3``, so that no rule has two texts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, get_args

from longspan.config.model import CP_COMM_TYPES
from longspan.config.schema import Key, keys

#: messages of which a Megatron-LM user would write nothing -> what to give at this entry point
_WHOLE = {
    "datasets: missing.": "--data-path: missing. Give a .bin/.idx prefix (longspan prepare makes one), or --mock-data.",
}
_NUMBER = r"[+-]?\d+(?:\.\d+)?(?:e[+-]?\d+)?"
_QUOTED = r"'[^']*'|\[[^\]]*\]|\{[^}]*\}"


def by_flags(problem: str, defaults: Mapping[str, Any] | None = None) -> str:
    """A message in which keys go by Megatron-LM's flags.

    Args:
        defaults: keys that nobody gave, with the values taken for them: a message that names one says so.
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
            if re.search(rf"(?<![\w-]){re.escape(shown)}(?![\w-])", problem):
                problem += f" ({shown} is Megatron-LM's default.)"
    return problem


def as_flag(k: Key, value: Any) -> str:
    """How a value is given at this entry point: ``--seq-length 128``, ``--disable-bias-linear``."""
    for switch, stands_for in k.switches.items():
        if value == stands_for and type(value) is type(stands_for):
            return switch
    if value is True:
        return k.flag
    if value is False:
        return "--no-" + k.name.replace("_", "-")
    return f"{k.flag} {value}"


def _translated(text: str, k: Key) -> str:
    name = rf"(?<![\w.-]){k.name}"
    words = "|".join(map(re.escape, sorted(_words(k), key=len, reverse=True)))
    values = rf"(true|false|null|{_NUMBER}|{_QUOTED}{'|' + words if words else ''})"

    def pair(match: re.Match) -> str:
        value = {"true": True, "false": False}.get(match[1], match[1])
        return as_flag(k, value)

    text = re.sub(rf"{name}: {values}(?![\w+-])", pair, text)
    if "_" in k.name:
        return re.sub(rf"{name}(?![\w-])", k.flag, text)
    # a name of one word is also an English word: it is the key where a message begins with it, before a value of its
    # own, and as what is to be given
    text = re.sub(rf"^{k.name}(?![\w-])", k.flag, text)
    text = re.sub(rf"{name}(?= (?:'|\d+(?:,\d+)+))", k.flag, text)
    return re.sub(rf"(?<![\w.-])(by|give|without|beside|leave) {k.name}(?=[,.;: ]|$)", rf"\1 {k.flag}", text)


def _words(k: Key) -> set[str]:
    """The words a key's value may be."""

    def inside(annotation: Any) -> set[str]:
        if isinstance(annotation, str):
            return {annotation}
        return set().union(*map(inside, get_args(annotation)))

    return inside(k.annotation) | (set(CP_COMM_TYPES) if k.name == "cp_comm_type" else {"auto", "jinja"})
