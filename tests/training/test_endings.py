"""Runs that end before their last step, or go on from an earlier one: nothing is lost, and all ranks do the same."""

import contextlib
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

import pool
import tiny
from longspan.data import IndexedDatasetWriter
from longspan.runs import session
from longspan.training import banner, checkpoint, loop
from longspan.training.export import export
from longspan.training.lock import CONFIG
from longspan.training.metrics import JsonLines, Metrics, keep_until
from longspan.training.nonfinite import NotFinite
from longspan.training.progress import Progress
from longspan.training.stopping import Stopping
from longspan.training.trainer import Trainer

CPU = torch.device("cpu")


class Records:
    """A sink that keeps the records."""

    def __init__(self):
        self.records = []

    def write(self, record):
        self.records.append(record)

    def close(self):
        pass


def run_of(prefix, folder, **changes):
    """A run with one sequence a step, because its steps are of no interest here."""
    return tiny.tiny_run(
        prefix, dist.get_world_size(), output_dir=str(folder), global_batch_size=1, **changes
    )


def trainer_of(prefix, folder, **changes):
    sink = Records()
    return Trainer(run_of(prefix, folder, **changes), CPU, Metrics([sink])), sink.records


def names(folder):
    return sorted(path.name for path in (Path(folder) / "checkpoints").iterdir())


class Signal(Progress):
    """Asks to stop, as a signal's handler does, on one rank between the ranks' agreement and what follows it, or on
    all while they evaluate."""

    def __init__(self, trainer, when):
        super().__init__()
        self.trainer, self.when = trainer, when

    def step(self, record, show):
        if self.when == "step" and record["step"] == 2 and dist.get_rank() == 1:
            self.trainer.signalled = True
        if self.when == "step 4" and record["step"] == 3:
            self.trainer.signalled = True

    def evaluation(self, record):
        if self.when == "evaluation" and record["step"] == 2:
            self.trainer.signalled = True


def stopped_by_a_signal(prefix, folder, when):
    trainer, records = trainer_of(prefix, folder, context_parallel_size=2, max_steps=6, eval_steps=2)
    loop.train(trainer, Path(folder), Signal(trainer, when))
    assert [r["step"] for r in records if r["kind"] == "eval"] == [2]
    assert names(folder) == ["latest", "step_00000003"]


@pytest.mark.parametrize("when", ["step", "evaluation"])
def test_a_signal_at_any_moment_stops_all_ranks_at_one_step_with_a_checkpoint(prefix, tmp_path, when):
    """One rank once left the loop alone while the other waited in an evaluation; and nothing was saved."""
    pool.run(2, stopped_by_a_signal, prefix, str(tmp_path), when)


def goes_on_from_an_earlier_step(prefix, folder):
    trainer, _ = trainer_of(prefix, folder, max_steps=6, save_steps=2)
    loop.train(trainer, Path(folder), Progress())
    assert names(folder) == ["latest", "step_00000002", "step_00000004", "step_00000006"]
    trainer, _ = trainer_of(prefix, folder, max_steps=6, save_steps=3, save_total_limit=1)
    trainer.resume(Path(folder) / "checkpoints" / "step_00000002")
    trainer.steps = 3
    loop.train(trainer, Path(folder), Progress())
    assert names(folder) == ["latest", "step_00000003", "step_00000004", "step_00000006"]
    assert checkpoint.newest(Path(folder) / "checkpoints").name == "step_00000003"


def test_what_a_run_has_just_saved_is_not_the_oldest(prefix, tmp_path):
    """Going on from an earlier step, save_total_limit once removed the new checkpoint and kept the old ones."""
    pool.run(1, goes_on_from_an_earlier_step, prefix, str(tmp_path))


class Warnings(Progress):
    """Keeps the warnings."""

    def __init__(self):
        super().__init__()
        self.texts = []

    def warn(self, text):
        self.texts.append(text)


