"""Reading a config: YAML and command line -> TrainConfig, all problems at once."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import ValidationError

from longspan.config.axolotl_keys import KEYS
from longspan.config.bounded_yaml import MAX_BYTES, BoundedLoader
from longspan.config.dataset_keys import LISTS, read_datasets
from longspan.config.foreign import MANY
from longspan.config.keys.data import InstructionType
from longspan.config.megatron_flags import FLAGS
from longspan.config.rope import rope_type, with_original_length
from longspan.config.schema import DatasetConfig, Key, TrainConfig, keys, names
from longspan.errors import UserError, did_you_mean

#: problems after which an unknown key gets no near name any more
MAX_NEAR = 50
#: names of Megatron-LM and axolotl that are no keys here -> their fate
FOREIGN = KEYS | {flag.removeprefix("--").replace("-", "_"): fate for flag, fate in FLAGS.items()}


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
    if path.stat().st_size > MAX_BYTES:
        raise UserError(
            f"{path} has {path.stat().st_size:,} bytes; a config file has {MAX_BYTES:,} at most. Is it the config?"
        )
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


_TEXT, _MERGE = "tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"


class _Loader(BoundedLoader):
    """YAML's safe loader, with what a config file means by its values.

    It refuses a key given twice, of which the first would be lost. The value of a key that holds text is
    the text itself, also where it looks like a date or a number. Numbers that people and YAML read
    differently, as 0100 and 1:30, stay text, which no number's key takes.
    """

    def construct_yaml_int(self, node):
        return node.value if _AMBIGUOUS.fullmatch(node.value) else super().construct_yaml_int(node)

    def construct_yaml_float(self, node):
        return node.value if _AMBIGUOUS.fullmatch(node.value) else super().construct_yaml_float(node)

    def construct_mapping(self, node, deep=False):
        for key_node, value_node in node.value:
            if isinstance(key_node, yaml.ScalarNode) and key_node.tag != _MERGE:
                key_node.tag = _TEXT  # a key's name is what is written there, also ``no`` or ``7``
            if isinstance(key_node, yaml.ScalarNode) and key_node.value in maps_of_text():
                for _, member in value_node.value if isinstance(value_node, yaml.MappingNode) else ():
                    if isinstance(member, yaml.ScalarNode) and _is_written_text(member):
                        member.tag = _TEXT
            plain = isinstance(key_node, yaml.ScalarNode) and isinstance(value_node, yaml.ScalarNode)
            if plain and key_node.value in text_keys() and _is_written_text(value_node):
                value_node.tag = _TEXT
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == _MERGE:  # <<, which stands for keys that others may replace
                continue
            name = self.construct_object(key_node, deep=True)
            if isinstance(name, str) and name in seen:
                raise yaml.YAMLError(f"{name} is given twice{key_node.start_mark}. Keep one.")
            seen.add(name if isinstance(name, str) else id(key_node))
        return super().construct_mapping(node, deep)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_yaml_float)

_AMBIGUOUS = re.compile(r"[+-]?(0[0-9_]+|[0-9][0-9_]*(:[0-9.]+)+)")


def _is_written_text(node: yaml.ScalarNode) -> bool:
    """Is it a date, a number, or a word such as ``on``? Null and false stay what they are: nothing."""
    kind = node.tag.rpartition(":")[2]
    return kind in ("int", "float", "timestamp") or (
        kind == "bool" and node.value.lower() in ("yes", "on", "true")
    )


@lru_cache
def text_keys() -> frozenset[str]:
    """Names of keys, of datasets too, whose value is text."""
    text = {
        spelling for spelling, name in names().items() if _is_text(TrainConfig.model_fields[name].annotation)
    }
    own = {name for name, info in DatasetConfig.model_fields.items() if _is_text(info.annotation)}
    return frozenset(text | own)


@lru_cache
def maps_of_text() -> frozenset[str]:
    """Names of keys, of datasets too, whose value is a mapping of names to text."""
    fields = TrainConfig.model_fields | DatasetConfig.model_fields
    return frozenset(name for name, info in fields.items() if dict[str, str] in get_args(info.annotation))


def _is_text(annotation: Any) -> bool:
    return set(get_args(annotation) or (annotation,)) <= {str, type(None)}


@dataclass
class Overrides:
    """What command-line options say.

    Attributes:
        values: by key.
        rest: arguments that are no options.
        problems: what is wrong, a message each.
        notes: options that have no effect here, each with the reason.
    """

    values: dict[str, Any] = field(default_factory=dict)
    rest: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def parse_overrides(
    arguments: Sequence[str], other_options: Sequence[str] = (), positionals: int = 0
) -> Overrides:
    """Command-line options -> key values.

    Each key is an option under its own name (``--learning-rate 1e-4``, ``--learning_rate=1e-4``)
    and under Megatron's (``--lr 1e-4``). Values are read as YAML. A boolean needs no value, and
    ``--no-KEY`` switches it off. A key that may be a list takes several (``--cp-comm-type p2p a2a``).
    Options of Megatron-LM and axolotl that are no keys here have their fate in ``foreign`` tables.

    Args:
        other_options: options the caller handles itself, for near misses.
        positionals: arguments that are no options; those still to come are not taken for a list's values.
    """
    table = option_table()
    found = Overrides()
    left = list(arguments)
    given: dict[str, str] = {}  # key -> the option that said it
    while left:
        argument = left.pop(0)
        if not argument.startswith("--") or argument == "--":
            found.rest.append(argument)
            continue
        option, equals, text = argument.partition("=")
        name = option[2:].replace("-", "_")
        if name not in table and name in FOREIGN:
            many = [text] if equals else _take(left, FOREIGN[name].values)
            read = [_yaml(v) for v in many]
            _foreign(option, read if len(read) > 1 else read[0] if read else True, found)
            continue
        if name not in table:
            known = [*("--" + n.replace("_", "-") for n in (*table, *FOREIGN)), *other_options]
            found.problems.append(f"{option}: unknown option.{did_you_mean(option.replace('_', '-'), known)}")
            if not equals and left and not left[0].startswith("--"):
                left.pop(0)
            continue
        k, fixed = table[name]
        if fixed is not _VALUE:
            if equals:
                found.problems.append(f"{option} takes no value; found {text!r}.")
            value = fixed
        elif equals:
            value = _value(k, text)
        elif _is_switch(k, name) and (not left or left[0].startswith("--") or _no_bool(left[0])):
            value = True
        elif not left or left[0].startswith("--"):
            found.problems.append(f"{option} needs a value: {k.text}")
            continue
        else:
            value = _value(k, left.pop(0))
            if _is_list(k) and len(found.rest) >= positionals:
                more = [_value(k, v) for v in _take(left, MANY)]
                value = [value, *more] if more or not _may_be_single(k) else value
        if _is_list(k) and not _may_be_single(k) and not isinstance(value, list | type(None)):
            value = [value]
        if k.name in found.values and found.values[k.name] != value and given[k.name] != option:
            found.problems.append(
                f"{option} and {given[k.name]} are the same key, {k.name}, with two values. Keep one."
            )
        found.values[k.name], given[k.name] = value, option
    return found


def option_table() -> dict[str, tuple[Key, Any]]:
    """Every option without its dashes, underscored -> (key, the value it stands for or a mark that it takes one)."""
    table: dict[str, tuple[Key, Any]] = {}
    for k in keys():
        for spelling in (k.name, *k.aliases):
            table[spelling] = (k, _VALUE)
            if _is_bool(k):
                table["no_" + spelling] = (k, False)
        table[k.flag[2:].replace("-", "_")] = (k, _VALUE)
        for switch, value in k.switches.items():
            table[switch[2:].replace("-", "_")] = (k, value)
    return table


def _take(left: list[str], count: int) -> list[str]:
    """Takes up to ``count`` values (MANY: all) that follow an option."""
    taken: list[str] = []
    while left and not left[0].startswith("--") and (count == MANY or len(taken) < count):
        taken.append(left.pop(0))
    return taken


def _foreign(spelling: str, value: Any, found: Overrides) -> None:
    """What becomes of a name that is no key here: keys, a note, or a problem."""
    entry = FOREIGN[spelling.removeprefix("--").replace("-", "_")]
    try:
        values = entry.read(spelling, value)
    except ValueError as error:
        found.problems.append(str(error))
        return
    if values is None:
        found.notes.append(f"{spelling}: {entry.why}")
    found.values.update(values or {})


_VALUE: Any = object()


def _is_bool(k: Key) -> bool:
    return bool in (k.annotation, *getattr(k.annotation, "__args__", ()))


def _is_switch(k: Key, spelling: str) -> bool:
    """May the option stand alone? Megatron's own name of a key that is no mere switch takes a value always."""
    return _is_bool(k) and (spelling in (k.name, *k.aliases) or k.flag == "--" + k.name.replace("_", "-"))


