"""The reference of all keys as Markdown: ``longspan config --markdown``, which is docs/keys.md."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from longspan.config.dialects.axolotl import KEYS
from longspan.config.dialects.external import ExternalName, refuses
from longspan.config.dialects.megatron_flags import FLAGS
from longspan.config.keys.declare import UNSET
from longspan.config.schema import GROUPS, DatasetConfig, Key, keys

HEAD = """\
# All keys

Made by `make docs` (`longspan config --markdown`) from `src/longspan/config`; not written by hand.

A key is given in a YAML file under its own name (axolotl's, where axolotl has it) or the name of its Megatron-LM flag, and
on the command line as an option under either: `--sequence-len 8192`, `--seq-length 8192`. A yes-or-no key needs no value,
and `--no-KEY` switches it off. Where the default of `longspan pretrain` and `pretrain_gpt.py` differs, it stands behind
"Megatron". What is unknown is refused with the nearest name; what has no effect is listed at start."""


def markdown() -> str:
    """The whole page as Markdown."""
    parts = [HEAD]
    for group in GROUPS:
        parts += [
            "",
            f"## {group[0].upper()}{group[1:]}",
            "",
            *_key_rows(k for k in keys() if k.group == group),
        ]
        if group == "data":
            parts += ["", "### An entry of datasets", "", *_dataset_rows()]
    parts += [
        "",
        "## Megatron-LM's flags that are no keys",
        "",
        *_external_rows("flag", FLAGS),
        "",
        "## axolotl's keys that are no keys here",
        "",
        *_external_rows("key", KEYS),
    ]
    return "\n".join(parts) + "\n"


def _table(head: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> list[str]:
    lines = [head, tuple("---" for _ in head), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]


def _key_rows(some: Iterator[Key]) -> list[str]:
    def row(k: Key) -> tuple[str, ...]:
        flags = [f"`{k.flag}`", *(f"`{switch}` ({shown(value)})" for switch, value in k.switches.items())]
        others = ", ".join([*flags, *(f"`{alias}`" for alias in k.aliases)])
        default = shown(k.default)
        if k.megatron_default is not UNSET and k.megatron_default != k.default:
            default += f"; Megatron: {shown(k.megatron_default)}"
        unit = f" [{k.unit}]" if k.unit else ""
        return f"`{k.name}`", others, kind(k.annotation) + unit, default, k.text

    return _table(("key", "flag, other names", "value", "default", "meaning"), map(row, some))


def _dataset_rows() -> list[str]:
    def row(item: tuple[str, Any]) -> tuple[str, ...]:
        name, info = item
        default = "needed" if info.is_required() else shown(info.get_default(call_default_factory=True))
        return f"`{name}`", kind(info.annotation), default, info.description or ""

    return _table(("field", "value", "default", "meaning"), map(row, DatasetConfig.model_fields.items()))


def _external_rows(what: str, table: Mapping[str, ExternalName]) -> list[str]:
    def handling(entry: ExternalName) -> str:
        return "other keys" if entry.becomes else "refused" if refuses(entry) else "no effect"

    return _table(
        (what, "handling", "why, and what to say"), ((f"`{n}`", handling(e), e.why) for n, e in table.items())
    )


def kind(annotation: Any) -> str:
    """A type in the words of YAML: ``number``, ``text``, ``a, b or c``, ``list of ...``."""
    plain = {int: "whole number", float: "number", str: "text", bool: "true, false", NoneType: "", Any: "any"}
    if annotation in plain:
        return plain[annotation]
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(shown(a) for a in arguments)
    if origin in (Union, UnionType):
        return " or ".join(filter(None, map(kind, arguments)))
    if origin is list:
        return f"list of {kind(arguments[0])}"
    if origin is dict:
        return "mapping"
    return "mapping"


def shown(value: Any) -> str:
    """A value as it is written in YAML; an empty text for null."""
    if value is None or value == [] or value == "":
        return ""
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"