def fails_once(prefix, folder):
    trainer, _ = trainer_of(prefix, folder, max_steps=4, save_steps=2)
    in_the_way = Path(folder) / "checkpoints" / "step_00000002"
    in_the_way.parent.mkdir()
    in_the_way.write_text("a file, which no folder can replace")
    progress = Warnings()
    loop.train(trainer, Path(folder), progress)
    (warning,) = progress.texts
    assert f"cannot write {in_the_way}" in warning
    assert in_the_way.is_file()
    assert names(folder) == ["latest", "step_00000002", "step_00000004"]
    assert checkpoint.newest(in_the_way.parent).name == "step_00000004"


def test_a_save_that_failed_does_not_cost_the_last_one(prefix, tmp_path):
    pool.run(1, fails_once, prefix, str(tmp_path))


def diverges(prefix, folder):
    trainer, _ = trainer_of(prefix, folder, max_steps=4, save_steps=2)
    compute = trainer.compute_gradients
    trainer.compute_gradients = lambda b: (float("nan"), 1) if trainer.step == 2 else compute(b)
    with pytest.raises(NotFinite):
        loop.train(trainer, Path(folder), Progress())
    assert names(folder) == ["latest", "step_00000002"]


def test_a_loss_that_is_no_number_leaves_the_checkpoint_on_its_way(prefix, tmp_path):
    pool.run(1, diverges, prefix, str(tmp_path))


def other_settings(prefix, folder):
    trainer, _ = trainer_of(prefix, folder, max_steps=2, weight_decay=0.0, adam_beta2=0.9)
    loop.train(trainer, Path(folder), Progress())
    trainer, _ = trainer_of(prefix, folder, max_steps=4, weight_decay=0.5, adam_beta2=0.99, adam_epsilon=1e-6)
    trainer.resume(Path(folder) / "checkpoints" / "step_00000002")
    matrices, vectors = trainer.optimizer.param_groups
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.5, 0.0)
    assert {(*group["betas"], group["eps"]) for group in (matrices, vectors)} == {(0.9, 0.99, 1e-6)}
    moments = next(iter(trainer.optimizer.state.values()))
    assert moments["step"].item() == 2


def test_weight_decay_and_betas_are_the_configs(prefix, tmp_path):
    """The checkpoint's once replaced them silently."""
    pool.run(1, other_settings, prefix, str(tmp_path))


def ends_where_it_would_stop(prefix, folder):
    trainer, records = trainer_of(prefix, folder, max_steps=4, exit_interval=4)
    loop.train(trainer, Path(folder), Progress())
    assert not trainer.stop_asked
    assert [r["step"] for r in records if r["kind"] == "eval"] == [4]


def test_an_exit_interval_that_divides_the_last_step_ends_the_run_as_any(prefix, tmp_path):
    pool.run(1, ends_where_it_would_stop, prefix, str(tmp_path))


def blended_with_one_too_long(folder):
    folder, sources = Path(folder), []
    for i in range(2):
        for name, kind in ((f"s{i}", np.uint16), (f"s{i}_mask", np.uint8)):
            with IndexedDatasetWriter(folder / name, kind) as writer:
                for length in (10, 20, 30, 200):
                    writer.add_document(np.ones(length, int))
        sources.append({"path": str(folder / f"s{i}"), "weight": 1})
    run = tiny.tiny_run("", 1, datasets=sources, max_steps=1, val_set_size=0, export_hf=False)
    trainer = Trainer(run, CPU)
    assert banner.filling(trainer).endswith("2 of 8 samples were too long and are dropped")
    # three samples of each, all of their tokens but the first
    assert banner.learned(trainer) == "6 samples, 114 of 120 tokens learned"
    assert "  samples    6 samples, 114 of 120 tokens learned\n" in banner.start_lines(trainer, folder)


def test_blended_samples_of_which_some_are_too_long(tmp_path):
    pool.run(1, blended_with_one_too_long, str(tmp_path))


