"""Adapters against full training of the same model: peak memory and tokens a second.

    python benchmarks/lora.py [--seq 1024] [--bf16] [--pairs 3] [--rank 16]

A Llama of 32M parameters (8 layers, hidden 512, vocabulary 8192), one sequence a step, AdamW, no recomputation;
adapters on all linear layers. One process of two threads each, which run by turns; memory is the largest resident
memory of the process, libraries included.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import common
import numpy as np
import torch

from longspan.config.load import make_config
from longspan.config.resolve import resolve
from longspan.config.run import Run
from longspan.data import IndexedDatasetWriter
from longspan.mesh.mesh import close_distributed, init_distributed
from longspan.training.adapters import parameter_counts
from longspan.training.trainer import Trainer

VOCAB, STEPS = 8192, 2


def make_model(folder: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 512, "num_hidden_layers": 8, "intermediate_size": 1408}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, **sizes, **heads)).save_pretrained(folder)


def one(folder: str, seq: int, bf16: bool, rank: int) -> dict:
    """A few steps in this process: median step time, peak memory, parameters; rank 0 trains all weights."""
    values = {
        "base_model": folder,
        "datasets": [{"path": f"{folder}/data"}],
        "sequence_len": seq,
        "sample_packing": False,
        "global_batch_size": 1,
        "max_steps": 100,
        "learning_rate": 1e-4,
        "bf16": bf16,
        "optimizer": "adamw_torch_fused",
    }
    values |= {"adapter": "lora", "lora_r": rank, "lora_target_linear": True} if rank else {}
    reading = make_config(values)
    assert reading.config is not None, reading.problems
    init_distributed("cpu")
    trainer = Trainer(Run.of(resolve(reading.config, 1).config), torch.device("cpu"))
    records = [trainer.train_step(trainer.micro_batches(step)) for step in range(1 + STEPS)]
    close_distributed()
    counts = parameter_counts(trainer.model)
    return {
        "seconds": statistics.median(r["step_time"] for r in records[1:]),
        "gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "parameters": counts,
    }


def main() -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seq", type=int, default=1024)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--one", nargs=2, metavar=("FOLDER", "RANK"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one(args.one[0], args.seq, args.bf16, int(args.one[1]))))
        return
    print(common.machine())
    found: dict[int, list[dict]] = {0: [], args.rank: []}
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder))
        with IndexedDatasetWriter(Path(folder) / "data", np.uint16) as writer:
            writer.add_document(np.random.default_rng(0).integers(0, VOCAB, 4 * args.seq))
        for _ in range(args.pairs):
            for rank in found:
                command = [sys.executable, __file__, "--seq", str(args.seq), "--one", folder, str(rank)]
                command += ["--bf16"] if args.bf16 else []
                shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                found[rank].append(json.loads(shown.splitlines()[-1]))
    print(f"\n{args.seq} tokens a step, {'bfloat16 compute' if args.bf16 else 'float32'}")
    for rank, runs in found.items():
        seconds = statistics.median(r["seconds"] for r in runs)
        parameters, trained = runs[0]["parameters"]
        name = f"LoRA, rank {rank}" if rank else "all weights"
        print(
            f"  {name:<14} {trained / 1e6:7.2f}M of {parameters / 1e6:.1f}M trained   "
            f"{max(r['gib'] for r in runs):5.2f} GiB   {args.seq / seconds:7.0f} tokens/s"
        )
    ratios = [full["seconds"] / own["seconds"] for full, own in zip(found[0], found[args.rank])]
    print(
        f"  LoRA is x {statistics.median(ratios):.2f} as fast ({min(ratios):.2f} .. {max(ratios):.2f}, {args.pairs} pairs)"
    )


if __name__ == "__main__":
    main()
