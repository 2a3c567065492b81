"""Attention cut over ranks against one dense masked reference in fp64: values, lse and gradients."""

import dataclasses
import math
from dataclasses import dataclass
from functools import cache
from itertools import product

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import pool
from longspan import AttnMaskType, TransformerConfig, parallel_state
from longspan.context_parallel import (
    DotProductAttention,
    PackedSeqParams,
    SequenceLayout,
    context_parallel_attention,
)
from longspan.context_parallel.kernels.cuda import VarlenKernel
from longspan.context_parallel.layout import LAYOUTS
from longspan.context_parallel.refusals import check_heads_of
from longspan.context_parallel.schedule import Schedule
from longspan.context_parallel.tiles import Mask
from longspan.mesh.topology import hierarchical_groups
from marks import slow
from oracle import dense, inputs, sinks_of


@dataclass(frozen=True)
class Case:
    """One attention problem and a way to cut it. ``comm`` a2a+p2p moves heads inside groups of ``inner`` ranks."""

    layout: str = "zigzag"
    comm: str = "p2p"
    heads: tuple[int, int] = (4, 2)  # query, key/value
    d: int = 8
    cu: tuple[int, ...] = (0, 37)
    causal: bool = True
    window: int | None = None
    inner: int = 1
    rows_a_step: int = 0
    sinks: bool = False

    def fits(self, world):
        degree = {"a2a": world, "a2a+p2p": self.inner}.get(self.comm, 1)
        return self.heads[0] % degree == 0 and world % degree == 0 and (self.causal or self.window is None)


@cache
def reference(heads, d, cu, causal, window, sinks=False):
    q, k, v, dout = inputs(cu[-1], *heads, d)
    of_heads = [sinks_of(heads[0])] if sinks else []
    leaves = [x.requires_grad_() for x in (q, k, v, *of_heads)]
    out, lse = dense(*leaves[:3], cu, causal, window, sinks=leaves[3] if sinks else None)
    return (out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, dout))