def stops_where_an_evaluation_is_due(prefix, folder):
    changes = {"max_steps": 6, "eval_steps": 2}
    trainer, _ = trainer_of(prefix, folder, **changes)
    trainer.metrics = Metrics([JsonLines(Path(folder) / "metrics.jsonl")])
    loop.train(trainer, Path(folder), Signal(trainer, "step 4"))
    assert recorded(folder, "eval") == [2]
    assert names(folder) == ["latest", "step_00000004"]
    for _ in range(2):  # a second resume of the same checkpoint finds it done
        trainer, _ = trainer_of(prefix, folder, **changes)
        trainer.resume(Path(folder) / "checkpoints" / "step_00000004")
        keep_until(Path(folder) / "metrics.jsonl", trainer.step)
        trainer.metrics = Metrics([JsonLines(Path(folder) / "metrics.jsonl")])
        loop.train(trainer, Path(folder), Progress())
        assert recorded(folder, "eval") == [2, 4, 6]
    trainer, whole = trainer_of(prefix, Path(folder) / "whole", **changes)
    loop.train(trainer, Path(folder) / "whole", Progress())
    expected = {r["step"]: r["loss"] for r in whole if r["kind"] == "eval"}
    assert {r["step"]: r["loss"] for r in records_in(folder) if r["kind"] == "eval"} == expected


def records_in(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def recorded(folder, kind):
    return [r["step"] for r in records_in(folder) if r["kind"] == kind]


def test_an_evaluation_that_was_due_where_a_run_stopped_is_made_up_for_once(prefix, tmp_path):
    pool.run(1, stops_where_an_evaluation_is_due, prefix, str(tmp_path))


def asked_in_its_last_step(prefix, folder):
    trainer, records = trainer_of(prefix, folder, max_steps=4, eval_steps=3)
    told = Told()
    trainer.signalled = True
    trainer.steps = 1
    loop.train(trainer, Path(folder), told)
    assert told.lines == ["step 1", "saving step_00000001", "saved step_00000001", "eval 1"]
    assert not trainer.stop_asked
    assert [r["kind"] for r in records] == ["train", "eval", "summary"]


class Told(Progress):
    """What a user is told, in short."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def step(self, record, show):
        self.lines.append(f"step {record['step']}")

    def evaluation(self, record):
        self.lines.append(f"eval {record['step']}")

    def saving(self, folder):
        self.lines.append(f"saving {folder.name}")

    def saved(self, folder):
        assert (folder / ".metadata").is_file()  # whole
        self.lines.append(f"saved {folder.name}")


def test_a_signal_in_the_last_step_saves_first_and_costs_nothing(prefix, tmp_path):
    """The last evaluation and the export were left out, and nothing was left to resume."""
    pool.run(1, asked_in_its_last_step, prefix, str(tmp_path))


def every_checkpoint_is_told_when_it_is_whole(prefix, folder):
    for background in (True, False):
        own = Path(folder) / str(background)
        trainer, _ = trainer_of(prefix, own, max_steps=4, save_steps=2, val_set_size=0, async_save=background)
        told = Told()
        loop.train(trainer, own, told)
        assert sorted(line for line in told.lines if line.startswith("saved")) == [
            "saved step_00000002",
            "saved step_00000004",
        ]


def test_a_checkpoint_is_told_to_be_saved_when_it_is_whole(prefix, tmp_path):
    pool.run(1, every_checkpoint_is_told_when_it_is_whole, prefix, str(tmp_path))


class Vanishes(io.StringIO):
    """What a run prints; the run's folder is removed when the second step is printed."""

    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def write(self, text):
        if text.startswith("step 2/"):
            shutil.rmtree(self.folder)
        return super().write(text)


def loses_its_folder(prefix, folder):
    output = Path(folder) / "out"
    run = tiny.tiny_run(prefix, 1, output_dir=str(output), max_steps=3, logging_steps=1, export_hf=False)
    said = Vanishes(output)
    with Stopping() as stopping, contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        output.mkdir()
        (output / CONFIG).write_text("")
        code = session.train(run, CPU, stopping)
    assert code == 1
    assert "step 2/3" in said.getvalue()
    assert "done" not in said.getvalue()
    assert "was removed or moved while the run wrote to it" in said.getvalue()
    assert "output_dir was removed or moved while the run went on" in said.getvalue()


def test_a_run_whose_folder_vanished_has_failed(prefix, tmp_path):
    pool.run(1, loses_its_folder, prefix, str(tmp_path))


def stops_early_without_save_last(prefix, folder):
    for name, ends in (("signal", {}), ("interval", {"exit_interval": 3})):
        own = Path(folder) / name
        trainer, _ = trainer_of(prefix, own, max_steps=6, save_last=False, **ends)
        loop.train(trainer, own, Progress() if ends else Signal(trainer, "step 4"))
        assert names(own) == ["latest", "step_00000003" if ends else "step_00000004"]
    own = Path(folder) / "whole"
    trainer, _ = trainer_of(prefix, own, max_steps=2, save_last=False)
    loop.train(trainer, own, Progress())
    assert trainer.step == 2
    assert not list(own.glob("checkpoints/step_*"))


def test_a_run_that_stops_early_is_saved_whatever_save_last_is(prefix, tmp_path):
    pool.run(1, stops_early_without_save_last, prefix, str(tmp_path))


def trained(prefix, folder, **changes):
    """A whole run by ``session.train``: (exit code, what was printed)."""
    run = run_of(prefix, folder, **changes)
    folder.mkdir(exist_ok=True)
    (folder / CONFIG).write_text("")
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said), Stopping() as stopping:
        code = session.train(run, CPU, stopping)
    return code, said.getvalue()


