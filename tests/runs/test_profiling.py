"""The parts of ``longspan profile`` without its processes: times, an invented trace of a GPU, memory, tiles, ranks."""

import random

import pytest
import torch
import torch.distributed as dist

import pool
from longspan.config.sizes import MeshSizes
from longspan.context_parallel.calls import VarlenCall
from longspan.context_parallel.kernels.math import Math
from longspan.context_parallel.tiles import Mask
from longspan.mesh import collectives
from longspan.mesh.axes import axes_of_groups
from longspan.mesh.mesh import ParallelMesh
from longspan.runs.profiling import intervals, labels, memory, summary, trace

# --- intervals --------------------------------------------------------------------------------


def points(times):
    return {x for start, stop in times for x in range(start, stop)}


def test_intervals_are_sets_of_times():
    draw = random.Random(0)

    def some():
        starts = [draw.randrange(60) for _ in range(draw.randrange(8))]
        return [(start, start + draw.randrange(12)) for start in starts]

    for _ in range(300):
        one, other = some(), some()
        a, b = intervals.union(one), intervals.union(other)
        assert points(a) == points(one)
        assert all(x[1] < y[0] for x, y in zip(a, a[1:]))
        assert intervals.length(a) == len(points(one))
        assert points(intervals.difference(a, b)) == points(one) - points(other)
        assert points(intervals.clip(a, (10, 30))) == points(one) & set(range(10, 30))
    assert intervals.union([(0, 1), (2, 3), (6, 7)], gap=1) == [(0, 3), (6, 7)]


# --- a trace of a GPU -------------------------------------------------------------------------


def event(category, name, start, stop, tid=7, **args):
    return {
        "ph": "X",
        "cat": category,
        "name": name,
        "ts": start,
        "dur": stop - start,
        "tid": tid,
        "args": args,
    }


NCCL = "ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)"
#: with the fields that Kineto writes; the launching thread is 1
GPU_TRACE = [
    event("user_annotation", "longspan step 0", 0, 100, tid=1),
    event("user_annotation", "longspan step 1", 100, 1100, tid=1),
    event("cpu_op", "aten::mm", 100, 900, tid=1),
    event("kernel", "sm90_xmma_gemm_bf16bf16", 200, 400),
    event("kernel", "sm90_xmma_gemm_bf16bf16", 500, 600),
    event("kernel", NCCL, 300, 550, tid=9, **{"Process Group Name": "3", "Process Group Description": "mesh_fsdp",
                                              "Collective name": "_allgather_base"}),
    event("kernel", NCCL, 700, 800, tid=9, **{"Process Group Name": "8", "Collective name": "send"}),
    event("kernel", NCCL, 750, 850, tid=9, **{"Process Group Name": "77", "Process Group Description": "mine"}),
    event("gpu_memcpy", "Memcpy DtoH (Device -> Pinned)", 580, 640),
    event("gpu_memset", "Memset (Device)", 640, 650),
    event("gpu_user_annotation", "attention tile forward", 210, 260),
    event("gpu_user_annotation", "exchange fsdp/all_gather", 300, 550, tid=9),
]  # fmt: skip


def test_a_gpus_kernels_are_sorted_by_axis_and_only_what_is_uncovered_is_exposed():
    times = trace.times_of(GPU_TRACE, {"3": "fsdp", "8": "cp"})
    got = trace.figures_of_step(times, times.steps[1])
    micro = 1e-6
    assert got["step"] == pytest.approx(1000 * micro)
    assert got["compute"] == pytest.approx((200 + 100 + 10) * micro)
    assert got["axes"].keys() == {"fsdp", "cp", "mine", "host copies"}
    assert got["axes"]["fsdp"]["operations"] == {"_allgather_base": pytest.approx(250 * micro)}
    assert got["axes"]["fsdp"]["exposed"] == pytest.approx(100 * micro)
    assert got["axes"]["fsdp"]["hidden"] == pytest.approx(150 * micro)
    assert got["axes"]["cp"]["exposed"] == pytest.approx(100 * micro)
    # cp and mine overlap, which counts once in the sum.
    assert got["exposed"] == pytest.approx((100 + 150 + 40) * micro)
    assert got["idle"] == pytest.approx((1000 - 310 - 290) * micro)
    assert got["attention"] == {"forward": pytest.approx(50 * micro)}
    assert trace.lanes_of_step(times, times.steps[1])["cp"] == [[0.6, 0.7]]


