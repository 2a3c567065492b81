"""Values that follow from an immutable object: computed at the first request and kept with the object."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TypeVar

T = TypeVar("T")


class Once:
    """A base class of frozen dataclasses whose last field is ``_made``, an empty dict at first."""

    _made: dict

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """The result of ``make``, which only the first call with ``key`` calls."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]
