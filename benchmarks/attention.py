"""Causal attention, forward + backward: two ranks of one thread against one process with two.

    python benchmarks/attention.py [--seq 8192] [--heads 8] [--kv-heads 8] [--head-dim 64] [--dtype float32] [--pairs 9]

The peer is PyTorch's scaled_dot_product_attention on the whole sequence. The target is 0.95 of it:
cutting costs messages, merging and a second pass over the keys.
"""

from __future__ import annotations

import argparse

import common
import torch
import torch.distributed as dist
import torch.nn.functional as F

from longspan.context_parallel import SequenceLayout, context_parallel_attention


def bench(args: argparse.Namespace) -> None:
    dtype, ranks, rank = getattr(torch, args.dtype), dist.get_world_size(), dist.get_rank()
    g = torch.Generator().manual_seed(0)
    q, dout = (torch.randn(args.seq, args.heads, args.head_dim, generator=g).to(dtype) for _ in range(2))
    k, v = (torch.randn(args.seq, args.kv_heads, args.head_dim, generator=g).to(dtype) for _ in range(2))
    layout = SequenceLayout.zigzag(args.seq, ranks)
    local = [layout.shard(x, rank).requires_grad_() for x in (q, k, v)]
    local_dout = layout.shard(dout, rank)
    whole = [x.transpose(0, 1).unsqueeze(0).contiguous().requires_grad_() for x in (q, k, v)]
    whole_dout = dout.transpose(0, 1).unsqueeze(0).contiguous()

    def cut(comm: str):
        def run():
            out, _ = context_parallel_attention(
                *local, group=dist.group.WORLD, layout=layout, cp_comm_type=comm
            )
            torch.autograd.grad(out, local, local_dout)

        return run

    def sdpa():
        out = F.scaled_dot_product_attention(*whole, is_causal=True, enable_gqa=args.heads != args.kv_heads)
        torch.autograd.grad(out, whole, whole_dout)

    ours = f"longspan p2p, {ranks} ranks x 1 thread"
    contestants = {
        ours: (cut("p2p"), 1, True),
        f"SDPA, 1 process x {ranks} threads": (sdpa, ranks, False),
        f"longspan all_gather, {ranks} ranks x 1 thread": (cut("all_gather"), 1, True),
    }
    times = common.compare(contestants, args.pairs)
    shape = f"{args.seq} tokens, {args.heads}/{args.kv_heads} heads x {args.head_dim}, {args.dtype}"
    common.report(f"causal attention, forward + backward: {shape}", times, ours)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seq", type=int, default=8192)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--pairs", type=int, default=9)
    print(common.machine())
    common.run_ranks(2, bench, parser.parse_args())