# --- gloo -------------------------------------------------------------------------------------


def test_gloos_exchanges_belong_to_the_labels_in_order():
    events = [
        event("user_annotation", "longspan step 0", 0, 100, tid=1),
        event("user_annotation", "exchange cp/all_reduce", 10, 12, tid=1),
        event("user_annotation", "exchange fsdp/reduce_scatter", 20, 22, tid=1),
        event("user_annotation", "gloo:all_reduce", 14, 18, tid=4),
        event("user_annotation", "gloo:all_reduce", 21, 40, tid=5),
        event("user_annotation", "gloo:all_gather", 60, 70, tid=5),
        event("cpu_op", "aten::mm", 30, 50, tid=1),
        event("cpu_op", "aten::copy_", 60, 70, tid=5),
        event("cpu_op", "autograd::engine::evaluate_function: MmBackward0", 70, 90, tid=1),
    ]
    times = trace.times_of(events, {})
    assert times.exchanges == {"cp": [(10, 18)], "fsdp": [(20, 40)], "other": [(60, 70)]}
    assert times.compute == [(30, 50)]


def labelled_on_each_rank():
    mesh = ParallelMesh.build(MeshSizes(tp=2, cp=1))
    axes = axes_of_groups(mesh, mesh.groups)
    calls = []
    before = vars(dist.ProcessGroup)["allreduce"]
    with labels.labelled_exchanges(axes, calls):
        collectives.all_reduce_sum(torch.ones(3, dtype=torch.float64), mesh.groups.tp)
        collectives.all_gather_dim(torch.ones(5, 2), mesh.groups.tp, 0)
    assert vars(dist.ProcessGroup)["allreduce"] is before
    total = collectives.all_reduce_sum(torch.ones(1), mesh.groups.tp)
    return [(call.axis, call.operation, call.size) for call in calls], total.item()


def test_exchanges_have_labels_only_inside_the_context():
    for calls, total in pool.run(2, labelled_on_each_rank):
        assert calls == [("tp", "all_reduce", 24), ("tp", "all_gather", 80)]
        assert total == 2.0


# --- memory -----------------------------------------------------------------------------------


def memory_event(at, address, size, tid=1):
    args = {"Addr": address, "Bytes": size, "Device Type": 0, "Total Allocated": 0}
    return {"ph": "i", "cat": "cpu_instant_event", "name": "[memory]", "ts": at, "tid": tid, "args": args}


def test_memory_is_named_by_address_by_what_allocates_it_and_by_when_it_is_freed():
    step = (1000.0, 3000.0)
    events = [
        event("user_annotation", "FSDP::all_gather (layers.0)", 1100, 1200, tid=1),
        event("cpu_op", "MoveKeys", 1300, 1400, tid=1),
        event("cpu_op", "autograd::engine::evaluate_function: MmBackward0", 2000, 2500, tid=1),
        event("user_annotation", "FSDP::post_backward_reduce (layers.0)", 2100, 2200, tid=1),
        event("user_annotation", "Optimizer.step#AdamW.step", 2600, 2700, tid=1),
        memory_event(900, 50, 7),  # from the step before, without a name
        memory_event(1050, 20, -40),  # the old gradient
        memory_event(1110, 30, 1000),  # gathered weights
        memory_event(1310, 31, 64),  # an activation, from inside attention
        memory_event(1320, 32, 16),  # attention's own work
        memory_event(1390, 32, -16),
        memory_event(1500, 33, 5),
        memory_event(1600, 33, -5),
        memory_event(2010, 34, 3),
        memory_event(2110, 20, 40),  # the new gradient, at the place of the old one
        memory_event(2120, 35, 11),
        memory_event(2300, 31, -64),
        memory_event(2310, 30, -1000),
        memory_event(2400, 34, -3),
        memory_event(2650, 36, 9),
        memory_event(2660, 36, -9),
        memory_event(2700, 99, 10**9, tid=1) | {"args": {"Addr": 1, "Bytes": 10**9, "Device Type": 1}},
    ]
    before = {10: (100, "parameters"), 20: (40, "gradients")}
    got = memory.timeline(events, step, before, gradients=[20], device_type=0)
    assert got["at_start"] == {"parameters": 100, "gradients": 40, "forward": 7}
    assert got["peak_bytes"] == 100 + 7 + 1000 + 64 + 3 + 40 + 11
    assert got["at_peak"] == {
        "parameters": 100,
        "gradients": 40,
        "gathered weights": 1000,
        "kept for backward": 64,
        "gradient reduction": 11,
        "forward": 7,
        "backward": 3,
    }
    assert got["peak_ms"] == pytest.approx(1.12)
    last = {name: sizes[-1] for name, sizes in got["points"]["components"].items()}
    assert {name: size for name, size in last.items() if size} == {
        "parameters": 100, "gradients": 40, "gradient reduction": 11, "forward": 7,
    }  # fmt: skip
    assert max(got["points"]["components"]["attention"]) == 16
    assert max(got["points"]["components"]["optimizer"]) == 9


