"""Attention forward + backward on two cores: longspan as two ranks against its peers.

    python benchmarks/attention.py [--seq 8192] [--heads 8] [--kv-heads 8] [--head-dim 64] [--dtype float32] [--pairs 9]
    python benchmarks/attention.py --packs 20 [--pairs 3] [--against sdpa]

One causal sequence, or the packs of 16384 tokens in lengths.json, all together. The peers: PyTorch's
scaled_dot_product_attention on one process with two threads (packs: a loop over the documents, and one call with a
block-diagonal mask), and PyTorch's own context parallelism on the same two ranks (it knows no documents, so it
computes each pack as one causal sequence).
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import common
import torch
import torch.distributed as dist
import torch.nn.functional as F
from peers import context_parallel_on_cpu, pytorch_attention
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from longspan.context_parallel import SequenceLayout, context_parallel_attention

PEERS = ("pytorch", "sdpa", "all_gather", "a2a", "mask")
LENGTHS = Path(__file__).with_name("lengths.json")


def make(args: argparse.Namespace, total: int) -> tuple[Tensor, ...]:
    """q, k, v, dout [t, heads, d], the same on every rank."""
    g = torch.Generator().manual_seed(0)
    dtype = getattr(torch, args.dtype)
    heads = (args.heads, args.kv_heads, args.kv_heads, args.heads)
    return tuple(torch.randn(total, n, args.head_dim, generator=g).to(dtype) for n in heads)


def ours(args: argparse.Namespace, packs: Sequence[Sequence[int]], comm: str) -> Callable[[], None]:
    """All packs on two ranks, each with its own layout; layouts are planned before, as a loader does."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    work = []
    for bounds in packs:
        layout = SequenceLayout.make("auto", bounds[-1], ranks, cu_seqlens=bounds)
        local = [layout.shard(x, rank) for x in make(args, bounds[-1])]
        work.append((layout, [x.requires_grad_() for x in local[:3]], local[3]))

    def run() -> None:
        for layout, qkv, dout in work:
            out, _ = context_parallel_attention(
                *qkv, group=dist.group.WORLD, layout=layout, cp_comm_type=comm
            )
            torch.autograd.grad(out, qkv, dout)

    return run


def heads_first(tensors: Sequence[Tensor], start: int = 0, stop: int | None = None) -> list[Tensor]:
    """[t, n, d] -> [1, n, t, d]"""
    return [x[start:stop].transpose(0, 1).unsqueeze(0).contiguous() for x in tensors]


def one_process(args: argparse.Namespace, packs: Sequence[Sequence[int]]) -> Callable[[], None]:
    """A loop over the documents, each one causal call."""
    calls = []
    for bounds in packs:
        whole = make(args, bounds[-1])
        calls += [pytorch_attention(*heads_first(whole, *ends)) for ends in itertools.pairwise(bounds)]

    def run() -> None:
        for call in calls:
            call()

    return run


def block_diagonal(args: argparse.Namespace, packs: Sequence[Sequence[int]]) -> Callable[[], None]:
    """One call a pack with a mask of s x s: what code without packing support does."""

    work = []
    for bounds in packs:
        total = bounds[-1]
        q, k, v, dout = heads_first(make(args, total))
        document = torch.bucketize(torch.arange(total), torch.tensor(bounds[1:]), right=True)
        mask = (document[:, None] == document[None, :]).tril_()
        work.append(([x.requires_grad_() for x in (q, k, v)], mask, dout))

    def run() -> None:
        for leaves, mask, dout in work:
            out = F.scaled_dot_product_attention(
                *leaves, attn_mask=mask, enable_gqa=args.heads != args.kv_heads
            )
            torch.autograd.grad(out, leaves, dout)

    return run


def bench(args: argparse.Namespace) -> None:
    ranks = dist.get_world_size()
    if args.packs:
        lengths = json.loads(LENGTHS.read_text())["packs"]["16384"][: args.packs]
        packs = [tuple(itertools.accumulate(pack, initial=0)) for pack in lengths]
        title = f"{len(packs)} packs of {packs[0][-1]} tokens"
    else:
        packs = [(0, args.seq)]
        title = f"one causal sequence of {args.seq} tokens"
    name = f"longspan p2p, {ranks} ranks x 1 thread"
    alone = f"1 process x {ranks} threads"

    def against(contestants: dict, warmup: int = 2, packs=packs, title=title) -> None:
        contestants = {name: (ours(args, packs, "p2p"), 1, True)} | contestants
        common.report(describe(args, title), common.compare(contestants, args.pairs, warmup=warmup), name)

    if "pytorch" in args.against:
        mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("cp",))
        with context_parallel_on_cpu(mesh, *heads_first(make(args, packs[0][-1]))) as shards:
            ring = pytorch_attention(*shards)

            def pytorch() -> None:
                for _ in packs:
                    ring()

            label = f"PyTorch's context parallel, {ranks} ranks x 1 thread"
            against({label: (pytorch, 1, True)}, warmup=1 if args.packs else 2)
    others = {}
    if "sdpa" in args.against:
        others[f"SDPA{' a document' if args.packs else ''}, {alone}"] = one_process(args, packs), ranks, False
    for comm in ("all_gather", "a2a"):
        if comm in args.against:
            others[f"longspan {comm}, {ranks} ranks x 1 thread"] = ours(args, packs, comm), 1, True
    if others:
        against(others)
    if args.packs and "mask" in args.against:
        few = packs[:1]
        label = f"SDPA with a block-diagonal mask, {alone}"
        masked = {label: (block_diagonal(args, few), ranks, False)}
        against(masked, warmup=1, packs=few, title="the first of these packs")


def describe(args: argparse.Namespace, title: str) -> str:
    return f"{title}: {args.heads}/{args.kv_heads} heads x {args.head_dim}, {args.dtype}, forward + backward"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seq", type=int, default=8192)
    parser.add_argument("--packs", type=int, default=0, help="so many packs of 16384 tokens, up to 20")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--against", nargs="+", choices=PEERS, default=PEERS)
    print(common.machine())
    common.run_ranks(2, bench, parser.parse_args())
