"""Timers for a training script, called as Megatron-LM's: ``timers("forward").start()`` ... ``timers.log()``.

Each process measures its own times with the host's clock. A timer waits for the work of this process's GPU
where it starts and stops, so that kernels which the host has only launched count in the part of the code that
launched them. ``log`` gathers the times of all ranks, and one rank prints them.

A timer has a level, and ``timing_log_level`` decides which timers are printed: 0 those of a whole step, 1
also what happens once a step, 2 also what happens for each micro-batch. Timers of a higher level are measured
too, so that ``elapsed`` is right at every level; Megatron-LM's measure nothing there, and their ``elapsed``
fails.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
import torch.distributed as dist

LEVELS = (0, 1, 2)
#: timing_log_option -> the first line of what ``log`` prints
HEADS = {
    "max": "max time across ranks (ms):",
    "minmax": "(min, max) time across ranks (ms):",
    "all": "times across ranks (ms):",
}


class Timer:
    """A stopwatch that adds up the times between ``start`` and ``stop``, in seconds.

    ``barrier=True`` waits for all ranks first, so that their waiting does not count in this timer.
    """

    def __init__(self, name: str):
        self.name, self._total = name, 0.0
        #: The time of the start; None while the timer does not run.
        self._begin: float | None = None

    def start(self, barrier: bool = False) -> None:
        """Starts the timer.

        Raises:
            RuntimeError: it runs already.
        """
        if self._begin is not None:
            raise RuntimeError(f"timer {self.name!r} runs already: stop it before it is started again.")
        self._begin = _now(barrier)

    def stop(self, barrier: bool = False) -> None:
        """Stops the timer and adds the time since its start.

        Raises:
            RuntimeError: it does not run.
        """
        if self._begin is None:
            raise RuntimeError(f"timer {self.name!r} does not run: start it before it is stopped.")
        self._total += _now(barrier) - self._begin
        self._begin = None

    def reset(self) -> None:
        """Sets the time to 0; a running timer stops."""
        self._total, self._begin = 0.0, None

    def elapsed(self, reset: bool = True, barrier: bool = False) -> float:
        """The time that was added up, in seconds; a timer that runs counts until now, and goes on.

        Args:
            reset: begin at 0 again.
        """
        running = self._begin is not None
        if running:
            self.stop(barrier)
        total = self._total
        if reset:
            self.reset()
        if running:
            self.start(barrier)
        return total


class Timers:
    """All timers of a script: ``timers(name)`` returns one, and makes it if there is none of this name.

    Args:
        log_level: the highest level that is printed, 0, 1 or 2.
        log_option: ``max``, ``minmax`` or ``all``: what is printed of the ranks' times.

    Raises:
        ValueError: another level or option.
    """

    def __init__(self, log_level: int = 0, log_option: str = "minmax"):
        _check_level("timing_log_level", log_level)
        if log_option not in HEADS:
            raise ValueError(f"timing_log_option {log_option!r}: one of {', '.join(HEADS)}.")
        self.log_level, self.log_option = log_level, log_option
        self._timers: dict[str, Timer] = {}
        self._levels: dict[str, int] = {}

    def __call__(self, name: str, log_level: int | None = None) -> Timer:
        """The timer of this name.

        Args:
            log_level: of a new timer; None makes it 2. A timer keeps its level.

        Raises:
            ValueError: there is no such level, or the timer has another one.
        """
        if name not in self._timers:
            level = LEVELS[-1] if log_level is None else log_level
            _check_level(f"timer {name!r}: log_level", level)
            self._timers[name], self._levels[name] = Timer(name), level
        elif log_level not in (None, self._levels[name]):
            raise ValueError(
                f"timer {name!r} has log_level {self._levels[name]}, and here {log_level}: a timer has one level. Use another "
                "name, or leave the level out."
            )
        return self._timers[name]

    def log(
        self,
        names: Sequence[str] | None = None,
        rank: int | None = None,
        normalizer: float = 1.0,
        reset: bool = True,
        barrier: bool = False,
    ) -> None:
        """Prints the times of all ranks, in milliseconds. All ranks must call it.

        A timer counts on the ranks where it has run; where it has run on no rank, it is left out.

        Args:
            names: which timers; None takes all. Timers above ``log_level`` are left out.
            rank: the global rank that prints; None takes the last rank, as Megatron-LM does.
            normalizer: times are divided by it, such as by the number of steps since the last call.
            reset: the timers that are read begin at 0 again.
            barrier: wait for all ranks first.

        Raises:
            ValueError: normalizer is not above 0.
        """
        text = self.all_ranks_text(names, normalizer, reset, barrier)
        world, own = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
        if text is not None and own == (world - 1 if rank is None else rank):
            print(text, flush=True)

    def all_ranks_text(
        self,
        names: Sequence[str] | None = None,
        normalizer: float = 1.0,
        reset: bool = True,
        barrier: bool = False,
    ) -> str | None:
        """The lines that ``log`` prints, on every rank; None if no timer has run. All ranks must call it."""
        if not normalizer > 0:
            raise ValueError(f"normalizer {normalizer}: times are divided by a number above 0.")
        if barrier and dist.is_initialized():
            dist.barrier()
        own = {
            name: timer.elapsed(reset)
            for name, timer in self._timers.items()
            if self._levels[name] <= self.log_level and (names is None or name in names)
        }
        # A stage of a pipeline may have timers that other stages lack, so the ranks exchange names too.
        by_rank: list[dict[str, float]] = [own]
        if dist.is_initialized():
            by_rank = [{} for _ in range(dist.get_world_size())]
            dist.all_gather_object(by_rank, own)
        lines = []
        for name in dict.fromkeys(name for times in by_rank for name in times):
            times = {r: 1000 * t[name] / normalizer for r, t in enumerate(by_rank) if t.get(name)}
            if times:
                lines += self._lines(name, times)
        return "\n".join([HEADS[self.log_option], *lines]) if lines else None

    def _lines(self, name: str, times: dict[int, float]) -> list[str]:
        """The lines of one timer; ``times`` are milliseconds by rank."""
        if self.log_option == "all":
            return [f"  {name}:", *(f"     rank {rank:2d}: {value:.2f}" for rank, value in times.items())]
        least, most = min(times.values()), max(times.values())
        shown = f"{most:.2f}" if self.log_option == "max" else f"({least:.2f}, {most:.2f})"
        return [f"    {f'{name} '.ljust(48, '.')}: {shown}"]


def _now(barrier: bool) -> float:
    """The host's clock, in seconds, after the work of this process's GPU; ``barrier`` waits for all ranks."""
    if barrier and dist.is_initialized():
        dist.barrier()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def _check_level(what: str, level: int) -> None:
    if level not in LEVELS:
        raise ValueError(f"{what} {level}: one of {', '.join(map(str, LEVELS))}.")
