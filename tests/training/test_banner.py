"""The lines at the start of a run: what they name is what runs."""

from pathlib import Path

import pytest
import torch

import tiny
from longspan.config.run import Run
from longspan.context_parallel.run_layout import run_layout
from longspan.training.banner import banner
from longspan.training.sharding import Sharder


def sequence_line(run):
    text = banner(run, parameters=1, trained=1, samples=10, held_out=0, tested=0, steps=1, warmup=0,
                  device=torch.device("cpu"), local_rows=1, filling="", learned="", output=Path("out"))  # fmt: skip
    return next(line for line in text.splitlines() if line.strip().startswith("sequence"))


@pytest.mark.parametrize(
    ("comm_type", "name"),
    [("a2a", "contiguous"), ("p2p", "zigzag"), (["p2p", "a2a"], "zigzag")],
    ids=str,
)
def test_the_layout_that_is_named_is_the_one_that_runs(comm_type, name):
    changes = {"sequence_len": 4096, "context_parallel_size": 4, "sample_packing": False}
    run = Run.of(tiny.checked("data", 4, **changes, cp_comm_type=comm_type).config)
    planned = []
    Sharder(run, 0, 0, planned.append).local_rows()
    assert planned == [run_layout(run, 4096)]
    assert planned[0].name == name
    assert f"context parallel ranks ({name}, " in sequence_line(run)
