"""Hybrid context parallelism against a fixed degree and against padding, on documents of wildly different lengths.

    python benchmarks/hybrid.py [--ranks 2] [--pairs 5]
    python benchmarks/hybrid.py --simulate

The same documents (lengths.json, at most 4096 tokens each), the same model, three ways to cut them over all ranks:

    hybrid    a degree for each document, at most 4096 tokens a rank and micro-batch
    fixed     every document zigzag over all ranks, as Megatron's packed data is (micro-batches of the same size)
    padded    every document padded to the longest, then zigzag over all ranks

Timed: forward and backward of a small Llama. Simulated: 64 and 512 ranks with documents of up to 128K tokens, from
the layouts' areas, rows and bytes; what the numbers assume stands at SIMULATED.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import common
import numpy as np
import torch
import torch.distributed as dist

from longspan.context_parallel import SequenceLayout, hybrid
from longspan.context_parallel.needed import rows_matrix
from longspan.training.sharding import LocalBatch

LENGTHS = json.loads(Path(__file__).with_name("lengths.json").read_text())
LONGEST, ROOM = 4096, 4096  # tokens of a document, and of a rank in a micro-batch


def micro_batches(way: str, lengths: list[int], ranks: int, room: int, longest: int) -> list[SequenceLayout]:
    """The layouts of all micro-batches."""
    if way == "hybrid":
        batches = hybrid.schedule(lengths, ranks, room)
        return [hybrid.layout_of(lengths, batch)[1] for batch in batches]
    if way == "padded":
        lengths = [longest] * len(lengths)
    layouts, open_pack = [], [0]
    for n in [*lengths, 0]:
        if n == 0 or open_pack[-1] + n > ranks * room:
            if len(open_pack) > 1:
                layouts.append(SequenceLayout.per_document_zigzag(open_pack, ranks))
            open_pack = [0]
        open_pack.append(open_pack[-1] + n)
    return layouts


# --- measured -----------------------------------------------------------------------------------

MODEL = {
    "num_layers": 2, "hidden_size": 256, "num_attention_heads": 4, "num_query_groups": 2, "ffn_hidden_size": 704,
    "vocab_size": 2048, "learning_rate": 1e-4, "max_steps": 1, "device": "cpu", "bf16": False,
}  # fmt: skip


def bench(args: argparse.Namespace, folder: str) -> None:
    ranks = dist.get_world_size()
    lengths = [n for pack in LENGTHS["packs"]["16384"][: args.packs] for n in pack]
    keys = {"sequence_len": LONGEST, "context_parallel_size": ranks, "hybrid_context_parallel": True}
    trainer = common.make_trainer(folder, MODEL | keys | {"max_seqlen_per_dp_cp_rank": ROOM})
    g = torch.Generator().manual_seed(dist.get_rank())

    def run(way: str):
        work = []
        for layout in micro_batches(way, lengths, ranks, ROOM, LONGEST):
            tokens = torch.randint(MODEL["vocab_size"], (1, layout.local_length), generator=g)
            work.append(LocalBatch(tokens, tokens, layout))
            for layer in trainer.model.decoder.layers.values():
                layer.plan(layout)
        return lambda: trainer.compute_gradients(work)

    contestants = {way: (run(way), 1, True) for way in ("hybrid", "fixed", "padded")}
    times = common.compare(contestants, args.pairs, warmup=1)
    title = f"{len(lengths)} documents of 1 to {max(lengths)} tokens, {sum(lengths)} in all, {ranks} ranks x 1 thread"
    common.report(title, times, "hybrid")
    if dist.get_rank() == 0:
        rate = sum(lengths) / np.median(times["hybrid"])
        print(f"  hybrid: {rate:,.0f} tokens/s")


# --- simulated ----------------------------------------------------------------------------------

#: A layer of a Llama of 8B parameters in bfloat16 on a GPU that does 400 TFLOP/s, with 50 GB/s between GPUs. Attention:
#: 4 FLOPs a pair, head and feature forward, 2.5 times that backward. The rest: 6 FLOPs a weight and token. Rows of keys and
#: values travel twice as such and once as float32 gradients; half of the time hides behind computing.
SIMULATED = {
    "heads": 32,
    "kv_heads": 8,
    "d": 128,
    "weights": 218e6,
    "flops": 400e12,
    "bytes": 50e9,
    "exposed": 0.5,
}


def seconds(layouts: list[SequenceLayout]) -> tuple[float, float]:
    """(seconds of a layer over all micro-batches, share of it that is exposed communication)."""
    m, total, waiting = SIMULATED, 0.0, 0.0
    for layout in layouts:
        area = max(layout.area(r) for r in range(layout.ranks))
        compute = 3.5 * 4 * area * m["heads"] * m["d"] + 6 * m["weights"] * layout.local_length
        rows = rows_matrix(layout)
        busiest = max(rows.sum(0).max(), rows.sum(1).max())
        wire = busiest * 2 * m["kv_heads"] * m["d"] * (2 + 2 + 4) / m["bytes"] * m["exposed"]
        total += compute / m["flops"] + wire
        waiting += wire
    return total, waiting / total


def simulate() -> None:
    pool = [n for pack in LENGTHS["packs_512k"] for n in pack]
    print("\nsimulated: a layer, forward and backward (see SIMULATED)")
    for ranks, copies, room in ((64, 8, 16384), (512, 16, 16384)):
        g = np.random.default_rng(0)
        lengths = [int(n) for n in g.permutation(np.array(pool * copies))]
        longest = max(lengths)
        print(
            f"  {ranks} ranks, {len(lengths)} documents of up to {longest:,} tokens, {sum(lengths):,} in all"
        )
        base = None
        for way in ("hybrid", "fixed"):
            layouts = micro_batches(way, lengths, ranks, room, longest)
            count, layouts = len(layouts), layouts[:2]  # they are much alike
            time, waiting = seconds(layouts)
            time *= count / len(layouts)
            base = base or time
            print(
                f"    {way:<8} {1e3 * time:10.1f} ms  x {time / base:6.2f}   {count} micro-batches, "
                f"{100 * waiting:.0f} % waiting for rows",
                flush=True,
            )
        # all padded micro-batches are alike: one stands for them
        each = max(1, ranks * room // longest)
        layout = micro_batches("padded", [longest] * each, ranks, room, longest)
        time, waiting = seconds(layout)
        time *= -(-len(lengths) // each)
        print(
            f"    {'padded':<8} {1e3 * time:10.1f} ms  x {time / base:6.2f}   {100 * waiting:.0f} % waiting for rows"
        )


if __name__ == "__main__":
    import tempfile

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument(
        "--packs", type=int, default=4, help="packs of 16384 tokens whose documents make the batch"
    )
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--simulate", action="store_true")
    args = parser.parse_args()
    print(common.machine())
    if args.simulate:
        simulate()
    else:
        with tempfile.TemporaryDirectory() as folder:
            common.run_ranks(args.ranks, bench, args, folder)
