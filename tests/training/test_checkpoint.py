"""Stop and go on: bit-equal at the same layout, equal to rounding at another; whole or absent whatever happens."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml

import command
import pool
import tiny
from full_disk import WEIGHTS, full_disk
from longspan.data.splits import open_datasets
from longspan.errors import UserError
from longspan.training import checkpoint
from longspan.training.checkpoint import Checkpointer, SaveError
from longspan.training.metrics import keep_until
from longspan.training.trainer import Trainer

CPU = torch.device("cpu")
TP2_CP2 = {"tensor_parallel_size": 2, "context_parallel_size": 2, "micro_batch_size": 2}


#: a run stops in its second epoch and ends in its third, after so many steps
STOP, END = 4, 6


def steps(prefix, changes, folder, first, last, background=True):
    """Trains steps first+1 .. last, from the checkpoint in ``folder`` unless first is 0, and saves there."""
    folder = Path(folder)
    trainer = Trainer(tiny.tiny_run(prefix, dist.get_world_size(), max_steps=20, **changes), CPU)
    if first:
        trainer.resume(checkpoint.find(folder))
        assert trainer.step == first
    losses = [
        trainer.train_step(batches)["loss"] for batches, _ in zip(trainer.steps_ahead(), range(last - first))
    ]
    saves = Checkpointer(folder, background=background)
    saves.save(trainer.step, trainer.model, trainer.optimizer, trainer.description())
    # training goes on while the checkpoint is written, and must not leak into it
    with torch.no_grad():
        moments = [tensor for state in trainer.optimizer.state.values() for tensor in state.values()]
        for tensor in (*trainer.model.parameters(), *moments):
            tensor.fill_(0.5)
    saves.finish()
    return losses


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """The prefix of data of two to three steps an epoch."""
    prefix = tiny.write_data(tmp_path_factory.mktemp("short"), documents=18)
    epoch = len(open_datasets(tiny.tiny_run(prefix, 1))[0])
    assert 8 <= epoch <= 12, epoch  # of 4 a step
    return prefix


@pytest.fixture(scope="module")
def stopped(short, tmp_path_factory):
    """A run that stops and one that does not: the losses and the folder of the first, the losses of the second."""
    folder = tmp_path_factory.mktemp("stopped")
    head = pool.run(4, steps, short, TP2_CP2, str(folder / "head"), 0, STOP)[0]
    whole = pool.run(4, steps, short, TP2_CP2, str(folder / "whole"), 0, END)[0]
    return head, folder / "head", whole


def test_the_same_layout_goes_on_bit_equal(short, stopped, tmp_path):
    head, folder, whole = stopped
    shutil.copytree(folder, tmp_path / "background")
    tail = pool.run(4, steps, short, TP2_CP2, str(tmp_path / "background"), STOP, END)[0]
    assert head + tail == whole
    # and where nothing is saved in the background
    here = str(tmp_path / "at once")
    head = pool.run(4, steps, short, TP2_CP2, here, 0, 2, False)[0]
    assert head + pool.run(4, steps, short, TP2_CP2, here, 2, 3, False)[0] == whole[:3]


@pytest.mark.parametrize(
    ("world", "changes"),
    [
        (4, {"context_parallel_size": 4, "micro_batch_size": 2}),
        (4, {"dp_shard_size": 4}),
        (4, {"dp_replicate_size": 2, "tensor_parallel_size": 2}),
        (3, {"context_parallel_size": 3, "micro_batch_size": 4}),
        (1, {}),
    ],
    ids=str,
)
def test_another_layout_goes_on_to_rounding(short, stopped, tmp_path, world, changes):
    head, folder, whole = stopped
    shutil.copytree(folder, tmp_path / "resumed")
    tail = pool.run(world, steps, short, changes, str(tmp_path / "resumed"), STOP, END)[0]
    assert head + tail == pytest.approx(whole, rel=1e-9)


def weights_only(prefix, folder):
    """Weights alone start at step 0, with a new optimizer, and may change batch and length."""
    run = tiny.tiny_run(prefix, 1, no_load_optim=True, global_batch_size=2, sequence_len=30)
    trainer = Trainer(run, CPU)
    before = {n: p.detach().full_tensor().clone() for n, p in trainer.model.named_parameters()}
    trainer.resume(checkpoint.find(Path(folder)))
    assert trainer.step == trainer.tokens == 0
    assert not trainer.optimizer.state
    assert not any(
        torch.equal(before[n], p.full_tensor()) for n, p in trainer.model.named_parameters() if p.dim() > 1
    )


def refusals(prefix, folder):
    def problems(**changes):
        trainer = Trainer(tiny.tiny_run(prefix, 1, **changes), CPU)
        with pytest.raises(UserError) as caught:
            trainer.resume(checkpoint.find(Path(folder)))
        return "\n".join(caught.value.problems)

    text = problems(num_layers=3, hidden_size=64)
    assert "another model: num_layers was 2, the config says 3" in text
    assert "hidden_size was 32" in text
    assert "global_batch_size 4, the config gives 8" in problems(global_batch_size=8)
    assert "trained with seed 42, the config gives 7" in problems(seed=7)


def test_weights_alone_and_refusals(prefix, tmp_path):
    pool.run(2, steps, prefix, {"context_parallel_size": 2}, str(tmp_path), 0, 3)
    pool.run(1, weights_only, prefix, str(tmp_path))
    pool.run(1, refusals, prefix, str(tmp_path))
    (tmp_path / "step_00000003" / ".metadata").unlink()
    with pytest.raises(UserError, match=r"not a whole checkpoint: .metadata missing"):
        checkpoint.find(tmp_path)
    with pytest.raises(UserError, match="there is no checkpoint at"):
        checkpoint.find(tmp_path / "step_00000099")


def saved(prefix, folder):
    trainer = Trainer(tiny.tiny_run(prefix, 1), CPU)
    saves = Checkpointer(Path(folder))
    saves.save(1, trainer.model, trainer.optimizer, trainer.description())
    saves.finish()


def test_a_damaged_checkpoint_is_refused_by_the_file(prefix, tmp_path):
    """A partial copy once was a traceback of torch's on every rank."""
    pool.run(1, saved, prefix, str(tmp_path))
    whole = tmp_path / "step_00000001"
    assert checkpoint.find(whole) == whole

    def cut(path):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    for number, (name, damage) in enumerate(
        [
            ("__0_0.distcp", cut),
            ("__0_0.distcp", Path.unlink),
            (".metadata", lambda path: path.write_bytes(b"no pickle")),
            ("longspan.json", lambda path: path.write_text("{}")),
            ("longspan.json", lambda path: path.write_text("[]")),
        ]
    ):
        copy = tmp_path / f"copy{number}"
        shutil.copytree(whole, copy)
        damage(copy / name)
        with pytest.raises(
            UserError, match=f"--checkpoint: .* is not a whole checkpoint: {name} missing or damaged"
        ):
            checkpoint.find(copy, "--checkpoint")


