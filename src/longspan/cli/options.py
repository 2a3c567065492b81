"""Functions of all commands with a config: reading it, and printing its keys."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from longspan.config.load import Reading, make_config
from longspan.config.options import parse_overrides
from longspan.config.packages import has_package
from longspan.config.schema import GROUPS, keys
from longspan.config.yaml_file import read_yaml
from longspan.errors import UserError, did_you_mean


def take_options(
    arguments: Sequence[str], takes_value: dict[str, bool]
) -> tuple[dict[str, str], list[str], list[str]]:
    """Takes a command's own options out of the arguments.

    Args:
        takes_value: option -> whether a value follows it.

    Returns:
        (option -> value, "" for an option without a value; the other arguments; problems).
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


def positionals(rest: Sequence[str], options: Iterable[str], problems: list[str]) -> list[str]:
    """The arguments left by ``take_options``, without unknown options, which are added to the problems."""
    problems += [f"{a}: unknown option.{did_you_mean(a, options)}" for a in rest if a.startswith("--")]
    return [a for a in rest if not a.startswith("--")]


def take_lists(
    arguments: Sequence[str], names: Sequence[str], problems: list[str]
) -> tuple[dict[str, list[str]], list[str]]:
    """Takes options with several values (up to the next option) out of the arguments.

    Returns:
        (option -> values, the other arguments). An option without a value is added to the problems.
    """
    taken: dict[str, list[str]] = {}
    rest, current = [], None
    for argument in arguments:
        option, equals, value = argument.partition("=")
        if option in names:
            current = taken.setdefault(option, [])
            if equals:
                current.append(value)
        elif argument.startswith("--") or current is None:
            current = None
            rest.append(argument)
        else:
            current.append(argument)
    problems += [f"{option} needs a value." for option, values in taken.items() if not values]
    return taken, rest


def read_config(
    command: str, arguments: Sequence[str], other_options: Sequence[str] = (), problems: Sequence[str] = ()
) -> Reading:
    """Reads ``CONFIG [--any-key value]``.

    Returns:
        The config of the valid keys, and the problems so far with their keys, for ``config.resolve.resolve``
        to continue with.

    Raises:
        UserError: nothing could be read.
    """
    given = parse_overrides(arguments, other_options, positionals=1)
    problems, rest = [*problems, *given.problems], given.rest
    if not rest:
        raise UserError(
            [*problems, f"longspan {command} needs a config file: longspan {command} CONFIG.yaml"]
        )
    problems += [f"{argument!r}: unexpected argument after the config file." for argument in rest[1:]]
    try:
        values = read_yaml(rest[0])
    except UserError as error:
        raise UserError([*problems, *error.problems]) from None
    reading = make_config(values, given.values)
    reading.problems[:0] = problems
    reading.notes += given.notes
    if reading.config is None:
        raise UserError(reading.problems)
    if command in WITHOUT_TRAINING and reading.config.learning_rate is None:
        rate = {"learning_rate": max(reading.config.min_lr or 0.0, reading.config.lr_warmup_init)}
        reading.config = reading.config.model_copy(update=rate)
    return reading


#: commands that read a config but do not need its learning rate
WITHOUT_TRAINING = ("layout", "plan", "prepare", "eval", "env")


def key_help(megatron: bool = False) -> str:
    """Every key with its flag, unit, default and meaning, by group; ``megatron`` puts Megatron's first."""
    lines = (
        ["Flags, by group, each with its other names:"]
        if megatron
        else ["Any key of the config can be given as an option, under its own name or Megatron's:"]
    )
    for group in GROUPS:
        lines += ["", f"{group}:"]
        for k in (k for k in keys() if k.group == group):
            own = "--" + k.name.replace("_", "-")
            spellings = list(
                dict.fromkeys([k.flag, *k.switches, own] if megatron else [own, k.flag, *k.switches])
            )
            default = k.default_of_megatron if megatron else k.default
            unit = f" [{k.unit}]" if k.unit else ""
            shown = "" if default is None or default == [] else f" (default {default})"
            lines.append(f"  {', '.join(spellings)}{unit}{shown}")
            lines.append(f"      {k.text}")
    return "\n".join(lines)


def number(
    taken: dict[str, str], option: str, problems: list[str], least: int = 1, most: int | None = None
) -> int | None:
    """An option's whole number; None if it is not given. A wrong value is added to the problems."""
    if option not in taken:
        return None
    try:
        value = int(taken[option])
    except ValueError:
        value = least - 1
    if value < least or (most is not None and value > most):
        problems.append(
            f"{option} {taken[option]!r}: a whole number from {least} {f'to {most}' if most else 'on'}."
        )
        return None
    return value


def read_picture(text: str, problems: list[str]) -> Path:
    """The path of the picture; reasons why it cannot be written are added to ``problems`` before any work."""
    path = Path(text)
    if path.suffix.lower() != ".png":
        problems.append(f"--png {text}: the picture is a PNG. Give a name that ends with .png.")
    elif path.is_dir():
        problems.append(f"--png {text}: is a folder. Give the name of a file.")
    elif not path.parent.is_dir():
        problems.append(f"--png {text}: there is no folder {path.parent}. Make it, or choose another.")
    elif not os.access(path.parent, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
        problems.append(f"--png {text}: cannot be written. Check its permissions, or choose another.")
    if not has_package("matplotlib"):
        problems.append("--png needs matplotlib, which is not installed. pip install 'longspan[plot]'.")
    return path
