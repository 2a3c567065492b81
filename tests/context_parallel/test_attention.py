"""Attention cut over ranks against one dense masked reference in fp64: values, lse and gradients."""

import math

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pool
from longspan import TransformerConfig, parallel_state
from longspan.context_parallel import (
    DotProductAttention,
    PackedSeqParams,
    SequenceLayout,
    context_parallel_attention,
    cpu_blocks,
)
from longspan.context_parallel.kernels import KERNELS, merge


def dense(q, k, v, cu_seqlens, causal=True, scale=None):
    """The oracle: q [t, n, d], k and v [t, m, d] in one dense masked softmax. Returns out, lse [n, t]."""
    t, n, d = q.shape
    k, v = (x.repeat_interleave(n // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("snd,tnd->nst", q, k) * (scale or 1 / math.sqrt(d))
    document = torch.bucketize(torch.arange(t), torch.tensor(cu_seqlens[1:]), right=True)
    seen = document[:, None] == document[None, :]
    if causal:
        seen &= torch.arange(t)[:, None] >= torch.arange(t)[None, :]
    scores = scores.masked_fill(~seen, float("-inf"))
    return torch.einsum("nst,tnd->snd", scores.softmax(-1), v), scores.logsumexp(-1)


def inputs(t, n, m, d, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    q, dout = (torch.randn(t, n, d, generator=g, dtype=torch.float64).to(dtype) for _ in range(2))
    k, v = (torch.randn(t, m, d, generator=g, dtype=torch.float64).to(dtype) for _ in range(2))
    return q, k, v, dout


def reference(t, n, m, d, cu_seqlens, causal=True):
    q, k, v, dout = inputs(t, n, m, d)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, lse = dense(*leaves, cu_seqlens, causal)
    return (out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, dout))


def make_layout(kind, cu_seqlens, ranks, multiple_of=1):
    if kind == "per_document_zigzag":
        return SequenceLayout.per_document_zigzag(cu_seqlens, ranks, multiple_of=multiple_of)
    make = getattr(SequenceLayout, kind)
    return make(cu_seqlens[-1], ranks, cu_seqlens=cu_seqlens, multiple_of=multiple_of)


def distributed(cases):
    """For each case: out, lse, dq, dk, dv of the whole sequence, put together from the ranks."""
    results = []
    for kind, comm, n, m, d, cu, causal in cases:
        group, rank = dist.group.WORLD, dist.get_rank()
        layout = make_layout(kind, cu, dist.get_world_size())
        local = [layout.shard(x, rank).requires_grad_() for x in inputs(cu[-1], n, m, d)]
        out, lse = context_parallel_attention(
            *local[:3], group=group, layout=layout, causal=causal, cp_comm_type=comm
        )
        grads = torch.autograd.grad(out, local[:3], local[3].detach())
        whole = [layout.unshard(x, group) for x in (out.detach(), lse.t().contiguous(), *grads)]
        padding = layout.positions(rank) >= layout.total
        assert (out[padding] == 0).all()
        assert all((g[padding] == 0).all() for g in grads)
        results.append([whole[0], whole[1].t(), *whole[2:]])
    return results if dist.get_rank() == 0 else None


def check(world, cases, tolerance=1e-10):
    results = pool.run(world, distributed, cases)[0]
    for case, got in zip(cases, results):
        _, _, n, m, d, cu, causal = case
        for name, x, ref in zip(
            ("out", "lse", "dq", "dk", "dv"), got, reference(cu[-1], n, m, d, cu, causal)
        ):
            error = (x - ref).abs().max() / ref.abs().max().clamp_min(1e-300)
            assert error <= tolerance, f"{name} of {case} on {world} ranks: {error:.1e}"


KINDS = ("contiguous", "zigzag", "per_document_zigzag")


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_equals_dense_attention(world):
    """Lengths that divide by nothing, one-token documents, fewer key/value heads than ranks."""
    check(
        world,
        [
            (kind, comm, n, m, 8, cu, causal)
            for kind in KINDS
            for comm in ("p2p", "all_gather")
            for n, m in ((4, 4), (4, 2), (3, 1))
            for cu in ((0, 37), (0, 1, 2, 17, 40, 41), (0, 16, 32))
            for causal in (True, False)
        ],
    )


@pytest.mark.parametrize("world", [6, 8])
def test_many_ranks_and_empty_ones(world):
    """More ranks than some documents have tokens; ranks with nothing but padding."""
    cases = [
        (kind, comm, 2, 1, 4, cu, True)
        for kind in KINDS
        for comm in ("p2p", "all_gather")
        for cu in ((0, 3), (0, 5, 6, 29), (0, 64))
    ]
    check(world, cases)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_random_packs(data):
    world = data.draw(st.sampled_from([2, 3, 4]))
    cases = []
    for _ in range(6):
        lengths = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=8))
        m = data.draw(st.sampled_from([1, 2]))
        n = m * data.draw(st.sampled_from([1, 2, 3]))
        cu = tuple(sum(lengths[:i]) for i in range(len(lengths) + 1))
        kind, comm = data.draw(st.sampled_from(KINDS)), data.draw(st.sampled_from(["p2p", "all_gather"]))
        cases.append((kind, comm, n, m, 4, cu, data.draw(st.booleans())))
    check(world, cases)


