"""A run of two processes is resolved once, in the launcher; its ranks build the same Run from what it wrote."""

import os

import pytest
import torch.distributed as dist
import yaml

import pool
import tiny
from longspan.cli import train as command
from longspan.config import resolve
from longspan.runs import train
from longspan.runs.environment import LAUNCHER


def counted(patch, calls):
    complete = resolve.complete
    patch.setattr(resolve, "complete", lambda *a, **k: calls.append(a) or complete(*a, **k))


def rank(arguments):
    """One rank of the run, in a process of the pool; its exit code, and how often it resolved."""
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        counted(patch, calls)
        patch.setattr(train, "end_with_launcher", lambda: None)
        for name in ("init_distributed", "close_distributed"):
            patch.setattr(f"longspan.mesh.mesh.{name}", lambda *given: None)
        own = {"RANK": dist.get_rank(), "LOCAL_RANK": dist.get_rank(), LAUNCHER: os.getpid()}
        both = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}
        for name, value in (own | both).items():
            patch.setenv(name, str(value))
        return command.run(arguments), len(calls)


def test_a_run_is_resolved_once(tmp_path, monkeypatch):
    calls, ranks = [], []
    values = tiny.values(
        tiny.write_data(tmp_path), output_dir=str(tmp_path / "out"), max_steps=2, export_hf=False
    )
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))

    def start(launch, processes, arguments, device, kept, restarts, wait_s):
        ranks.extend(pool.run(processes, rank, arguments[1:]))
        return max(code for code, _ in ranks)

    monkeypatch.setattr(train, "start", start)
    counted(monkeypatch, calls)
    assert command.run([str(tmp_path / "config.yaml"), "--context-parallel-size", "2"]) == 0
    assert len(calls) == 1
    assert ranks == [(0, 0), (0, 0)]
    assert (tmp_path / "out" / "metrics.jsonl").read_text().count('"train"') == 2
