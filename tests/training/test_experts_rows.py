"""Experts where rows are uneven: ranks of padding, masked prompts, experts that nobody chooses. fp64, one process."""

import numpy as np
import pytest
import torch
import torch.distributed as dist

import pool
import tiny
from longspan.data import IndexedDatasetWriter
from longspan.training.trainer import Trainer
from step_results import ALL, BIAS, CPU, References, compare, steps

#: in sequences of 50 tokens most of them leave room that no other fits in
LENGTHS = (27, 27, 24, 40, 28, 9, 1, 35, 50, 30, 27, 33)
EXPERTS = ALL | {"val_set_size": 0.2}


@pytest.fixture(scope="module")
def prefix(tmp_path_factory):
    """Samples of uneven lengths, of which a tenth of the tokens counts: those before are a prompt."""
    prefix = tmp_path_factory.mktemp("samples") / "samples"
    rng = np.random.default_rng(0)
    with (
        IndexedDatasetWriter(prefix, np.uint16) as tokens,
        IndexedDatasetWriter(f"{prefix}_mask", np.uint8) as masks,
    ):
        for length in LENGTHS:
            tokens.add_document(rng.integers(tiny.VOCAB, size=length))
            learned = max(1, length // 10)
            masks.add_document(np.array([0] * (length - learned) + [1] * learned))
    return str(prefix)


@pytest.fixture(scope="module")
def reference(prefix):
    return References(prefix)


def tokens_of_ranks(prefix, changes):
    """For each micro-batch of two steps the tokens of this rank."""
    trainer = Trainer(tiny.tiny_run(prefix, dist.get_world_size(), **changes), CPU)
    return [[b.sequences.num_tokens for b in trainer.micro_batches(step)] for step in range(2)]


#: name -> (processes, what differs)
UNEVEN = {
    "a rank of padding alone, and one with most tokens": (
        2,
        {"context_parallel_size": 2, "expert_parallel_size": 2, "cp_layout": "contiguous"},
    ),
    "three ranks": (3, {"context_parallel_size": 3, "expert_parallel_size": 3, "cp_layout": "contiguous"}),
    "tp2": (2, {"tensor_parallel_size": 2, "expert_parallel_size": 2, "expert_tensor_parallel_size": 1}),
    "dp4, packs of different lengths": (4, {"expert_parallel_size": 4, "num_moe_experts": 8}),
}


@pytest.mark.parametrize("name", UNEVEN)
def test_samples_of_uneven_lengths(name, prefix, reference):
    world, changes = UNEVEN[name]
    got = pool.run(world, steps, prefix, 2, EXPERTS | changes)
    alone = {"num_moe_experts": changes.get("num_moe_experts", 6)}
    compare(got[0], reference(2, EXPERTS | alone))


def test_the_cases_are_what_they_are_called(prefix):
    world, changes = UNEVEN["a rank of padding alone, and one with most tokens"]
    first, second = pool.run(world, tokens_of_ranks, prefix, EXPERTS | changes)
    pairs = [(a, b) for mine, others in zip(first, second) for a, b in zip(mine, others)]
    assert any(b == 0 for _, b in pairs)
    assert any(0 < b <= 0.1 * (a + b) for a, b in pairs)


def test_samples_of_a_hybrid_run(prefix, reference):
    """Balanced over documents, which one process has as a loss of its own."""
    one = {"moe_router_load_balancing_type": "seq_aux_loss", "moe_aux_loss_coeff": 0.2}
    cut = {"context_parallel_size": 2, "hybrid_context_parallel": True, "max_seqlen_per_dp_cp_rank": 60}
    hybrid = EXPERTS | one | cut | {"moe_router_load_balancing_type": "aux_loss"}
    compare(pool.run(2, steps, prefix, 2, hybrid)[0], reference(2, EXPERTS | one))


#: name -> (processes, what differs)
LAYOUTS = {
    "ep2": (2, {"expert_parallel_size": 2}),
    "ep2, all to all ranks": (2, {"expert_parallel_size": 2, "moe_token_dispatcher_type": "allgather"}),
    "ep3 over cp3": (3, {"expert_parallel_size": 3, "context_parallel_size": 3}),
    "ep2 x etp2": (4, {"expert_parallel_size": 2, "tensor_parallel_size": 2}),
}


#: the experts that all tokens choose, of one rank or of two, and the layouts
FAVOURED = [
    ([3], LAYOUTS),
    ([0, 1], ("ep2", "ep3 over cp3")),
    ([4, 1], ("ep2, all to all ranks", "ep2 x etp2")),
]


@pytest.mark.parametrize(("favoured", "layouts"), FAVOURED)
def test_experts_that_nobody_chooses(prefix, favoured, layouts):
    """A large bias sends every token to the same experts, so that ranks have none: their gradients are 0."""
    run = BIAS | {"val_set_size": 0.2, "moe_router_topk": len(favoured)}
    (expected,) = pool.run(1, steps, prefix, 2, run, favoured)
    for record in expected["records"]:
        for layer in record["moe_load"]:
            assert sorted(favoured) == [expert for expert, share in enumerate(layer) if share]
    for world, changes in map(LAYOUTS.get, layouts):
        compare(pool.run(world, steps, prefix, 2, run | changes, favoured)[0], expected)


def step_without_targets(prefix, changes):
    """Weights, buffers and load before and after steps in which no token counts."""
    trainer = Trainer(tiny.tiny_run(prefix, dist.get_world_size(), **changes), CPU)

    def state():
        found = {}
        for name, value in trainer.model.state_dict().items():
            found[name] = (value.to_local() if hasattr(value, "to_local") else value).clone()
        return found

    trainer.train_step(trainer.micro_batches(0))
    before = state()
    batches = [b._replace(labels=torch.full_like(b.labels, -100)) for b in trainer.micro_batches(1)]
    record = trainer.train_step(batches)
    assert record["loss"] is None
    assert "moe_load" not in record
    assert all(torch.equal(value, before[name]) for name, value in state().items())
    assert any(name.endswith("expert_bias") and value.any() for name, value in before.items())


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_step_in_which_nothing_counts_moves_neither_weights_nor_bias(prefix, ranks):
    pool.run(
        ranks, step_without_targets, prefix, BIAS | {"val_set_size": 0.2} | {"expert_parallel_size": ranks}
    )
