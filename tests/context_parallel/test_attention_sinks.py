"""Attention sinks at their limits, in every precision, and what is refused (test_attention has every way to cut them)."""

import pytest
import torch
import torch.distributed as dist

import pool
from longspan import TransformerConfig, parallel_state
from longspan.context_parallel import (
    DotProductAttention,
    SequenceLayout,
    context_parallel_attention,
    hybrid,
)
from longspan.context_parallel.kernels.choose import CPU_KERNELS
from oracle import dense, inputs, sinks_of

CU = (0, 1, 20, 41)


def attend(sinks, backend="auto", comm="p2p", dtype=torch.float64, cu=CU, window=None):
    """out, lse and the gradients of q, k, v and the sinks of this rank; those of the sinks summed over ranks."""
    group, rank, ranks = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    layout = SequenceLayout.make("balanced", cu[-1], ranks, cu_seqlens=cu)
    *local, dout = (layout.shard(x, rank) for x in inputs(cu[-1], 4, 2, 8, dtype))
    leaves = [x.requires_grad_() for x in (*local, *([] if sinks is None else [sinks.to(dtype)]))]
    out, lse = context_parallel_attention(
        *leaves[:3],
        sinks=None if sinks is None else leaves[3],
        group=group,
        layout=layout,
        window=window,
        cp_comm_type=comm,
        backend=backend,
    )
    grads = torch.autograd.grad(out, leaves, dout)
    for x in grads[3:]:
        dist.all_reduce(x)
    return out.detach(), lse, *grads


def limits(comm):
    plain = attend(None, comm=comm)
    none = attend(torch.full((4,), -torch.inf, dtype=torch.float64), comm=comm)
    assert all(torch.equal(a, b) for a, b in zip(plain, none))
    assert torch.equal(none[-1], torch.zeros(4, dtype=torch.float64))
    for size in (1e4, 1e30, torch.inf):
        out, lse, *grads = attend(torch.full((4,), size, dtype=torch.float64), comm=comm)
        assert all(torch.equal(x, torch.zeros_like(x)) for x in (out, *grads))
        # Rows of padding are no rows of a softmax, with a sink or without.
        assert torch.equal(lse.isneginf(), plain[1].isneginf())
        assert (lse[~lse.isneginf()] == size).all()


@pytest.mark.parametrize("comm", ["p2p", "all_gather", "a2a"])
def test_a_sink_of_minus_infinity_is_none_and_a_large_one_takes_everything(comm):
    pool.run(2, limits, comm)
    pool.run(4, limits, comm)


def every_kernel():
    # Large enough for blocks, which small tiles do not use.
    cu = (0, 700, 1400)
    for dtype, error in ((torch.float64, 1e-10), (torch.float32, 2e-5), (torch.bfloat16, 2e-2)):
        *qkv, dout = (x.double() for x in inputs(cu[-1], 4, 2, 8, dtype))
        leaves = [x.requires_grad_() for x in (*qkv, sinks_of(4))]
        out, lse = dense(*leaves[:3], cu, sinks=leaves[3])
        expected = (out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, dout))
        for name, kernel in CPU_KERNELS.items():
            for got, ref in zip(attend(sinks_of(4), kernel, dtype=dtype, cu=cu), expected):
                worst = (got.double() - ref).abs().max() / ref.abs().max()
                assert worst < error, (name, dtype, worst)


def test_every_cpu_kernel_in_every_precision():
    pool.run(1, every_kernel)


LENGTHS = (19, 1, 7, 30, 2)


def samples_of_their_own_degree():
    """The micro-batches of hybrid context parallelism, each against one process."""
    group, rank, ranks = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    degrees = set()
    for batch in hybrid.schedule(LENGTHS, ranks, 24):
        samples, layout = hybrid.layout_of(LENGTHS, batch)
        degrees |= {sum(any(piece[0] == s for piece in held) for held in batch) for s in samples}
        *qkv, dout = inputs(layout.total, 4, 2, 8)
        leaves = [x.requires_grad_() for x in (*qkv, sinks_of(4))]
        out, lse = dense(*leaves[:3], layout.cu_seqlens, window=9, sinks=leaves[3])
        expected = (out, lse.t(), *torch.autograd.grad(out, leaves, dout))
        local = [layout.shard(x.detach(), rank).requires_grad_() for x in qkv] + [
            sinks_of(4).requires_grad_()
        ]
        out, lse = context_parallel_attention(
            *local[:3], sinks=local[3], group=group, layout=layout, window=9
        )
        *grads, of_sinks = torch.autograd.grad(out, local, layout.shard(dout, rank))
        dist.all_reduce(of_sinks)
        got = [layout.unshard(x.detach(), group) for x in (out, lse.t().contiguous(), *grads)]
        for x, ref in zip((*got, of_sinks), expected):
            torch.testing.assert_close(x, ref.detach(), rtol=1e-10, atol=1e-10)
    return degrees


def test_hybrid_context_parallelism():
    degrees = pool.run(3, samples_of_their_own_degree)[0]
    assert len(degrees) > 1, degrees


def module(kind):
    parallel_state.initialize_model_parallel(context_parallel_size=2)
    config = TransformerConfig(num_layers=1, hidden_size=16, num_attention_heads=4, softmax_type=kind)
    attention, x, sinks = DotProductAttention(config, 1), torch.randn(4, 1, 4, 4), torch.zeros(4)
    if kind == "off-by-one":
        learned = TransformerConfig(
            num_layers=1, hidden_size=16, num_attention_heads=4, softmax_type="learnable"
        )
        expected = DotProductAttention(learned, 1)(x, x, x, softmax_offset=sinks)
        assert all(torch.equal(a, b) for a, b in zip(attention(x, x, x), expected))
    wrong = None if kind == "learnable" else sinks
    with pytest.raises(ValueError, match=f"softmax_offset is .*, softmax_type is '{kind}'"):
        attention(x, x, x, softmax_offset=wrong)
    with pytest.raises(ValueError, match=r"sinks \(3,\) on cpu, query of 4 heads"):
        context_parallel_attention(
            x, x, x, sinks=torch.zeros(3), group=dist.group.WORLD, layout=SequenceLayout.zigzag(8, 2)
        )


@pytest.mark.parametrize("kind", ["vanilla", "learnable", "off-by-one"])
def test_the_module_takes_what_its_config_names(kind):
    pool.run(2, module, kind)