def hierarchy(inner):
    """This rank's inner and outer groups; every rank makes all of them once in a world. Those of an earlier one are let
    go: each group has three threads."""
    made, key = vars(hierarchy).setdefault("made", {}), (dist.group.WORLD, inner)
    for earlier in [k for k in made if k[0] is not dist.group.WORLD]:
        del made[earlier]
    if key not in made:
        world = dist.get_world_size()
        groups = hierarchical_groups(range(world), [inner, world // inner])
        rank = dist.get_rank()
        everyone = [[(ranks, dist.new_group(ranks)) for ranks in level] for level in groups]
        made[key] = [next(g for ranks, g in level if rank in ranks) for level in everyone]
    return made[key]


def distributed(cases, deterministic_twice=False, backend="auto"):
    """For each case: out, lse, dq, dk, dv of the whole sequence, put together from the ranks."""
    results = []
    for case in cases:
        group, rank, (n, m) = dist.group.WORLD, dist.get_rank(), case.heads
        total, ranks = case.cu[-1], dist.get_world_size()
        layout = SequenceLayout.make(case.layout, total, ranks, cu_seqlens=case.cu, windows=[case.window])
        *local, dout = (layout.shard(x, rank).requires_grad_() for x in inputs(total, n, m, case.d))
        sinks = [sinks_of(n).requires_grad_()] if case.sinks else []

        def run(case=case, layout=layout, local=local, dout=dout, sinks=sinks):
            out, lse = context_parallel_attention(
                *local,
                sinks=sinks[0] if sinks else None,
                group=dist.group.WORLD,
                layout=layout,
                causal=case.causal,
                window=case.window,
                cp_comm_type=case.comm,
                hierarchical_groups=hierarchy(case.inner) if case.comm == "a2a+p2p" else None,
                backend=backend,
                rows_a_step=case.rows_a_step,
            )
            return out, lse, *torch.autograd.grad(out, local + sinks, dout.detach())

        out, lse, *grads = run()
        if deterministic_twice:
            assert all(torch.equal(a, b) for a, b in zip(run(), (out, lse, *grads)))
        for x in grads[3:]:
            dist.all_reduce(x)
        grads, of_sinks = grads[:3], grads[3:]
        whole = [layout.unshard(x, group) for x in (out.detach(), lse.t().contiguous(), *grads)]
        padding = layout.positions(rank) >= layout.total
        assert (out[padding] == 0).all()
        assert all((g[padding] == 0).all() for g in grads)
        results.append([whole[0], whole[1].t(), *whole[2:], *of_sinks])
    vars(hierarchy).pop("made", None)
    return results if dist.get_rank() == 0 else None


def check(world, cases, tolerance=1e-10, deterministic_twice=False):
    cases = [case for case in cases if case.fits(world)]
    compare(world, cases, pool.run(world, distributed, cases, deterministic_twice)[0], tolerance)


def compare(world, cases, results, tolerance=1e-10):
    for case, got in zip(cases, results):
        expected = reference(case.heads, case.d, case.cu, case.causal, case.window, case.sinks)
        assert len(got) == len(expected)
        for name, x, ref in zip(("out", "lse", "dq", "dk", "dv", "dsinks"), got, expected):
            error = (x - ref).abs().max() / ref.abs().max().clamp_min(1e-300)
            assert error <= tolerance, f"{name} of {case} on {world} ranks: {error:.1e}"


COMMS = ("p2p", "all_gather", "a2a", "a2a+p2p")
HEADS = ((12, 12), (12, 3), (12, 1), (4, 2))
PACKS = ((0, 37), (0, 1, 2, 17, 40, 41), (0, 16, 32))
MASKS = ((True, None), (False, None), (True, 7))


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("comm", COMMS)
def test_equals_dense_attention(world, comm):
    """Lengths that divide by nothing, one-token documents, fewer key/value heads than ranks.

    Every layout meets every pack with every mask. The heads go round, so that each number of heads meets every
    layout, every pack and every mask.
    """
    inner = 2 if world == 4 else world
    heads = [each for each in HEADS if Case(comm=comm, heads=each, inner=inner).fits(world)]
    cases = [
        Case(layout, comm, heads[(i + j + k) % len(heads)], 8, cu, causal, window, inner, sinks=sinks)
        for i, layout in enumerate(LAYOUTS)
        for j, cu in enumerate(PACKS)
        for k, (causal, window) in enumerate(MASKS)
        for sinks in (False, True)
    ]
    check(world, cases)


#: heads of keys and values, packs, windows and rows of a step for many ranks
FEW_ROWS = (
    (1, (0, 3), None, 0),
    (4, (0, 5, 6, 29), None, 12),
    (1, (0, 5, 6, 29), 5, 0),
    (4, (0, 64), None, 0),
)


@pytest.mark.parametrize("world", slow([6, 8], 8))
def test_many_ranks_and_empty_ones(world):
    """More ranks than some documents have tokens; ranks with nothing but padding.

    Each of FEW_ROWS meets every layout and every type of communication, and at 8 ranks others than at 6.
    """
    cases = []
    for (i, layout), (j, comm) in product(enumerate(LAYOUTS), enumerate(COMMS)):
        m, cu, window, least = FEW_ROWS[(i + j + world) % 4]
        sinks = (i + j) % 3 == 0
        cases.append(Case(layout, comm, (24, m), 4, cu, True, window, 2, rows_a_step=least, sinks=sinks))
    check(world, cases)


def test_inner_groups_of_one_rank_keep_the_order_of_rows():
    """a2a+p2p that moves no heads: padding between documents stays where it is."""
    cu = (0, 3, 39, 53)
    check(
        2,
        [Case("per_document_zigzag", "a2a+p2p", (2, 1), 4, cu, causal, inner=1) for causal in (True, False)],
    )


@pytest.mark.slow
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_random_packs(data):
    world = data.draw(st.sampled_from([2, 3, 4, 6, 8]))
    cases = []
    for _ in range(5):
        lengths = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=8))
        m = data.draw(st.sampled_from([1, 2, 3]))
        comm = data.draw(st.sampled_from(COMMS))
        inner = data.draw(st.sampled_from([i for i in range(1, world + 1) if world % i == 0]))
        degree = {"a2a": world, "a2a+p2p": inner}.get(comm, 1)
        n = math.lcm(m, degree) * data.draw(st.sampled_from([1, 2, 3]))
        causal = data.draw(st.booleans())
        cases.append(
            Case(
                data.draw(st.sampled_from(LAYOUTS)),
                comm,
                (n, m),
                4,
                tuple(sum(lengths[:i]) for i in range(len(lengths) + 1)),
                causal,
                data.draw(st.one_of(st.none(), st.integers(1, 50))) if causal else None,
                inner,
                data.draw(st.sampled_from([0, 10, 512])),
                data.draw(st.booleans()),
            )
        )
    check(world, cases, deterministic_twice=True)


