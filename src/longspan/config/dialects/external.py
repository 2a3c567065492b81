"""Names of Megatron-LM and axolotl that are no keys here, and how each is handled.

A name is handled in one of three ways: it stands for keys, it has no effect here (which is listed at start),
or it is refused with the reason and our way. ``axolotl`` and ``megatron_flags`` hold the tables. Any other
unknown name is a mistake.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

#: values that ask for nothing
NOTHING: tuple[Any, ...] = (None, False, 0, "", [], {})
#: a flag takes all values up to the next flag
MANY = -1


@dataclass(frozen=True)
class ExternalName:
    """How a name is handled.

    Attributes:
        why: what becomes of it, or why it is refused and what to say instead.
        values: how many values a flag takes: 0, 1 or MANY.
        accepts: whether this value is harmless (no effect); None accepts all.
        becomes: the keys a value stands for.
    """

    why: str
    values: int = 1
    accepts: Callable[[Any], bool] | None = None
    becomes: Callable[[Any], dict[str, Any]] | None = None

    def read(self, spelling: str, value: Any) -> dict[str, Any] | None:
        """The keys it stands for; ``{}`` where a value asks for nothing, None where it has no effect.

        Raises:
            ValueError: it is refused.
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
    """Changes nothing here; listed at start."""
    return ExternalName(why, values)


def refused(why: str, values: int = 1, unless: tuple[Any, ...] = NOTHING) -> ExternalName:
    """Refused, unless the value asks for nothing."""
    return ExternalName(
        why, values, lambda value: values != 0 and any(value is u or value == u for u in unless)
    )


def becomes(keys: Callable[[Any], dict[str, Any]], why: str, values: int = 1) -> ExternalName:
    """Another way to say some keys; ``keys`` raises ValueError or KeyError for a value that is none."""
    return ExternalName(why, values, None, keys)


def choice(choices: dict[Any, dict[str, Any]], why: str, values: int = 1) -> ExternalName:
    """As :func:`becomes`, by a table of values."""
    return becomes(lambda value: choices[value], why, values)


def refuses(name: ExternalName) -> bool:
    """Is a name refused, unless its value asks for nothing?"""
    return name.accepts is not None
