"""A hybrid model whose attention has a layout of its own, against one contiguous layout for all layers.

    python benchmarks/two_layouts.py [--ranks 2] [--tokens 16384] [--packs 2] [--pairs 5] [--whole]

Forward and backward of a small model of three Mamba-2 layers to one of attention, on packs of lengths.json (documents
of very different lengths) or, with ``--whole``, on one document. The stream is contiguous in both contestants:

    two layouts   attention_cp_layout auto: its rows move to a layout of even work and back
    one layout    attention_cp_layout contiguous: nothing moves, and the work of attention is uneven

Beside the times stand what follows from the layouts alone: the busiest rank's causal work over the mean, the share of
rows that travel around an attention layer, and the key/value rows that attention sends, as a share of a ring's.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
from pathlib import Path

import common
import torch
import torch.distributed as dist

from longspan.context_parallel import SequenceLayout
from longspan.context_parallel.move_rows import rows_between
from longspan.context_parallel.two_layouts import attention_layout
from longspan.training.sharding import LocalBatch

LENGTHS = json.loads(Path(__file__).with_name("lengths.json").read_text())
MODEL = {
    "num_layers": 4, "layer_types": ["mamba", "mamba", "mamba", "attention"], "hidden_size": 256,
    "num_attention_heads": 8, "num_query_groups": 2, "ffn_hidden_size": 704, "vocab_size": 2048,
    "mamba_num_heads": 8, "mamba_num_groups": 2, "mamba_state_dim": 64,
    "learning_rate": 1e-4, "max_steps": 1, "device": "cpu", "bf16": False,
}  # fmt: skip
CONTESTANTS = {"two layouts": "auto", "one layout": "contiguous"}


def figures(config, streams: list[SequenceLayout]) -> str:
    """Means over the packs of what the layouts decide."""
    uneven, moved, keys = [], [], []
    for stream in streams:
        layout = attention_layout(config, stream)
        areas = [layout.area(rank) for rank in range(layout.ranks)]
        uneven.append(max(areas) * len(areas) / sum(areas))
        moved.append(1 - rows_between(stream, layout).trace() / stream.total)
        received = sum(layout.received_rows(rank) for rank in range(layout.ranks))
        keys.append(received / (layout.ranks - 1) / layout.total)
    return (
        f"busiest / mean {statistics.mean(uneven):.3f}, rows that move {statistics.mean(moved):.1%}, "
        f"keys {statistics.mean(keys):.1%} of a ring"
    )


def bench(args: argparse.Namespace, folder: str) -> None:
    ranks, rank = dist.get_world_size(), dist.get_rank()
    packs = [[args.tokens]] if args.whole else LENGTHS["packs"][str(args.tokens)][: args.packs]
    streams = [
        SequenceLayout.contiguous(sum(lengths), ranks, cu_seqlens=[0, *itertools.accumulate(lengths)])
        for lengths in packs
    ]
    g = torch.Generator().manual_seed(rank)
    work = []
    for stream in streams:
        tokens = torch.randint(MODEL["vocab_size"], (1, stream.local_length), generator=g)
        work.append(LocalBatch(tokens, tokens, stream))
    contestants, texts = {}, {}
    for name, asked in CONTESTANTS.items():
        keys = {"sequence_len": args.tokens, "context_parallel_size": ranks, "attention_cp_layout": asked}
        trainer = common.make_trainer(folder, MODEL | keys)
        for layer in trainer.model.decoder.layers.values():
            for stream in streams:
                layer.plan(stream)
        texts[name] = figures(trainer.model.config, streams)
        contestants[name] = (lambda trainer=trainer: trainer.compute_gradients(work), 1, True)
    times = common.compare_clocks(contestants, args.pairs, warmup=1)
    what = "one document" if args.whole else f"{sum(map(len, packs))} documents"
    common.report_clocks(
        f"{what}, {len(packs)} x {args.tokens:,} tokens, {ranks} ranks x 1 thread", times, "two layouts"
    )
    if rank == 0:
        for name, text in texts.items():
            print(f"  {name}: {text}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=16384, choices=map(int, LENGTHS["packs"]))
    parser.add_argument("--packs", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--whole", action="store_true")
    args = parser.parse_args()
    print(common.machine())
    with tempfile.TemporaryDirectory() as folder:
        common.run_ranks(args.ranks, bench, args, folder)
