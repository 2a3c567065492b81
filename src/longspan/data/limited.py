"""Calls within limits of time and memory, for chat templates, which are programs of other authors.

A template may loop for ever or make a string of a terabyte, by accident or on purpose. Python cannot
always interrupt this in its own process, because a thread gets no signals, and one operation may take
hours. So the call runs in a second process, whose limits the operating system enforces. The second
process starts at the first call and runs all later calls, one at a time; sending a call and its result
costs about 50 microseconds. It ends with the first process, or after `IDLE_S` seconds without a call.
"""

from __future__ import annotations

import atexit
import os
import pickle
import resource
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

#: The seconds of computing that a call may take; waiting for a busy processor does not count.
TIME_S = 2.0
#: The bytes of memory that the second process may have.
MEMORY = 2 << 30
#: The seconds without a call after which the second process ends.
IDLE_S = 30.0


class LimitError(Exception):
    """A call exceeded its time or memory, or ended the second process."""


def limited(function: Callable[..., Any], *arguments: Any, seconds: float = TIME_S) -> Any:
    """Returns or raises what the function does; can be called from any thread and any process.

    Args:
        function: a function of a module, found by its name.
        arguments: sent by pickle, as is the result.
        seconds: of computing that the call may take; waiting for a busy processor does not count.

    Raises:
        LimitError: a limit was exceeded, or the call ended the second process.
    """
    request = pickle.dumps((seconds, function, arguments))
    with _state.lock:
        while True:
            process = _state.running()
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                process.stdin.write(request)
                process.stdin.flush()
                result, error = pickle.load(process.stdout)
                break
            except (BrokenPipeError, EOFError, pickle.UnpicklingError):
                code = process.wait()
            # After an interrupt, a late result must not be taken for the result of the next call.
            except BaseException:
                process.kill()
                process.wait()
                raise
            # With exit code 0, the idle process may have ended just when this call began.
            if code != 0:
                if code == -signal.SIGPROF:
                    raise LimitError(
                        f"it took more than {seconds:g} seconds of computing, where milliseconds are usual; look for a loop without an end"
                    )
                raise LimitError(f"the process that ran it ended with code {code}")
    if isinstance(error, MemoryError):
        raise LimitError(f"it took more than {MEMORY >> 30} GiB of memory")
    if error is not None:
        raise error
    return result


class _State:
    """The second process of this process; a fork of this process starts its own second process."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.lock = threading.Lock()
        self.process: subprocess.Popen | None = None

    def running(self) -> subprocess.Popen:
        if self.process is None or self.process.poll() is not None:
            # The second process must find modules in the same places as this process.
            places = [path for path in sys.path if path]
            code = f"import sys; sys.path[:] = {places!r}; from {__name__} import _serve; _serve()"
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", code],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
        return self.process

    def end(self) -> None:
        if self.process is not None and self.process.stdin is not None:
            with suppress(OSError):
                self.process.stdin.close()
            self.process.wait()


_state = _State()
atexit.register(_state.end)
os.register_at_fork(after_in_child=_state.reset)


def _serve() -> None:
    """The loop of the second process: reads seconds, a function and arguments, writes (result, exception)."""
    # The terminal's Ctrl-C goes to this process too, but the caller handles it and ends this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Some systems have no such limit.
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    requests, replies = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr
    while select.select([requests], [], [], IDLE_S)[0]:
        try:
            seconds, function, arguments = pickle.load(requests)
        except EOFError:
            return
        # By default the timer's signal ends the process, even in the middle of an operation.
        signal.setitimer(signal.ITIMER_PROF, seconds)
        replies.write(_reply(function, arguments))
        signal.setitimer(signal.ITIMER_PROF, 0)
        replies.flush()


def _reply(function: Callable[..., Any], arguments: tuple) -> bytes:
    try:
        return pickle.dumps((function(*arguments), None))
    except MemoryError:
        return pickle.dumps((None, MemoryError()))
    except Exception as error:
        try:
            reply = pickle.dumps((None, error))
            pickle.loads(reply)
        # Some exceptions cannot be pickled.
        except Exception:
            return pickle.dumps((None, RuntimeError(repr(error))))
        return reply
