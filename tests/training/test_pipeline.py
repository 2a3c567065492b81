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


#: experts with every balancing loss
EXPERTS = {
    "export_hf": False,
    "num_layers": 4,
    "num_moe_experts": 4,
    "moe_ffn_hidden_size": 24,
    "moe_layer_freq": [0, 1, 1, 1],
    "moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss", "global_aux_loss"],
    "moe_aux_loss_coeff": [0.2, 0.1, 0.05],
    "moe_z_loss_coeff": 0.02,
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
}
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
    "an empty stage": (4, {"pipeline_parallel_size": 4}, {"num_layers": 2, "tie_word_embeddings": True}),
    "fewer micro-batches than stages": (
        3,
        {"pipeline_parallel_size": 3, "pipeline_schedule": "gpipe"},
        {"global_batch_size": 2},
    ),
    "tp2": (4, PP2 | {"tensor_parallel_size": 2}, {"tie_word_embeddings": True}),
    "dp_shard2": (4, PP2 | {"dp_shard_size": 2}, {"tie_word_embeddings": True}),
    "dp_replicate2": (4, PP2 | {"dp_replicate_size": 2}, {}),
    "written out, selective recomputation": (
        2,
        PP2 | {"pipeline_layout": "E|t|(tt|)*1tL", "gradient_checkpointing": "selective"},
        {"num_layers": 4},
    ),
    "interleaved, cp2, full recomputation": (
        4,
        PP2
        | {"virtual_pipeline_parallel_size": 2, "context_parallel_size": 2, "gradient_checkpointing": True},
        {"num_layers": 4, "tie_word_embeddings": True},
    ),
    "zero bubble": (2, PP2 | {"pipeline_schedule": "interleaved_zero_bubble"}, {"num_layers": 4}),
    "zero bubble, tied": (
        2,
        PP2 | {"pipeline_schedule": "interleaved_zero_bubble"},
        {"num_layers": 4, "tie_word_embeddings": True},
    ),
    "zbv": (2, PP2 | {"pipeline_schedule": "zbv"}, {"num_layers": 4}),
    "zbv, tied": (2, PP2 | {"pipeline_schedule": "zbv"}, {"num_layers": 4, "tie_word_embeddings": True}),
    "zbv, dp_shard2, selective recomputation": (
        4,
        PP2 | {"pipeline_schedule": "zbv", "dp_shard_size": 2, "gradient_checkpointing": "selective"},
        {"num_layers": 4, "global_batch_size": 8},
    ),
    "zero bubble, cp2, full recomputation": (
        4,
        PP2
        | {
            "pipeline_schedule": "interleaved_zero_bubble",
            "context_parallel_size": 2,
            "gradient_checkpointing": True,
        },
        {"num_layers": 4},
    ),
    "experts, ep2": (4, PP2 | {"expert_parallel_size": 2}, EXPERTS),
    "experts, folded over cp2, full recomputation": (
        4,
        PP2 | {"context_parallel_size": 2, "expert_parallel_size": 2, "gradient_checkpointing": True},
        EXPERTS,
    ),
    "experts, zero bubble": (2, PP2 | {"pipeline_schedule": "interleaved_zero_bubble"}, EXPERTS),
    "experts, zbv, ep2, selective recomputation": (
        4,
        PP2 | {"pipeline_schedule": "zbv", "expert_parallel_size": 2, "gradient_checkpointing": "selective"},
        EXPERTS | {"global_batch_size": 8},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_steps_equal_one_process(name, prefix, reference):
    world, layout, model = CASES[name]
    got = pool.run(world, steps, prefix, 2, layout | model)
    assert all(rank["records"] == got[0]["records"] for rank in got)
    compare(got[0], reference(2, model))
