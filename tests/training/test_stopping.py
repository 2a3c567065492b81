"""Signals to a process that trains, in processes of their own."""

import os
import signal
import subprocess
import sys

import pytest

#: says "ready", works in one call of C that no handler of Python's interrupts, and ends with code 7 when asked to stop
WORK = """
import hashlib, signal, sys
from longspan.training.stopping import Stopping
for name in {ignored}:
    signal.signal(name, signal.SIG_IGN)
asked = []
with Stopping(second={second!r}) as stopping:
    if {saves}:
        stopping.saves(lambda: asked.append(1) or "the step is saved")
    print("ready", flush=True)
    while not ({saves} and asked and not {long}):
        hashlib.pbkdf2_hmac("sha256", b"", b"", 10**8 if {long} else 1000)
sys.exit(7)
"""


class Worker:
    def __init__(self, saves, second="ends", long=False, ignored=()):
        source = WORK.format(saves=saves, second=second, long=long, ignored=[int(n) for n in ignored])
        self.process = subprocess.Popen(
            [sys.executable, "-c", source], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert self.process.stdout.readline() == "ready\n"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.communicate()

    def send(self, number):
        self.process.send_signal(number)

    def told(self):
        return self.process.stderr.readline()

    def code(self):
        return self.process.wait(60)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_first_signal_asks_and_the_process_ends_in_its_own_time(number):
    with Worker(saves=True) as worker:
        worker.send(number)
        assert worker.told() == f"longspan: {number.name}: the step is saved; a second signal stops at once\n"
        assert worker.code() == 7


def test_before_there_is_anything_to_save_the_first_one_ends_it_in_the_middle_of_a_call():
    with Worker(saves=False, long=True) as worker:
        worker.send(signal.SIGINT)
        assert "there is nothing to save" in worker.told()
        assert worker.code() == 1


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_one_ends_it_in_the_middle_of_a_call(second):
    with Worker(saves=True, long=True) as worker:
        worker.send(signal.SIGTERM)
        worker.told()
        worker.send(second)
        assert "stopped at once, by a second signal" in worker.told()
        assert worker.code() == 1


def test_what_a_launcher_hands_on_at_once_is_not_a_second_one():
    with Worker(saves=True, second="launcher", long=True) as worker:
        worker.send(signal.SIGTERM)
        worker.told()
        worker.send(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            worker.process.wait(1)
    with Worker(saves=True, second="later", long=True) as worker:
        worker.send(signal.SIGTERM)
        worker.told()
        worker.send(signal.SIGINT)
        assert worker.code() == 1


def test_a_signal_that_is_ignored_at_the_start_stays_ignored():
    with Worker(saves=True, ignored=[signal.SIGHUP]) as worker:
        worker.send(signal.SIGHUP)
        worker.send(signal.SIGTERM)
        assert worker.told().startswith("longspan: SIGTERM:")
        assert worker.code() == 7


#: prints to its terminal until it is asked to stop, prints once more, and leaves a file
ON_A_TERMINAL = """
import fcntl, os, sys, termios, time
from pathlib import Path
from longspan.training.stopping import Stopping
os.setsid()
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
asked = []
with Stopping() as stopping:
    stopping.saves(lambda: asked.append(1) or "the step is saved")
    while not asked:
        print("a step", flush=True)
        time.sleep(0.01)
    print("saving", flush=True)
    Path(sys.argv[1]).write_text("saved")
    print("saved", flush=True)
print("the end", flush=True)
"""


def test_a_terminal_that_is_closed_asks_to_stop_and_what_is_printed_then_ends_nothing(tmp_path):
    ours, theirs = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", ON_A_TERMINAL, tmp_path / "file"], stdin=theirs, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    assert b"a step" in os.read(ours, 100)
    os.close(ours)
    assert process.wait(60) == 0
    assert (tmp_path / "file").read_text() == "saved"
