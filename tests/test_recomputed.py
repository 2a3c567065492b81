"""What is computed again in backward: the same bits as plain autograd, and less kept."""

import pytest
import torch
import torch.nn.functional as F

from longspan.recomputed import gated_linear, rms_norm


def kept(function, *leaves):
    """Output, gradients, and how many elements autograd keeps beside the leaves."""
    sizes = {}

    def pack(t):
        sizes[t.untyped_storage().data_ptr()] = t.numel()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = function(*leaves)
    for leaf in leaves:
        sizes.pop(leaf.untyped_storage().data_ptr(), None)
    dout = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.dtype)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    return [y, *torch.autograd.grad(y, wanted, dout)], sum(sizes.values())


def leaves_of(shapes, dtype, frozen=()):
    g = torch.Generator().manual_seed(0)
    leaves = [torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for shape in shapes]
    return [x.requires_grad_(i not in frozen) for i, x in enumerate(leaves)]


@pytest.mark.parametrize("frozen", [(), (1,)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_rms_norm_keeps_its_input_only(dtype, frozen):
    leaves = leaves_of([(7, 2, 64), (64,)], dtype, frozen)
    got, size = kept(lambda x, w: rms_norm(x, w, 1e-5), *leaves)
    expected, _ = kept(lambda x, w: F.rms_norm(x, w.shape, w, 1e-5), *leaves)
    assert all(torch.equal(a, b) for a, b in zip(got, expected))
    assert size == 0


@pytest.mark.parametrize("frozen", [(), (2,)])
@pytest.mark.parametrize("activation", [F.silu, F.gelu])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_gated_linear_keeps_gate_and_up_only(dtype, activation, frozen):
    leaves = leaves_of([(7, 2, 96), (7, 2, 96), (64, 96)], dtype, frozen)
    got, size = kept(lambda gate, up, w: gated_linear(gate, up, w, lambda g, u: activation(g) * u), *leaves)
    expected, plain = kept(lambda gate, up, w: F.linear(activation(gate) * up, w), *leaves)
    assert all(torch.equal(a, b) for a, b in zip(got, expected))
    assert size == 0 < plain
