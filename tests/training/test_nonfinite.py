"""Steps that are not finite: found by all ranks wherever they come from, and left out as nan_policy says."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import pool
import tiny
from longspan.training import loop
from longspan.training.checkpoint import Checkpointer
from longspan.training.metrics import JsonLines, Metrics
from longspan.training.nonfinite import MOST_IN_A_ROW, NotFinite
from longspan.training.progress import Lines, Progress
from longspan.training.trainer import Trainer

CPU = torch.device("cpu")
SHORT = {"sequence_len": 30, "global_batch_size": 2, "max_steps": 6, "logging_steps": 1}


class Failing(Trainer):
    """In some steps one rank's loss, or a gradient, is NaN.

    Attributes:
        bad: global batches, by their numbers from 0.
        rank: where the NaN comes from.
        what: ``loss``, or the beginning of a parameter's name.
    """

    bad: tuple = ()
    rank, what = 0, "loss"

    def failing(self):
        return dist.get_rank() == self.rank and self.batch_of_step(self.step) in self.bad

    def _compute(self, batch, x=None, stage=None):
        out = super()._compute(batch, x, stage)
        return (
            out * float("nan") if self.failing() and self.what == "loss" and torch.is_grad_enabled() else out
        )

    def compute_gradients(self, batches):
        result = super().compute_gradients(batches)
        if self.failing() and self.what != "loss":
            name = next(n for n, _ in self.model.named_parameters() if n.startswith(self.what))
            self.model.get_parameter(name).grad.to_local().view(-1)[:1] = float("nan")
        return result


def failing(prefix, changes, bad, rank=0, what="loss"):
    trainer = Failing(tiny.tiny_run(prefix, dist.get_world_size(), **SHORT | changes), CPU)
    trainer.bad, trainer.rank, trainer.what = bad, rank, what
    return trainer


def skipping(prefix, changes, rank, what):
    """The records of six steps of which the third is not finite, and whether that one changed anything."""
    trainer = failing(prefix, {"nan_policy": "skip"} | changes, (2,), rank, what)

    def state():
        moments = [value for held in trainer.optimizer.state.values() for value in held.values()]
        values = [*trainer.model.state_dict().values(), *moments]
        return [(v.to_local() if hasattr(v, "to_local") else v).clone() for v in values]

    records, same = [], []
    for step in range(6):
        before = state()
        records.append(trainer.train_step(trainer.micro_batches(step)))
        after = state()
        same.append(len(before) == len(after) and all(map(torch.equal, before, after)))
    keys = ("loss", "grad_norm", "learning_rate", "tokens", "skipped", "not_finite")
    return [{k: r.get(k) for k in keys} for r in records], same, trainer.description()["skipped"]


EXPERTS = {
    "num_moe_experts": 4,
    "moe_ffn_hidden_size": 24,
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "export_hf": False,
}
#: name -> (processes, the layout, the rank that fails, what is NaN)
PLACES = {
    "one process": (1, {}, 0, "loss"),
    "one of two ranks": (2, {"context_parallel_size": 2}, 1, "loss"),
    "a gradient on one rank": (2, {"dp_shard_size": 2}, 1, "decoder.layers.1.mlp"),
    "the last stage": (2, {"pipeline_parallel_size": 2}, 1, "loss"),
    "a gradient of the first stage": (2, {"pipeline_parallel_size": 2}, 0, "embedding"),
    "an expert": (2, {"expert_parallel_size": 2} | EXPERTS, 1, "decoder.layers.0.mlp.experts"),
}


@pytest.mark.parametrize("name", PLACES)
def test_a_step_that_is_skipped_changes_nothing_and_the_next_ones_come(prefix, name):
    world, layout, rank, what = PLACES[name]
    alone = EXPERTS if "num_moe_experts" in layout else {}
    (expected, *_) = pool.run(1, skipping, prefix, alone, 0, "loss")
    for records, same, skipped in pool.run(world, skipping, prefix, layout, rank, what):
        assert same == [False, False, True, False, False, False]
        assert skipped == [3]
        found = records[2]["not_finite"]
        assert found["ranks"] == ([rank] if what == "loss" else [])
        if what != "loss":
            assert all(name.startswith(what) for name in found["parameters"])
        assert found["documents"] == expected[0][2]["not_finite"]["documents"] != []
        for got, want in zip(records, expected[0]):
            assert got["skipped"] == want["skipped"]
            for key in ("loss", "grad_norm", "learning_rate", "tokens"):
                assert got[key] is want[key] or got[key] == pytest.approx(want[key], rel=1e-9), key


def skipping_for_ever(prefix):
    trainer = failing(prefix, {"nan_policy": "skip", "max_steps": 20}, range(1, 20))
    trainer.train_step(trainer.micro_batches(0))
    for step in range(1, MOST_IN_A_ROW):
        assert trainer.train_step(trainer.micro_batches(step))["skipped"]
    with pytest.raises(
        NotFinite, match="the loss is nan in step 11.*Not finite: the loss of rank 0.*documents: .*tiny:"
    ):
        trainer.train_step(trainer.micro_batches(10))


def test_ten_steps_in_a_row_end_the_run(prefix):
    pool.run(1, skipping_for_ever, prefix)


def rolling_back(prefix, folder, changes, bad, rank):
    """A run to its end, with a checkpoint every two steps: the losses that are recorded, and the warnings."""
    trainer = failing(
        prefix, {"nan_policy": "roll_back", "save_steps": 2, "val_set_size": 0} | changes, bad, rank
    )
    first = dist.get_rank() == 0
    trainer.metrics = Metrics([JsonLines(Path(folder) / "metrics.jsonl")] if first else [])
    try:
        loop.train(trainer, Path(folder), Lines(6) if first else Progress())
    except NotFinite as error:
        return str(error)
    finally:
        trainer.metrics.close()
    return trainer.passed_over


def passing_over(prefix, changes, passed):
    trainer = failing(prefix, {"val_set_size": 0} | changes, ())
    trainer.passed_over = passed
    return [trainer.train_step(trainer.micro_batches(step))["loss"] for step in range(6)]


@pytest.mark.parametrize(
    ("world", "layout"), [(1, {}), (2, {"context_parallel_size": 2}), (2, {"pipeline_parallel_size": 2})]
)
def test_a_run_goes_back_and_leaves_the_batch_out(prefix, tmp_path, world, layout):
    passed = pool.run(world, rolling_back, prefix, str(tmp_path), layout, (3,), world - 1)
    assert passed == [[3]] * world
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = [r["step"] for r in records if r["kind"] == "train"]
    assert steps == [1, 2, 3, 4, 5, 6]
    (back,) = (r for r in records if r["kind"] == "roll_back")
    assert (back["step"], back["from_step"], back["passed_over"]) == (2, 4, 3)
    expected = pool.run(1, passing_over, prefix, {}, [3])[0]
    assert [r["loss"] for r in records if r["kind"] == "train"] == pytest.approx(expected, rel=1e-9)
    then = json.loads((tmp_path / "checkpoints" / "step_00000006" / "longspan.json").read_text())
    assert then["passed_over"] == [3]


def test_the_second_time_before_a_checkpoint_and_a_run_without_one_end(prefix, tmp_path):
    (text,) = pool.run(1, rolling_back, prefix, str(tmp_path / "twice"), {}, (2, 3), 0)
    assert "this is the second time since step_00000002" in text
    (text,) = pool.run(1, rolling_back, prefix, str(tmp_path / "early"), {}, (0,), 0)
    assert "no checkpoint was saved yet" in text


def resumed(prefix, folder, changes):
    """The batches that come after a checkpoint in which one was passed over."""
    trainer = failing(prefix, changes, ())
    if folder is None:
        return None
    trainer.resume(Path(folder))
    return trainer.skipped, [trainer.batch_of_step(step) for step in range(trainer.step, 6)]


def saved(prefix, folder):
    trainer = failing(prefix, {"nan_policy": "skip"}, (1,))
    trainer.passed_over = [2, 4]
    for step in range(2):
        trainer.train_step(trainer.micro_batches(step))
    saver = Checkpointer(Path(folder), background=False)
    return str(saver.save(2, trainer.model, trainer.optimizer, trainer.description()))


def test_a_resume_at_another_layout_trains_on_the_same_data(prefix, tmp_path):
    (path,) = pool.run(1, saved, prefix, str(tmp_path))
    assert pool.run(2, resumed, prefix, path, {"context_parallel_size": 2})[0] == ([2], [3, 5, 6, 7])
