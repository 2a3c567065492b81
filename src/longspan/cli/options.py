"""What the commands that take a config share: reading it, and printing its keys."""

from __future__ import annotations

from collections.abc import Sequence

from longspan.config.load import make_config, parse_overrides, read_yaml
from longspan.config.schema import GROUPS, TrainConfig, keys
from longspan.errors import UserError


def take_options(
    arguments: Sequence[str], takes_value: dict[str, bool]
) -> tuple[dict[str, str], list[str], list[str]]:
    """Takes a command's own options out of the arguments.

    Args:
        takes_value: option -> whether a value follows it.

    Returns:
        (option -> value, "" without one; the other arguments; problems).
    """
    taken, rest, problems = {}, [], []
    arguments = list(arguments)
    while arguments:
        argument = arguments.pop(0)
        option, equals, value = argument.partition("=")
        if option not in takes_value:
            rest.append(argument)
        elif not takes_value[option]:
            if equals:
                problems.append(f"{option} takes no value; found {value!r}.")
            taken[option] = ""
        elif equals:
            taken[option] = value
        elif arguments and not arguments[0].startswith("--"):
            taken[option] = arguments.pop(0)
        else:
            problems.append(f"{option} needs a value.")
    return taken, rest, problems


def read_config(
    command: str, arguments: Sequence[str], other_options: Sequence[str] = (), problems: Sequence[str] = ()
) -> tuple[TrainConfig, list[str], set[str]]:
    """Reads ``CONFIG [--any-key value]``.

    Returns:
        The config of the good keys, the problems so far, and the keys they are about, for
        ``config.resolve.resolve`` to go on with.

    Raises:
        UserError: there is no config to go on with.
    """
    overrides, rest, more = parse_overrides(arguments, other_options, positionals=1)
    problems = [*problems, *more]
    if not rest:
        raise UserError(
            [*problems, f"longspan {command} needs a config file: longspan {command} CONFIG.yaml"]
        )
    problems += [f"{argument!r}: unexpected argument after the config file." for argument in rest[1:]]
    try:
        values = read_yaml(rest[0])
    except UserError as error:
        raise UserError([*problems, *error.problems]) from None
    config, wrong, bad = make_config(values, overrides)
    if config is None:
        raise UserError([*problems, *wrong])
    return config, [*problems, *wrong], bad


def key_help() -> str:
    """Every key with its flag, unit, default and meaning, by group."""
    lines = ["Any key of the config can be given as an option, under its own name or Megatron's:"]
    by_group = {group: [k for k in keys() if k.group == group] for group in GROUPS}
    for group, members in by_group.items():
        lines += ["", f"{group}:"]
        for k in members:
            own = "--" + k.name.replace("_", "-")
            flag = f", {k.flag}" if k.flag != own else ""
            unit = f" [{k.unit}]" if k.unit else ""
            default = "" if k.default is None else f" (default {k.default})"
            lines.append(f"  {own}{flag}{unit}{default}")
            lines.append(f"      {k.text}")
    return "\n".join(lines)
