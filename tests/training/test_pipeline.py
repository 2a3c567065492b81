"""Pipelines at every schedule and mix of axes against one process: losses, every gradient, evaluation. fp64."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

import pool
from llamas import lora_run, make_llama
from longspan.mesh.whole import whole_tensors
from longspan.training.export import export
from longspan.training.trainer import Trainer
from step_results import References, alike, compare, continued, saved

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def reference(prefix):
    return References(prefix)


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
        {"pipeline_parallel_size": 3},
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
    "tp2 x cp2": (
        8,
        PP2 | {"tensor_parallel_size": 2, "context_parallel_size": 2},
        {"tie_word_embeddings": True},
    ),
    "experts, tp2 x cp2, ep4 folded over both, the pipeline before dp": (
        8,
        PP2
        | {
            "tensor_parallel_size": 2,
            "context_parallel_size": 2,
            "expert_parallel_size": 4,
            "expert_tensor_parallel_size": 1,
            "use_tp_pp_dp_mapping": True,
        },
        EXPERTS,
    ),
    "experts, ep2, dp_shard2, hsdp": (
        8,
        PP2 | {"expert_parallel_size": 2, "dp_shard_size": 2, "dp_replicate_size": 2},
        EXPERTS | {"global_batch_size": 8},
    ),
    "the pipeline before dp": (
        4,
        PP2 | {"dp_shard_size": 2, "use_tp_pp_dp_mapping": True},
        {"tie_word_embeddings": True},
    ),
    "zbv, tp2": (
        4,
        PP2 | {"pipeline_schedule": "zbv", "tensor_parallel_size": 2},
        {"num_layers": 4, "tie_word_embeddings": True},
    ),
}


#: every schedule with every one of these, 60 cases that take ten minutes: with LONGSPAN_TEST_ALL=1
SCHEDULES = ("gpipe", "1f1b", "interleaved", "interleaved_zero_bubble", "zbv")
WITH = {
    "tied": (2, {}, {"tie_word_embeddings": True}),
    "dp_shard2": (4, {"dp_shard_size": 2}, {"global_batch_size": 8}),
    "tp2": (4, {"tensor_parallel_size": 2}, {}),
    "cp2": (4, {"context_parallel_size": 2}, {}),
    "full recomputation": (2, {"gradient_checkpointing": True}, {}),
    "selective recomputation": (2, {"gradient_checkpointing": "selective"}, {}),
    "experts": (2, {}, EXPERTS),
    "experts, full recomputation": (2, {"gradient_checkpointing": True}, EXPERTS),
    "experts, selective recomputation": (2, {"gradient_checkpointing": "selective"}, EXPERTS),
    "experts, ep2": (4, {"expert_parallel_size": 2}, EXPERTS | {"global_batch_size": 8}),
    "experts, a capacity": (
        4,
        {"context_parallel_size": 2, "expert_parallel_size": 2},
        EXPERTS | {"moe_expert_capacity_factor": 1.0},
    ),
    "experts, a capacity, recomputed": (
        2,
        {"gradient_checkpointing": True},
        EXPERTS | {"moe_expert_capacity_factor": 1.0},
    ),
}
if os.environ.get("LONGSPAN_TEST_ALL"):
    CASES |= {
        f"{schedule}, {name}, of all": (
            world,
            PP2 | {"pipeline_schedule": schedule} | layout,
            {"num_layers": 4} | model,
        )
        for schedule in SCHEDULES
        for name, (world, layout, model) in WITH.items()
    }


@pytest.mark.parametrize("name", CASES)
def test_steps_equal_one_process(name, prefix, reference):
    world, layout, model = CASES[name]
    model = model | {"eval_max_samples": 2}
    expected = reference(2, model, evaluates_first=True)
    alike(prefix, expected, 2, [(world, layout | model)], evaluates_first=True)


LAYOUTS = {
    "one": (1, {}),
    "pp2": (2, PP2),
    "pp2, interleaved": (2, PP2 | {"virtual_pipeline_parallel_size": 2}),
    "zbv": (2, PP2 | {"pipeline_schedule": "zbv"}),
    "tp2": (2, {"tensor_parallel_size": 2}),
    "pp2 x dp_shard2": (4, PP2 | {"dp_shard_size": 2}),
    "pp2 x cp2, the pipeline before dp": (
        4,
        PP2 | {"context_parallel_size": 2, "use_tp_pp_dp_mapping": True},
    ),
    "pp3": (3, {"pipeline_parallel_size": 3}),
    "cp3": (3, {"context_parallel_size": 3}),
}
#: pairs of layouts, each layout at both ends
PAIRS = [("one", "pp2"), ("pp2", "tp2"), ("tp2", "pp2, interleaved"), ("pp2, interleaved", "zbv"),
         ("zbv", "pp2 x dp_shard2"), ("pp2 x dp_shard2", "one"), ("pp2", "pp2"), ("one", "pp3"),
         ("pp3", "pp2 x cp2, the pipeline before dp"), ("pp2 x cp2, the pipeline before dp", "cp3"), ("cp3", "zbv"),
         ("zbv", "tp2")]  # fmt: skip


@pytest.mark.parametrize("tied", [False, True])
def test_checkpoints_and_exports_are_of_the_whole_model(prefix, tmp_path, tied):
    model = {"num_layers": 4, "tie_word_embeddings": tied}
    found = {}
    # What is tied matters where the ends are on two ranks, and where they are on one.
    pairs = PAIRS[:1] + PAIRS[4:6] if tied else PAIRS
    for name in dict.fromkeys(["one", *(first for first, _ in pairs)]):
        world, layout = LAYOUTS[name]
        found[name] = pool.run(world, saved, prefix, str(tmp_path / name), model | layout)[0]
    exported = (tmp_path / "one" / "hf" / "model.safetensors").read_bytes()
    for first, then in pairs:
        path, expected = found[first]
        assert (tmp_path / first / "hf" / "model.safetensors").stat().st_size == len(exported)
        world, layout = LAYOUTS[then]
        got = pool.run(world, continued, prefix, path, model | layout)[0]
        assert got == (expected if first == then else pytest.approx(expected, rel=1e-9))
        names = load_file(tmp_path / first / "hf" / "model.safetensors")
        for key, value in load_file(tmp_path / "one" / "hf" / "model.safetensors").items():
            torch.testing.assert_close(names[key], value, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_adapters_behind_a_frozen_stage(prefix, tmp_path, schedule):
    """Only the layers of the last stage have trained parameters near them: the first stage is frozen but for its adapters."""
    base = make_llama(tmp_path, num_hidden_layers=4)
    (expected,) = pool.run(1, adapted, prefix, base, {})
    (got, *_) = pool.run(2, adapted, prefix, base, PP2 | {"pipeline_schedule": schedule})
    compare(got, expected)


def adapters_after_a_step(prefix, base, folder, changes):
    trainer = Trainer(lora_run(prefix, base, **changes), CPU)
    trainer.train_step(trainer.micro_batches(0))
    export(trainer, Path(folder))


def test_adapters_of_all_stages_are_exported(prefix, tmp_path):
    base = make_llama(tmp_path, num_hidden_layers=4)
    layouts = {"one": (1, {}), "zbv": (2, PP2 | {"pipeline_schedule": "zbv"})}
    for name, (world, changes) in layouts.items():
        pool.run(world, adapters_after_a_step, prefix, base, str(tmp_path / name), changes)
    one, pipeline = (load_file(tmp_path / name / "adapter_model.safetensors") for name in layouts)
    assert one.keys() == pipeline.keys()
    assert {name.split(".")[4] for name in one} == {"0", "1", "2", "3"}
    for name, value in one.items():
        torch.testing.assert_close(pipeline[name], value, rtol=1e-5, atol=1e-7)


def adapted(prefix, base, changes):
    trainer = Trainer(lora_run(prefix, base, **changes), CPU)
    # Without gradients in the first layers the stage before is frozen as a whole.
    for name, parameter in trainer.model.named_parameters():
        if name.startswith(("decoder.layers.0.", "decoder.layers.1.", "embedding")):
            parameter.requires_grad_(False)
    before = trainer.evaluate()["loss"]
    loss, count = trainer.compute_gradients(trainer.micro_batches(0))
    named = {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
    gradients = {name: whole.clone() for name, whole in whole_tensors(named, trainer.groups.pp)}
    if dist.get_rank() == 0:
        assert len(gradients) > 4
    return {
        "parameters": trainer.parameter_counts,
        "records": [{"loss": loss, "tokens": count}],
        "gradients": gradients if dist.get_rank() == 0 else {},
        "evaluations": [before],
        "state": {},
    }