# --- DotProductAttention ------------------------------------------------------------------


def batched(cp, b, comm):
    parallel_state.initialize_model_parallel(context_parallel_size=cp)
    config = TransformerConfig(
        num_layers=2, hidden_size=16, num_attention_heads=4, num_query_groups=2, context_parallel_size=cp
    )
    attention = DotProductAttention(config, 1, cp_comm_type=comm)
    layout = SequenceLayout.zigzag(24, cp)
    rank = parallel_state.get_context_parallel_rank()
    rows = [inputs(24, 4, 2, 4, seed=i) for i in range(b)]
    q, k, v, dout = (torch.stack(x, dim=1) for x in zip(*rows))
    local = [layout.shard(x, rank).requires_grad_() for x in (q, k, v)]
    context, lse = attention(*local)
    assert context.shape == local[0].shape
    assert lse.shape == (b, 4, 24 // cp)
    assert lse.dtype == torch.float64
    grads = torch.autograd.grad(context, local, layout.shard(dout, rank))
    group = parallel_state.get_context_parallel_group()
    for i, (qi, ki, vi, di) in enumerate(rows):
        leaves = [x.requires_grad_() for x in (qi, ki, vi)]
        out, _ = dense(*leaves, (0, 24))
        expected = (out.detach(), *torch.autograd.grad(out, leaves, di))
        for got, ref in zip((context.detach(), *grads), expected):
            torch.testing.assert_close(layout.unshard(got, group)[:, i], ref, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("comm", ["p2p", "all_gather", "allgather"])
def test_dot_product_attention_takes_zigzag_shards_of_a_batch(comm):
    pool.run(4, batched, 4, 2, comm)
    pool.run(2, batched, 1, 3, comm)


def refusals():
    parallel_state.initialize_model_parallel(context_parallel_size=2)
    config = TransformerConfig(num_layers=1, hidden_size=16, num_attention_heads=4, context_parallel_size=2)
    with pytest.raises(ValueError, match="a2a.*not supported yet"):
        DotProductAttention(config, 1, cp_comm_type="a2a")
    with pytest.raises(ValueError, match="cp_comm_type 'ring'"):
        DotProductAttention(config, 1, cp_comm_type="ring")
    attention = DotProductAttention(config, 1)
    x = torch.randn(4, 1, 4, 4)
    with pytest.raises(ValueError, match="attention_mask"):
        attention(x, x, x, attention_mask=torch.ones(4, 4))
    with pytest.raises(ValueError, match="layout.shard"):
        attention(x, x, x, layout=SequenceLayout.zigzag(16, 2))
    with pytest.raises(ValueError, match="3 ranks"):
        attention(x, x, x, layout=SequenceLayout.zigzag(12, 3))
    layout = SequenceLayout.zigzag(8, 2)
    q = torch.randn(4, 4, 4)
    with pytest.raises(ValueError, match="window"):
        context_parallel_attention(q, q, q, group=dist.group.WORLD, layout=layout, window=4)
    with pytest.raises(ValueError, match="divide"):
        context_parallel_attention(q, q[:, :3], q[:, :3], group=dist.group.WORLD, layout=layout)


def test_refuses_what_it_cannot_do():
    pool.run(2, refusals)


# --- kernels ------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", ["cpu-blocks", "cpu-flash", "math"])
def test_kernel_equals_dense(name, causal, monkeypatch):
    for constant, value in (("SMALL", 0), ("ROWS", 34), ("KEYS", 23)):  # several blocks, the last ones short
        monkeypatch.setattr(cpu_blocks, constant, value)
    t = 1500 if name == "math" else 150  # math goes through the rows in blocks of 256
    q, k, v, dout = inputs(t, 4, 2, 8)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, lse = dense(*leaves, (0, t), causal)
    expected = torch.autograd.grad(out, leaves, dout)
    kernel = KERNELS[name]
    q, k, v, dout = (x.detach().unsqueeze(1) for x in (q, k, v, dout))
    got, got_lse = kernel.forward(q, k, v, causal, 1 / math.sqrt(8))
    grads = kernel.backward(dout, q, k, v, got, got_lse, causal, 1 / math.sqrt(8))
    torch.testing.assert_close(got.squeeze(1), out, rtol=0, atol=1e-12)
    torch.testing.assert_close(got_lse[0], lse, rtol=0, atol=1e-12)
    for x, ref in zip(grads, expected):
        torch.testing.assert_close(x.squeeze(1), ref, rtol=0, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "keys", "causal"), [(1500, 1500, True), (700, 1300, False)])
def test_cpu_blocks_is_as_near_to_float64_as_flash(rows, keys, causal, dtype):
    g = torch.Generator().manual_seed(0)
    q, dout = (torch.randn(rows, 2, 6, 16, generator=g).to(dtype) for _ in range(2))
    k, v = (torch.randn(keys, 2, 2, 16, generator=g).to(dtype) for _ in range(2))

    def run(name, dtype):
        x = [t.to(dtype) for t in (q, k, v, dout)]
        out, lse = KERNELS[name].forward(*x[:3], causal, 0.25)
        return out, lse, *KERNELS[name].backward(x[3], *x[:3], out, lse, causal, 0.25)

    for blocks, flash, exact in zip(
        run("cpu-blocks", dtype), run("cpu-flash", dtype), run("math", torch.float64)
    ):
        error, allowed = ((x.double() - exact).square().mean().sqrt().item() for x in (blocks, flash))
        assert error <= 2 * allowed


def test_merge_guards_rows_without_keys():
    out, lse = (
        torch.zeros(2, 1, 1, 3, dtype=torch.float64),
        torch.full((1, 1, 2), float("-inf"), dtype=torch.float64),
    )
    merge(out, lse, torch.ones_like(out), lse.clone())
    assert (out == 0).all()
    assert (lse == float("-inf")).all()
    merge(out, lse, torch.ones_like(out), torch.zeros_like(lse))
    assert (out == 1).all()
    assert (lse == 0).all()


def bf16_error():
    cu = (0, 700, 1000)
    layout = SequenceLayout.zigzag(1000, dist.get_world_size(), cu_seqlens=cu)
    exact = reference(1000, 4, 2, 16, cu)
    local = [
        layout.shard(x, dist.get_rank()).requires_grad_() for x in inputs(1000, 4, 2, 16, torch.bfloat16)
    ]
    group = dist.group.WORLD
    out, lse = context_parallel_attention(*local[:3], group=group, layout=layout)
    grads = torch.autograd.grad(out, local[:3], local[3].detach())
    assert lse.dtype == torch.float32
    got = [layout.unshard(x, group) for x in (out.detach(), *grads)]
    # the same precision on one rank, without any cutting of the sequence
    q, k, v, dout = inputs(1000, 4, 2, 16, torch.bfloat16)
    plain = [[], [], [], []]
    for a, b in zip(cu, cu[1:]):
        leaves = [x[a:b].transpose(0, 1).unsqueeze(0).requires_grad_() for x in (q, k, v)]
        o = torch.nn.functional.scaled_dot_product_attention(*leaves, is_causal=True, enable_gqa=True)
        both = (o.detach(), *torch.autograd.grad(o, leaves, dout[a:b].transpose(0, 1).unsqueeze(0)))
        for held, x in zip(plain, both):
            held.append(x[0].transpose(0, 1))
    q, k, v, dout = (x.double() for x in (q, k, v, dout))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    o, _ = dense(*leaves, cu)
    exact = (o.detach(), *torch.autograd.grad(o, leaves, dout))
    return [
        ((x - e).abs().max() / (torch.cat(p) - e).abs().max()).item() for x, p, e in zip(got, plain, exact)
    ]


def test_bf16_is_at_most_twice_as_far_off_as_one_process():
    ratios = pool.run(4, bf16_error)[0]
    assert max(ratios) <= 2.0, ratios


def packing_refusals():
    parallel_state.initialize_model_parallel(context_parallel_size=2)
    attention = DotProductAttention(TransformerConfig(num_layers=1, hidden_size=16, num_attention_heads=4), 1)
    x, cu = torch.randn(8, 4, 4), torch.tensor([0, 8, 16])
    row = x.unsqueeze(1)
    for message, args, kwargs in (
        ("qkv_format None", (row, row, row), {"packed_seq_params": PackedSeqParams(cu_seqlens_q=cu)}),
        ("qkv_format 'bshd'", (row, row, row), {"packed_seq_params": PackedSeqParams("bshd")}),
        ("2 documents in a batch of 1", (row, row, row), {"packed_seq_params": PackedSeqParams("sbhd", cu)}),
        ("differ", (x, x, x), {"packed_seq_params": PackedSeqParams("thd", cu, torch.tensor([0, 4, 16]))}),
        (
            "Give one of them",
            (x, x, x),
            {"packed_seq_params": PackedSeqParams("thd", cu), "layout": SequenceLayout.zigzag(16, 2)},
        ),
        ("as one row", (torch.cat([row, row], 1),) * 3, {"packed_seq_params": PackedSeqParams("thd", cu)}),
        ("batch of 1, key of 2", (row, torch.cat([row, row], 1), torch.cat([row, row], 1)), {}),
        ("must be alike", (row, row.double(), row), {}),
        ("dims", (row, x, x), {}),
    ):
        with pytest.raises(ValueError, match=message):
            attention(*args, **kwargs)


def test_packing_that_would_be_ignored_is_refused():
    pool.run(2, packing_refusals)


def padded_documents():
    """thd with padding behind documents, one of them empty: what Megatron-style callers hand in."""
    parallel_state.initialize_model_parallel(context_parallel_size=2)
    attention = DotProductAttention(TransformerConfig(num_layers=1, hidden_size=16, num_attention_heads=4), 1)
    cu, padded = (0, 5, 5, 16), (0, 8, 16, 32)
    q, k, v, dout = inputs(16, 4, 2, 4)
    layout = SequenceLayout.per_document_zigzag(cu, 2, cu_seqlens_padded=padded)
    rank = dist.get_rank()
    params = PackedSeqParams(
        "thd", torch.tensor(cu), torch.tensor(cu), torch.tensor(padded), torch.tensor(padded), 16, 16
    )
    local = [layout.shard(x, rank).requires_grad_() for x in (q, k, v)]
    assert local[0].shape[0] == 16
    out, lse = attention(*local, packed_seq_params=params)
    assert lse.shape == (4, 16)
    grads = torch.autograd.grad(out, local, layout.shard(dout, rank))
    for got, expected in zip((out.detach(), *grads), (reference(16, 4, 2, 4, cu)[i] for i in (0, 2, 3, 4))):
        torch.testing.assert_close(layout.unshard(got, dist.group.WORLD), expected, rtol=1e-10, atol=1e-10)


def test_padded_documents():
    pool.run(2, padded_documents)
