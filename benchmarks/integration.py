"""A model of transformers with its sequence over two ranks (attn_implementation="longspan") against itself whole (sdpa).

    python benchmarks/integration.py [--seq 4096] [--pairs 5]

The same Llama (16M parameters), the same tokens and AdamW on both sides: two ranks of one thread against one process of two
threads. Memory is the largest a process ever held, libraries included, each contestant in processes of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import common
import torch
import torch.distributed as dist
from memory import peak_gib

import training
from longspan.integrations.transformers import all_reduce_gradients, longspan_context, shard_batch

RANKS, THREADS = 2, 2


class Ours(training.Peer):
    """The peer's model and step, its sequence cut over all ranks."""

    def __init__(self, folder: str):
        super().__init__(folder, False)
        self.model.set_attn_implementation("longspan")

    def step(self, tokens: torch.Tensor) -> float:
        group = dist.group.WORLD
        shard = shard_batch({"input_ids": tokens, "labels": tokens}, group=group, config=self.model.config)
        self.optimizer.zero_grad()
        with longspan_context(shard.layout, group=group):
            loss = self.model(**shard.inputs).loss
        loss.backward()
        all_reduce_gradients(self.model, group)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        loss = loss.detach()
        dist.all_reduce(loss)
        return loss.item()


def tokens_of(seq: int) -> torch.Tensor:
    return torch.randint(training.VOCAB, (1, seq), generator=torch.Generator().manual_seed(0))


def bench(folder: str, seq: int, pairs: int) -> None:
    ours, tokens = Ours(folder), tokens_of(seq)
    peer = training.Peer(folder, False) if dist.get_rank() == 0 else None
    losses = {}
    name = f"attn_implementation=longspan, {RANKS} ranks x 1 thread"

    def ours_step():
        losses["longspan"] = ours.step(tokens)

    def peer_step():
        losses["sdpa"] = peer.step(tokens)

    contestants = {
        name: (ours_step, 1, True),
        f"sdpa, 1 process x {THREADS} threads": (peer_step, THREADS, False),
    }
    common.report(
        f"training step: 16M parameters, {seq} tokens, float32", common.compare(contestants, pairs), name
    )
    if dist.get_rank() == 0:
        print(f"  losses after {pairs + 2} steps: {losses}")


def held(kind: str, folder: str, seq: int, out: str) -> None:
    """Two steps, and the memory they took."""
    side = Ours(folder) if kind == "longspan" else training.Peer(folder, False)
    for _ in range(2):
        side.step(tokens_of(seq))
    peak = torch.tensor(peak_gib(), dtype=torch.float64)
    dist.all_reduce(peak, op=dist.ReduceOp.MAX)
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(peak.item()))


def memory(folder: str, seq: int) -> None:
    print("\npeak memory of a process")
    for kind, ranks in (("sdpa", 1), ("longspan", RANKS)):
        out = f"{folder}/out.json"
        subprocess.run(
            [sys.executable, __file__, "--one", kind, str(ranks), folder, str(seq), out], check=True
        )
        print(f"  {kind}, {ranks} process(es): {json.loads(Path(out).read_text()):.2f} GiB", flush=True)


def main() -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    if "--one" in sys.argv:
        kind, ranks, folder, seq, out = sys.argv[sys.argv.index("--one") + 1 :]
        common.run_ranks(int(ranks), held, kind, folder, int(seq), out)
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seq", type=int, default=4096)
    parser.add_argument("--pairs", type=int, default=5)
    args = parser.parse_args()
    print(common.machine())
    with tempfile.TemporaryDirectory() as folder:
        training.make_model(Path(folder))
        common.run_ranks(RANKS, bench, folder, args.seq, args.pairs)
        memory(folder, args.seq)


if __name__ == "__main__":
    main()
