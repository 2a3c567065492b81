"""The worker pool itself: a failing rank shows its traceback, a hanging one its stack, and the pool goes on."""

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

import pool


def seed():
    return hash("a name")


def total():
    x = torch.tensor(float(dist.get_rank()))
    dist.all_reduce(x)
    return x.item()


def fails_on_rank_one():
    if dist.get_rank() == 1:
        raise ValueError("a clear message")
    dist.barrier()


def hangs_on_rank_one():
    if dist.get_rank() == 1:
        time.sleep(1000)


def dies_on_rank_one():
    if dist.get_rank() == 1:
        os._exit(3)


@pytest.mark.slow
def test_trouble_is_named_and_the_pool_goes_on():
    own = pool.Pool()
    try:
        for function, message, timeout in (
            (fails_on_rank_one, "rank 1 of 2, fails_on_rank_one:(.|\n)*ValueError: a clear message", 60),
            (dies_on_rank_one, "rank 1 died", 60),
            (
                hangs_on_rank_one,
                "rank 1 of 2 hung in hangs_on_rank_one for 1 s:(.|\n)*in hangs_on_rank_one",
                1,
            ),
        ):
            assert own.run(2, total) == [1.0, 1.0]
            with pytest.raises(pool.WorkerError, match=message):
                own.run(2, function, timeout=timeout)
        assert own.run(2, total) == [1.0, 1.0]
    finally:
        own.close()


def test_a_world_that_does_not_start_is_started_again(monkeypatch):
    own = pool.Pool()
    try:
        assert own.run(2, total) == [1.0, 1.0]
        os.kill(own.workers[1][0].pid, signal.SIGSTOP)
        with monkeypatch.context() as patch:
            patch.setattr(pool, "START_S", 1.0)
            assert own._start(2, (total.__module__, total.__name__, ())) is None
        assert own.run(2, total) == [1.0, 1.0]
        monkeypatch.setattr(pool, "START_S", 0.0)
        with pytest.raises(pool.WorkerError, match="no world of 2 ranks was started, 3 times of 0 s"):
            own.run(2, total)
    finally:
        own.close()


def test_ranks_of_each_axis_have_different_hash_seeds():
    """Ranks that go through a set in different orders would hang or mix up tensors; with one seed no test would find it."""
    seeds = pool.run(4, seed)
    assert seeds[0] != seeds[1] != seeds[3] != seeds[2] != seeds[0]
