"""Peak memory of a training step: each rank at CP 1, 2 and 4, and transformers on one process.

    python benchmarks/memory.py [--seq 16384]

Resident memory (the largest a process ever held, libraries included), each contestant in processes of
its own. The same Llama (16M parameters), float32, one sequence, AdamW, no recomputation on either side.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import common
import torch
import torch.distributed as dist

import training


def peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def ours(folder: str, seq: int, ranks: int, out: str) -> None:
    trainer = training.make_trainer(folder, seq, False, ranks)
    start = peak_gib()
    for step in range(2):
        trainer.train_step(trainer.micro_batches(step))
    held = torch.tensor([peak_gib(), start], dtype=torch.float64)
    dist.all_reduce(held, op=dist.ReduceOp.MAX)
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(held.tolist()))


def theirs(folder: str, seq: int, out: str) -> None:
    peer = training.Peer(folder, False)
    start = peak_gib()
    for _ in range(2):
        peer.step(torch.randint(training.VOCAB, (1, seq)))
    Path(out).write_text(json.dumps([peak_gib(), start]))


def measure(name: str, folder: str, seq: int) -> list[float]:
    """Peak and start, GiB, in processes of their own."""
    with tempfile.TemporaryDirectory() as place:
        out = f"{place}/out.json"
        subprocess.run([sys.executable, __file__, "--one", name, folder, str(seq), out], check=True)
        return json.loads(Path(out).read_text())


def main() -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    if "--one" in sys.argv:
        name, folder, seq, out = sys.argv[sys.argv.index("--one") + 1 :]
        if name == "transformers":
            theirs(folder, int(seq), out)
        else:
            common.run_ranks(int(name), ours, folder, int(seq), int(name), out)
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seq", type=int, default=16384)
    args = parser.parse_args()
    print(common.machine())
    print(f"\npeak memory of a process in a training step: 16M parameters, {args.seq} tokens, float32")
    with tempfile.TemporaryDirectory() as folder:
        training.make_model(Path(folder))
        training.make_data(Path(folder), args.seq)
        peer, start = measure("transformers", folder, args.seq)
        print(
            f"  transformers, 1 process     {peer:6.2f} GiB ({start:.2f} before the first step)", flush=True
        )
        for ranks in (1, 2, 4):
            own, start = measure(str(ranks), folder, args.seq)
            print(
                f"  longspan, context parallel {ranks} {own:6.2f} GiB ({start:.2f} before the first step)  "
                f"{own / peer:.2f} of transformers",
                flush=True,
            )


if __name__ == "__main__":
    main()
