"""Pipelines at every schedule and mix of axes against one process: losses, every gradient, evaluation. fp64."""

import json

import pytest
import torch
import torch.distributed as dist

import pool
import tiny
from longspan.models.hf_weights import whole_tensors
from longspan.training.trainer import Trainer

CPU = torch.device("cpu")


def steps(prefix, count, changes):
    """An evaluation, steps with every whole gradient of the first one, and an evaluation."""
    trainer = Trainer(tiny.tiny_run(prefix, dist.get_world_size(), **changes), CPU)
    before = trainer.evaluate()["loss"]
    trainer.compute_gradients(trainer.micro_batches(0))
    named = {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
    gradients = {name: whole.clone() for name, whole in whole_tensors(named, trainer.groups.pp)}
    records = [trainer.train_step(trainer.micro_batches(step)) for step in range(count)]
    keys = ("loss", "grad_norm", "tokens", "moe_aux_loss", "moe_z_loss", "moe_load", "moe_dropped_tokens")
    return {
        "records": [{k: r[k] for k in keys if k in r} for r in records],
        "gradients": gradients if dist.get_rank() == 0 else {},
        "evaluations": (before, trainer.evaluate()["loss"]),
    }


@pytest.fixture(scope="module")
def reference(prefix):
    done = {}

    def get(count, changes):
        key = json.dumps([count, changes], sort_keys=True)
        if key not in done:
            (done[key],) = pool.run(1, steps, prefix, count, changes)
        return done[key]

    return get


def compare(got, expected, tolerance=1e-10):
    for a, b in zip(got["records"], expected["records"]):
        assert a.keys() == b.keys()
        for name, value in b.items():
            assert a[name] == value or a[name] == pytest.approx(value, rel=tolerance), name
    assert got["evaluations"] == pytest.approx(expected["evaluations"], rel=tolerance)
    assert list(got["gradients"]) == list(expected["gradients"])
    for name, whole in expected["gradients"].items():
        error = (got["gradients"][name] - whole).abs().max()
        assert error <= tolerance * max(whole.abs().max().item(), 1e-3), f"{name}: {error}"


PP2 = {"pipeline_parallel_size": 2}
TWICE = {"virtual_pipeline_parallel_size": 2, "num_layers": 4}
#: name -> (processes, the layout, what else differs from the plain run)
CASES = {
    "1f1b": (2, PP2, {}),
    "gpipe": (2, PP2 | {"pipeline_schedule": "gpipe"}, {}),
    "interleaved": (2, PP2 | {"virtual_pipeline_parallel_size": 2}, {"num_layers": 4}),
    "tied": (2, PP2, {"tie_word_embeddings": True}),
    "cp2, a layout for each micro-batch": (4, PP2 | {"context_parallel_size": 2}, {}),
    "odd number of layers over three ranks": (3, {"pipeline_parallel_size": 3}, {"num_layers": 5}),
}


@pytest.mark.parametrize("name", CASES)
def test_steps_equal_one_process(name, prefix, reference):
    world, layout, model = CASES[name]
    got = pool.run(world, steps, prefix, 2, layout | model)
    assert all(rank["records"] == got[0]["records"] for rank in got)
    compare(got[0], reference(2, model))
