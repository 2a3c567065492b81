"""The scan of Mamba-2 against transformers' scan in plain PyTorch: forward and backward, and what is kept.

    python benchmarks/recurrent.py [--tokens 4096] [--heads 32] [--size 64] [--state 128] [--groups 1]
                                   [--chunks 64 128 256] [--repeats 7] [--threads 2]

Both sides compute only the scan (inputs after the convolution, step sizes after softplus, D included), on the same
float32 inputs: ``longspan.recurrent.ssd.ssd_scan`` for each chunk size of ``--chunks``, and
``mamba2_chunk_scan`` of transformers' Mamba-2 with its own chunk size. They take turns in one process. The ratio is
the median over the turns of the peer's time over ours. Beside the elapsed time stands the processor time of all
threads, which other work on the machine disturbs less. The memory is that of the tensors that autograd keeps for
backward, each storage once, and what of it is not an input.
"""

from __future__ import annotations

import argparse
import inspect
import os
import statistics
import time
from collections.abc import Callable

# Threads sleep while they wait: on a machine with other work, spinning threads slow the smaller operations most.
# OpenMP reads the variable when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from common import machine
from torch import Tensor
from transformers import Mamba2Config
from transformers.models.mamba2 import modeling_mamba2

from longspan.recurrent.ssd import CHUNK, ssd_scan


def inputs(tokens: int, heads: int, size: int, state: int, groups: int) -> dict[str, Tensor]:
    """Step sizes between 0.001 and 0.1 and A between -16 and -1, as Mamba-2 begins with."""
    torch.manual_seed(0)
    tensors = {
        "x": torch.randn(tokens, 1, heads, size),
        "dt": 0.001 * 100 ** torch.rand(tokens, 1, heads),
        "A": -(1 + 15 * torch.rand(heads)),
        "B": torch.randn(tokens, 1, groups, state),
        "C": torch.randn(tokens, 1, groups, state),
        "D": torch.randn(heads),
    }
    return {name: tensor.requires_grad_() for name, tensor in tensors.items()}


def peer(t: dict[str, Tensor], chunk: int) -> Tensor:
    """transformers' scan, which is batch-first, on the same inputs."""
    x, dt, B, C = (t[name].transpose(0, 1) for name in ("x", "dt", "B", "C"))
    scan = inspect.unwrap(modeling_mamba2.mamba2_chunk_scan)
    return scan(x, dt, t["A"], B, C, chunk, D=t["D"]).transpose(0, 1)


def kept(function: Callable[[], Tensor], known: list[Tensor]) -> tuple[int, int]:
    """Bytes of the tensors kept for backward, each storage once: all of them, and those of no input."""
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = function()
    inputs = {tensor.untyped_storage().data_ptr() for tensor in known}
    del y
    return sum(found.values()), sum(size for place, size in found.items() if place not in inputs)


def once(function: Callable[[], Tensor], tensors: list[Tensor], up: Tensor) -> tuple[float, float]:
    """(elapsed seconds, processor seconds of all threads) of forward and backward."""
    begin, used = time.perf_counter(), time.process_time()
    torch.autograd.grad(function(), tensors, up)
    return time.perf_counter() - begin, time.process_time() - used


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sizes = {"tokens": 4096, "heads": 32, "size": 64, "state": 128, "groups": 1, "repeats": 7, "threads": 2}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--chunks", type=int, nargs="*", default=[CHUNK])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    t = inputs(args.tokens, args.heads, args.size, args.state, args.groups)
    tensors, up = list(t.values()), torch.randn_like(t["x"])
    theirs = Mamba2Config().chunk_size
    name = f"transformers, chunk {theirs}"
    contestants: dict[str, Callable[[], Tensor]] = {name: lambda: peer(t, theirs)}
    for chunk in args.chunks:
        contestants[f"longspan, chunk {chunk}"] = lambda chunk=chunk: ssd_scan(**t, chunk=chunk)[0]
    print(
        f"{args.tokens} tokens, {args.heads} heads of {args.size}, state {args.state}, {args.groups} groups, "
        f"float32, {args.threads} threads; {machine()}"
    )
    with torch.no_grad():
        results = {label: function() for label, function in contestants.items()}
    for label, y in results.items():
        difference = (y - results[name]).abs().max() / results[name].abs().max()
        print(f"  {label:<26} largest difference from the peer: {difference:.1e} of the largest output")
    del results
    times: dict[str, list[tuple[float, float]]] = {label: [] for label in contestants}
    for turn in range(args.repeats + 1):
        for label, function in contestants.items():
            seconds = once(function, tensors, up)
            if turn:
                times[label].append(seconds)
    for label, function in contestants.items():
        elapsed, used = (statistics.median(values) for values in zip(*times[label]))
        ratios = [statistics.median(a[i] / b[i] for a, b in zip(times[name], times[label])) for i in range(2)]
        everything, more = (size / 2**20 for size in kept(function, tensors))
        print(
            f"  {label:<26} {1e3 * elapsed:7.0f} ms elapsed (peer x {ratios[0]:.2f})  {1e3 * used:7.0f} ms of "
            f"processors (peer x {ratios[1]:.2f})  keeps {everything:6.0f} MiB, {more:.0f} of no input"
        )


if __name__ == "__main__":
    main()
