"""The Megatron door: command-line flags alone, with Megatron's defaults.

The parser is generated from the schema: a key's flag, its values and its default at this
door are all said there, so adding a key adds both names.
"""

from __future__ import annotations

from collections.abc import Sequence

from longspan.config.load import make_config, parse_overrides
from longspan.config.schema import TrainConfig, keys
from longspan.errors import UserError


def parse_megatron_flags(
    arguments: Sequence[str], other_options: Sequence[str] = ()
) -> tuple[TrainConfig, dict[str, object]]:
    """``--num-layers 2 --hidden-size 64 --lr 1e-4 ...`` -> a config with Megatron's defaults.

    Args:
        other_options: options the caller handles itself, for near misses.

    Returns:
        The config, and the keys whose default differs here from the YAML door's (for the banner).

    Raises:
        UserError: with all unknown flags and wrong values.
    """
    given, rest, problems = parse_overrides(arguments, other_options)
    problems += [f"{argument!r}: unexpected argument; values follow their --flag." for argument in rest]
    defaults = {
        k.name: k.default_at_megatron_door
        for k in keys()
        if k.default_at_megatron_door != k.default and k.name not in given
    }
    config, wrong, _ = make_config(defaults, given)
    if problems or wrong or config is None:
        raise UserError([*problems, *wrong])
    return config, defaults
