"""How long the ranks of a pipeline wait, against the bubble formula: pp 2 on two gloo ranks of one thread.

    python benchmarks/pipeline.py [--seq 512] [--layers 4] [--rounds 5] [--schedules 1f1b interleaved ...]
                                  [--recompute none|selective|full] [--experts 8]

A step of m micro-batches takes (m v + p - 1) / v times the time t of a micro-batch on a rank, with p ranks and v stages a
rank, so that a rank works m v / (m v + p - 1) of the time. Here t is what 8 more micro-batches cost, divided by 8, and the
share is m t / (time of the step). A split backward computes more in t: its price is its t over that of interleaved in
the same run, and grows with recomputation and with experts (docs/pipeline.md). The zero-bubble schedules have no such formula; theirs is the share alone. Time of the
optimizer and of the gradients' reduction is in a step, which makes the shares smaller than the formula's.
"""

from __future__ import annotations

import argparse
import statistics
import time

import common
import torch
import torch.distributed as dist

from longspan.config.load import make_config
from longspan.config.resolve import resolve
from longspan.config.run import Run
from longspan.config.stages import SCHEDULES, SPLIT_BACKWARD
from longspan.training.trainer import Trainer

MICRO_BATCHES = (2, 4, 8, 16)


def make_trainer(args: argparse.Namespace, schedule: str, micro_batches: int) -> Trainer:
    values = {
        "num_layers": args.layers,
        "hidden_size": 256,
        "num_attention_heads": 4,
        "ffn_hidden_size": 704,
        "vocab_size": 128,
        "mock_data": True,
        "sequence_len": args.seq,
        "max_steps": 2,
        "learning_rate": 1e-3,
        "bf16": False,
        "device": "cpu",
        "val_set_size": 0,
        "pipeline_parallel_size": 2,
        "pipeline_schedule": schedule,
        "gradient_accumulation_steps": micro_batches,
        "gradient_checkpointing": {"none": False, "full": True}.get(args.recompute, args.recompute),
    }
    if args.experts:
        values |= {"num_moe_experts": args.experts, "moe_ffn_hidden_size": 352}
    read = make_config(values)
    assert not read.problems, read.problems
    return Trainer(Run.of(resolve(read.config, 2).config), torch.device("cpu"))


def measure(args: argparse.Namespace) -> None:
    trainers = {(s, m): make_trainer(args, s, m) for s in args.schedules for m in MICRO_BATCHES}
    batches = {key: trainer.micro_batches(0) for key, trainer in trainers.items()}
    seconds: dict[tuple[str, int], list[float]] = {key: [] for key in trainers}
    for turn in range(args.rounds + 1):
        for key, trainer in trainers.items():
            dist.barrier()
            start = time.perf_counter()
            trainer.compute_gradients(batches[key])
            slowest = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
            dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
            if turn:
                seconds[key].append(slowest.item())
    if dist.get_rank():
        return
    for schedule in args.schedules:
        median = {m: statistics.median(seconds[schedule, m]) for m in MICRO_BATCHES}
        virtual = 2 if SCHEDULES[schedule] else 1
        each = (median[16] - median[8]) / 8
        print(f"\n{schedule}: {1e3 * each:.0f} ms a micro-batch on a rank")
        for m in MICRO_BATCHES:
            formula = (
                "" if schedule in SPLIT_BACKWARD else f"   formula {m * virtual / (m * virtual + 1):.2f}"
            )
            print(
                f"  {m:>2} micro-batches {1e3 * median[m]:8.0f} ms   works {m * each / median[m]:.2f}{formula}"
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seq", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--recompute", choices=("none", "selective", "full"), default="none")
    parser.add_argument("--experts", type=int, default=0)
    parser.add_argument("--schedules", nargs="+", choices=SCHEDULES, default=[*SCHEDULES])
    args = parser.parse_args()
    print(common.machine())
    common.run_ranks(2, measure, args)
