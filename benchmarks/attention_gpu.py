"""One GPU plays every rank in turn: the tiles of each rank with merging, against one monolithic flash call.

    python benchmarks/attention_gpu.py [--local 8192] [--ranks 8] [--heads 32] [--kv-heads 8] [--head-dim 128]
        [--lengths 1886,83,811,...] [--backend auto] [--pairs 7]

The whole sequence's keys are at hand, so nothing travels: what is measured is the price of cutting (small
tiles, gathered rows, merging). ``--lengths`` packs documents (balanced layout; the peer is one variable-length
call), else one sequence is cut zigzag. Without a GPU it runs on the CPU, which shows that it works, no more.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
from collections.abc import Sequence

import common
import torch
from ranks_in_turn import Rank

from longspan.context_parallel import Schedule, SequenceLayout
from longspan.context_parallel.calls import calls_of
from longspan.context_parallel.kernels.choose import select_kernel

OURS, PEER = "all ranks in turn", "one monolithic call"


def measure(
    lengths: Sequence[int],
    ranks: int,
    heads: tuple[int, int],
    head_dim: int,
    device: torch.device,
    backend: str = "auto",
    pairs: int = 7,
) -> tuple[str, dict[str, list[float]]]:
    """Milliseconds of forward and backward, ``pairs`` times each, alternately.

    Args:
        lengths: of the documents of one pack.
        heads: query heads and key/value heads.

    Returns:
        What was run, and the times by name.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    cu = [0, *itertools.accumulate(lengths)]
    layout = SequenceLayout.make("auto", cu[-1], ranks, cu_seqlens=cu)
    kernel, reason = select_kernel(device, dtype, head_dim, backend)
    about = (
        f"{kernel.name} ({reason}); {layout.name}, {cu[-1]} tokens in {len(lengths)} documents, {ranks} ranks"
    )
    g = torch.Generator(device=device).manual_seed(0)

    def make(n: int) -> torch.Tensor:
        return torch.randn(layout.padded_total, 1, n, head_dim, generator=g, device=device, dtype=dtype)

    q, dout, k, v = make(heads[0]), make(heads[0]), make(heads[1]), make(heads[1])
    scale = 1 / math.sqrt(head_dim)
    parts = [Rank(layout, rank, (q, k, v, dout)) for rank in range(ranks)]

    def cut() -> None:
        for rank in parts:
            rank.backward(kernel, scale, *rank.forward(kernel, scale))

    (whole,) = Schedule.of(SequenceLayout.contiguous(cu[-1], 1, cu_seqlens=cu), 0).steps
    whole_q, whole_dout, whole_k, whole_v = (x[: cu[-1]] for x in (q, dout, k, v))

    def monolithic() -> None:
        for call in calls_of(whole, kernel, device):  # one on CUDA, one a document on CPU
            out, lse = call.forward(kernel, whole_q, whole_k, whole_v, scale)
            full, full_lse = out, lse
            if out.shape != whole_q.shape:
                full = torch.zeros_like(whole_q)
                full_lse = torch.zeros(1, heads[0], cu[-1], dtype=lse.dtype, device=device)
                full[call.q], full_lse[:, :, call.q] = out, lse
            call.backward(kernel, whole_dout, whole_q, whole_k, whole_v, full, full_lse, scale)

    times: dict[str, list[float]] = {OURS: [], PEER: []}
    for turn in range(pairs + 2):
        for name, function in ((OURS, cut), (PEER, monolithic)):
            ms = common.device_ms(function, device)
            if turn >= 2:
                times[name].append(ms)
    return about, times


def ratio(times: dict[str, list[float]]) -> float:
    """How many times the monolithic call's time the ranks take together: the median of the pairs."""
    return statistics.median(a / b for a, b in zip(times[OURS], times[PEER]))


def main(args: argparse.Namespace) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lengths = [int(n) for n in args.lengths.split(",")] if args.lengths else [args.local * args.ranks]
    heads = (args.heads, args.kv_heads)
    about, times = measure(lengths, args.ranks, heads, args.head_dim, device, args.backend, args.pairs)
    print(about)
    seconds = {name: [ms / 1e3 for ms in held] for name, held in times.items()}
    common.report(f"forward + backward, {args.heads}/{args.kv_heads} heads x {args.head_dim}", seconds, OURS)
    print(f"  the ranks together take {ratio(times):.3f} x the monolithic call")


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