class PackedMath(VarlenKernel):
    """A kernel that takes many sequences in one call, as CUDA's do, made of plain PyTorch."""

    name = "packed math"

    def __init__(self, deterministic):
        super().__init__(deterministic)
        self.calls = 0

    def _scores(self, q, k, mask, scale):
        rows, keys = q.shape[0], k.shape[0]
        seen = torch.ones(rows, keys, dtype=torch.bool)
        if mask is Mask.CAUSAL:  # aligned at the bottom right
            seen = seen.tril(keys - rows)
        elif mask is Mask.ANTI:
            seen = seen.triu(keys - rows)
        return torch.einsum("snd,tnd->nst", q, k).mul(scale).masked_fill(~seen, float("-inf"))

    def _sequences(self, call):
        assert call.max_q == call.cu_q.diff().max()
        assert call.max_k == call.cu_k.diff().max()
        q, k = call.cu_q.tolist(), call.cu_k.tolist()
        return zip(*(map(slice, x, x[1:]) for x in (q, k)))

    def forward_varlen(self, q, k, v, call, scale):
        self.calls += 1
        out, lse = torch.empty_like(q), q.new_empty(q.shape[1], q.shape[0])
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        for a, b in self._sequences(call):
            scores = self._scores(q[a], k[b], call.mask, scale)
            lse[:, a] = scores.logsumexp(-1)
            out[a] = torch.einsum("nst,tnd->snd", scores.softmax(-1), v[b])
        return out, lse

    def backward_varlen(self, dout, q, k, v, out, lse, call, scale):
        share = q.shape[1] // k.shape[1]
        wide_k, wide_v = (x.repeat_interleave(share, 1) for x in (k, v))
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(wide_k), torch.zeros_like(wide_v)
        for a, b in self._sequences(call):
            p = (self._scores(q[a], wide_k[b], call.mask, scale) - lse[:, a, None]).exp()
            delta = (dout[a] * out[a]).sum(-1).t().unsqueeze(-1)
            ds = p * (torch.einsum("snd,tnd->nst", dout[a], wide_v[b]) - delta) * scale
            dq[a] += torch.einsum("nst,tnd->snd", ds, wide_k[b])
            dk[b] += torch.einsum("nst,snd->tnd", ds, q[a])
            dv[b] += torch.einsum("nst,snd->tnd", p, dout[a])
        return dq, *(x.unflatten(1, (-1, share)).sum(2) for x in (dk, dv))


class Numbers(TorchDispatchMode):
    """Counts the calls of torch's ``index_add_``, and the numbers that are sent."""

    def __init__(self):
        super().__init__()
        self.index_adds = self.sent = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.index_adds += func.overloadpacket == torch.ops.aten.index_add_
        if func.overloadpacket == torch.ops.c10d.send:
            self.sent += sum(tensor.numel() for tensor in args[0])
        return func(*args, **kwargs or {})


