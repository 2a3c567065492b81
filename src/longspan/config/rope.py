"""Scaling of rotary embeddings for longer context, with Hugging Face's names: types, fields and rules."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

#: type -> (the fields it needs, the fields it may have)
ROPE_TYPES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "yarn": (
        ("factor", "original_max_position_embeddings"),
        ("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor", "truncate"),
    ),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), ()),
}

#: the types with a field for the length, in tokens, that the model was first trained at
_WITH_ORIGINAL = ("yarn", "llama3")

_LONGROPE = (
    "rope_scaling type 'longrope' is not supported: it has two lists of factors and takes one or the other by the length of "
    "each call, so one document would be computed otherwise alone than in a pack. Use yarn."
)


def rope_type(scaling: Mapping[str, Any] | None) -> str:
    """The type of a ``rope_scaling``: its ``rope_type``, or its ``type`` (the old name), or ``default``."""
    scaling = scaling or {}
    return scaling.get("rope_type") or scaling.get("type") or "default"


def rope_problems(c: Any) -> list[str]:
    """A message for each rule that ``rope_scaling`` breaks.

    Args:
        c: an object with rope_scaling, rotary_base, rotary_channels and max_position_embeddings.
    """
    scaling = c.rope_scaling
    if not scaling:
        return []
    kind = rope_type(scaling)
    if kind == "longrope":
        return [_LONGROPE]
    if not isinstance(kind, str) or kind not in ROPE_TYPES:
        return [f"rope_scaling type {kind!r}: one of {', '.join(ROPE_TYPES)}."]
    if "type" in scaling and "rope_type" in scaling and scaling["type"] != scaling["rope_type"]:
        return [f"rope_scaling: rope_type {kind!r} and type {scaling['type']!r} differ. Keep one."]
    needs, may = ROPE_TYPES[kind]
    fields = {k: v for k, v in scaling.items() if k not in ("rope_type", "type") and v is not None}
    found = []
    missing = [name for name in needs if name not in fields]
    if missing:
        found.append(f"rope_scaling of type {kind}: {', '.join(missing)} missing.")
    if others := [name for name in fields if name not in (*needs, *may)]:
        hint = " The base of the frequencies is rotary_base." if "rope_theta" in others else ""
        found.append(
            f"rope_scaling of type {kind}: {', '.join(others)} would have no effect; its fields are "
            f"{', '.join((*needs, *may)) or 'none'}.{hint}"
        )
    numbers = {k: v for k, v in fields.items() if k in (*needs, *may) and k != "truncate"}
    if wrong := [f"{k} {v!r}" for k, v in numbers.items() if not _positive(v)]:
        found.append(f"rope_scaling: {', '.join(wrong)}: a number above 0.")
    if not isinstance(fields.get("truncate", True), bool):
        found.append(f"rope_scaling: truncate {fields['truncate']!r}: true or false.")
    if not found:
        found += _between(kind, numbers, c)
    return found


def _between(kind: str, numbers: Mapping[str, float], c: Any) -> list[str]:
    """A message for each broken rule between the fields of one type."""
    found = []
    if kind == "llama3" and numbers["high_freq_factor"] <= numbers["low_freq_factor"]:
        found.append(
            f"rope_scaling: high_freq_factor {numbers['high_freq_factor']} must be larger than low_freq_factor "
            f"{numbers['low_freq_factor']}."
        )
    if kind == "yarn":
        fast, slow = numbers.get("beta_fast", 32), numbers.get("beta_slow", 1)
        if fast < slow:
            found.append(f"rope_scaling: beta_fast {fast} must not be smaller than beta_slow {slow}.")
        if ("mscale" in numbers) != ("mscale_all_dim" in numbers):
            found.append(
                "rope_scaling: mscale and mscale_all_dim have an effect together only. Give both or none."
            )
        if "mscale" in numbers and "attention_factor" in numbers:
            found.append(
                "rope_scaling: attention_factor leaves mscale and mscale_all_dim without effect. Give one or the other."
            )
        if c.rotary_base <= 1:
            found.append(f"rope_scaling of type yarn needs rotary_base above 1; found {c.rotary_base}.")
    if kind == "dynamic":
        if c.max_position_embeddings is None:
            found.append(
                "rope_scaling of type dynamic needs max_position_embeddings, the length beyond which it begins. Give it."
            )
        if c.rotary_channels <= 2:
            found.append(
                f"rope_scaling of type dynamic needs heads with more than 2 rotated features; they have {c.rotary_channels} (kv_channels x rotary_percent)."
            )
    return found


def with_original_length(scaling: Mapping[str, Any], length: int | None) -> dict[str, Any]:
    """A ``rope_scaling`` with the length that the model was first trained at, if the type has a field for it.

    Args:
        length: in tokens; taken if ``scaling`` holds no length.
    """
    given = dict(scaling)
    if length is not None and rope_type(given) in _WITH_ORIGINAL:
        given.setdefault("original_max_position_embeddings", length)
    return given


def reach(scaling: Mapping[str, Any] | None) -> int:
    """The length, in tokens, that YaRN extends a model to; 0 for the other types, which define none."""
    if rope_type(scaling) != "yarn" or not scaling:
        return 0
    values = [scaling.get("factor"), scaling.get("original_max_position_embeddings")]
    return int(math.prod(float(v or 0) for v in values)) if all(map(_positive, values)) else 0


def _positive(value: Any) -> bool:
    return (
        isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0
    )
