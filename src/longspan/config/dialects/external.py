"""Names of Megatron-LM and axolotl that are not keys of longspan, and how each is handled.

A name is handled in one of three ways: it is replaced by keys, it has no effect in longspan (which is listed
at start), or it is refused, with the reason and longspan's way. ``axolotl`` and ``megatron_flags`` hold the
tables. A name in neither table is a mistake.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

#: values with which a refused name has no effect, so that it is accepted
NOTHING: tuple[Any, ...] = (None, False, 0, "", [], {})
#: The number of values of a flag that takes all values up to the next flag.
MANY = -1


@dataclass(frozen=True)
class ExternalName:
    """How a name is handled.

    Attributes:
        why: why the name has no effect, or why it is refused and what to write instead.
        values: how many values a flag takes: 0, 1 or MANY.
        accepts: whether a value is harmless (it has no effect); None accepts all values.
        becomes: value -> the keys that it is replaced by.
    """

    why: str
    values: int = 1
    accepts: Callable[[Any], bool] | None = None
    becomes: Callable[[Any], dict[str, Any]] | None = None

    def read(self, spelling: str, value: Any) -> dict[str, Any] | None:
        """The keys that replace the name; ``{}`` if the value is harmless, None if the name has no effect.

        Raises:
            ValueError: the value is refused.
        """
        if self.becomes is not None:
            try:
                return self.becomes(value)
            except (ValueError, TypeError, KeyError, AttributeError, IndexError):
                raise ValueError(f"{spelling}: {value!r} is not supported. {self.why}") from None
        if self.accepts is None:
            return None
        if self.accepts(value):
            return {}
        shown = f"{spelling}" if value is True and self.values == 0 else f"{spelling}: {value!r}"
        raise ValueError(f"{shown} is not supported. {self.why}")


def no_effect(why: str, values: int = 1) -> ExternalName:
    """A name that changes nothing in longspan, and is listed at start."""
    return ExternalName(why, values)


def refused(why: str, values: int = 1, unless: tuple[Any, ...] = NOTHING) -> ExternalName:
    """A name that is refused, but for the values in ``unless``."""
    return ExternalName(
        why, values, lambda value: values != 0 and any(value is u or value == u for u in unless)
    )


def becomes(keys: Callable[[Any], dict[str, Any]], why: str, values: int = 1) -> ExternalName:
    """A name that keys replace; ``keys`` raises ValueError or KeyError for a value that is not supported."""
    return ExternalName(why, values, None, keys)


def choice(choices: dict[Any, dict[str, Any]], why: str, values: int = 1) -> ExternalName:
    """As :func:`becomes`, with a table of values -> keys."""
    return becomes(lambda value: choices[value], why, values)


def refuses(name: ExternalName) -> bool:
    """Whether a name is refused, but for harmless values."""
    return name.accepts is not None
