"""The Megatron door: command-line flags alone, with Megatron's defaults.

The parser is generated from the schema: a key's flag, its values and its default at this
door are all said there, so adding a key adds both names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from longspan.config.data_rules import DEFAULT_SPLIT, read_split
from longspan.config.load import Reading, make_config, parse_overrides
from longspan.config.schema import keys
from longspan.errors import UserError


def parse_megatron_flags(
    arguments: Sequence[str], other_options: Sequence[str] = ()
) -> tuple[Reading, dict[str, Any]]:
    """``--num-layers 2 --hidden-size 64 --lr 1e-4 ...`` -> a config with Megatron's defaults.

    Args:
        other_options: options the caller handles itself, for near misses.

    Returns:
        What was read, with the problems of flags and values, and the keys whose default differs here from
        the YAML door's (for the banner).
    """
    given = parse_overrides(arguments, other_options)
    given.problems += [f"{a!r}: unexpected argument; values follow their --flag." for a in given.rest]
    values = {name: _ours(name, value) for name, value in given.values.items()}
    defaults = megatron_defaults(values)
    reading = make_config(defaults, values)
    reading.problems[:0] = given.problems
    reading.notes[:0] = given.notes
    return reading, defaults


def megatron_defaults(given: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that nobody gave, in any way, and whose default at this door is not the YAML door's."""
    idle = {key for key, other in OTHER_WAYS.items() if other in given}
    if not _evaluates(given):
        idle |= {"eval_steps", "eval_iters"}
    return {
        k.name: k.default_at_megatron_door
        for k in keys()
        if k.default_at_megatron_door != k.default and k.name not in {*given, *idle}
    }


#: keys with a default at this door -> the other way to say the same
OTHER_WAYS = {
    "warmup_steps": "warmup_ratio",
    "eval_steps": "evals_per_epoch",
    "eval_iters": "eval_max_samples",
}


def _evaluates(given: Mapping[str, Any]) -> bool:
    """Is there anything to evaluate on, and is it wanted? What is wrong with a value is said elsewhere."""
    if given.get("eval_iters") == 0:
        return False
    if given.get("train_data_path"):
        return bool(given.get("valid_data_path"))
    if given.get("datasets"):
        return bool(given.get("val_set_size") or given.get("test_datasets"))
    try:
        return read_split(str(given.get("split") or DEFAULT_SPLIT))[1] > 0
    except UserError:
        return False


#: values that Megatron-LM calls otherwise
_VALUES = {"optimizer": {"adam": "adamw_torch_fused"}}


def _ours(name: str, value: Any) -> Any:
    return _VALUES.get(name, {}).get(value, value) if isinstance(value, str) else value
