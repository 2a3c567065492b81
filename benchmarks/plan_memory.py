"""Memory as ``longspan plan`` predicts it against real processes, rank by rank.

    python benchmarks/plan_memory.py [--first 0] [--count 24] [--small]

Configs are drawn by a fixed seed: every layout and every value of every other axis at least twice. Each one trains two
steps on real gloo processes under torch's profiler, whose records of the CPU's allocator give the live bytes of the
second step; the prediction comes from processes without data. Prints a line a rank, and the mean and the worst error.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch._C._profiler import _EventType

from longspan.config.load import make_config
from longspan.config.resolve import resolve
from longspan.config.run import Run
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


def peak_of_events(events: list[tuple[int, int, int, str]], start: int) -> int:
    """The most live bytes from time ``start`` on.

    Args:
        events: (time, bytes, address, path of operations) of each allocation (bytes > 0) and release, by time.
            Buffers that gloo's threads release have no release among them: they end with their collective.
    """
    held: dict[int, int] = {}
    released = set()
    for number, (_, size, address, _) in enumerate(events):
        if size > 0:
            held[address] = number
        elif address in held:
            released.add(held.pop(address))
    live: dict[int, int] = {}
    ending: list[int] = []
    peak = total = 0
    for number, (time, size, address, path) in enumerate(events):
        collective = "c10d" in path or "gloo" in path
        if not collective:
            total -= sum(live.pop(other, 0) for other in ending)
            ending = []
        total -= live.pop(address, 0)
        if size > 0:
            live[address] = size
            total += size
            if collective and number not in released:
                ending.append(address)
        if time >= start:
            peak = max(peak, total)
    return peak


def _train(rank: int, run: Run, port: int, results: Any) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=run.sizes.world_size)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        trainer = Trainer(run, torch.device("cpu"))
        for step in range(2):
            batches = trainer.micro_batches(step)
            with torch.profiler.record_function(f"step {step}"):
                trainer.train_step(batches)
    events, start = [], 0
    waiting = [(node, "") for node in profile.profiler.kineto_results.experimental_event_tree()]
    while waiting:
        node, path = waiting.pop()
        if node.tag == _EventType.Allocation:
            events.append((node.start_time_ns, node.extra_fields.alloc_size, node.extra_fields.ptr, path))
        elif node.name == "step 1":
            start = node.start_time_ns
        waiting += [(child, f"{path}>{node.name}") for child in node.children]
    results.put((rank, peak_of_events(sorted(events), start)))
    dist.barrier()
    dist.destroy_process_group()


def measured(run: Run) -> list[int]:
    """The peak of each rank of real processes, in bytes."""
    context = multiprocessing.get_context("fork")
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
