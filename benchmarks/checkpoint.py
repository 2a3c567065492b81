"""How long a checkpoint holds training up: written in the background against written at once.

    python benchmarks/checkpoint.py [--hidden 512] [--layers 8] [--rounds 7]

Two gloo ranks of one thread, FSDP over both. The stall is the time that the call which saves takes on the slowest
rank; in the background the step after it shares the processor with the writing, so that its time is printed too.
Both ways are measured in turn, with the same model and optimizer, into one folder.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import common
import torch
import torch.distributed as dist

from longspan.config.load import make_config
from longspan.config.resolve import resolve
from longspan.config.run import Run
from longspan.training.checkpoint import Checkpointer
from longspan.training.trainer import Trainer


def make_trainer(args: argparse.Namespace) -> Trainer:
    values = {
        "num_layers": args.layers,
        "hidden_size": args.hidden,
        "num_attention_heads": 8,
        "vocab_size": 8192,
        "mock_data": True,
        "sequence_len": 256,
        "max_steps": 1000,
        "learning_rate": 1e-4,
        "bf16": False,
        "device": "cpu",
        "val_set_size": 0,
        "dp_shard_size": 2,
    }
    read = make_config(values)
    assert not read.problems, read.problems
    return Trainer(Run.of(resolve(read.config, 2).config), torch.device("cpu"))


def slowest(seconds: float) -> float:
    """The time of the slowest rank."""
    shared = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(shared, op=dist.ReduceOp.MAX)
    return shared.item()


def measure(args: argparse.Namespace, folder: str) -> None:
    trainer = make_trainer(args)
    batches = trainer.micro_batches(0)
    savers = {way: Checkpointer(Path(folder) / way, keep=1, background=way == "background") for way in WAYS}
    found: dict[str, list[float]] = {name: [] for name in (*WAYS, *(f"step {way}" for way in WAYS), "step")}

    def timed(name: str, call) -> None:
        dist.barrier()
        start = time.perf_counter()
        call()
        found[name].append(slowest(time.perf_counter() - start))

    for _ in range(args.rounds + 1):
        timed("step", lambda: trainer.train_step(batches))
        for way, saver in savers.items():
            state = (trainer.step, trainer.model, trainer.optimizer, trainer.description())
            timed(way, lambda saver=saver, state=state: saver.save(*state))
            timed(f"step {way}", lambda: trainer.train_step(batches))
            saver.finish()
    if dist.get_rank():
        return
    size = sum(f.stat().st_size for f in (Path(folder) / "at once").rglob("*.distcp")) / 2**20
    median = {name: 1e3 * statistics.median(times[1:]) for name, times in found.items()}
    print(f"a checkpoint of {size:,.0f} MiB; a step without a save {median['step']:.0f} ms")
    for way in WAYS:
        after = median[f"step {way}"]
        print(f"  {way:<12} stall {median[way]:8.0f} ms   the step after it {after:6.0f} ms")
    print(f"the stall is {median['at once'] / median['background']:.1f} times shorter in the background")


WAYS = ("at once", "background")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    print(common.machine())
    with tempfile.TemporaryDirectory() as folder:
        common.run_ranks(2, measure, args, folder)
