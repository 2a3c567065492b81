"""A process that ends with the one that started it, however that ends."""

import os
import signal
import subprocess
import sys
import time

import pytest

#: starts a child with one body, prints its process id, and waits
PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", {child!r}], stdout=subprocess.PIPE, text=True)
child.stdout.readline()
print(child.pid, flush=True)
time.sleep(600)
"""
CHILD = """
import time
from longspan import parent
{more}
parent.end_with_parent({pid})
print("ready", flush=True)
time.sleep(600)
"""
POOL = """
import os, time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from longspan.parent import end_with_pool
if __name__ == "__main__":
    pool = ProcessPoolExecutor(1, get_context("spawn"), end_with_pool)
    print(pool.submit(os.getpid).result(), flush=True)
    time.sleep(600)
"""


def is_alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_gone(pid, seconds=60):
    end = time.monotonic() + seconds
    while is_alive(pid):
        assert time.monotonic() < end, f"process {pid} outlives its parent"
        time.sleep(0.02)


def started(source, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(source)
    return subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True)


# without the kernel's signal a look at the parent does the same
@pytest.mark.parametrize("more", ["", "parent.PR_SET_PDEATHSIG = 10**6"])
def test_a_child_ends_with_a_parent_that_is_killed(tmp_path, more):
    process = started(PARENT.format(child=CHILD.format(more=more, pid="None")), tmp_path)
    child = int(process.stdout.readline())
    if not more:  # one that is stopped too
        os.kill(child, signal.SIGSTOP)
    process.kill()
    process.wait()
    wait_until_gone(child)


def test_a_parent_that_has_ended_before_ends_its_child():
    source = CHILD.format(more="", pid=2**22 + 1)  # no process has this id
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, timeout=60, text=True)
    assert (done.returncode, done.stdout) == (1, "")


def test_a_worker_ends_with_the_process_of_its_pool(tmp_path):
    process = started(POOL, tmp_path)
    worker = int(process.stdout.readline())
    process.kill()
    process.wait()
    wait_until_gone(worker)
