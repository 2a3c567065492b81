"""Time-outs: every group has the run's own, and a rank that waited in vain tells where."""

import datetime
import importlib
import inspect
import threading
import time
import types
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import pool
import tiny
from longspan import parallel_state
from longspan.mesh.mesh import hold_waiting_time, set_waiting_time
from longspan.training import waiting
from longspan.training.checkpoint import Checkpointer
from longspan.training.trainer import Trainer

CPU = torch.device("cpu")
SECONDS = 41.0


def time_outs():
    """Group -> seconds, of every group of this process."""
    found = {}
    for group in dist.distributed_c10d._world.pg_map:
        for device in group._device_types:
            found[group.group_name] = group._get_backend(device).options._timeout.total_seconds()
    return found


def groups_of_a_run(prefix, folder, sizes):
    set_waiting_time(
        dist.group.WORLD, datetime.timedelta(seconds=SECONDS)
    )  # as ddp_timeout does at the start
    run = tiny.tiny_run(prefix, dist.get_world_size(), output_dir=folder, global_batch_size=2, **sizes)
    trainer = Trainer(run, CPU)
    assert len(time_outs()) > 4
    assert set(time_outs().values()) == {SECONDS}
    trainer.train_step(trainer.micro_batches(0))
    trainer.evaluate()
    saves = Checkpointer(Path(folder) / "checkpoints")
    hold_waiting_time()
    saves.save(1, trainer.model, trainer.optimizer, trainer.description())
    saves.finish()
    assert set(time_outs().values()) == {SECONDS}


@pytest.mark.parametrize(
    "sizes",
    [
        {"context_parallel_size": 2, "tensor_parallel_size": 2},
        {"context_parallel_size": 2, "dp_replicate_size": 2},
    ],
    ids=str,
)
def test_every_group_has_the_runs_time_out(prefix, tmp_path, sizes):
    """Those of the mesh and of FSDP had torch's half an hour."""
    pool.run(4, groups_of_a_run, prefix, str(tmp_path), sizes)


def groups_of_a_library():
    set_waiting_time(dist.group.WORLD, datetime.timedelta(seconds=SECONDS))
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2, context_parallel_size=2)
    assert set(time_outs().values()) == {SECONDS}


def test_the_groups_of_a_library_have_the_default_groups_time_out():
    pool.run(4, groups_of_a_library)


def waits_in_vain(prefix, folder, where, expected):
    """Rank 1 does not come; rank 0 tells where it waited."""
    run = tiny.tiny_run(prefix, 2, output_dir=folder, context_parallel_size=2, global_batch_size=1)
    trainer = Trainer(run, CPU)
    trainer.train_step(trainer.micro_batches(0))  # what a first step imports takes its time
    batches = trainer.micro_batches(1)
    dist.barrier()
    set_waiting_time(dist.group.WORLD, datetime.timedelta(seconds=3))
    hold_waiting_time()
    if dist.get_rank() == 1:
        # long enough for the other to give up, whatever the machine's load
        store = dist.distributed_c10d._get_default_store()
        store.wait(["given up"], datetime.timedelta(seconds=50))
        return
    with pytest.raises(RuntimeError) as failed:
        trainer.train_step(batches) if where == "step" else trainer.evaluate()
    error = failed.value
    assert waiting.timed_out(error), error
    place = waiting.place(waiting.calls_of(error.__traceback__), trainer.step)
    dist.distributed_c10d._get_default_store().set("given up", "")
    assert place.startswith(expected)
    text = waiting.late(0, place, 3)
    assert text.startswith(f"rank 0 waited 3 s (ddp_timeout) for another rank in {place}.")


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("step", "step 2, the forward and backward passes (all_reduce)"),
        ("evaluation", "an evaluation, after step 1 ("),
    ],
)
def test_a_time_out_tells_the_step_the_phase_and_the_exchange(prefix, tmp_path, where, expected):
    try:
        pool.run(2, waits_in_vain, prefix, str(tmp_path), where, expected)
    except pool.WorkerError as error:
        # the barrier at the end of a pool's run may find the connections closed by the time-out: that is all
        if "in waits_in_vain" in str(error):
            raise


def test_every_phase_is_a_function_that_there_is():
    for module, name in waiting.PHASES:
        found = importlib.import_module(f"longspan.{module}")
        owners = [found, *(c for _, c in inspect.getmembers(found, inspect.isclass))]
        assert any(hasattr(owner, name) for owner in owners), f"{module}.{name}"


def test_the_innermost_phase_tells():
    step = [("longspan.training.loop", "train"), ("longspan.training.trainer", "train_step")]
    norm = [
        ("longspan.training.trainer", "apply_gradients"),
        ("longspan.training.optimizer", "gradient_norm"),
        ("torch.distributed.c10d_logger", "wrapper"),
        ("torch.distributed.distributed_c10d", "all_reduce"),
    ]
    assert waiting.place([*step, *norm], 11) == "step 12, the gradient norm (all_reduce)"
    keys = [
        ("longspan.training.trainer", "compute_gradients"),
        ("longspan.context_parallel.move_keys", "wait"),
    ]
    there = "step 12, the forward and backward passes (keys and values of other ranks)"
    assert waiting.place([*step, *keys], 11) == there
    assert waiting.place(step, 11) == "step 11, the end of the step"
    assert waiting.place([], None) == "an exchange"


def test_gloo_and_the_store_are_understood():
    gloo = "[gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 5000ms for recv operation to complete"
    assert waiting.timed_out(RuntimeError(gloo))
    assert waiting.timed_out(dist.DistStoreError("wait timeout after 5000ms, keys: /x"))
    assert not waiting.timed_out(ValueError("timeout"))
    gone = RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:39137")
    assert waiting.lost(gone)
    assert not waiting.timed_out(gone)
    nccl = "NCCL error in: NCCLUtils.cpp:94, {}, NCCL version 2.27.5"
    assert waiting.lost(RuntimeError(nccl.format("remote process exited or there was a network error")))
    for other in ("unhandled cuda error", "invalid usage", "Duplicate GPU detected : rank 0 and rank 1"):
        assert not waiting.lost(RuntimeError(nccl.format(other)))


def test_a_rank_that_waits_without_an_exception_tells_once(capsys):
    """NCCL ends the process from within, and no exception comes to Python."""
    scope = {"__name__": "torch.distributed.distributed_c10d", "threading": threading}
    told = watched(capsys, types.FunctionType(rest.__code__, scope, "all_reduce"))
    assert told.startswith("longspan: rank 3 waited 0.2 s (ddp_timeout) for another rank in")


def test_a_long_step_of_ones_own_is_no_wait_for_another_rank(capsys):
    told = watched(capsys, rest)
    assert told == "longspan: rank 3 has been in one place, after step 11 for 0.2 s (ddp_timeout)\n"


def rest():
    threading.Event().wait(0.3)


def watched(capsys, work):
    watch = waiting.Watch(0.2, 3, lambda: 11, look=0.01)
    end, told = time.monotonic() + 60, ""
    while not told and time.monotonic() < end:
        work()
        told += capsys.readouterr().err
    watch.close()
    return told
