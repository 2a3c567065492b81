"""A function tile by tile: the same numbers, parameters it does not use, and what is kept."""

import gc

import pytest
import torch
from torch import nn

from longspan.models.memory.offload import Offload
from longspan.models.memory.tiled import _slices, tiled

H, N = 6, 10


class Two(nn.Module):
    """Two layers with biases, a parameter that is not used and one that is frozen."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.up = nn.Parameter(torch.randn(N, H, generator=g, dtype=torch.float64).to(dtype))
        self.bias = nn.Parameter(torch.randn(N, generator=g, dtype=torch.float64).to(dtype))
        self.unused = nn.Parameter(torch.zeros(3, dtype=dtype))
        self.down = nn.Parameter(torch.randn(H, N, generator=g, dtype=torch.float64).to(dtype))
        self.frozen = nn.Parameter(torch.ones(H, dtype=dtype), requires_grad=False)

    def forward(self, x):
        return torch.nn.functional.silu(x @ self.up.t() + self.bias) @ self.down.t() * self.frozen


def results(tokens, tiles, dtype=torch.float64, x_needed=True):
    module = Two(dtype)
    g = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, H, generator=g, dtype=torch.float64).to(dtype).requires_grad_(x_needed)
    dout = torch.randn(tokens, H, generator=g, dtype=torch.float64).to(dtype)
    y = module(x) if tiles is None else tiled(module, x, list(module.parameters()), tiles)
    y.backward(dout)
    return [y.detach(), x.grad, *(p.grad for p in module.parameters())]


@pytest.mark.parametrize("tokens", [1, 2, 7, 31])
@pytest.mark.parametrize("tiles", [1, 2, 3, 7, 31, 1000])
def test_any_number_of_tiles_gives_the_plain_numbers(tokens, tiles):
    for got, expected in zip(results(tokens, tiles), results(tokens, None), strict=True):
        assert (got is None) == (expected is None)
        if got is not None:
            torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-13)


def test_an_input_without_gradient_and_two_runs_with_equal_bits():
    first, second = results(31, 4, x_needed=False), results(31, 4, x_needed=False)
    assert first[1] is None
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(first, second))
    torch.testing.assert_close(first[2], results(31, None)[2], rtol=1e-13, atol=1e-13)


def test_gradients_of_bfloat16_weights_are_summed_in_float32():
    exact = results(4096, None)
    errors = []
    for tiles in (1, 64):
        got = results(4096, tiles, torch.bfloat16)
        errors.append(max(((a - b).norm() / b.norm()).item() for a, b in zip(got[2:4], exact[2:4])))
    assert errors[1] <= 1.5 * errors[0]


@pytest.mark.parametrize("tokens", [0, 1, 5, 16, 17])
@pytest.mark.parametrize("tiles", [1, 4, 5, 40])
def test_tiles_cover_all_tokens_once(tokens, tiles):
    parts = list(_slices(tokens, tiles))
    assert [i for part in parts for i in range(tokens)[part]] == list(range(tokens))
    lengths = [part.stop - part.start for part in parts]
    assert len(lengths) == max(1, min(tokens, tiles))
    assert max(lengths) - min(lengths) <= 1


def test_only_the_input_is_kept():
    kept = []
    module, x = Two(), torch.randn(32, H, dtype=torch.float64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        tiled(module, x, list(module.parameters()), 4)
    assert [t.data_ptr() for t in kept] == [x.data_ptr()]


# --- offloading, as far as a CPU shows it -----------------------------------------------------------------


def chain(layers, offload, x):
    for layer in layers:
        if offload is None:
            x = layer(x)
        else:
            with offload.layer(lambda layer=layer: layer.parameters()):
                x = layer(x)
    return x


def offloaded(offload, twice=False):
    layers = [Two() for _ in range(4)]
    x = torch.randn(9, H, generator=torch.Generator().manual_seed(2), dtype=torch.float64).requires_grad_()
    y = chain(layers, offload, x)
    if twice:
        y.sum().backward(retain_graph=True)
        chain(layers, offload, x)  # lets the first graph's layers go once more
    y.sum().backward()
    return [y.detach(), x.grad, *(p.grad for layer in layers for p in layer.parameters())]


@pytest.mark.parametrize("twice", [False, True])
def test_what_is_moved_comes_back_with_the_same_bits(twice):
    offload = Offload(torch.device("cpu"), minimum=1)
    for got, expected in zip(offloaded(offload, twice), offloaded(None, twice), strict=True):
        assert got is expected is None or torch.equal(got, expected)
    assert offload.moved


def test_weights_and_small_tensors_stay_and_a_tensor_is_moved_once():
    module = Two()
    x = torch.randn(9, H, dtype=torch.float64, requires_grad=True)
    offload = Offload(torch.device("cpu"), minimum=9 * H * 8)
    with offload.layer(lambda: module.parameters()):
        (x * x).sum()
    assert offload.moved == x.nbytes  # saved twice
    offload.moved = 0
    with offload.layer(lambda: []):
        y = (x * x).sum() + (x.view(2, -1) * x.view(2, -1)).sum()  # in another shape
    assert offload.moved == x.nbytes
    x.grad = None
    y.backward()
    assert torch.equal(x.grad, 4 * x)
    offload = Offload(torch.device("cpu"), minimum=9 * H * 8 + 1)
    with offload.layer(lambda: module.parameters()):
        (x * x).sum() + (module.up @ x.t()).sum()
    assert offload.moved == 0


def test_a_layer_is_let_go_when_the_one_after_the_next_ends_and_nothing_outlives_the_graph():
    offload = Offload(torch.device("cpu"), minimum=1)
    layers = [Two() for _ in range(4)]
    y = chain(layers, offload, torch.randn(9, H, dtype=torch.float64, requires_grad=True))
    groups = [ref() for ref in offload.on_device]
    assert len(groups) == 2
    assert all(group.here is not None for group in groups)
    before = groups[0].before()
    assert before.here is None
    assert before.host
    y.sum().backward()
    last = offload.last
    del groups, before, y
    gc.collect()
    assert last() is None
