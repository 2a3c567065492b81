"""Peak memory and time of a training step with each key that saves memory, beside a step with none.

    python benchmarks/memory_keys.py [--seq 16384] [--threads 2] [--ranks 1] [--only NAME ...] [--kept]

One process a contestant (or --ranks processes): resident memory (the largest it ever held, libraries included), and the
second step's time, on the clock and of the processor (with --threads 1 the latter says what a key costs on a busy
machine, too). The model of memory.py (16M parameters), float32, one sequence, AdamW,
and with --wide an MLP of 8 x the hidden size.

--kept counts instead what autograd keeps for backward between the layers' forward and backward passes, by key, and what
activation_offloading and gradient_checkpointing: offload would move to the CPU's memory: a count of tensors, which needs no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common
import torch
import torch.distributed as dist

import training
from longspan.models.memory.offload import Offload
from longspan.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy

TILED = {"tiled_mlp": True}
FULL, SELECTIVE = {"gradient_checkpointing": "full"}, {"gradient_checkpointing": "selective"}
KEYS: dict[str, dict] = {
    "none": {},
    "none, whole logits": {},
    "tiled_mlp": TILED,
    "tiled_mlp, 4 tiles": TILED | {"tiled_mlp_num_shards": 4},
    "selective": SELECTIVE,
    "selective, tiled_mlp": SELECTIVE | TILED,
    "full": FULL,
    "full, tiled_mlp": FULL | TILED,
    "full, whole logits": FULL,
    "reshard_after_forward: true": {"reshard_after_forward": True},
}


def peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def with_whole_logits(trainer) -> None:
    """The loss as it would be without chunks: logits of all tokens, then cross-entropy."""

    def losses(batch):
        logits = trainer.model(batch.tokens, layout=batch.layout)
        return vocab_parallel_cross_entropy(logits, batch.labels, group=trainer.groups.tp)

    trainer.losses = losses


def make_trainer(folder: str, args: argparse.Namespace, name: str):
    wide = {"ffn_hidden_size": 8 * training.HIDDEN} if args.wide else {}
    ranks = dist.get_world_size()
    torch.set_num_threads(args.threads)
    changes = KEYS[name] | wide | {"reinit_weights": True}
    trainer = training.make_trainer(folder, args.seq, False, ranks, **changes)
    if "whole logits" in name:
        with_whole_logits(trainer)
    return trainer


def measure_step(folder: str, args: argparse.Namespace, name: str, out: str) -> None:
    trainer = make_trainer(folder, args, name)
    start = peak_gib()
    for step in range(2):
        batches = trainer.micro_batches(step)
        dist.barrier()
        begun, worked = time.perf_counter(), time.process_time()
        loss = trainer.train_step(batches)["loss"]
        seconds = time.perf_counter() - begun, time.process_time() - worked
    held = torch.tensor([peak_gib(), start, *seconds, loss], dtype=torch.float64)
    dist.all_reduce(held, op=dist.ReduceOp.MAX)
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(held.tolist()))


def count_kept(folder: str, args: argparse.Namespace, name: str, out: str) -> None:
    """Bytes of the tensors a forward pass keeps (each memory once, weights left out), and of those that would move."""
    trainer = make_trainer(folder, args, name)
    batch = trainer.micro_batches(0)[0]
    kept: dict[int, torch.Tensor] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        kept[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        trainer.losses(batch)
    for parameter in trainer.model.parameters():  # the gathered ones: reshard_after_forward is off
        kept.pop(parameter.to_local().untyped_storage().data_ptr(), None)
    everything = sum(t.untyped_storage().nbytes() for t in kept.values())
    kept.clear()
    offload = Offload(torch.device("cpu"))
    for layer in trainer.model.decoder.layers.values():
        layer.offload = offload
    trainer.losses(batch)
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps([everything / 2**20, offload.moved / 2**20]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seq", type=int, default=16384)
    parser.add_argument("--ranks", type=int, default=1, help="processes, by context parallelism")
    parser.add_argument("--threads", type=int, default=2, help="of each process")
    parser.add_argument("--only", nargs="+", choices=[*KEYS], default=[*KEYS], metavar="NAME")
    parser.add_argument("--wide", action="store_true", help="an MLP of 8 x the hidden size")
    parser.add_argument("--kept", action="store_true")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    if args.one:
        name, folder, out = args.one
        function = count_kept if args.kept else measure_step
        common.run_ranks(args.ranks, function, folder, args, name, out)
        return
    print(common.machine())
    print(f"\n{args.seq} tokens, {args.ranks} process(es), float32{', wide MLP' if args.wide else ''}")
    with tempfile.TemporaryDirectory() as folder:
        training.make_model(Path(folder))
        training.make_data(Path(folder), args.seq)
        for name in args.only:
            out = f"{folder}/out.json"
            command = [sys.executable, __file__, *sys.argv[1:], "--one", name, folder, out]
            subprocess.run(command, check=True)
            got = json.loads(Path(out).read_text())
            if args.kept:
                line = f"kept {got[0]:8.1f} MiB, of it could be moved {got[1]:8.1f} MiB"
            else:
                line = f"{got[0]:6.2f} GiB ({got[1]:.2f} before the first step)  {got[2]:7.2f} s, {got[3]:7.2f} s of processor"
                line += f"  loss {got[4]:.6f}"
            print(f"  {name:<30} {line}", flush=True)


if __name__ == "__main__":
    main()
