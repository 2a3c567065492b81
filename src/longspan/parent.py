"""Ending with the process that started this one, so that a kill of a launcher leaves nothing behind."""

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

#: seconds between two looks at the parent where the kernel does not tell of its end
LOOK_S = 1.0
#: Linux: the signal that the kernel sends when the parent ends
PR_SET_PDEATHSIG = 1


def end_with_parent(parent: int | None = None) -> None:
    """Has this process killed when its parent ends, however that ends.

    Linux sends the signal itself, to a stopped process too. Elsewhere, and for a parent that is a thread's
    or another namespace's, a thread of this process looks once a second.

    Args:
        parent: the process id of the parent, where it is known; one that has ended already ends this process
            now. None takes the parent of the moment.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    parent = os.getppid() if parent is None else parent
    if os.getppid() != parent:
        os._exit(1)
    threading.Thread(target=_look, args=(parent,), name="parent", daemon=True).start()


def end_with_pool() -> None:
    """Has this worker of a pool of :mod:`multiprocessing` end when the process of the pool does, which it
    would survive."""
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