def keeps_two(prefix, folder):
    trainer = Trainer(tiny.tiny_run(prefix, 1), CPU)
    saves = Checkpointer(Path(folder), keep=2)
    for step in (1, 2, 3):
        saves.save(step, trainer.model, trainer.optimizer, trainer.description())
    saves.finish()
    assert sorted(p.name for p in Path(folder).iterdir()) == ["latest", "step_00000002", "step_00000003"]


def fails_and_recovers(prefix, folder):
    """A save that fails leaves the earlier one, and says so on every rank; the next one works."""
    trainer = Trainer(tiny.tiny_run(prefix, 2, context_parallel_size=2), CPU)
    saves = Checkpointer(Path(folder))
    saves.save(1, trainer.model, trainer.optimizer, trainer.description())
    saves.finish()
    with full_disk(WEIGHTS):
        saves.save(2, trainer.model, trainer.optimizer, trainer.description())
        with pytest.raises(SaveError, match="cannot write .*step_00000002.*File too large"):
            saves.finish()
    assert checkpoint.find(Path(folder)).name == "step_00000001"
    dist.barrier()
    saves.save(3, trainer.model, trainer.optimizer, trainer.description())
    assert saves.finish().name == "step_00000003"


def test_keep_the_newest_and_survive_a_failed_save(prefix, tmp_path):
    pool.run(1, keeps_two, prefix, str(tmp_path / "two"))
    pool.run(2, fails_and_recovers, prefix, str(tmp_path / "full"))


