"""``key``: the declaration of one key of a config, with both its names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field

UNSET: Any = object()

#: unit -> the largest value of a key: larger than for any machine and model, and too small to keep this
#: program busy for hours or to overflow the integers of its libraries
LARGEST: dict[str | None, int] = {
    "layers": 10_000,
    "features": 1 << 20,
    "heads": 1 << 16,
    "tokens": 1 << 30,
    "ranks": 1 << 20,
    "processes": 4096,
    "sequences": 1 << 24,
    "micro-batches": 1 << 24,
    "steps": 1 << 40,
    "epochs": 10**6,
    "seconds": 10**9,
}
#: the largest value of all other keys: the largest 64-bit integer
LARGEST_INTEGER = (1 << 63) - 1


def key(
    default: Any,
    text: str,
    *,
    unit: str | None = None,
    flag: str | None = None,
    switches: Mapping[str, Any] | None = None,
    aliases: tuple[str, ...] = (),
    megatron_default: Any = UNSET,
    **constraints: Any,
) -> Any:
    """Declares one key.

    Args:
        unit: what a number counts (tokens, ranks, steps, sequences).
        flag: Megatron's flag that takes the key's value, if it is not the key with dashes.
        switches: Megatron's flags without a value -> the value of the key for each.
        aliases: other key names; a dot stands for a key inside a mapping (``fsdp_config.offload_params``).
        megatron_default: the default with Megatron's flags, if it differs.
        constraints: pydantic's constraints, such as ``gt=0``.
    """
    extra: dict[str, Any] = {}
    if unit:
        extra["unit"] = unit
    if flag:
        extra["megatron_flag"] = flag
    if switches:
        extra["megatron_switches"] = dict(switches)
    if aliases:
        extra["aliases"] = list(aliases)
    if megatron_default is not UNSET:
        extra["megatron_default"] = megatron_default
    return Field(default, description=text, json_schema_extra=extra, **constraints)
