"""Values that follow from an immutable object: computed at the first request and kept with the object."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

T = TypeVar("T")


class Store:
    """The kept values.

    It is no dict, because FSDP looks into dicts and dataclasses among a model's arguments before and after each
    forward pass. A layout keeps many values, among them other layouts.
    """

    def __init__(self) -> None:
        self.values: dict[Hashable, Any] = {}


class Once:
    """A base class of frozen dataclasses whose last field is ``_made``, an empty :class:`Store` at first."""

    _made: Store

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """The result of ``make``, which only the first call with ``key`` calls."""
        values = self._made.values
        if key not in values:
            values[key] = make()
        return values[key]
