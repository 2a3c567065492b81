"""Training on one CUDA device. Marked gpu: runs where there is a device."""

import json
import subprocess
import sys

import pytest
import torch
import yaml

import tiny
from longspan.mesh.mesh import close_distributed, init_distributed
from longspan.training.trainer import Trainer

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", autouse=True)
def world():
    init_distributed("cuda")
    yield
    close_distributed()


def losses(prefix, device, **changes):
    """Of ten steps."""
    values = {"params_dtype": "float32", "max_steps": 10, "kv_channels": 16} | changes
    trainer = Trainer(
        tiny.tiny_run(prefix, 1, device=device, **values),
        torch.device("cuda", 0) if device == "cuda" else torch.device("cpu"),
    )
    return [trainer.train_step(batches)["loss"] for batches in trainer.steps_ahead()]


@pytest.mark.parametrize(("changes", "tolerance"), [({}, 1e-4), ({"bf16": True}, 0.03)])
def test_one_gpu_follows_the_cpu(tmp_path, changes, tolerance):
    prefix = tiny.write_data(tmp_path)
    got, expected = (losses(prefix, device, **changes) for device in ("cuda", "cpu"))
    assert got == pytest.approx(expected, rel=tolerance)


def test_the_command_trains_on_the_gpu_and_writes_what_it_learned(tmp_path):
    prefix = tiny.write_data(tmp_path)
    values = tiny.values(prefix, output_dir="out", params_dtype="float32", bf16="auto", max_steps=10)
    values |= {"device": "auto", "kv_channels": 16}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    command = [sys.executable, "-m", "longspan", "train", "config.yaml", "--num-processes", "1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    written = [r["loss"] for r in records if r["kind"] == "train"]
    assert len(written) == 10
    assert written[-1] < written[0]
    resolved = yaml.safe_load((tmp_path / "out/config.yaml").read_text())
    assert (resolved["device"], resolved["bf16"]) == ("cuda", True)


@pytest.mark.parametrize("keys", [{}, {"gradient_checkpointing": "full", "tiled_mlp": True}])
def test_compiled_parts_follow_plain_ones(tmp_path, keys):
    prefix = tiny.write_data(tmp_path)
    got = losses(prefix, "cuda", torch_compile=True, **keys)
    assert got == pytest.approx(losses(prefix, "cuda"), rel=1e-4)
