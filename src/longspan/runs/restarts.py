"""Whether a run whose ranks have failed is started again, from which checkpoint, and after which pause."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from longspan.runs.notes import Failure, Notes
from longspan.runs.ranks import Ending
from longspan.training.stopping import Heard

#: The pause before a restart doubles, from the first to the last of these numbers of seconds.
PAUSE_S = (1.0, 60.0)


@dataclass(frozen=True)
class Decision:
    """What becomes of a run whose ranks have failed.

    Attributes:
        again: start the ranks again.
        pause: seconds to wait before that.
        text: what to print; "" if the ranks have printed it.
    """

    again: bool
    pause: float = 0.0
    text: str = ""


class Restarts:
    """Counts restarts. Torch elastic's count is for the whole run, so that a month of rare faults uses it up; this
    one begins anew with every new checkpoint.

    Args:
        most: ``max_restarts``.
        newest: returns the name of the newest checkpoint, None before the first one.
    """

    def __init__(self, most: int, newest: Callable[[], str | None]):
        self.most, self.newest = most, newest
        self.count = 0
        self.point = newest()
        self.before: tuple[str, int | None] | None = None

    def decide(self, ending: Ending, notes: Notes) -> Decision:
        """What to do after an attempt that did not end well."""
        failures = failures_of(ending, notes)
        if not self.most or ending.asked or not _may_go_on(ending, failures):
            return Decision(False)
        what = what_failed(ending, failures) if ending.failures else ending.elsewhere
        own = next((f for f in failures.values() if f.kind == "error"), None)
        # A rank that was killed from outside explains the errors of the others.
        killed = any(code < 0 and rank not in failures for rank, code in ending.failures.items())
        error = None if own is None or killed else (own.error, own.step)
        if error is not None and error == self.before:
            where = "before the first step" if own is None or own.step is None else f"after step {own.step}"
            return Decision(
                False,
                text=f"the same error twice in a row, {where}: {error[0]}. Another restart would not help.",
            )
        self.before = error
        point = self.newest()
        if point != self.point:
            self.count, self.point = 0, point
        since = f"since {point}" if point else "and no checkpoint yet"
        if self.count == self.most:
            return Decision(
                False, text=f"{what}, after {self.count} restarts {since} (max_restarts): the run ends."
            )
        self.count += 1
        pause = min(PAUSE_S[0] * 2 ** (self.count - 1), PAUSE_S[1])
        return Decision(
            True,
            pause,
            f"{what}; restart {self.count} of {self.most}, from {point or 'the start'}, in {pause:g} s",
        )


def failures_of(ending: Ending, notes: Notes) -> dict[int, Failure]:
    """Failed rank of this machine -> its note, for those that have left one."""
    return {rank: failure for rank in ending.failures if (failure := notes.failure(rank))}


def _may_go_on(ending: Ending, failures: dict[int, Failure]) -> bool:
    """Whether a restart could help: not after a mistake of the user, nor after an end that a rank chose itself."""
    return 2 not in ending.failures.values() and not any(f.kind == "chosen" for f in failures.values())


def what_failed(ending: Ending, failures: Mapping[int, Failure]) -> str:
    """The failure that explains the others, as the beginning of a sentence.

    A rank that has waited or lost another one is a consequence; NCCL ends such a rank by SIGABRT.
    """
    return ending.describe({rank for rank, failure in failures.items() if failure.kind in ("lost", "late")})


def who_did_not_answer(ending: Ending, notes: Notes) -> list[str]:
    """A line for each rank of this machine for which another one waited in vain."""
    if not ending.unanswered or not notes.someone_waited():
        return []
    lines = []
    for rank, state in ending.unanswered.items():
        failure = notes.failure(rank)
        if failure is not None and failure.kind == "late":
            continue
        why = ": its process is stopped (SIGSTOP)" if state == "T" else ""
        place = notes.place(rank)
        lines.append(f"rank {rank} did not answer{why}{f'; it was last seen in {place}' if place else ''}.")
    return lines


def pause(seconds: float, asked: Heard) -> bool:
    """Waits before a restart. Returns whether a signal has asked to stop meanwhile."""
    until = time.monotonic() + seconds
    while not asked and (left := until - time.monotonic()) > 0:
        time.sleep(min(left, 0.1))
    return bool(asked)
