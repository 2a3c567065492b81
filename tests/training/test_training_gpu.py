"""Training on one CUDA device. Marked gpu: runs where there is a device."""

import json
import subprocess
import sys

import pytest
import yaml

import tiny

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("bf16", [False, True])
def test_one_gpu_follows_the_cpu(tmp_path, bf16):
    prefix = tiny.write_data(tmp_path)
    losses = {}
    for device in ("cpu", "cuda"):
        values = tiny.values(prefix, output_dir=device, params_dtype="float32", bf16=bf16, max_steps=10)
        values |= {"device": device, "kv_channels": 16}
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
        command = [sys.executable, "-m", "longspan", "train", "config.yaml", "--num-processes", "1"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        lines = (tmp_path / device / "metrics.jsonl").read_text().splitlines()
        losses[device] = [r["loss"] for r in map(json.loads, lines) if r["kind"] == "train"]
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=0.03 if bf16 else 1e-4)