def test_metrics_drop_the_lines_of_steps_that_are_run_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [{"kind": "train", "step": s} for s in (1, 2, 3, 4)]
    lines[2:2] = [{"kind": "eval", "step": 2}]
    path.write_text(
        "".join(json.dumps(x) + "\n" for x in [*lines, {"kind": "summary", "step": 2}]) + '{"kind": "tr'
    )
    keep_until(path, 2)
    kept = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(r["kind"], r["step"]) for r in kept] == [("train", 1), ("train", 2), ("eval", 2)]


# --- as a user meets it ---------------------------------------------------------------------


def write_config(folder, prefix, **changes):
    values = tiny.values(prefix, output_dir="out", val_set_size=0, global_batch_size=2, **changes)
    (folder / "config.yaml").write_text(yaml.safe_dump(values))


def train(folder, *arguments):
    return command.run("train", "config.yaml", *arguments, cwd=folder)


def test_resume_from_the_command_line(prefix, tmp_path):
    write_config(tmp_path, prefix, max_steps=6, save_steps=2, lr_scheduler="constant")
    first = train(tmp_path, "--resume", "auto")  # nothing there yet: a fresh start
    assert first.returncode == 0, first.stderr
    records = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    again = train(tmp_path, "--resume", "out/checkpoints/step_00000004", "--context-parallel-size", "2")
    assert again.returncode == 0, again.stderr
    assert "step_00000004, after step 4" in again.stdout
    resumed = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    expected = [json.loads(line) for line in records]
    assert [(r["kind"], r["step"]) for r in resumed] == [(r["kind"], r["step"]) for r in expected]
    for a, b in zip(resumed, expected):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-9)
        assert a["tokens"] == b["tokens"]
    shutil.rmtree(
        tmp_path / "out" / "hf"
    )  # as where a run was ended between its last checkpoint and its export
    before = (tmp_path / "out" / "metrics.jsonl").read_text()
    two = ["--context-parallel-size", "2"]
    for arguments in (
        ["--resume", "auto", *two],
        ["--load", "out"],
        ["--resume", "auto", "--max-steps", "4"],
    ):
        finished = train(tmp_path, *arguments)
        assert finished.returncode == 0, finished.stderr
        assert "step_00000006 has trained 6 steps, and" in finished.stdout
        assert "Nothing is left to do" in finished.stdout
        assert (tmp_path / "out" / "metrics.jsonl").read_text() == before
        assert (tmp_path / "out" / "hf" / "model.safetensors").is_file()
    for arguments, message in (
        (["--resume", "auto", "--num-layers", "3"], "another model: num_layers was 2"),
        (["--resume", "nowhere"], "there is no checkpoint at nowhere"),
        (["--no-load-optim"], "give resume too"),
        (["--resume", "auto", "--global-batch-size", "8", "--max-steps", "9"], "global_batch_size 2"),
    ):
        refused = train(tmp_path, *arguments)
        assert refused.returncode == 2, refused.stdout
        assert message in refused.stderr
        assert "Traceback" not in refused.stderr


def test_a_run_that_is_asked_to_stop_saves_and_can_go_on(prefix, tmp_path):
    write_config(tmp_path, prefix, max_steps=100000)
    process = command.start("train", "config.yaml", "--context-parallel-size", "2", cwd=tmp_path)
    metrics = tmp_path / "out" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 2, process)
    os.kill(process.pid, signal.SIGTERM)
    done = process.wait(60)
    assert done.returncode == 1, process.output
    assert "stopped: " in done.stdout
    assert "--resume auto goes on" in done.stdout
    step = checkpoint.describe(checkpoint.find(tmp_path / "out"))["step"]
    assert json.loads(metrics.read_text().splitlines()[-1]) | {"kind": "summary", "step": step}


def test_a_run_stops_where_exit_interval_says(prefix, tmp_path):
    write_config(tmp_path, prefix, max_steps=50, exit_interval=3)
    done = train(tmp_path, "--context-parallel-size", "2")
    assert done.returncode == 0, done.stderr
    assert "stopped: 3 steps" in done.stdout
    assert checkpoint.describe(checkpoint.find(tmp_path / "out"))["step"] == 3
    again = train(tmp_path, "--resume", "auto")
    assert again.returncode == 0, again.stderr
    assert checkpoint.describe(checkpoint.find(tmp_path / "out"))["step"] == 6


