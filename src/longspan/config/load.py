"""Reading a config: YAML and command line -> TrainConfig, all problems at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import ValidationError

from longspan.config.schema import DatasetConfig, Key, TrainConfig, keys, names
from longspan.errors import UserError, did_you_mean


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        UserError: no such file (with the near one), no YAML, or no mapping.
    """
    path = Path(path)
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "does not exist"
        siblings = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        raise UserError(f"config file {path} {found}.{did_you_mean(path.name, siblings)}")
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # a SafeLoader
    except UnicodeDecodeError:
        raise UserError(f"{path} is not a text file in UTF-8.") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid YAML: {error}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    if not isinstance(data, dict):
        raise UserError(
            f"{path} holds {type(data).__name__}, not a mapping of keys to values ('key: value')."
        )
    return data


class _Loader(yaml.SafeLoader):
    """YAML's safe loader that refuses a key given twice, of which the first would be lost."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            name = self.construct_object(key_node, deep=True)
            if isinstance(name, str) and name in seen:
                raise yaml.YAMLError(f"{name} is given twice{key_node.start_mark}. Keep one.")
            seen.add(name if isinstance(name, str) else id(key_node))
        return super().construct_mapping(node, deep)


def parse_overrides(
    arguments: Sequence[str], other_options: Sequence[str] = (), positionals: int = 0
) -> tuple[dict[str, Any], list[str], list[str]]:
    """Command-line options -> key values.

    Each key is an option under its own name (``--learning-rate 1e-4``, ``--learning_rate=1e-4``)
    and under Megatron's (``--lr 1e-4``). Values are read as YAML. A boolean needs no value, and
    ``--no-KEY`` switches it off. A key that may be a list takes several (``--cp-comm-type p2p a2a``).

    Args:
        other_options: options the caller handles itself, for near misses.
        positionals: arguments that are no options; those still to come are not taken for a list's values.

    Returns:
        (values by key, arguments that are no options, problems).
    """
    table: dict[str, tuple[Key, Any]] = {}  # option without dashes, underscored -> key, fixed value or _VALUE
    for k in keys():
        for spelling in (k.name, *k.aliases):
            table[spelling] = (k, _VALUE)
            if _is_bool(k):
                table["no_" + spelling] = (k, False)
        flag = k.flag[2:].replace("-", "_")
        table[flag] = (k, _VALUE if k.takes_value else k.flag_value)
    values: dict[str, Any] = {}
    rest, problems = [], []
    arguments = list(arguments)
    while arguments:
        argument = arguments.pop(0)
        if not argument.startswith("--") or argument == "--":
            rest.append(argument)
            continue
        option, equals, text = argument.partition("=")
        entry = table.get(option[2:].replace("-", "_"))
        if entry is None:
            known = [*("--" + name.replace("_", "-") for name in table), *other_options]
            problems.append(f"{option}: unknown option.{did_you_mean(option.replace('_', '-'), known)}")
            if not equals and arguments and not arguments[0].startswith("--"):
                arguments.pop(0)
            continue
        k, fixed = entry
        if fixed is not _VALUE:
            if equals:
                problems.append(f"{option} takes no value; found {text!r}.")
            value = fixed
        elif equals:
            value = _value(k, text)
        elif _is_bool(k) and (not arguments or arguments[0].startswith("--") or _no_bool(arguments[0])):
            value = True
        elif not arguments or arguments[0].startswith("--"):
            problems.append(f"{option} needs a value: {k.text}")
            continue
        else:
            value = _value(k, arguments.pop(0))
            more = []
            while (
                _is_list(k) and len(rest) >= positionals and arguments and not arguments[0].startswith("--")
            ):
                more.append(_value(k, arguments.pop(0)))
            value = [value, *more] if more else value
        values[k.name] = value
    return values, rest, problems


_VALUE: Any = object()


def _is_bool(k: Key) -> bool:
    return bool in (k.annotation, *getattr(k.annotation, "__args__", ()))


def _is_list(k: Key) -> bool:
    """A list of plain values."""
    members = (k.annotation, *get_args(k.annotation))
    return any(get_origin(m) is list and get_args(m)[0] is not DatasetConfig for m in members)


def _no_bool(text: str) -> bool:
    return text.lower() not in ("true", "false", "yes", "no", "on", "off", "auto", "full", "selective")


def _value(k: Key, text: str) -> Any:
    """A value as YAML reads it; the text itself for a key that holds text."""
    if k.annotation is str or set(getattr(k.annotation, "__args__", ())) == {str, type(None)}:
        return text
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        return text


def make_config(
    values: Mapping[str, Any], overrides: Mapping[str, Any] | None = None
) -> tuple[TrainConfig | None, list[str], set[str]]:
    """Values under any accepted spelling -> TrainConfig.

    Returns:
        (config made of the good keys, or None if there is none to be made; problems; bad keys).
    """
    table, problems, bad = names(), [], set()
    merged: dict[str, Any] = {}
    spelled: dict[str, str] = {}
    for spelling, value in values.items():
        name = table.get(str(spelling))
        if name is None:
            problems.append(f"{spelling}: unknown key.{did_you_mean(str(spelling), table)}")
        elif name in merged and merged[name] != value:
            problems.append(
                f"{spelling} and {spelled[name]} are the same key with two values, {value!r} and {merged[name]!r}. "
                "Keep one."
            )
            bad.add(name)
        else:
            merged[name], spelled[name] = value, str(spelling)
    merged.update(overrides or {})
    merged = {name: value for name, value in merged.items() if value is not None}
    while True:
        try:
            return TrainConfig(**merged), problems, bad
        except ValidationError as error:
            wrong = {str(e["loc"][0]) for e in error.errors()}
            problems += _explain(error, merged)
            bad |= wrong
            if not wrong & merged.keys():
                return None, problems, bad
            merged = {name: value for name, value in merged.items() if name not in wrong}


def _explain(error: ValidationError, values: Mapping[str, Any]) -> list[str]:
    """One line a wrong key, in our words."""
    lines: dict[str, str] = {}
    for e in error.errors():
        place = ".".join(map(str, e["loc"]))
        top = str(e["loc"][0])
        if e["type"] == "extra_forbidden" and top == "datasets":
            name = str(e["loc"][-1])
            lines[place] = f"{place}: unknown key.{did_you_mean(name, DatasetConfig.model_fields)}"
            continue
        if e["type"] == "missing":
            lines[place] = f"{place}: missing."
            continue
        rule = e["msg"].replace("Input should be", "must be").replace("Value error, ", "")
        found = (
            e["input"]
            if len(e["loc"]) == 1
            else values.get(top)
            if isinstance(e["loc"][1], str)
            else e["input"]
        )
        base = top if top != "datasets" else place
        hint = ""
        if e["type"] == "literal_error" and isinstance(found, str):
            choices = (
                str(e.get("ctx", {}).get("expected", "")).replace("'", "").replace(" or ", ", ").split(", ")
            )
            hint = did_you_mean(found, choices)
        if base in lines:  # one line for all members of a union
            lines[base] = (
                lines[base].replace(".", f", or {rule.removeprefix('must be ')}.", 1)
                if not hint
                else (lines[base] + hint)
            )
        else:
            lines[base] = f"{base}: {found!r} {rule}.{hint}"
    return list(lines.values())


def load_config(path: str | Path, arguments: Sequence[str] = ()) -> TrainConfig:
    """Reads a YAML file and overrides; rules between keys are checked by ``config.resolve``.

    Raises:
        UserError: with all problems found.
    """
    overrides, rest, problems = parse_overrides(arguments)
    problems += [f"{argument!r}: unexpected argument." for argument in rest]
    config, more, _ = make_config(read_yaml(path), overrides)
    if problems or more:
        raise UserError(problems + more)
    assert config is not None
    return config


def to_yaml(config: TrainConfig) -> str:
    """All keys with their values, in the order of the schema."""
    return yaml.safe_dump(config.model_dump(), sort_keys=False, allow_unicode=True, width=100)