def killed_before_its_export(prefix, folder):
    folder = Path(folder) / "out"
    common = {
        "datasets": [],
        "data_path": [prefix],
        "split": "80,10,10",
        "val_set_size": 0.0,
        "eval_steps": 5,
    }
    common |= {"context_parallel_size": dist.get_world_size()}
    assert trained(prefix, folder, max_steps=2, **common)[0] == 0
    assert recorded(folder, "eval") == [2, 2]

    last = {"max_steps": 4, **common}
    resume = str(folder / "checkpoints/step_00000002")
    assert trained(prefix, folder, resume=resume, export_hf=False, **last)[0] == 0
    dist.barrier()
    if dist.get_rank() == 0:  # as a kill right after the last checkpoint leaves it
        whole = records_in(folder)
        kept = [r for r in whole if r["step"] < 4 or r["kind"] == "train"]
        lines = "".join(json.dumps(record) + "\n" for record in kept)
        (folder / "metrics.jsonl").write_text(lines + '{"kind": "eval", "step": 4, "lo')
    dist.barrier()
    resume = {"resume": str(folder / "checkpoints/step_00000004"), **last}
    for missing in (True, False):
        code, said = trained(prefix, folder, **resume)
        dist.barrier()
        assert code == 0
        if dist.get_rank() == 0:
            assert "done before" in said
            assert (
                "metrics.jsonl, which lacked eval and test and summary of the last step" in said
            ) is missing
            assert ("hf, which was missing" in said) is missing
            now = records_in(folder)
            assert [(r["kind"], r["step"], r["loss"]) for r in now] == [
                (r["kind"], r["step"], r["loss"]) for r in whole
            ]
            assert now[-1]["eval_loss"] == whole[-1]["eval_loss"]
            old, new = (load_file(folder / name / "model.safetensors") for name in ("hf.1", "hf"))
            assert not any(torch.equal(old[name], new[name]) for name in old if "norm" not in name)
    trainer, _ = trainer_of(prefix, folder, **last)
    trainer.resume(folder / "checkpoints/step_00000004")
    export(trainer, folder / "expected")
    if dist.get_rank() == 0:
        expected = load_file(folder / "expected" / "model.safetensors")
        assert all(torch.equal(expected[name], new[name]) for name in expected)


@pytest.mark.parametrize("world", [1, 2])
def test_what_comes_after_the_last_step_is_made_up_for(prefix, tmp_path, world):
    """The export of an earlier end was once taken for this one's."""
    pool.run(world, killed_before_its_export, prefix, str(tmp_path))
