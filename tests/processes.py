"""Processes that tests look at and wait for: launchers and their ranks."""

import os
import time


def status(pid):
    """(state, parent) of a process; None where there is none, or one that has ended and not been waited for."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            state, parent = file.read().rpartition(")")[2].split()[:2]
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if state == "Z" else (state, int(parent))


def children(pid):
    """The process ids of a launcher's ranks that run, in the order in which they were started."""
    return sorted(
        int(name) for name in filter(str.isdigit, os.listdir("/proc")) if (status(name) or ("", 0))[1] == pid
    )


def ranks_of(pid):
    """rank -> process id of a launcher's ranks that are programs of their own."""
    found = {}
    for child in children(pid):
        with open(f"/proc/{child}/environ") as file:
            environment = dict(v.partition("=")[::2] for v in file.read().split("\0"))
        if "RANK" in environment:
            found[int(environment["RANK"])] = child
    return found


def wait_for(condition, process, seconds=180):
    """Waits until a condition holds; fails if the process ends before."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.output
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)


def wait_until_gone(pids, seconds=60):
    end = time.monotonic() + seconds
    while alive := [pid for pid in pids if status(pid)]:
        assert time.monotonic() < end, f"{alive} go on"
        time.sleep(0.02)
