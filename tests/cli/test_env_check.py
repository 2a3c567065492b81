"""``longspan env --check`` from its command line: two launchers, a rank that hangs, and mistakes."""

import json
import os
import re
import signal
import socket
import time

import pytest
import torch

import command
from longspan.cli import main
from longspan.cli.env import Lines, line, summary
from longspan.runs.machine.check import report_of
from longspan.runs.machine.protocol import Finding, Place
from processes import children


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.mark.slow
def test_two_launchers_check_their_ranks_together(tmp_path):
    """Each stands for a machine with one process; the second one prints JSON."""
    shared = ["env", "--check", "--device", "cpu", "--num-processes", "2", "--num-machines", "2"]
    shared += ["--main-process-ip", "127.0.0.1", "--main-process-port", free_port(), "--timeout", "60"]
    first = command.start(*shared, "--machine-rank", "0", cwd=tmp_path)
    second = command.start(*shared, "--machine-rank", "1", "--json", cwd=tmp_path)
    first, second = first.wait(), second.wait()
    assert first.returncode == second.returncode == 0, first.stdout + first.stderr + second.stderr
    lines = first.stdout.splitlines()
    assert lines[0] == "checking 2 processes on 2 machines (this is number 0): cpu, gloo"
    assert lines[1] == line(Finding("barrier", "ok", "all ranks arrive"))
    assert lines[-1].startswith("passed: ")
    report = json.loads(second.stdout)
    assert report["passed"]
    assert report["device"] == "cpu"
    assert report["hosts"] == [os.uname().nodename] * 2
    findings = {finding["name"]: finding for finding in report["findings"]}
    assert len(findings) >= 26
    assert {"all_reduce", "links", "attention math", "grouped experts"} <= findings.keys()
    for name in ("verify cp 2", "verify tp 2, cp 1"):
        assert findings[name]["status"] == "ok"
        assert findings[name]["figures"]["max_gradient_error"] < 1e-10
    # both machines have the same report
    for finding in report["findings"]:
        assert line(Finding(**finding)) in first.stdout


@pytest.mark.slow
def test_a_rank_that_hangs_is_named_and_ended(tmp_path):
    process = command.start("env", "--check", "--device", "cpu", "--timeout", "1", cwd=tmp_path)
    end = time.monotonic() + 120
    while "objects" not in process.output:
        assert process.poll() is None, process.output
        assert time.monotonic() < end
        time.sleep(0.01)
    ranks = children(process.pid)
    os.kill(ranks[1], signal.SIGSTOP)
    done = process.wait()
    assert done.returncode == 1
    assert re.search(rf"rank 1 \({os.uname().nodename}\): (gave no answer|did not begin)", done.stdout)
    assert "BROKEN" in done.stdout
    assert "not run: the checks ended before it" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("FAILED: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--timeout", "3"], "--timeout is for longspan env --check."),
        (["--num-processes", "3"], "--num-processes is for longspan env --check."),
        (["--check", "--device", "gpu"], "--device 'gpu': one of auto, cpu, cuda."),
        (["--check", "--timeout", "0"], "--timeout '0': a whole number from 1 on."),
        (["--check", "config.yaml"], "'config.yaml': longspan env takes no such option."),
        (["--check", "--num-machines", "2"], "--num-machines 2 needs --main-process-ip"),
        (["--check", "--device", "cuda", "--num-processes", "99"], "device: cuda asks for 99 GPUs"),
        (["--chek"], "Did you mean --check?"),
    ],
)
def test_mistakes_are_refused(capsys, arguments, message):
    assert main.main(["env", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_under_torchrun_it_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main.main(["env", "--check"]) == 2
    assert "starts its processes itself: run it without torchrun" in capsys.readouterr().err


class Terminal:
    """A stream that is a terminal."""

    def __init__(self):
        self.text = ""

    def isatty(self):
        return True

    def write(self, text):
        self.text += text

    def flush(self):
        pass


def test_a_terminal_shows_the_running_check_until_its_finding():
    stream = Terminal()
    lines = Lines(stream)
    lines.began("all_reduce")
    assert stream.text.endswith("all_reduce ...")
    lines.found(Finding("all_reduce", "wrong", "rank 1 (a): 3 of 8 elements differ", "Look here."))
    shown = stream.text.rpartition("\x1b[K")[2]
    assert shown.splitlines()[0].split() == [
        "WRONG",
        "all_reduce",
        "rank",
        "1",
        "(a):",
        "3",
        "of",
        "8",
        "elements",
        "differ",
    ]
    assert shown.splitlines()[1] == "        Look here."


@pytest.mark.parametrize(
    ("statuses", "hung", "passed"),
    [
        (["ok", "slow", "absent", "skipped"], False, True),
        (["ok", "wrong"], False, False),
        (["broken", "ok"], False, False),
        (["ok"], True, False),
    ],
)
def test_slow_and_absent_alone_pass(statuses, hung, passed):
    place = Place(0, ("a",), torch.device("cpu"), None, 1.0)
    report = report_of([Finding("x", status, "") for status in statuses], hung, place)
    assert report["passed"] is passed


def test_the_summary_names_what_is_wrong_and_what_is_slow():
    def of(passed, *statuses):
        findings = [{"name": f"n{i}", "status": status} for i, status in enumerate(statuses)]
        return summary({"passed": passed, "findings": findings})

    assert of(True, "ok", "slow", "absent") == "passed: 3 findings; slow: n1"
    assert of(False, "wrong", "slow", "broken") == "FAILED: 3 findings; broken: n2; wrong: n0; slow: n1"
