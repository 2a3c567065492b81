"""Processes end with the process that started them, so that a killed launcher leaves none behind."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import multiprocessing.connection
import multiprocessing.process
import os
import signal
import sys
import threading
import time

#: seconds between two checks of the parent, where the kernel sends no signal at its end
LOOK_S = 1.0
#: Linux: the signal that the kernel sends when the parent ends
PR_SET_PDEATHSIG = 1


def end_with_parent(parent: int | None = None) -> None:
    """Makes this process end when its parent ends, whatever ends the parent.

    Linux sends the signal itself, to a stopped process too. On other systems, and where Linux sends none (the
    parent is another thread's or another namespace's), a thread of this process checks once a second.

    Args:
        parent: the process id of the parent, if it is known; if that process has ended already, this one
            ends now. None takes the present parent.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    parent = os.getppid() if parent is None else parent
    if os.getppid() != parent:
        os._exit(1)
    threading.Thread(target=_look, args=(parent,), name="parent", daemon=True).start()


def parent_since() -> str:
    """The parent's process id with the time at which it was started, as far as the system has it: no other process has both."""
    with contextlib.suppress(OSError, IndexError), open(f"/proc/{os.getppid()}/stat") as file:
        return f"{os.getppid()} since {file.read().rpartition(')')[2].split()[19]}"
    return str(os.getppid())


def end_with_pool() -> None:
    """Makes this worker of a :mod:`multiprocessing` pool end with the pool's process; else it would go on."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_wait_for, args=(parent,), name="parent", daemon=True).start()


def _wait_for(parent: multiprocessing.process.BaseProcess) -> None:
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _look(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(LOOK_S)
    os._exit(1)
