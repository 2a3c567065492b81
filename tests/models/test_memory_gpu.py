"""Keys that save memory on one CUDA device. Marked gpu: runs where there is a device."""

import pytest
import torch

import tiny
from longspan.mesh.mesh import close_distributed, init_distributed
from longspan.models.memory.offload import Offload
from longspan.training.trainer import Trainer

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
                with offload.layer(lambda weight=weight: [weight]):
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


@pytest.fixture(scope="module")
def prefix(tmp_path_factory):
    init_distributed("cuda")
    yield tiny.write_data(tmp_path_factory.mktemp("data"))
    close_distributed()


def trained(prefix, keys):
    """Losses of five steps."""
    sizes = {"kv_channels": 64, "sequence_len": 512, "hidden_size": 256}
    values = {"device": "cuda", "params_dtype": "float32", "max_steps": 5} | sizes | keys
    trainer = Trainer(tiny.tiny_run(prefix, 1, **values), torch.device("cuda", 0))
    return [trainer.train_step(batches)["loss"] for batches in trainer.steps_ahead()]


@pytest.fixture(scope="module")
def plain(prefix):
    return trained(prefix, {})


@pytest.mark.parametrize("number", range(len(KEYS)))
def test_one_gpu_trains_the_same_with_each_key(prefix, plain, number):
    # AdamW's first steps follow the sign of a gradient, so rounding grows: 1e-4 as for float32 curves elsewhere
    assert trained(prefix, KEYS[number]) == pytest.approx(plain, rel=1e-4)
