"""What the ranks leave in their launcher's store: where they are, and why they have failed.

The launcher reads it when a rank has failed: to name a rank that does not answer, and to decide about a
restart. Nothing is pickled: a note is JSON.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch.distributed import Store

#: seconds in which the store has to answer; a rank that fails does not wait longer for a launcher that is gone
ANSWER_S = 10.0


@dataclass(frozen=True)
class Failure:
    """Why a rank has failed.

    Attributes:
        kind: ``error``: an exception of its own; ``lost``: another rank has ended; ``late``: it waited for
            another rank in vain; ``chosen``: it has ended itself, and would do so again. ``lost`` and ``late``
            are consequences.
        error: the exception's type, and the line of code that raised it.
        step: number of finished optimizer steps; None before there is a trainer.
        text: the exception's message.
    """

    kind: Literal["error", "lost", "late", "chosen"]
    error: str
    step: int | None
    text: str


class Notes:
    """The notes of one attempt of a run: of the time between two restarts.

    Args:
        store: the launcher's store; None (torchrun has started the ranks) keeps no notes.
    """

    def __init__(self, store: Store | None, attempt: int = 0):
        self.store: Store | None = None
        if store is not None:
            from torch.distributed import PrefixStore

            self.store = PrefixStore(f"longspan/notes/{attempt}", store)

    @classmethod
    def at(cls, host: str, port: int, attempt: int) -> Notes:
        """A rank's own notes, in the launcher's store at this address."""
        from torch.distributed import TCPStore

        wait = datetime.timedelta(seconds=ANSWER_S)
        try:
            return cls(TCPStore(host, port, is_master=False, timeout=wait), attempt)
        # Without the store the run goes on: only a message about a failure would name less.
        except RuntimeError:
            return cls(None)

    def fail(self, rank: int, failure: Failure) -> None:
        self._write(f"failure/{rank}", json.dumps(asdict(failure)))
        if failure.kind == "late":
            self._write("late", "")

    def put_place(self, rank: int, place: str) -> None:
        """Writes the place of a rank in the run, such as ``step 12, the gradient norm``."""
        self._write(f"place/{rank}", place)

    def failure(self, rank: int) -> Failure | None:
        text = self._read(f"failure/{rank}")
        return Failure(**json.loads(text)) if text else None

    def someone_waited(self) -> bool:
        """Whether some rank, of any machine, has waited for another one in vain."""
        return self._read("late") is not None

    def place(self, rank: int) -> str | None:
        return self._read(f"place/{rank}")

    def _write(self, name: str, text: str) -> None:
        # The launcher may have ended, and with it the store.
        with contextlib.suppress(RuntimeError):
            if self.store is not None:
                self.store.set(name, text)

    def _read(self, name: str) -> str | None:
        store = self.store
        if store is None:
            return None
        try:
            return within(ANSWER_S, lambda: store.get(name).decode() if store.check([name]) else None)
        except TimeoutError:
            # It will not answer the next question either.
            self.store = None
            return None


def within(seconds: float, call: Callable[[], Any]) -> Any:
    """The result of a call to a store; None if it fails.

    A store whose process is stopped, or whose machine is gone, blocks the caller without a limit.

    Raises:
        TimeoutError: there is no answer within so many seconds.
    """
    results: list[Any] = []

    def run() -> None:
        with contextlib.suppress(Exception):
            results.append(call())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError
    return results[0] if results else None


#: the notes of a rank that no longspan launcher has started
NO_NOTES = Notes(None)