def _is_list(k: Key) -> bool:
    """A list of plain values."""
    members = (k.annotation, *get_args(k.annotation))
    return any(get_origin(m) is list and get_args(m)[0] is not DatasetConfig for m in members)


def _may_be_single(k: Key) -> bool:
    """May a key that takes a list also be one plain value?"""
    return any(
        get_origin(m) is not list and m is not type(None) for m in (get_args(k.annotation) or (k.annotation,))
    )


def _no_bool(text: str) -> bool:
    return text.lower() not in (
        "true",
        "false",
        "yes",
        "no",
        "on",
        "off",
        "auto",
        "full",
        "selective",
        "offload",
    )


def _value(k: Key, text: str) -> Any:
    """A value as YAML reads it; the text itself for a key that holds text."""
    members = set(getattr(k.annotation, "__args__", ()))
    if k.annotation is str or members == {str, type(None)}:
        return text
    if members == {list[str], type(None)} and not text.startswith("["):
        return text  # a path may look like a number or a date
    return _yaml(text)


def _yaml(text: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader
    except (yaml.YAMLError, ValueError, RecursionError):
        return text


@dataclass
class Reading:
    """What was made of keys and values.

    Attributes:
        config: of the good keys; None if there is none to be made.
        problems, notes: as in :class:`Overrides`.
        bad: keys that problems are about.
    """

    config: TrainConfig | None
    problems: list[str]
    bad: set[str]
    notes: list[str]


def make_config(values: Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> Reading:
    """Values under any accepted spelling -> TrainConfig."""
    table, bad = names(), set()
    found = Overrides()
    merged: dict[str, Any] = {}
    spelled: dict[str, str] = {}
    for spelling, value in _flat(values):
        name = table.get(spelling)
        if name is not None and _asks_for_nothing(name, value):
            value = None
        if name is None and spelling in FOREIGN:
            if value is not None and value not in ("", [], {}):  # empty, it asks for nothing
                _foreign(spelling, value, found)
        elif name is None:
            # Looking for the near name takes milliseconds, which a file of thousands of wrong keys would add up.
            near = did_you_mean(spelling, [*table, *FOREIGN]) if len(found.problems) < MAX_NEAR else ""
            found.problems.append(f"{spelling}: unknown key.{near}")
        elif name in merged and merged[name] != value:
            found.problems.append(
                f"{spelling} and {spelled[name]} are the same key with two values, {value!r} and {merged[name]!r}. "
                "Keep one."
            )
            bad.add(name)
        else:
            merged[name], spelled[name] = value, spelling
    for name, value in found.values.items():
        if merged.setdefault(name, value) != value:
            found.problems.append(f"{name}: {merged[name]!r} here, and {value!r} by another key. Keep one.")
            bad.add(name)
    for name, value in (overrides or {}).items():
        merged[name] = None if _asks_for_nothing(name, value) else value
    merged = {name: value for name, value in merged.items() if value is not None}
    for name in [name for name, value in merged.items() if _has_zero(value)]:
        found.problems.append(f"{name}: {str(merged.pop(name))[:60]!r} holds a zero byte (\\0). Take it out.")
        bad.add(name)
    for name in set(LISTS) & merged.keys():
        merged[name], problems, notes = read_datasets(name, merged[name])
        found.problems += problems
        found.notes += notes
        bad |= {name} if problems else set()
    problems, config = found.problems, None
    while True:
        try:
            config = TrainConfig(**merged)
            break
        except ValidationError as error:
            wrong = {str(e["loc"][0]) for e in error.errors()}
            problems += _explain(error, merged)
            bad |= wrong
            if not wrong & merged.keys():
                break
            merged = {name: value for name, value in merged.items() if name not in wrong}
    return Reading(config, problems, bad, found.notes)


def _has_zero(value: Any) -> bool:
    """Whether there is a zero byte in a text, which the system takes in no path."""
    if isinstance(value, Mapping):
        return any(map(_has_zero, value)) or any(map(_has_zero, value.values()))
    if isinstance(value, list | tuple):
        return any(map(_has_zero, value))
    return isinstance(value, str) and "\0" in value


#: keys that a config cannot mean to leave empty
_NOT_EMPTY = ("base_model", "tokenizer_config")


def _asks_for_nothing(name: str, value: Any) -> bool:
    """Is a value another way to write null: false, or something empty, for a key that may be null?"""
    info = TrainConfig.model_fields[name]
    kinds = get_args(info.annotation)
    if type(None) not in kinds or info.default is not None or name in _NOT_EMPTY:
        return False
    if value is False:
        return not {bool, int, float} & set(kinds)
    return value in ("", [], {})


#: mappings whose members are keys of their own here: fsdp_config: {offload_params: true}
NESTED = ("fsdp_config",)


def _flat(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Pairs of spelling and value; members of nested mappings as ``outer.inner``."""
    for outer, value in values.items():
        if outer in NESTED and isinstance(value, Mapping):
            yield from ((f"{outer}.{str(inner).removeprefix('fsdp_')}", v) for inner, v in value.items())
        else:
            yield str(outer), value


def _explain(error: ValidationError, values: Mapping[str, Any]) -> list[str]:
    """One line a wrong key, in our words."""
    lines: dict[str, str] = {}
    for e in error.errors():
        place = ".".join(map(str, e["loc"]))
        top = str(e["loc"][0])
        if top in LISTS:  # which member of a union it is, is nothing to the user
            place = ".".join(str(part) for part in e["loc"] if part != "InstructionType")
            if isinstance(values[top], list) and str(e["loc"][-1]).startswith("literal["):
                continue
        if e["type"] == "extra_forbidden" and top in LISTS:
            name = str(e["loc"][-1])
            lines[place] = f"{place}: unknown key.{did_you_mean(name, InstructionType.model_fields)}"
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
        base = top if top not in LISTS else place
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
    given = parse_overrides(arguments)
    reading = make_config(read_yaml(path), given.values)
    problems = [*given.problems, *(f"{a!r}: unexpected argument." for a in given.rest), *reading.problems]
    if problems:
        raise UserError(problems)
    assert reading.config is not None
    return reading.config


def architecture_config(values: Mapping[str, Any], sequence_len: int | None = None) -> TrainConfig:
    """A config of an architecture alone, for commands that do not train.

    Args:
        values: as ``hub.architecture_of`` gives them.
        sequence_len: None takes the longest the model is made for.

    Raises:
        UserError: with all problems found.
    """
    length = (
        sequence_len
        or values.get("max_position_embeddings")
        or TrainConfig.model_fields["sequence_len"].default
    )
    most, scaling = values.get("max_position_embeddings"), values.get("rope_scaling")
    values = dict(values)
    if scaling:
        values["rope_scaling"] = with_original_length(scaling, most)
    if most and values.get("position_embedding_type", "rope") == "rope" and rope_type(scaling) != "dynamic":
        values["max_position_embeddings"] = max(most, length)
    none = {"learning_rate": 0, "datasets": [{"path": "none"}], "sample_packing": False}
    reading = make_config({**values, "sequence_len": length, **none})
    if reading.config is None or reading.problems:
        raise UserError(reading.problems)
    return reading.config


def to_yaml(config: TrainConfig) -> str:
    """All keys with their values, in the order of the schema."""
    return yaml.safe_dump(config.model_dump(), sort_keys=False, allow_unicode=True, width=100)
