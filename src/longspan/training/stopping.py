"""Signals in a process that trains: the first SIGTERM, SIGINT (Ctrl-C) or SIGHUP makes it save and stop, SIGUSR1
makes it save and go on."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TextIO, cast

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
#: Clusters send this signal ahead of a time limit (Slurm's ``--signal=USR1@120``).
SAVES = signal.SIGUSR1
#: Within so many seconds the same signal counts once.
AGAIN_S = 1.0


def heeded() -> list[signal.Signals]:
    """The signals that stop a run: all but those ignored at its start, as SIGHUP is under nohup."""
    return [number for number in STOPS if signal.getsignal(number) is not signal.SIG_IGN]


#: the errors of writing to a closed terminal, and to a pipe whose reader has ended
GONE = (errno.EIO, errno.EPIPE)


class Heard(list[signal.Signals]):
    """The signals received, in order; the first signal again within ``AGAIN_S`` seconds is not counted.

    One signal may arrive twice: the kernel and the shell both send a hangup, and a cluster sends its signal
    to every process while torchrun passes its own on.
    """

    # the time of the first signal
    since = 0.0
    # Whether a save was asked for (SIGUSR1) since this was last set to False.
    to_save = False

    def hear(self, number: int) -> bool:
        """Takes a signal; returns whether it counts as one that stops the run."""
        if number == SAVES:
            self.to_save = True
            return False
        now = time.monotonic()
        if self and number == self[0] and now - self.since < AGAIN_S:
            return False
        if not self:
            self.since = now
        self.append(signal.Signals(number))
        return True


class _Outliving:
    """A stream whose terminal or reader may end before the run; later output is dropped without an error."""

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
            if error.errno not in GONE:
                raise
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _may_go(stream: TextIO | None) -> bool:
    """Whether a stream leads to a terminal or another program, and not to a file."""
    try:
        mode = 0 if stream is None else os.fstat(stream.fileno()).st_mode
    # The stream is not a file of the operating system.
    except (OSError, ValueError, AttributeError):
        return False
    return stat.S_ISCHR(mode) or stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)


@contextlib.contextmanager
def outliving_reader() -> Iterator[None]:
    """Inside this context ``print`` raises no error when the terminal or a program such as ``tee`` has ended.

    A closed terminal and a Ctrl-C end the program behind a pipe too, and the run must still be saved.
    """
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (
        cast(TextIO, _Outliving(stream)) if _may_go(stream) else stream for stream in before
    )
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


@contextlib.contextmanager
def handling(numbers: Iterable[signal.Signals], handler: Any) -> Iterator[None]:
    """Inside this context ``handler`` handles the signals; afterwards the handlers before do.

    Python sets handlers in the main thread only. In another thread this context does nothing: a program that trains
    in a thread of its own keeps its handlers.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


class Stopping:
    """A context that handles the signals.

    Before :meth:`saves` is called, a first signal ends the process at once, because there is nothing to save.
    After that it requests a save and a stop, and a second signal ends the process at once. SIGUSR1 requests a
    save, after which the run goes on. A thread receives the signals, because Python runs handlers only after
    the present call, and a backward may take minutes. Outside the main thread no signal is handled (:func:`handling`).

    Args:
        speaks: print the effect of a signal to stderr; True in one process of a run.
        second_ends: a second signal ends this process; False if its launcher does that.
        within: seconds after which a process that was asked to stop ends unsaved; None waits without a limit.
    """

    def __init__(self, speaks: bool = True, second_ends: bool = True, within: float | None = None):
        self.speaks, self.second_ends, self.within = speaks, second_ends, within
        self.stops: Callable[[], bool] = bool
        self.timer: threading.Timer | None = None
        self.ask: Callable[[], str] | None = None
        self.ask_save: Callable[[], str] = str
        self.heard = Heard()

    def __enter__(self) -> Stopping:
        self.heeded = heeded()
        self.context = contextlib.ExitStack()
        self.context.enter_context(self._hearing())
        self.context.enter_context(outliving_reader())
        return self

    def __exit__(self, *_: object) -> None:
        self.saved()
        self.context.close()

    @contextlib.contextmanager
    def _hearing(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        pipe = os.pipe()
        os.set_blocking(pipe[1], False)
        thread = threading.Thread(target=self._hear, args=(pipe[0],), name="signals", daemon=True)
        thread.start()
        try:
            # Python writes a signal's number to the pipe only if the signal has a Python handler.
            with handling((*self.heeded, SAVES), lambda *_: None):
                before = signal.set_wakeup_fd(pipe[1], warn_on_full_buffer=False)
                try:
                    yield
                finally:
                    signal.set_wakeup_fd(before)
        finally:
            os.write(pipe[1], b"\0")
            thread.join()
            for end in pipe:
                os.close(end)

    def saves(self, ask: Callable[[], str], ask_save: Callable[[], str], stops: Callable[[], bool]) -> None:
        """From now on a first signal calls ``ask`` in the signals' thread and prints the returned text.

        Args:
            ask_save: called for SIGUSR1.
            stops: whether there still is something to save; without it a signal sets no limit (``within``).
        """
        self.ask_save, self.stops, self.ask = ask_save, stops, ask

    def saved(self) -> None:
        """What a signal has asked to save is saved: the limit ``within`` has no effect any more."""
        if self.timer is not None:
            self.timer.cancel()

    def _hear(self, pipe: int) -> None:
        while True:
            for number in os.read(pipe, 64):
                if number == 0:
                    return
                if number in self.heeded:
                    self._act(number)
                elif number == SAVES:
                    text = self.ask_save() if self.ask else "no step is done, so there is nothing to save"
                    self._tell(f"{SAVES.name}: {text}")

    def _act(self, number: int) -> None:
        name = signal.Signals(number).name
        if self.ask is None:
            self._tell(f"{name}: stopped before a step was done; there is nothing to save")
            os._exit(1)
        if not self.heard.hear(number):
            return
        if len(self.heard) == 1:
            if self.within is not None and self.stops():
                self.timer = threading.Timer(self.within, self._give_up, (name,))
                self.timer.daemon = True
                self.timer.start()
            self._tell(f"{name}: {self.ask()}; a second signal stops at once")
        elif self.second_ends:
            self._tell(f"{name}: stopped at once, by a second signal")
            os._exit(1)

    def _give_up(self, name: str) -> None:
        self._tell(
            f"{name}: not saved within {self.within:g} s (stop_timeout), so it is stopped now, unsaved"
        )
        os._exit(1)

    def _tell(self, text: str) -> None:
        if not self.speaks:
            return
        # An error such as a full disk must not keep the next signal from being handled.
        with contextlib.suppress(OSError):
            print(f"longspan: {text}", file=sys.stderr, flush=True)
