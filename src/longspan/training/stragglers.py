"""Ranks that are slower than the others: a GPU that is throttled, a machine with other work, a slow disk.

A step takes as long as its slowest rank, and every rank waits for it in some exchange, so times of steps
do not show which one it is. So now and then each rank does the same small piece of work without any exchange,
and the ranks compare how long it took, and how long they have waited for data.
"""

from __future__ import annotations

import socket
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

#: A rank is slow if its work takes so many times the median's.
FACTOR = 1.5
#: A rank waits for its data if it does so for this share of the time, and so many times as long as the median.
SHARE = 0.1
#: the slowest ranks that a record names
NAMED = 8


def probe(device: torch.device) -> float:
    """Seconds of some products of matrices: the shortest of three tries, which other work disturbs least."""
    cuda = device.type == "cuda"
    size, times = (4096, 4) if cuda else (256, 8)
    a = torch.ones(size, size, device=device, dtype=torch.bfloat16 if cuda else torch.float32)
    tries = []
    for _ in range(3):
        if cuda:
            torch.cuda.synchronize(device)
        begin = time.perf_counter()
        for _ in range(times):
            torch.mm(a, a)
        if cuda:
            torch.cuda.synchronize(device)
        tries.append(time.perf_counter() - begin)
    return min(tries)


class Stragglers:
    """Compares the ranks every so many steps.

    Args:
        every: ``straggler_interval``, in steps; 0 never compares.
        measure: returns the seconds that the piece of work has taken on this rank.

    Attributes:
        waited: seconds that this rank has waited for its data since the last comparison.
    """

    def __init__(self, every: int, measure: Callable[[], float]):
        self.every, self.measure = every, measure
        self.waited, self.since = 0.0, time.perf_counter()
        # Ranks that were slow at the last comparison; once may be chance.
        self.before: set[tuple[int, str]] = set()

    def look(self, step: int) -> tuple[dict[str, Any], list[str]] | None:
        """Compares the ranks if it is time to; collective then.

        Returns:
            A record, and a line for each rank that was slow twice in a row. None if it is not time.
        """
        world = dist.get_world_size()
        if not self.every or step % self.every or world == 1:
            return None
        now = time.perf_counter()
        own = torch.tensor([self.measure(), self.waited], dtype=torch.float64)
        elapsed, self.waited, self.since = now - self.since, 0.0, now
        gathered = [torch.empty_like(own) for _ in range(world)]
        dist.all_gather(gathered, own)
        work, waits = torch.stack(gathered).T.tolist()
        slow = [(rank, "work") for rank in _above(work, 0.0, FACTOR)]
        slow += [(rank, "data") for rank in _above(waits, SHARE * elapsed, FACTOR)]
        # All ranks have found the same ones.
        again = [found for found in slow if found in self.before]
        self.before = set(slow)
        lines = []
        if again:
            hosts: list = [None] * world
            dist.all_gather_object(hosts, socket.gethostname())
            for rank, what in again:
                times = work if what == "work" else waits
                text = "computes slower" if what == "work" else "waits longer for its data"
                lines.append(
                    f"rank {rank} ({hosts[rank]}) {text} than the others: {_ms(times[rank])} against {_ms(_median(times))} (median) "
                    f"{'for the same work' if what == 'work' else f'in {elapsed:.3g} s'}; every step waits for it."
                )
        return {"work_ms": _summary(work), "data_wait_ms": _summary(waits)}, lines


def _median(times: Sequence[float]) -> float:
    return statistics.median_low(times)


def _above(times: Sequence[float], least: float, factor: float) -> list[int]:
    """The ranks whose time is above the median times a factor, and above ``least``."""
    limit = max(least, factor * _median(times))
    return [rank for rank, seconds in enumerate(times) if seconds > limit]


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"


def _summary(times: Sequence[float]) -> dict[str, Any]:
    """Numbers for the record, in milliseconds, and the slowest ranks, the slowest first."""
    order = sorted(range(len(times)), key=lambda rank: -times[rank])
    low, median, high = min(times), _median(times), max(times)
    return {
        **{name: round(1e3 * value, 4) for name, value in zip(("min", "median", "max"), (low, median, high))},
        "slowest_ranks": order[:NAMED],
    }
