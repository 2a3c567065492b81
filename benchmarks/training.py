"""Training steps: longspan on two cores, as two ranks or as one process, against transformers on the same two.

    python benchmarks/training.py [--seq 4096] [--bf16] [--pairs 7]

The same Llama (16M parameters, as transformers makes it), the same tokens, AdamW on both sides, one sequence a
step. bf16 is bfloat16 compute with float32 weights here, autocast there.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

import common
import numpy as np
import torch
import torch.distributed as dist

from longspan.config.load import make_config
from longspan.config.resolve import resolve
from longspan.config.run import Run
from longspan.data import IndexedDatasetWriter
from longspan.training.trainer import Trainer

THREADS = 2
VOCAB, HIDDEN, LAYERS, HEADS, KV_HEADS, FFN = 8192, 384, 6, 6, 2, 1024


def make_model(folder: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        intermediate_size=FFN,
        max_position_embeddings=1 << 20,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)


def make_data(folder: Path, seq: int) -> None:
    rng = np.random.default_rng(0)
    with IndexedDatasetWriter(folder / "data", np.uint16) as writer:
        writer.add_document(rng.integers(0, VOCAB, 4 * seq))  # four whole samples


def make_trainer(folder: str, seq: int, bf16: bool, ranks: int, **changes) -> Trainer:
    values = {
        "base_model": folder,
        "datasets": [{"path": f"{folder}/data"}],
        "sequence_len": seq,
        "sample_packing": False,
        "context_parallel_size": ranks,
        "global_batch_size": 1,
        "max_steps": 1000,
        "learning_rate": 1e-4,
        "bf16": bf16,
        "warmup_steps": 0,
        "reshard_after_forward": False,  # a small model: the peer keeps its weights too
    }
    reading = make_config(values | changes)
    assert reading.config is not None, reading.problems
    return Trainer(Run.of(resolve(reading.config, ranks).config), torch.device("cpu"))


class Peer:
    """transformers' own model and loss in a plain training step."""

    def __init__(self, folder: str, bf16: bool, checkpointing: bool = False):
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa")
        if checkpointing:
            self.model.gradient_checkpointing_enable()
        self.model.train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.bf16 = bf16

    def step(self, tokens: torch.Tensor) -> float:
        self.optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            loss = self.model(tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return loss.item()


def bench(args: argparse.Namespace, folder: str) -> None:
    trainer = make_trainer(folder, args.seq, args.bf16, dist.get_world_size())
    batches = trainer.micro_batches(0)
    peer = Peer(folder, args.bf16) if dist.get_rank() == 0 else None
    tokens = trainer.train_data.micro_batches(
        0, global_batch_size=1, micro_batch_size=1, dp_rank=0, dp_size=1
    )[0].tokens
    losses = {}

    def ours_step():
        losses["longspan"] = trainer.train_step(batches)["loss"]

    def peer_step():
        losses["transformers"] = peer.step(tokens)

    ranks = dist.get_world_size()
    threads = THREADS // ranks
    ours = f"longspan, {ranks} process(es) x {threads} thread(s)"
    contestants = {
        ours: (ours_step, threads, True),
        f"transformers, 1 process x {THREADS} threads": (peer_step, THREADS, False),
    }
    times = common.compare(contestants, args.pairs)
    kind = "bfloat16 compute" if args.bf16 else "float32"
    common.report(f"training step: 16M parameters, {args.seq} tokens, {kind}", times, ours)
    if dist.get_rank() == 0:
        print(f"  losses after {args.pairs + 2} steps: {losses}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seq", type=int, default=4096)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--ranks", type=int, default=2, help="processes of longspan; they share two threads")
    os.environ["HF_HUB_OFFLINE"] = "1"
    print(common.machine())
    with tempfile.TemporaryDirectory() as folder:
        args = parser.parse_args()
        make_model(Path(folder))
        make_data(Path(folder), args.seq)
        common.run_ranks(args.ranks, bench, args, folder)
