"""The one exception for a user's mistake, and helpers for its messages.

Every message names what was found, the rule, and the remedy. The command line prints
it without a traceback and exits with code 2.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

Problem = tuple[tuple[str, ...], str]
"""What is wrong with a config: the keys it is about, and the message."""


class UserError(ValueError):
    """A mistake that the user can correct: a key, a flag, a file, a shape or a layout.

    Args:
        problems: one message, or all messages of one check (a config shows all its
            problems at once).
    """

    def __init__(self, problems: str | Iterable[str]):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class NotReached(UserError):
    """Another process or machine is not there, or not any more. It may come back, so the exit code is 1."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns ``" Did you mean X?"`` for the nearest known name, or an empty string."""
    nearest = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean {nearest[0]}?" if nearest else ""
