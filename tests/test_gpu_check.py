"""benchmarks/gpu_check.py: its parts at tiny sizes on the CPU, its time limits, its report, its wheels."""

import base64
import hashlib
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import pool
from marks import slow

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def gpu_check(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_check

    return gpu_check


def run_part(module, name, path):
    """One part as gpu_check runs it."""
    import importlib

    sys.path.append(str(BENCHMARKS))
    try:
        from common import Rows

        getattr(importlib.import_module(module), name)(Rows(path, name), torch.device("cpu"), True)
    finally:
        sys.path.remove(str(BENCHMARKS))


PARTS = {
    "attention": "gpu_attention",
    "cutting": "gpu_attention",
    "step": "gpu_training",
    "recurrent": "gpu_recurrent",
    "speed": "gpu_training",
    "compiled": "gpu_training",
    "parameters": "gpu_training",
    "peer": "gpu_training",
}


@pytest.mark.parametrize("name", slow(PARTS, "step"))
def test_a_part_runs_through_on_the_cpu(name, tmp_path, gpu_check):
    (module,) = (part.module for part in gpu_check.PARTS if part.name == name)
    assert module == PARTS[name]
    pool.run(1, run_part, module, name, tmp_path / "rows.jsonl")
    rows = gpu_check.rows_of(tmp_path)
    assert rows
    assert all(row["ok"] is not False for row in rows), rows
    held = [row for row in rows if not row["note"].startswith("skipped")]
    assert held
    if name in ("attention", "step"):
        assert all(row["ok"] for row in held)
    elif name == "recurrent":
        assert all(row["ok"] or row["numbers"]["ms"] > 0 for row in held)
        assert sum(row["ok"] is True for row in held) == 4
    elif name == "cutting":
        assert all(row["numbers"]["times_one_call"] > 0 for row in held)
    else:
        assert all(row["numbers"]["tokens_per_s"] > 0 for row in held)


def test_every_part_is_there(gpu_check):
    assert {part.name for part in gpu_check.PARTS} == {"tests", *PARTS}


def command(*options):
    return subprocess.run(
        [sys.executable, str(BENCHMARKS / "gpu_check.py"), *options],
        capture_output=True,
        text=True,
        timeout=280,
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="for a machine without a GPU")
def test_a_machine_without_a_gpu_gives_a_report_of_what_was_skipped(tmp_path, gpu_check):
    done = command("--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "gpu_check.json").read_text())
    assert [part["name"] for part in report["parts"]] == [part.name for part in gpu_check.PARTS]
    assert {part["result"] for part in report["parts"]} == {"skipped: no CUDA device"}
    assert report["machine"]["gpu"] is None
    assert report["rows"] == []
    for part in gpu_check.PARTS:
        assert f"{part.name}: {part.what} (skipped: no CUDA device" in done.stdout


def test_a_part_beyond_its_time_costs_that_part_alone(tmp_path):
    options = ["--device", "cpu", "--tiny", "--only", "attention", "cutting", "--part-seconds", "0.3"]
    done = command("--out", str(tmp_path), *options)
    assert done.returncode == 1, done.stderr
    report = json.loads((tmp_path / "gpu_check.json").read_text())
    assert [part["result"] for part in report["parts"]] == ["ended after its 0 s"] * 2


def test_a_part_that_nothing_ends_is_left_behind(tmp_path, gpu_check):
    left = []
    part = gpu_check.run_part(
        gpu_check.PARTS[1], 0, tmp_path, ["--device", "cpu", "--tiny"], dict(os.environ), left.append
    )
    assert part["result"] == "ended after its 0 s"
    left[0].kill()
    left[0].wait()


def test_gpu_check_of_make_installs_nothing():
    lines = (BENCHMARKS.parent / "Makefile").read_text().splitlines()
    assert "gpu-check:" in lines  # without a prerequisite


def test_what_is_wrong_and_what_broke_off_gives_exit_code_1(gpu_check):
    row = {"part": "a", "case": "b", "ok": True, "note": "", "numbers": {"ms": 1234.5, "peak_gib": None}}
    part = {"name": "a", "what": "c", "seconds": 1.0, "result": "ran"}
    report = {"machine": {}, "parts": [part], "rows": [row, row | {"ok": None}]}
    assert not gpu_check.failed(report)
    assert not gpu_check.failed(report | {"parts": [part | {"result": "skipped: no time left"}]})
    assert gpu_check.failed(report | {"rows": [row | {"ok": False}]})
    assert gpu_check.failed(report | {"parts": [part | {"result": "failed with exit code -11"}]})
    assert "ms 1,23" in gpu_check.table(report)
    assert "peak_gib -" in gpu_check.table(report)


def test_memory_that_runs_out_is_a_row_and_no_failure(tmp_path, gpu_check):
    from common import Rows

    rows = Rows(tmp_path / "rows.jsonl", "speed")
    rows.failed("32,768 tokens: no key", torch.OutOfMemoryError("CUDA out of memory."))
    rows.failed("32,768 tokens: tiled_mlp", RuntimeError("no kernel\nat all"))
    first, second = gpu_check.rows_of(tmp_path)
    assert (first["ok"], first["note"]) == (None, "out of memory")
    assert (second["ok"], second["note"]) == (False, "RuntimeError: no kernel")


def make_wheel(folder, name):
    """The smallest wheel there is: one module."""
    files = {
        f"{name}.py": b"VALUE = 7\n",
        f"{name}-1.0.dist-info/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n".encode(),
        f"{name}-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = f"{name}-1.0.dist-info/RECORD"
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
        lines = []
        for path, data in files.items():
            wheel.writestr(path, data)
            digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
            lines.append(f"{path},sha256={digest},{len(data)}")
        wheel.writestr(record, "\n".join([*lines, f"{record},,", ""]))


def test_what_is_missing_is_installed_from_wheels_into_a_folder_of_its_own(tmp_path, gpu_check, monkeypatch):
    name, other = "longspan_probe_of_wheels", "longspan_probe_without_wheel"
    packages = {"json": ("none",), name: (name,), other: (other,)}
    wheels, site = tmp_path / "wheels", tmp_path / "site"
    wheels.mkdir()
    make_wheel(wheels, name)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert gpu_check.install(None, site, packages) == [name, other]
    assert gpu_check.install(wheels, site, packages) == [other]
    assert (site / f"{name}.py").exists()