# --- tiles ------------------------------------------------------------------------------------


def masked_pairs(queries, keys, mask):
    """Counted on a whole mask: a causal tile is aligned at the bottom right, an ANTI tile at the top left."""
    whole = torch.ones(queries, keys)
    if mask is Mask.CAUSAL:
        whole = whole.tril(keys - queries)
    elif mask is Mask.ANTI:
        whole = whole.triu()
    return int(whole.sum())


@pytest.mark.parametrize("mask", list(Mask))
def test_the_pairs_of_tiles_are_those_that_are_not_masked(mask):
    lengths = [(1, 1), (3, 3), (4, 9 if mask is not Mask.ANTI else 4)]
    cu_q, cu_k = (torch.tensor([0, *part]).cumsum(0) for part in zip(*lengths))
    call = VarlenCall(slice(0, 8), slice(0, int(cu_k[-1])), cu_q, cu_k, 4, 9, mask, True)
    assert labels.pairs(call) == sum(masked_pairs(q, k, mask) for q, k in lengths)
    assert labels.pairs((5, 5, mask is Mask.CAUSAL)) == masked_pairs(
        5, 5, mask if mask is not Mask.ANTI else Mask.FULL
    )


def test_a_labelled_kernel_computes_the_same_and_counts():
    torch.manual_seed(0)
    q, k, v = (torch.randn(6, 2, heads, 8, dtype=torch.float64) for heads in (4, 2, 2))
    kernel, plain = labels.LabelledKernel(Math()), Math()
    out, lse = kernel.forward(q, k, v, True, 0.3)
    expected, expected_lse = plain.forward(q, k, v, True, 0.3)
    assert torch.equal(out, expected)
    grads = kernel.backward(out, q, k, v, out, lse, True, 0.3)
    assert all(map(torch.equal, grads, plain.backward(out, q, k, v, out, expected_lse, True, 0.3)))
    pairs, heads = 6 * 7 // 2, 2 * 4 * 8
    assert kernel.take_flops() == pairs * heads * (4 + 10)
    assert kernel.take_flops() == 0
    assert (kernel.name, kernel.varlen, kernel.deterministic) == (plain.name, plain.varlen, False)


# --- ranks ------------------------------------------------------------------------------------


def test_an_axis_that_a_step_or_a_rank_has_not_used_counts_as_nothing():
    def step(seconds, **axes):
        whole = dict.fromkeys(summary.FIGURES, seconds)
        return whole | {"axes": axes, "attention": {"forward": 0.5}, "attention_flops": 10**12}

    ep = dict.fromkeys(summary.OF_AXIS, 4.0) | {"operations": {"all_to_all": 4.0}}
    mean = summary.mean_of_steps([step(1.0, ep=ep), step(3.0)])
    assert mean["step"] == 2.0
    assert mean["axes"]["ep"]["exposed"] == 2.0
    assert mean["axes"]["ep"]["operations"] == {"all_to_all": 2.0}
    ranks = [
        {"mean": mean, "matmul_tflop_per_s": 8.0, "memory": {"peak_bytes": 5}},
        {"mean": summary.mean_of_steps([step(4.0)]), "matmul_tflop_per_s": 4.0, "memory": {"peak_bytes": 9}},
    ]
    got = summary.summarise(ranks)
    assert got["balance"]["step"] == {"min": 2.0, "mean": 3.0, "max": 4.0}
    assert got["axes"]["ep"]["exposed"] == {"min": 0.0, "mean": 1.0, "max": 2.0}
    assert got["attention"]["share_of_matmul"] == {"min": 0.25, "mean": 0.375, "max": 0.5}
    assert got["memory"]["busiest_rank"] == 1
