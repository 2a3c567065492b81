"""Reads YAML: the values that a config's author meant, within limits.

A small file may describe billions of values, or keep a reader busy for hours. Such a file is refused.
"""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path
from typing import Any, get_args

import yaml

from longspan.config.schema import DatasetConfig, TrainConfig, names
from longspan.errors import UserError, did_you_mean

#: bytes of a config file; the largest config files hold a chat template or some hundred paths
MAX_BYTES = 1 << 20
#: how deeply lists and mappings may be nested
MAX_DEPTH = 50
#: values in a file; a value counts again for each alias (``*name``) that repeats it
MAX_VALUES = 20_000
#: characters of a number or a date
MAX_NUMBER = 400

_NUMBERS = tuple(f"tag:yaml.org,2002:{kind}" for kind in ("int", "float", "timestamp"))


class BoundedLoader(yaml.SafeLoader):
    """YAML's safe loader, which also refuses a file beyond the limits of this module, while it reads.

    A node's extent is (values in it, their depth), where an alias counts as the node that it names. It is
    computed from the extents of the node's children, so an alias takes no time, however much it repeats.

    Raises:
        yaml.YAMLError: a limit is exceeded, or an alias is inside the node that it names.
    """

    def __init__(self, stream):
        super().__init__(stream)
        self._open = 0
        self._extents: dict[yaml.Node, tuple[int, int]] = {}

    def compose_node(self, parent, index):
        event = self.peek_event()
        self._open += 1
        if self._open > MAX_DEPTH:
            raise yaml.YAMLError(
                f"lists and mappings lie in each other more than {MAX_DEPTH} deep{event.start_mark}."
            )
        node = super().compose_node(parent, index)
        self._open -= 1
        # A file with too many values is refused at the first value that is too many, before the rest is read.
        if node not in self._extents:
            if isinstance(event, yaml.AliasEvent):
                raise yaml.YAMLError(
                    f"the alias *{event.anchor} stands inside what it names{event.start_mark}."
                )
            self._extents[node] = self._extent(node)
        own, depth = self._extents[node]
        values = max(own, len(self._extents))
        if values > MAX_VALUES:
            raise yaml.YAMLError(
                f"more than {MAX_VALUES:,} values, counting each alias (*name) as what it stands for{event.start_mark}."
            )
        if depth > MAX_DEPTH:
            raise yaml.YAMLError(f"aliases lead more than {MAX_DEPTH} deep{event.start_mark}.")
        return node

    def _extent(self, node: yaml.Node) -> tuple[int, int]:
        if isinstance(node, yaml.ScalarNode):
            if node.tag in _NUMBERS and len(node.value) > MAX_NUMBER:
                raise yaml.YAMLError(f"a number of {len(node.value)} characters{node.start_mark}.")
            return 1, 1
        pairs = isinstance(node, yaml.MappingNode)
        children = [child for pair in node.value for child in pair] if pairs else node.value
        extents = [self._extents[child] for child in children]
        return 1 + sum(values for values, _ in extents), 1 + max((depth for _, depth in extents), default=0)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        UserError: the file does not exist (the message names a similar file), is too large, cannot be read,
            is not YAML in UTF-8, or holds no mapping.
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
        # ConfigLoader is a SafeLoader.
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=ConfigLoader)
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


class ConfigLoader(BoundedLoader):
    """YAML's safe loader, which reads values as a config means them.

    It refuses a key that is given twice, because YAML drops the first value. The value of a key that holds
    text is the text itself, even if it looks like a date or a number. A number that people and YAML read
    differently, such as 0100 or 1:30, stays text, which a key for a number refuses.
    """

    def construct_yaml_int(self, node):
        return node.value if _AMBIGUOUS.fullmatch(node.value) else super().construct_yaml_int(node)

    def construct_yaml_float(self, node):
        return node.value if _AMBIGUOUS.fullmatch(node.value) else super().construct_yaml_float(node)

    def construct_mapping(self, node, deep=False):
        for key_node, value_node in node.value:
            if isinstance(key_node, yaml.ScalarNode) and key_node.tag != _MERGE:
                # A key's name is the text in the file, even if it is ``no`` or ``7``.
                key_node.tag = _TEXT
            if isinstance(key_node, yaml.ScalarNode) and key_node.value in maps_of_text():
                for _, member in value_node.value if isinstance(value_node, yaml.MappingNode) else ():
                    if isinstance(member, yaml.ScalarNode) and _is_written_text(member):
                        member.tag = _TEXT
            plain = isinstance(key_node, yaml.ScalarNode) and isinstance(value_node, yaml.ScalarNode)
            if plain and key_node.value in text_keys() and _is_written_text(value_node):
                value_node.tag = _TEXT
        seen = set()
        for key_node, _ in node.value:
            # The keys that << inserts may be given again, to replace their values.
            if key_node.tag == _MERGE:
                continue
            name = self.construct_object(key_node, deep=True)
            if isinstance(name, str) and name in seen:
                raise yaml.YAMLError(f"{name} is given twice{key_node.start_mark}. Keep one.")
            seen.add(name if isinstance(name, str) else id(key_node))
        return super().construct_mapping(node, deep)


ConfigLoader.add_constructor("tag:yaml.org,2002:int", ConfigLoader.construct_yaml_int)
ConfigLoader.add_constructor("tag:yaml.org,2002:float", ConfigLoader.construct_yaml_float)

_AMBIGUOUS = re.compile(r"[+-]?(0[0-9_]+|[0-9][0-9_]*(:[0-9.]+)+)")


def _is_written_text(node: yaml.ScalarNode) -> bool:
    """Whether a node is a date, a number or a word such as ``on``; not null or false, which mean no value."""
    kind = node.tag.rpartition(":")[2]
    return kind in ("int", "float", "timestamp") or (
        kind == "bool" and node.value.lower() in ("yes", "on", "true")
    )


@lru_cache
def text_keys() -> frozenset[str]:
    """The names of keys, including the keys of a dataset, whose value is text."""
    text = {
        spelling for spelling, name in names().items() if _is_text(TrainConfig.model_fields[name].annotation)
    }
    own = {name for name, info in DatasetConfig.model_fields.items() if _is_text(info.annotation)}
    return frozenset(text | own)


@lru_cache
def maps_of_text() -> frozenset[str]:
    """The names of keys, including the keys of a dataset, whose value is a mapping of names to text."""
    fields = TrainConfig.model_fields | DatasetConfig.model_fields
    return frozenset(name for name, info in fields.items() if dict[str, str] in get_args(info.annotation))


def _is_text(annotation: Any) -> bool:
    return set(get_args(annotation) or (annotation,)) <= {str, type(None)}


def read_value(text: str) -> Any:
    """A value of the command line, read as YAML; the text itself if it is not YAML."""
    try:
        # ConfigLoader is a SafeLoader.
        return yaml.load(text, Loader=ConfigLoader)
    except (yaml.YAMLError, ValueError, RecursionError):
        return text
