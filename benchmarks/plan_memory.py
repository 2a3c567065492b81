"""Memory as ``longspan plan`` predicts it against real processes, rank by rank.

    python benchmarks/plan_memory.py [--first 0] [--count 24] [--small]

Configs are drawn by a fixed seed: every layout and every value of every other axis at least twice. Each one trains two
steps on real gloo processes, in which a library in C (allocations.c) counts the bytes of PyTorch's allocator; the
prediction for the second step comes from processes without data. Experts get equally many tokens in both. Prints a
line a rank, and the mean and the worst error.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from longspan.config.load import make_config
from longspan.config.resolve import resolve
from longspan.config.run import Run
from longspan.expert_parallel import router
from longspan.runs.plan import memory_of_ranks
from longspan.training.trainer import Trainer

MODEL = {
    "num_layers": 4,
    "hidden_size": 256,
    "num_attention_heads": 8,
    "num_query_groups": 4,
    "ffn_hidden_size": 768,
    "vocab_size": 8192,
    "mock_data": True,
    "max_steps": 3,
    "learning_rate": 1e-3,
    "params_dtype": "float32",
    "device": "cpu",
    "use_tensorboard": False,
    "val_set_size": 0,
}
EXPERTS = {"num_moe_experts": 8, "moe_router_topk": 2, "moe_ffn_hidden_size": 256}
#: layout -> (processes, keys)
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "fsdp 2": (2, {}),
    "hsdp 2 x 2": (4, {"dp_shard_size": 2, "dp_replicate_size": 2}),
    "tp 2": (2, {"tensor_parallel_size": 2}),
    "cp 2 p2p": (2, {"context_parallel_size": 2}),
    "cp 2 all_gather": (2, {"context_parallel_size": 2, "cp_comm_type": "all_gather"}),
    "cp 2 a2a": (2, {"context_parallel_size": 2, "cp_comm_type": "a2a"}),
    "cp 4 a2a+p2p": (
        4,
        {
            "context_parallel_size": 4,
            "cp_comm_type": "a2a+p2p",
            "hierarchical_context_parallel_sizes": [2, 2],
        },
    ),
    "tp 2 x cp 2": (4, {"tensor_parallel_size": 2, "context_parallel_size": 2}),
    "pp 2": (2, {"pipeline_parallel_size": 2, "gradient_accumulation_steps": 4}),
    "pp 2 x cp 2": (
        4,
        {"pipeline_parallel_size": 2, "context_parallel_size": 2, "gradient_accumulation_steps": 4},
    ),
    "ep 2": (2, {"expert_parallel_size": 2, **EXPERTS}),
    "experts, fsdp 2": (2, EXPERTS),
}
AXES: dict[str, tuple[Any, ...]] = {
    "gradient_checkpointing": (False, "selective", True),
    "sample_packing": (False, True),
    "sequence_len": (1024, 2048, 4096, 8192, 16384),
    "bf16": (False, True),
}


def draw(count: int, small: bool) -> list[tuple[str, int, dict[str, Any]]]:
    """(name, processes, keys) of each config; the same for the same ``count``."""
    drawn = random.Random(16)
    decks = {name: [*values] * -(-count // len(values)) for name, values in AXES.items()}
    for deck in decks.values():
        drawn.shuffle(deck)
    names = [*LAYOUTS] * -(-count // len(LAYOUTS))
    configs = []
    for number, layout in enumerate(names[:count]):
        world, keys = LAYOUTS[layout]
        others = {name: deck[number] for name, deck in decks.items()}
        if small:
            others["sequence_len"] = min(others["sequence_len"], 2048)
        name = f"{layout}; " + ", ".join(f"{key} {value}" for key, value in others.items())
        configs.append((name, world, {**MODEL, "micro_batch_size": 1, **keys, **others}))
    return configs


def run_of(world: int, keys: dict[str, Any]) -> Run:
    reading = make_config(keys)
    assert not reading.problems, reading.problems
    return Run.of(resolve(reading.config, world).config)


def _train(rank: int, run: Run, port: int, results: Any) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    most_bytes = ctypes.CDLL(None).longspan_most_bytes
    most_bytes.restype = ctypes.c_size_t
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=run.sizes.world_size)
    # Experts get equally many tokens, as a plan takes them to.
    router.known_choices = lambda chosen, experts: (
        torch.arange(chosen.numel()).remainder(experts).view(chosen.shape)
    )
    before = most_bytes()
    trainer = Trainer(run, torch.device("cpu"))
    for step in range(2):
        batches = trainer.micro_batches(step)
        most_bytes()
        trainer.train_step(batches)
        del batches
    results.put((rank, most_bytes() - before))
    dist.barrier()
    dist.destroy_process_group()


def measured(run: Run) -> list[int]:
    """The peak of each rank of real processes in the second step, in bytes, without what it held before the run."""
    # A new program each, because the counting library is loaded at a program's start.
    context = multiprocessing.get_context("spawn")
    results, port = context.Queue(), random.randint(20000, 40000)
    processes = [
        context.Process(target=_train, args=(rank, run, port, results))
        for rank in range(run.sizes.world_size)
    ]
    for process in processes:
        process.start()
    try:
        return [peak for _, peak in sorted(results.get(timeout=600) for _ in processes)]
    finally:
        for process in processes:
            process.join(10)
            process.kill()


@contextlib.contextmanager
def counting() -> Iterator[None]:
    """A context in which new programs count their allocations (``allocations.c``)."""
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        sys.exit("this benchmark counts allocations by a small library in C: install a C compiler (gcc).")
    with tempfile.TemporaryDirectory() as folder:
        library = os.path.join(folder, "allocations.so")
        source = Path(__file__).with_name("allocations.c")
        subprocess.run(
            [compiler, "-O2", "-shared", "-fPIC", source, "-o", library, "-ldl", "-lpthread"], check=True
        )
        os.environ["LD_PRELOAD"] = library
        try:
            yield
        finally:
            del os.environ["LD_PRELOAD"]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--first", type=int, default=0, help="number of the first config")
    parser.add_argument("--count", type=int, default=24, help="number of configs")
    parser.add_argument("--small", action="store_true", help="sequences of at most 2,048 tokens")
    args = parser.parse_args()
    errors = []
    configs = draw(24, args.small)[args.first : args.first + args.count]
    for name, world, keys in configs:
        run = run_of(world, keys)
        with counting():
            real = measured(run)
        for memory, peak in zip(memory_of_ranks(run, range(world)), real):
            error = memory.peak / peak - 1
            errors.append(abs(error))
            print(
                f"{name}; rank {memory.rank}: {memory.peak / 2**20:.2f} predicted, {peak / 2**20:.2f} measured MiB, {error:+.2%}",
                flush=True,
            )
    if errors:
        print(f"{len(errors)} ranks: mean error {sum(errors) / len(errors):.2%}, worst {max(errors):.2%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