def distributed_packed(cases, deterministic):
    kernel = PackedMath(deterministic)
    with Numbers() as numbers:
        results = distributed(cases, backend=kernel)
    return results, kernel.calls, numbers.index_adds


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_kernels_that_take_many_sequences_in_one_call(world, deterministic):
    """What CUDA's flash kernels are asked to do, with its rows gathered and scattered, is right.

    index_add_ on CUDA adds rows that come twice in any order, so deterministic kernels do without.
    """
    steps = ((None, 0), (None, 30), (7, 0))
    cases = []
    # Any two of a layout, a type, a pack and a way to step meet. Other worlds, and kernels that are deterministic,
    # have the other combinations.
    for (i, layout), (j, (window, least)) in product(enumerate(LAYOUTS), enumerate(steps)):
        comm = ("p2p", "all_gather")[(i + j + deterministic) % 2]
        cu = ((0, 37), (0, 1, 2, 17, 40, 41, 90))[(i // 2 + j + world + deterministic) % 2]
        cases.append(Case(layout, comm, (4, 2), 4, cu, True, window, rows_a_step=least, sinks=i % 2 == 0))
    results, calls, adds = pool.run(world, distributed_packed, cases, deterministic)[0]
    compare(world, cases, results)
    assert calls > 0
    assert (adds == 0) == deterministic


def bytes_sent(cases):
    """What really went over the wire in forward and backward: elements of keys and of gradients, for each case."""
    found = []
    for layout in cases:
        x = layout.shard(torch.randn(layout.total, 2, 4), dist.get_rank())
        q, k, v = (x.clone().requires_grad_() for _ in range(3))
        with Numbers() as forward:
            out, _ = context_parallel_attention(q, k, v, group=dist.group.WORLD, layout=layout)
        with Numbers() as backward:
            out.sum().backward()
        found.append((forward.sent, backward.sent))
    return found


@pytest.mark.parametrize("world", [2, 3, 4])
def test_what_is_sent_is_what_the_schedule_says(world):
    """A causal zigzag sequence moves 3/4 of a ring's rows in forward, in backward the same and gradients home."""
    zigzag = SequenceLayout.zigzag(16 * world, world)
    packed = SequenceLayout.balanced((0, 5, 40, 41, 90), world)
    ranks = pool.run(world, bytes_sent, [zigzag, packed])
    row = 2 * 2 * 4  # keys and values, heads, head size
    for number, layout in enumerate((zigzag, packed)):
        rows = [Schedule.of(layout, r).sent_rows for r in range(world)]
        received = [Schedule.of(layout, r).received_rows for r in range(world)]
        assert [forward for forward, _ in (r[number] for r in ranks)] == [row * n for n in rows]
        assert [backward for _, backward in (r[number] for r in ranks)] == [
            row * (a + b) for a, b in zip(rows, received)
        ]
    ring = world * (world - 1) * zigzag.local_length
    assert sum(r[0][0] for r in ranks) == ring * 3 // 4 * row


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
    function = context_parallel_attention(*local, group=group, layout=layout, cp_comm_type=comm)
    assert torch.equal(function[0], context)
    assert torch.equal(function[1], lse)
    for i, (qi, ki, vi, di) in enumerate(rows):
        leaves = [x.requires_grad_() for x in (qi, ki, vi)]
        out, _ = dense(*leaves, (0, 24))
        expected = (out.detach(), *torch.autograd.grad(out, leaves, di))
        for got, ref in zip((context.detach(), *grads), expected):
            torch.testing.assert_close(layout.unshard(got, group)[:, i], ref, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("comm", ["p2p", "all_gather", "allgather", "a2a"])
def test_dot_product_attention_takes_zigzag_shards_of_a_batch(comm):
    pool.run(4, batched, 4, 2, comm)
    pool.run(2, batched, 1, 3, comm)


def refusals():
    parallel_state.initialize_model_parallel(context_parallel_size=2)
    config = TransformerConfig(num_layers=1, hidden_size=16, num_attention_heads=4, context_parallel_size=2)
    with pytest.raises(ValueError, match=r"'a2a\+p2p' with 2 .* needs hierarchical_context_parallel_sizes"):
        DotProductAttention(config, 1, cp_comm_type="a2a+p2p")
    odd = TransformerConfig(
        num_layers=1, hidden_size=12, num_attention_heads=3, context_parallel_size=2, cp_comm_type="p2p"
    )
    with pytest.raises(ValueError, match="3 query heads .* do not divide by 2. Use p2p"):
        DotProductAttention(odd, 1, cp_comm_type="a2a")
    for message, arguments in (
        ("self-attention only", {"attention_type": "cross"}),
        ("attention_dropout=0.1", {"attention_dropout": 0.1}),
        ("MLA", {"k_channels": 8, "v_channels": 4}),
    ):
        with pytest.raises(ValueError, match=message):
            DotProductAttention(config, 1, **arguments)
    windowed = dataclasses.replace(config, sliding_window=4)
    with pytest.raises(ValueError, match="full attention"):
        DotProductAttention(windowed, 1, AttnMaskType.no_mask)
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
    group = dist.group.WORLD
    for message, arguments in (
        ("window=0", {"window": 0}),
        ("window=2.5", {"window": 2.5}),
        ("needs causal=True", {"window": 4, "causal": False}),
        (r"needs hierarchical_context_parallel_sizes.*\[1, 2\]", {"cp_comm_type": "a2a+p2p"}),
        ("two levels", {"cp_comm_type": "a2a+p2p", "hierarchical_groups": [group, group]}),
    ):
        with pytest.raises(ValueError, match=message):
            context_parallel_attention(q, q, q, group=group, layout=layout, **arguments)
    with pytest.raises(ValueError, match="attention_bias"):
        attention(x, x, x, attention_bias=torch.ones(4, 4))
    with pytest.raises(ValueError, match="divide"):
        context_parallel_attention(q, q[:, :3], q[:, :3], group=dist.group.WORLD, layout=layout)


def test_heads_of_a_hierarchy():
    """The remedy's sizes are of all ranks, not of the inner ones."""
    with pytest.raises(ValueError, match=r"a2a\+p2p with hierarchical_context_parallel_sizes \[2, 4\]"):
        check_heads_of("a2a+p2p", 2, 8, [4, 2])


def test_refuses_what_it_cannot_do():
    pool.run(2, refusals)


def bf16_error(layout_name, comm):
    cu = (0, 700, 1000)
    layout = SequenceLayout.make(layout_name, 1000, dist.get_world_size(), cu_seqlens=cu)
    exact = reference((4, 2), 16, cu, True, None)
    local = [
        layout.shard(x, dist.get_rank()).requires_grad_() for x in inputs(1000, 4, 2, 16, torch.bfloat16)
    ]
    group = dist.group.WORLD
    out, lse = context_parallel_attention(*local[:3], group=group, layout=layout, cp_comm_type=comm)
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


@pytest.mark.parametrize(
    ("layout", "comm"),
    [("zigzag", "p2p"), ("balanced", "p2p"), ("balanced", "all_gather"), ("zigzag", "a2a")],
)
def test_bf16_is_at_most_twice_as_far_off_as_one_process(layout, comm):
    ratios = pool.run(4, bf16_error, layout, comm)[0]
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


def padded_rows():
    """Full attention would see the padding behind the rows; causal attention does not reach it."""
    parallel_state.initialize_model_parallel()
    config = TransformerConfig(num_layers=1, hidden_size=16, num_attention_heads=4)
    x = torch.randn(8, 2, 4, 4)
    padded, full = (PackedSeqParams("sbhd", torch.tensor([0, n, 2 * n])) for n in (5, 8))
    DotProductAttention(config, 1)(x, x, x, packed_seq_params=padded)
    for kind in (AttnMaskType.padding, AttnMaskType.no_mask):
        attention = DotProductAttention(config, 1, kind)
        attention(x, x, x, packed_seq_params=full)
        with pytest.raises(ValueError, match="a row of 5 tokens padded to 8: .* Use 'thd'"):
            attention(x, x, x, packed_seq_params=padded)


def test_packing_that_would_be_ignored_is_refused():
    pool.run(2, packing_refusals)
    pool.run(1, padded_rows)


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
    for got, expected in zip(
        (out.detach(), *grads), (reference((4, 2), 4, cu, True, None)[i] for i in (0, 2, 3, 4))
    ):
        torch.testing.assert_close(layout.unshard(got, dist.group.WORLD), expected, rtol=1e-10, atol=1e-10)


def test_padded_documents():
    pool.run(2, padded_documents)