def wait_for(condition, process, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.output
        assert time.monotonic() < end, "nothing happened in a minute"
        time.sleep(0.02)


@pytest.mark.slow
def test_twelve_kills_never_leave_a_broken_checkpoint(prefix, tmp_path):
    """A run that saves at every step is killed at arbitrary moments; what ``latest`` names always loads."""
    write_config(tmp_path, prefix, max_steps=1000000, save_steps=1, save_total_limit=3, num_layers=1)
    folder, seen = tmp_path / "out" / "checkpoints", 0
    for kill in range(12):
        process = command.start("train", "config.yaml", "--resume", "auto", cwd=tmp_path)
        last = seen
        wait_for(lambda last=last: newest_step(folder) > last, process)
        time.sleep(0.022 * kill)  # a different moment of the save each time
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait().returncode == -signal.SIGKILL
        path = checkpoint.find(folder)
        seen = checkpoint.describe(path)["step"]
        for whole in folder.glob("step_*"):
            checkpoint.find(whole)
    pool.run(1, loads, prefix, str(folder))


def newest_step(folder):
    try:
        return int((folder / "latest").read_text().strip().removeprefix("step_"))
    except (FileNotFoundError, ValueError):
        return 0


def loads(prefix, folder):
    same = {"max_steps": 1000000, "val_set_size": 0, "global_batch_size": 2, "num_layers": 1}
    trainer = Trainer(tiny.tiny_run(prefix, 1, **same), CPU)
    for path in Path(folder).glob("step_*"):
        trainer.resume(path)
        assert all(torch.isfinite(p.full_tensor()).all() for p in trainer.model.parameters())


def saves_between(prefix, folder):
    """A step without a target and one that learns, without and with a checkpoint in between, and after a resume."""

    def steps(between):
        trainer = Trainer(tiny.tiny_run(prefix, 1, max_steps=4, weight_decay=0.5), CPU)
        compute = trainer.compute_gradients
        trainer.compute_gradients = lambda batches: (None, 0)
        trainer.train_step(trainer.micro_batches(0))
        trainer.compute_gradients = compute
        trainer = between(trainer) or trainer
        trainer.train_step(trainer.micro_batches(1))
        return {name: p.detach().full_tensor().clone() for name, p in trainer.model.named_parameters()}

    def save(trainer):
        saves = Checkpointer(Path(folder))
        saves.save(trainer.step, trainer.model, trainer.optimizer, trainer.description())
        saves.finish()

    def resume(_):
        trainer = Trainer(tiny.tiny_run(prefix, 1, max_steps=4, weight_decay=0.5), CPU)
        trainer.resume(checkpoint.find(Path(folder)))
        assert trainer.step == 1
        return trainer

    expected = steps(lambda trainer: None)
    for between in (save, resume):
        found = steps(between)
        assert all(torch.equal(expected[name], found[name]) for name in expected), between


def test_a_checkpoint_before_the_first_update_leaves_the_optimizer_as_it_was(prefix, tmp_path):
    """Adam once took it for a step, and the first update was a third smaller."""
    pool.run(1, saves_between, prefix, str(tmp_path))


def loses_a_checkpoint(prefix, folder):
    folder = Path(folder) / "run" / "checkpoints"
    trainer = Trainer(tiny.tiny_run(prefix, 1), CPU)
    saves = Checkpointer(folder)
    # the folder of the run vanishes, then that of a checkpoint alone
    for gone in (folder.parent, folder / ".step_00000001.partial"):
        saves.save(1, trainer.model, trainer.optimizer, trainer.description())
        assert saves.pending is not None
        saves.pending[1].result()
        shutil.rmtree(gone)
        with pytest.raises(SaveError, match=r"removed or moved while it was written.*MiB were free there"):
            saves.finish()
        assert not (folder / "latest").exists()
    saves.save(1, trainer.model, trainer.optimizer, trainer.description())
    assert saves.finish() == checkpoint.newest(folder)


def test_a_checkpoint_that_vanishes_while_it_is_written_is_an_error_of_saving(prefix, tmp_path):
    pool.run(1, loses_a_checkpoint, prefix, str(tmp_path))
