"""A session-wide pool of gloo worker processes, to which tests ship functions.

    run(4, check_something, arg)   runs check_something(arg) on ranks 0..3 of a fresh world

Workers are forked from two processes that have imported torch, and stay; a run makes a fresh process group (a file store of its
own) and takes it down again, so tests share nothing. The functions are module-level, so
that they travel by name. The results come back as a list by rank.

A rank that fails shows its own traceback. A rank that hangs fails the test within a
minute, by rank, with the stack it hangs in; the pool then starts anew.

On a busy machine gloo may wait without end for a connection of a new world, before any code of a test runs:
about one world of 150 did beside two other pools. Such a world is started again, with new workers.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import faulthandler
import functools
import gc
import importlib
import multiprocessing as mp
import os
import signal
import sys
import tempfile
import time
import traceback
import warnings
from multiprocessing import forkserver
from multiprocessing.connection import wait
from pathlib import Path
from unittest import mock

#: a machine that does other work needs longer: LONGSPAN_TEST_TIMEOUT gives seconds
TIMEOUT_S = float(os.environ.get("LONGSPAN_TEST_TIMEOUT", "60"))
GRACE_S = 3.0
#: within so many seconds the process group of a world is made; then new workers try again, at most so many times
START_S = TIMEOUT_S / 3
STARTS = 3
#: what a process has imported of which workers are forked
PRELOADED = ["torch", "torch.distributed.tensor", "torch._dynamo", "longspan.training.trainer"]


#: what a worker sends when its process group is made
STARTED = "started"


class WorkerError(AssertionError):
    """Some rank failed or hung; the message holds its traceback."""


def torch_caches() -> list:
    """What empties the caches of torch.distributed whose entries hold meshes, and so process groups."""
    from torch.distributed.tensor import _redistribute, debug

    kind = type(functools.lru_cache(len))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # looking at what is deprecated
        found = [o for o in gc.get_objects() if isinstance(o, kind)]
    names = (
        (debug, "_clear_sharding_prop_cache"),
        (_redistribute, "clear_redistribute_planner_cache"),  # torch 2.13
    )
    return [
        *(
            o.cache_clear
            for o in found
            if (getattr(o, "__module__", None) or "").startswith("torch.distributed")
        ),
        *(getattr(module, name) for module, name in names if hasattr(module, name)),
    ]


def forget_meshes(clear: list) -> None:
    """Lets go of the process groups of a world that is over.

    DTensor's caches and cycles keep its meshes alive, and with each group gloo's threads: after some hundred tests
    they would be hundreds, and slow everything.
    """
    for function in clear:
        function()
    gc.collect()


def _serve(connection, paths: list[str], stacks: str) -> None:
    sys.path[:] = paths
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    # not SIGUSR1: a training in this process sets and resets its handler
    faulthandler.register(signal.SIGUSR2, file=open(stacks, "w"), all_threads=True)  # noqa: SIM115
    from longspan import parallel_state

    clear = torch_caches()
    gc.freeze()  # what is imported now stays: a collection after each run need not look at it
    while True:
        try:
            job = connection.recv()
        except (EOFError, KeyboardInterrupt):
            return
        rank, world, store, module, name, args = job
        ok, result = True, None
        try:
            torch.manual_seed(0)
            dist.init_process_group(
                "gloo",
                store=dist.FileStore(store, world),
                rank=rank,
                world_size=world,
                timeout=datetime.timedelta(seconds=TIMEOUT_S),
            )
            connection.send(STARTED)
            result = getattr(importlib.import_module(module), name)(*args)
            dist.barrier()
        except BaseException:
            ok, result = False, traceback.format_exc()
        finally:
            parallel_state.destroy_model_parallel()
            with contextlib.suppress(Exception):
                if dist.is_initialized():
                    dist.destroy_process_group()
            forget_meshes(clear)
        try:
            connection.send((ok, result))
        except Exception:  # a result that cannot travel
            connection.send((False, traceback.format_exc()))


class Pool:
    """Workers, started when they are needed.

    A forked worker has the hash seed of the process of which it is forked. There are two of these, so that ranks go
    through a set of names in different orders, as those of a user do. Ranks that differ in one axis of sizes of two are
    of different processes: the number of ones in a rank's binary digits decides.
    """

    def __init__(self) -> None:
        self.servers = [forkserver.ForkServer() for _ in range(2)]
        for server in self.servers:
            server.set_forkserver_preload(PRELOADED)
        self.workers: list[tuple] = []  # (process, connection, file of stacks)
        self.folder = tempfile.TemporaryDirectory()
        self.runs = 0

    def _ensure(self, world: int) -> None:
        context = mp.get_context("forkserver")
        while len(self.workers) < world:
            server = self.servers[len(self.workers).bit_count() % 2]
            here, there = context.Pipe()
            stacks = os.path.join(self.folder.name, f"stacks-{time.monotonic_ns()}")
            process = context.Process(target=_serve, args=(there, sys.path, stacks), daemon=True)
            # multiprocessing itself has one process to fork of.
            with mock.patch.object(forkserver, "connect_to_new_process", server.connect_to_new_process):
                process.start()
            there.close()
            self.workers.append((process, here, stacks))

    def run(self, world: int, function, *args, timeout: float = TIMEOUT_S) -> list:
        """Runs ``function(*args)`` on ``world`` ranks; returns the results by rank.

        Raises:
            WorkerError: a rank raised, died or did not finish in ``timeout`` seconds.
        """
        job = (function.__module__, function.__name__, args)
        store = next((path for _ in range(STARTS) if (path := self._start(world, job))), None)
        if store is None:
            raise WorkerError(f"no world of {world} ranks was started, {STARTS} times of {START_S:.0f} s")
        results: dict[int, object] = {}
        failures: list[str] = []
        deadline = time.monotonic() + timeout
        waiting = {self.workers[rank][1]: rank for rank in range(world)}
        while waiting and time.monotonic() < deadline:
            for connection in wait(list(waiting), timeout=max(0.0, deadline - time.monotonic())):
                rank = waiting.pop(connection)
                try:
                    ok, result = connection.recv()
                except EOFError:
                    ok, result = False, f"rank {rank} died (exit code {self.workers[rank][0].exitcode})"
                if ok:
                    results[rank] = result
                else:
                    failures.append(f"rank {rank} of {world}, {function.__name__}:\n{result}")
                    deadline = min(deadline, time.monotonic() + GRACE_S)  # the others wait for it in vain
        if waiting and not failures:
            for rank in waiting.values():
                failures.append(
                    f"rank {rank} of {world} hung in {function.__name__} for {timeout:.0f} s:\n{self._stack(rank)}"
                )
        if waiting or any(not process.is_alive() for process, *_ in self.workers):
            self.close()
        if failures:
            raise WorkerError("\n".join(failures))
        with contextlib.suppress(FileNotFoundError):
            os.unlink(store)
        return [results[rank] for rank in range(world)]

    def _start(self, world: int, job: tuple) -> str | None:
        """Starts a world; returns the path of its store, or None if not every rank has its process group in time."""
        self._ensure(world)
        self.runs += 1
        store = os.path.join(self.folder.name, f"store-{self.runs}")
        for rank in range(world):
            self.workers[rank][1].send((rank, world, store, *job))
        deadline = time.monotonic() + START_S
        waiting = [connection for _, connection, _ in self.workers[:world]]
        for connection in waiting:
            # A worker that has died is readable too, and run() reports it.
            with contextlib.suppress(EOFError):
                left = max(0.0, deadline - time.monotonic())
                if not connection.poll(left) or connection.recv() != STARTED:
                    self.close()
                    return None
        return store

    def _stack(self, rank: int) -> str:
        process, _, stacks = self.workers[rank]
        if not os.path.exists(stacks):
            return "(the process was still starting)"
        os.kill(process.pid, signal.SIGUSR2)
        time.sleep(0.3)
        return Path(stacks).read_text()

    def close(self) -> None:
        for process, connection, _ in self.workers:
            connection.close()
            process.kill()
            process.join()
        self.workers.clear()


_pool = Pool()
atexit.register(_pool.close)
run = _pool.run
