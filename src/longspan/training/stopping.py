"""What SIGTERM, SIGINT (Ctrl-C) and SIGHUP do to a process that trains: the first one asks it to save and
stop."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TextIO, cast

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
#: seconds in which the same signal counts once: a cluster may send it to every process, and torchrun hands
#: on its own
AGAIN_S = 1.0


def heeded() -> list[signal.Signals]:
    """The signals that stop a run: all but those that were ignored at the start, as nohup ignores SIGHUP."""
    return [number for number in STOPS if signal.getsignal(number) is not signal.SIG_IGN]


class _Terminal:
    """A stream to a terminal that may be closed while the run goes on: what is written then goes nowhere."""

    def __init__(self, stream: Any):
        self._stream = stream

    def write(self, text: str) -> int:
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, action: Callable[[], object]) -> None:
        try:
            action()
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def outliving_terminal() -> Iterator[None]:
    """Inside, a terminal that goes does not end the process by an error of ``print``: a hangup saves and stops."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (
        cast(TextIO, _Terminal(stream)) if stream is not None and stream.isatty() else stream
        for stream in before
    )
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


class Stopping:
    """Hears the signals while it is entered.

    Until :meth:`saves` a first signal ends the process at once, for there is nothing to save; afterwards it
    asks, and a second one ends the process at once. A thread hears them: Python's own handlers wait for the
    call they come in, and one backward pass may take minutes.

    Args:
        speaks: tell on stderr what a signal does; one process of a run does.
        second: what a second signal does: ``ends`` this process; ``ends`` it unless it follows the first
            within a second, for a process whose launcher hands on what it may have got itself (``later``);
            or nothing, where the launcher ends its processes (``launcher``).
    """

    def __init__(self, speaks: bool = True, second: str = "ends"):
        self.speaks, self.second = speaks, second
        self.ask: Callable[[], str] | None = None
        self.first: tuple[int, float] | None = None

    def __enter__(self) -> Stopping:
        self.heeded = heeded()
        self.pipe = os.pipe()
        os.set_blocking(self.pipe[1], False)
        # a handler of Python's own is what makes the number of a signal arrive in the pipe
        self.before: dict[signal.Signals, Any] = {
            number: signal.signal(number, lambda *_: None) for number in self.heeded
        }
        self.pipe_before = signal.set_wakeup_fd(self.pipe[1], warn_on_full_buffer=False)
        self.thread = threading.Thread(target=self._hear, name="signals", daemon=True)
        self.thread.start()
        self.terminal = outliving_terminal()
        self.terminal.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.terminal.__exit__(None, None, None)
        signal.set_wakeup_fd(self.pipe_before)
        for number, handler in self.before.items():
            signal.signal(number, handler)
        os.write(self.pipe[1], b"\0")
        self.thread.join()
        for end in self.pipe:
            os.close(end)

    def saves(self, ask: Callable[[], str]) -> None:
        """From now on a first signal calls ``ask``, in the thread that hears; what it returns is told."""
        self.ask = ask

    def _hear(self) -> None:
        while True:
            for number in os.read(self.pipe[0], 64):
                if number == 0:
                    return
                if number in self.heeded:
                    self._act(number)

    def _act(self, number: int) -> None:
        name, now = signal.Signals(number).name, time.monotonic()
        if self.ask is None:
            self._tell(f"{name}: stopped before a step was done; there is nothing to save")
            os._exit(1)
        if self.first is None:
            self.first = number, now
            self._tell(f"{name}: {self.ask()}; a second signal stops at once")
            return
        repeated = number == self.first[0] and now - self.first[1] < AGAIN_S
        if self.second == "ends" or (self.second == "later" and not repeated):
            self._tell(f"{name}: stopped at once, by a second signal")
            os._exit(1)

    def _tell(self, text: str) -> None:
        if self.speaks:
            print(f"longspan: {text}", file=sys.stderr, flush=True)
