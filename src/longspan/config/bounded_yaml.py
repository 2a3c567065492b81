"""YAML within limits: a small file may stand for billions of values, or keep a reader busy for hours."""

from __future__ import annotations

import yaml

#: of a config file; the largest hold a chat template or some hundred paths
MAX_BYTES = 1 << 20
#: how deeply lists and mappings may lie in each other
MAX_DEPTH = 50
#: values in a file, each as often as an alias (``*name``) repeats it
MAX_VALUES = 20_000
#: characters of a number or a date
MAX_NUMBER = 400

_NUMBERS = tuple(f"tag:yaml.org,2002:{kind}" for kind in ("int", "float", "timestamp"))


class BoundedLoader(yaml.SafeLoader):
    """YAML's safe loader that refuses, while it reads, what goes beyond the limits of this module.

    A node's extent is (values in it, their depth), with aliases counted as what they stand for. It
    is made of the extents of its children, so an alias costs nothing, however much it repeats.

    Raises:
        yaml.YAMLError: a limit is passed, or an alias stands inside what it names.
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
        # A file of too many values is refused where they become too many, not when all of it is read.
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
