"""Keys that save memory on one CUDA device. Marked gpu: runs where there is a device."""

import json
import subprocess
import sys

import pytest
import torch
import yaml

import tiny
from longspan.models.offload import Offload

pytestmark = pytest.mark.gpu

LAYERS, SIZE = 6, 2048


def peak_and_gradients(moved):
    """Six layers that keep three matrices each; with offloading, two layers' at a time are on the device."""
    device = torch.device("cuda", 0)
    torch.manual_seed(0)
    weights = [torch.randn(SIZE, SIZE, device=device).div_(SIZE**0.5).requires_grad_() for _ in range(LAYERS)]
    offload = Offload(device) if moved else None
    x = torch.randn(SIZE, SIZE, device=device, requires_grad=True)

    def layer(x, weight):
        return torch.sin(torch.cos(x @ weight).exp()) + x

    torch.cuda.reset_peak_memory_stats(device)
    start = torch.cuda.memory_allocated(device)
    for _ in range(2):  # as two micro-batches
        y = x
        for weight in weights:
            if offload is None:
                y = layer(y, weight)
            else:
                with offload.layer([weight]):
                    y = layer(y, weight)
        y.square().mean().backward()
        del y
    peak = torch.cuda.max_memory_allocated(device) - start
    return peak, [x.grad, *(w.grad for w in weights)]


def test_offloaded_layers_come_back_with_the_same_bits_and_leave_the_device():
    plain, expected = peak_and_gradients(False)
    less, got = peak_and_gradients(True)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert less < 0.75 * plain


KEYS = [
    {"gradient_checkpointing": "offload"},
    {"activation_offloading": True},
    {"activation_offloading": True, "gradient_checkpointing": "selective"},
    {"offload_params": True},
    {
        "tiled_mlp": True,
        "tiled_mlp_num_shards": 3,
        "offload_params": True,
        "gradient_checkpointing": "offload",
    },
]


def trained(folder, name, keys):
    prefix = tiny.write_data(folder)
    values = tiny.values(prefix, output_dir=name, params_dtype="float32", max_steps=5, **keys)
    values |= {"device": "cuda", "kv_channels": 64, "sequence_len": 512, "hidden_size": 256}
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    command = [sys.executable, "-m", "longspan", "train", "config.yaml", "--num-processes", "1"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = (folder / name / "metrics.jsonl").read_text().splitlines()
    return [r["loss"] for r in map(json.loads, lines) if r["kind"] == "train"]


@pytest.mark.parametrize("number", range(len(KEYS)))
def test_one_gpu_trains_the_same_with_each_key(tmp_path, number):
    assert trained(tmp_path, "keys", KEYS[number]) == pytest.approx(trained(tmp_path, "plain", {}), rel=1e-5)
