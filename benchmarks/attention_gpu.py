"""One GPU plays every rank in turn: the tiles of each rank with merging, against one monolithic flash call.

    python benchmarks/attention_gpu.py [--local 8192] [--ranks 8] [--heads 32] [--kv-heads 8] [--head-dim 128]
        [--lengths 1886,83,811,...] [--backend auto] [--pairs 7]

The whole sequence's keys are at hand, so nothing travels: what is measured is the price of cutting (small
tiles, gathered rows, merging). ``--lengths`` packs documents (balanced layout; the peer is one variable-length
call), else one sequence is cut zigzag. Without a GPU it runs on the CPU, which shows that it works, no more.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time

import common
import torch

from longspan.context_parallel import Schedule, SequenceLayout
from longspan.context_parallel.calls import calls_of
from longspan.context_parallel.kernels import select_kernel
from longspan.context_parallel.keys import backward_step, forward_step


def step_rows(step, layout: SequenceLayout, rank: int, device) -> torch.Tensor:
    """The tokens whose keys a step computes with, in the order its tiles count them."""
    if not step.receives:
        return layout.positions(rank).to(device)
    rows = torch.cat([layout.positions(m.peer)[a:b] for m in step.receives for a, b in m.ranges])
    if step.order is not None:
        rows = torch.cat([rows[a:b] for a, b in step.order])
    return rows.to(device)


def main(args: argparse.Namespace) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    lengths = [int(n) for n in args.lengths.split(",")] if args.lengths else [args.local * args.ranks]
    cu = [0]
    for n in lengths:
        cu.append(cu[-1] + n)
    layout = SequenceLayout.make("auto", cu[-1], args.ranks, cu_seqlens=cu)
    kernel, reason = select_kernel(device, dtype, args.head_dim, args.backend)
    print(
        f"{kernel.name} ({reason}); {layout.name}, {cu[-1]} tokens in {len(lengths)} documents, {args.ranks} ranks"
    )
    g = torch.Generator(device=device).manual_seed(0)

    def make(heads: int) -> torch.Tensor:
        return torch.randn(
            layout.padded_total, 1, heads, args.head_dim, generator=g, device=device, dtype=dtype
        )

    q, dout, k, v = make(args.heads), make(args.heads), make(args.kv_heads), make(args.kv_heads)
    scale = 1 / math.sqrt(args.head_dim)
    ranks = []
    for rank in range(args.ranks):
        schedule = Schedule.of(layout, rank)
        own = layout.positions(rank).to(device)
        steps = [(step, step_rows(step, layout, rank, device)) for step in schedule.steps]
        ranks.append((q[own], dout[own], [(step, k[rows], v[rows]) for step, rows in steps]))

    def cut() -> None:
        for q_own, dout_own, steps in ranks:
            out = torch.zeros(q_own.shape, dtype=torch.float32, device=device)
            lse = torch.full(
                (1, args.heads, q_own.shape[0]), float("-inf"), dtype=torch.float32, device=device
            )
            for step, k_step, v_step in steps:
                forward_step(out, lse, q_own, k_step, v_step, step, kernel, scale)
            out, dq = out.to(dtype), torch.zeros(q_own.shape, dtype=torch.float32, device=device)
            for step, k_step, v_step in steps:
                dk, dv = (torch.zeros(x.shape, dtype=torch.float32, device=device) for x in (k_step, v_step))
                backward_step(dq, dk, dv, dout_own, q_own, k_step, v_step, out, lse, step, kernel, scale)

    whole_layout = SequenceLayout.contiguous(cu[-1], 1, cu_seqlens=cu)
    (whole,) = Schedule.of(whole_layout, 0).steps
    whole_q, whole_dout, whole_k, whole_v = (x[: cu[-1]] for x in (q, dout, k, v))

    def monolithic() -> None:
        for call in calls_of(whole, kernel, device):  # one on CUDA, one a document on CPU
            out, lse = call.forward(kernel, whole_q, whole_k, whole_v, scale)
            full, full_lse = whole_q, lse
            if out.shape != whole_q.shape:
                full = torch.zeros_like(whole_q)
                full_lse = torch.zeros(1, args.heads, cu[-1], dtype=lse.dtype, device=device)
                full[call.q], full_lse[:, :, call.q] = out, lse
            else:
                full = out
            call.backward(kernel, whole_dout, whole_q, whole_k, whole_v, full, full_lse, scale)

    def timed(function) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    times: dict[str, list[float]] = {"all ranks in turn": [], "one monolithic call": []}
    for turn in range(args.pairs + 2):
        for name, function in (("all ranks in turn", cut), ("one monolithic call", monolithic)):
            seconds = timed(function)
            if turn >= 2:
                times[name].append(seconds)
    common.report(
        f"forward + backward, {args.heads}/{args.kv_heads} heads x {args.head_dim}",
        times,
        "all ranks in turn",
    )
    ratio = statistics.median(a / b for a, b in zip(*times.values()))
    print(f"  the ranks together take {ratio:.3f} x the monolithic call")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--local", type=int, default=8192)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--lengths", default="")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--pairs", type=int, default=7)
    print(common.machine())
    main(parser.parse_args())
