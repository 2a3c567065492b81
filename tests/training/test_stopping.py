"""Signals to a process that trains, in processes of their own."""

import os
import signal
import subprocess
import sys
import time

import pytest

from longspan.training.stopping import AGAIN_S, Heard, Stopping

#: says "ready", works in one call of C that no handler of Python's interrupts, and ends with code 7 when asked to stop
WORK = """
import hashlib, signal, sys
from longspan.training import stopping
for name in {ignored}:
    signal.signal(name, signal.SIG_IGN)
asked = []
stopping.AGAIN_S = {again}
with stopping.Stopping(second_ends={second_ends}, within={within}) as heard:
    if {saves}:
        heard.saves(lambda: asked.append(1) or "the step is saved", lambda: "saved, and on", lambda: True)
    print("ready", flush=True)
    while not ({saves} and asked and not {long}):
        hashlib.pbkdf2_hmac("sha256", b"", b"", 10**8 if {long} else 1000)
sys.exit(7)
"""


class Worker:
    def __init__(self, saves, second_ends=True, long=False, ignored=(), again=1.0, within=None):
        source = WORK.format(
            saves=saves,
            second_ends=second_ends,
            long=long,
            ignored=[int(n) for n in ignored],
            again=again,
            within=within,
        )
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
    with Worker(saves=True, long=True, again=0.0) as worker:
        worker.send(signal.SIGTERM)
        worker.told()
        worker.send(second)
        assert "stopped at once, by a second signal" in worker.told()
        assert worker.code() == 1


def test_the_same_signal_at_once_is_not_a_second_one():
    """A terminal that is closed sends a hangup, and its shell hands on another."""
    with Worker(saves=True, long=True, again=600.0) as worker:
        worker.send(signal.SIGHUP)
        worker.told()
        worker.send(signal.SIGHUP)
        with pytest.raises(subprocess.TimeoutExpired):
            worker.process.wait(1)
        worker.send(signal.SIGINT)
        assert worker.code() == 1
    heard = Heard()
    assert [heard.hear(n) for n in (signal.SIGHUP, signal.SIGHUP, signal.SIGTERM)] == [True, False, True]
    heard.since -= AGAIN_S
    assert heard.hear(signal.SIGHUP)


def test_a_second_one_ends_no_process_whose_launcher_does():
    with Worker(saves=True, second_ends=False, long=True) as worker:
        worker.send(signal.SIGTERM)
        worker.told()
        worker.send(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            worker.process.wait(1)


def test_sigusr1_saves_and_is_no_stop():
    with Worker(saves=True) as worker:
        worker.send(signal.SIGUSR1)
        assert worker.told() == "longspan: SIGUSR1: saved, and on\n"
        worker.send(signal.SIGTERM)  # still the first one that stops
        assert worker.told().startswith("longspan: SIGTERM: the step is saved")
        assert worker.code() == 7
    with Worker(saves=False) as worker:  # before a step is done it must not end the process
        worker.send(signal.SIGUSR1)
        assert "SIGUSR1: no step is done, so there is nothing to save" in worker.told()
        worker.send(signal.SIGTERM)
        assert worker.code() == 1


def test_what_does_not_end_in_time_is_ended_in_the_middle_of_a_call():
    with Worker(saves=True, long=True, within=0.5) as worker:
        worker.send(signal.SIGTERM)
        assert worker.told().startswith("longspan: SIGTERM: the step is saved")
        assert "SIGTERM: not saved within 0.5 s (stop_timeout), so it is stopped now" in worker.told()
        assert worker.code() == 1


def test_what_is_saved_in_time_is_not_ended():
    stopping = Stopping(within=0.2)
    with stopping:
        for stops in (True, False):  # without anything left to save there is no limit
            stopping.saves(lambda: "the step is saved", str, lambda stops=stops: stops)
            stopping.heard.clear()
            stopping._act(signal.SIGTERM)
            stopping.saved()
            time.sleep(0.4)


def test_a_signal_that_is_ignored_at_the_start_stays_ignored():
    with Worker(saves=True, ignored=[signal.SIGHUP]) as worker:
        worker.send(signal.SIGHUP)
        worker.send(signal.SIGTERM)
        assert worker.told().startswith("longspan: SIGTERM:")
        assert worker.code() == 7


#: takes its standard input for its terminal
TAKES_ITS_TERMINAL = """
import fcntl, os, termios
os.setsid()
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
"""
#: prints until it is asked to stop, prints once more, and leaves a file
PRINTS = """
import sys, time
from pathlib import Path
from longspan.training.stopping import Stopping
asked = []
with Stopping() as stopping:
    stopping.saves(lambda: asked.append(1) or "the step is saved", str, lambda: True)
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
        [sys.executable, "-c", TAKES_ITS_TERMINAL + PRINTS, tmp_path / "file"],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    assert b"a step" in os.read(ours, 100)
    os.close(ours)
    assert process.wait(60) == 0
    assert (tmp_path / "file").read_text() == "saved"


def test_a_reader_that_ends_first_does_not_end_a_run_that_saves(tmp_path):
    """``2>&1 | tee log``: Ctrl-C ends tee too, and closing the terminal does."""
    process = subprocess.Popen(
        [sys.executable, "-c", PRINTS, tmp_path / "file"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert process.stdout.read(6) == b"a step"
    process.stdout.close()
    time.sleep(0.1)  # a few steps are printed for nobody
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0
    assert (tmp_path / "file").read_text() == "saved"
