"""Training with experts at every mix of ranks against one process: losses, every gradient, counts, bias. fp64."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate, Shard

import pool
import tiny
from longspan.config.sizes import MeshSizes
from longspan.mesh.mesh import ParallelMesh
from longspan.models import GPTModel
from longspan.parallelize import parallelize
from longspan.training.checkpoint import Checkpointer
from longspan.training.experts import IDLE_STEPS, Experts
from longspan.training.optimizer import gradient_norm
from longspan.training.trainer import Trainer
from step_results import ALL, BIAS, CPU, References, alike, compare, steps


@pytest.fixture(scope="module")
def reference(prefix):
    return References(prefix)


#: name -> (processes, what differs)
MIXES = {
    "ep2": (2, {"expert_parallel_size": 2}),
    "ep2, all to all ranks": (2, {"expert_parallel_size": 2, "moe_token_dispatcher_type": "allgather"}),
    "ep2 x tp2": (4, {"expert_parallel_size": 2, "tensor_parallel_size": 2}),
    "ep2 x tp2, experts whole": (
        4,
        {"expert_parallel_size": 2, "tensor_parallel_size": 2, "expert_tensor_parallel_size": 1},
    ),
    "tp2 without sequence parallelism": (2, {"tensor_parallel_size": 2, "sequence_parallel": False}),
    "ep2 folded into cp2": (2, {"expert_parallel_size": 2, "context_parallel_size": 2}),
    "ep2 x etp2 over cp2": (
        4,
        {"expert_parallel_size": 2, "expert_tensor_parallel_size": 2, "context_parallel_size": 2},
    ),
    "dp_shard2 x cp2, ep2": (4, {"expert_parallel_size": 2, "context_parallel_size": 2}),
    "cp3 x ep3": (3, {"expert_parallel_size": 3, "context_parallel_size": 3}),
    "HSDP x ep2": (4, {"expert_parallel_size": 2, "dp_replicate_size": 2}),
    "one expert a rank, more ranks than that": (4, {"num_moe_experts": 2, "expert_parallel_size": 2}),
    "dp4": (4, {}),
    "fewer experts than ranks, and sizes that do not divide": (
        3,
        {"num_moe_experts": 2, "moe_ffn_hidden_size": 20, "context_parallel_size": 3},
    ),
    "ep4 folded over cp2": (4, {"num_moe_experts": 4, "expert_parallel_size": 4, "context_parallel_size": 2}),
}


@pytest.mark.parametrize("name", MIXES)
def test_steps_equal_one_process(name, prefix, reference):
    world, changes = MIXES[name]
    run = ALL | changes
    alone = {
        k: v
        for k, v in run.items()
        if k
        not in (
            "expert_parallel_size",
            "tensor_parallel_size",
            "context_parallel_size",
            "expert_tensor_parallel_size",
            "dp_replicate_size",
            "sequence_parallel",
            "moe_token_dispatcher_type",
        )
    }
    got = pool.run(world, steps, prefix, 2, run)
    assert all(rank["records"] == got[0]["records"] for rank in got), (
        "the ranks disagree about what they computed"
    )
    compare(got[0], reference(2, alone))


def test_the_size_of_a_micro_batch_does_not_matter(prefix, reference):
    expected = reference(2, ALL | {"micro_batch_size": 1})
    alike(prefix, expected, 2, [(1, ALL | {"micro_batch_size": size}) for size in (2, 4)])
    kinds = {
        "moe_router_load_balancing_type": ["aux_loss", "global_aux_loss"],
        "moe_aux_loss_coeff": [0.2, 0.05],
    }
    stream = ALL | kinds | {"sample_packing": False}
    expected = reference(2, stream)
    cases = [
        (1, stream | {"micro_batch_size": 4}),
        (2, stream | {"expert_parallel_size": 2, "micro_batch_size": 2}),
        (2, stream | {"context_parallel_size": 2}),
    ]
    alike(prefix, expected, 2, cases)


CAPACITY = ALL | {"moe_expert_capacity_factor": 0.7}
CUTS = [
    (2, {"expert_parallel_size": 2}),
    (4, {"expert_parallel_size": 2, "context_parallel_size": 2}),
    (2, {"tensor_parallel_size": 2}),
]


@pytest.mark.parametrize("policy", ["probs", "position"])
def test_the_same_tokens_are_dropped_at_every_layout(prefix, reference, policy):
    run = CAPACITY | {"moe_token_drop_policy": policy}
    expected = reference(2, run)
    assert all(record["moe_dropped_tokens"] > 10 for record in expected["records"])
    cases = [(world, run | cut | {"moe_pad_expert_input_to_capacity": True}) for world, cut in CUTS]
    alike(prefix, expected, 2, [*cases, (1, run | {"micro_batch_size": 4})])


def test_hybrid_context_parallelism_balances_over_documents(prefix, reference):
    kinds = {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.2}
    expected = reference(2, ALL | kinds | {"moe_router_load_balancing_type": "seq_aux_loss"})
    hybrid = {"context_parallel_size": 2, "hybrid_context_parallel": True, "max_seqlen_per_dp_cp_rank": 60}
    alike(prefix, expected, 2, [(2, ALL | kinds | hybrid | {"expert_parallel_size": 2})])


@pytest.mark.slow
def test_the_bias_of_experts_follows_one_process(prefix, reference):
    run = BIAS | {"sequence_len": 30, "micro_batch_size": 2}
    steps = 30
    expected = reference(steps, run)
    bias = next(value for name, value in expected["state"].items() if name.endswith("expert_bias"))
    assert bias.abs().max() > 0.015
    cases = [
        (2, {"expert_parallel_size": 2}),
        (2, {"tensor_parallel_size": 2}),
        (3, {"expert_parallel_size": 3, "context_parallel_size": 3}),
    ]
    alike(prefix, expected, steps, [(world, run | cut) for world, cut in cases], 1e-9)


def recomputed(prefix, changes, ties):
    """Gradients with each way to recompute; with ``ties`` every router gives all experts the same score."""
    found = []
    for how in (False, "full", "selective"):
        run = tiny.tiny_run(prefix, dist.get_world_size(), **changes, gradient_checkpointing=how)
        trainer = Trainer(run, CPU)
        if ties:
            for layer in trainer.experts.layers:
                torch.nn.init.zeros_(layer.router.weight.to_local())
        loss, _ = trainer.compute_gradients(trainer.micro_batches(0))
        counts = [layer.load.counts.tolist() for layer in trainer.experts.layers]
        found.append((loss, counts, [p.grad.to_local().clone() for p in trainer.model.parameters()]))
    (loss, counts, gradients), *others = found
    for other in others:
        assert other[:2] == (loss, counts)
        assert all(torch.equal(a, b) for a, b in zip(gradients, other[2]))


@pytest.mark.parametrize("ties", [False, True])
def test_recomputing_changes_no_bit(prefix, ties):
    pool.run(2, recomputed, prefix, BIAS | {"expert_parallel_size": 2}, ties)


def resumed(prefix, folder, changes):
    """Four steps, and two steps, a checkpoint and two more: the same bits."""
    run = tiny.tiny_run(prefix, dist.get_world_size(), **changes)
    whole = Trainer(run, CPU)
    for step in range(4):
        whole.train_step(whole.micro_batches(step))
    first = Trainer(run, CPU)
    for step in range(2):
        first.train_step(first.micro_batches(step))
    path = Checkpointer(Path(folder), background=False).save(
        2, first.model, first.optimizer, first.description()
    )
    dist.barrier()
    second = Trainer(run, CPU)
    second.resume(path)
    for step in range(2, 4):
        second.train_step(second.micro_batches(step))
    for (name, a), (_, b) in zip(whole.model.state_dict().items(), second.model.state_dict().items()):
        a, b = (x.to_local() if hasattr(x, "to_local") else x for x in (a, b))
        assert torch.equal(a, b), name
    return str(path)


def continued(prefix, path, changes):
    trainer = Trainer(tiny.tiny_run(prefix, dist.get_world_size(), **changes), CPU)
    trainer.resume(Path(path))
    records = [trainer.train_step(trainer.micro_batches(step)) for step in range(2, 4)]
    return [(r["loss"], r["grad_norm"]) for r in records]


def test_a_checkpoint_goes_on_bit_equal_and_at_another_layout(prefix, tmp_path):
    run = BIAS | ALL | {"moe_router_score_function": "sigmoid"}
    path = pool.run(2, resumed, prefix, str(tmp_path), run | {"expert_parallel_size": 2})[0]
    expected = pool.run(2, continued, prefix, path, run | {"expert_parallel_size": 2})[0]
    for world, cut in ((1, {}), (4, {"expert_parallel_size": 2, "tensor_parallel_size": 2})):
        got = pool.run(world, continued, prefix, path, run | cut)[0]
        for a, b in zip(got, expected):
            assert a == pytest.approx(b, rel=1e-9)


def norm_of_four():
    """Experts whose gradients have the norms 2 and 4 on one rank, 6 and 8 on the other."""
    mesh = ParallelMesh.build(MeshSizes(dp_shard=2, ep=2))
    held = torch.zeros(2, 3, 5)
    held[:, 0, 0] = torch.tensor([[2.0, 4.0], [6.0, 8.0]])[dist.get_rank()]
    whole = DTensor.from_local(held, mesh.groups.expert_mesh, [Shard(0), Replicate()], run_check=False)
    module = torch.nn.Module()
    module.weight = torch.nn.Parameter(whole)
    module.weight.grad = whole.detach().clone()
    return gradient_norm(module).item()


def test_the_norm_counts_each_expert_once():
    assert pool.run(2, norm_of_four) == [pytest.approx(120**0.5)] * 2


def test_an_expert_that_nobody_chooses_is_named_once():
    whole = tiny.checked("data", 1, **BIAS | {"num_layers": 4, "moe_layer_freq": [0, 1]}).model
    experts = Experts(torch.nn.Linear(1, 1), None, whole)
    named = []
    for step in range(1, 2 * IDLE_STEPS):
        counts = torch.tensor([[1, 1, 0], [2, int(step == 5), 3]])
        experts.count_idle(counts == 0)
        named += [(step, name) for name in experts.collapsed()]
        # A checkpoint after any step changes nothing.
        counted, experts = experts.idle_counts(), Experts(torch.nn.Linear(1, 1), None, whole)
        experts.restart_idle(counted)
    assert named == [(IDLE_STEPS, "expert 2 of layer 2"), (5 + IDLE_STEPS, "expert 1 of layer 4")]


def buffers_beside_weights_from_elsewhere():
    """Memory that nobody has filled is filled with the largest numbers here."""
    mesh = ParallelMesh.build(MeshSizes())
    run = tiny.checked("data", 1, **BIAS)
    torch.use_deterministic_algorithms(True)
    try:
        with torch.device("meta"):
            model = GPTModel(run.transformer_config(), 50, 8, pg_collection=mesh.groups)
        parallelize(model, mesh, seed=None, device=CPU)
    finally:
        torch.use_deterministic_algorithms(False)
    buffers = [buffer.to_local() for _, buffer in model.named_buffers()]
    assert len(buffers) == 4
    assert all((buffer == 0).all() for buffer in buffers)


def test_buffers_are_filled_where_weights_come_from_a_base_model():
    pool.run(1, buffers_beside_weights_from_elsewhere)
