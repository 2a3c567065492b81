"""The part of gpu_check.py that runs the tests marked gpu."""

from __future__ import annotations

import torch
from common import Rows
from gpu_check import ROOT


class Recorder:
    """A plugin of pytest: a row a test, as soon as it ends."""

    def __init__(self, rows: Rows):
        self.rows = rows

    def pytest_runtest_logreport(self, report) -> None:
        if report.when != "call" and report.outcome == "passed":
            return
        name = report.nodeid.rpartition("/")[2]
        if report.outcome == "skipped":
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else ""
            self.rows.add(name, None, f"skipped: {reason.removeprefix('Skipped: ')}")
            return
        note = "" if report.passed else (report.longreprtext.strip().splitlines() or [""])[-1][:200]
        self.rows.add(name, report.passed, note, seconds=round(report.duration, 1))


def tests(rows: Rows, device: torch.device, tiny: bool) -> None:
    """Files that hold such tests only are collected: the others' imports take longer than these tests."""
    import pytest

    files = sorted(str(path) for path in (ROOT / "tests").rglob("test_*_gpu.py"))
    options = ["-m", "gpu", "-p", "no:cacheprovider", "--rootdir", str(ROOT), "--tb=short"]
    code = pytest.main([*options, *files], plugins=[Recorder(rows)])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        rows.add("pytest", False, f"exit code {int(code)}")
