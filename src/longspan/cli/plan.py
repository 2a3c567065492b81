"""``longspan plan``: what a run will need, before it runs."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from longspan.cli.options import key_help, number, read_config, take_options
from longspan.config.resolve import processes_asked_for, resolve
from longspan.errors import UserError
from longspan.planner.gpus import GPUS, find_gpu

USAGE = f"""\
usage: longspan plan CONFIG [--any-key value] [--gpus N] [--gpu NAME] [--nodes M] [--json]

Prints mesh, batch arithmetic and the memory of the heaviest and the lightest rank by component, and whether it fits.
Starts nothing: a training step of the real model runs on tensors without data, as one rank of the whole world. Needs no
GPU, no weights, no data and no network. Experts get equally many tokens, and the kernels are those of a CPU with the same
tensors kept for backward, without torch.compile. The time is that of long kernels at the rates of the GPU's data sheet
times what programs reach of them; short kernels take longer.
  --gpus N     GPUs of the run (default: the product of the parallel sizes)
  --gpu NAME   {", ".join(GPUS)} (default h100)
  --nodes M    machines, which must divide the GPUs
  --document-len N   tokens of each document of a pack (default: one document fills a row)
  --json       one JSON object: fits, memory_gib {{total, lightest, and a component each}}, capacity_gib, gpu,
               heaviest_rank, lightest_rank, parameters, checkpoint_gib, mesh, batch, step_s, time_s {{part: seconds}},
               communication_s {{axis: seconds}}, tokens_per_second_per_gpu, tflops_per_gpu, mfu
Exit code 0: it fits, 1: it does not, 2: a mistake in what was asked.
"""
OPTIONS = {"--gpus": True, "--gpu": True, "--nodes": True, "--document-len": True, "--json": False}


def run(arguments: Sequence[str]) -> int:
    if "--help" in arguments or "-h" in arguments:
        print(USAGE)
        print(key_help())
        return 0
    # With this variable the hub's library uses only the files on this machine.
    os.environ["HF_HUB_OFFLINE"] = "1"
    taken, rest, problems = take_options(arguments, OPTIONS)
    gpus, nodes = number(taken, "--gpus", problems), number(taken, "--nodes", problems)
    document_len = number(taken, "--document-len", problems)
    gpu = None
    try:
        gpu = find_gpu(taken.get("--gpu", "h100"))
    except UserError as error:
        problems += error.problems
    if gpus and nodes and gpus % nodes:
        problems.append(
            f"--gpus {gpus} --nodes {nodes}: each machine has the same number of GPUs. Choose a multiple."
        )
    reading = read_config("plan", rest, list(OPTIONS), problems)
    if reading.config is None or gpu is None:
        raise UserError(reading.problems)
    world = gpus or processes_asked_for(reading.config)
    checked = resolve(
        reading.config, world, device="cuda", bad_keys=set(reading.bad), earlier=reading.problems
    )

    from longspan.runs.plan import plan

    result = plan(checked, gpu, document_len, _shown if sys.stderr.isatty() else _unseen)
    if "--json" in taken:
        print(json.dumps(result, indent=2))
    else:
        report(result, nodes)
    return 0 if result["fits"] else 1


def _shown(done: int, of: int) -> None:
    print(f"\rsteps traced: {done} of {of}", end="\n" if done == of else "", file=sys.stderr, flush=True)


def _unseen(done: int, of: int) -> None:
    pass


def report(result: dict[str, Any], nodes: int | None) -> None:
    """Prints a plan."""
    memory = dict(result["memory_gib"])
    total, lightest = memory.pop("total"), memory.pop("lightest")
    print(f"mesh    {result['mesh']}{f' on {nodes} machines' if nodes else ''}")
    print(f"batch   {result['batch']}")
    print(f"model   {result['parameters']:,} parameters")
    if result["checkpoint_gib"] is not None:
        print(f"disk    {result['checkpoint_gib']:.2f} GiB a checkpoint")
    print(f"\nmemory of rank {result['heaviest_rank']}, the heaviest, at its peak in GiB:")
    for name, size in sorted(memory.items(), key=lambda item: -item[1]):
        print(f"  {name:<26} {size:9.3f}")
    print(f"  {'total':<26} {total:9.3f}   (rank {result['lightest_rank']}, the lightest: {lightest:.3f})")
    if result["step_s"] is not None:
        print(f"\ntime of a step, {result['step_s']:.3g} s, of which seconds:")
        for name, seconds in sorted(result["time_s"].items(), key=lambda item: -item[1]):
            if seconds:
                print(f"  {name:<26} {seconds:9.3f}")
        for axis, seconds in result["communication_s"].items():
            if seconds:
                print(f"  {f'({axis} sends, hidden or not)':<26} {seconds:9.3f}")
        print(
            f"{result['tokens_per_second_per_gpu']:,.0f} tokens/s a GPU, {result['tflops_per_gpu']:.0f} TFLOP/s a GPU by causal "
            f"attention, MFU {result['mfu']:.0%}"
        )
    verdict = "fits in" if result["fits"] else "does not fit in"
    print(f"\nIt {verdict} the {result['capacity_gib']:.1f} GiB of {result['gpu']}.")
