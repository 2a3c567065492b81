"""Initial weights outside the trainer: by (seed, name, shape) at every layout, and refused where copies would differ."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

import pool
from longspan import TransformerConfig, parallel_state
from longspan.config.parallel import MeshSizes
from longspan.mesh.mesh import ParallelMesh
from longspan.models import GPTModel, TransformerBlock, TransformerLayer
from longspan.models.gpt import MLP
from longspan.parallelize import parallelize
from longspan.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    init_weights,
    model_parallel_seed,
)

VOCAB, LENGTH, SEED = 300, 16, 7


def config(tp=1, **more):
    return TransformerConfig(
        **dict(
            num_layers=2,
            hidden_size=16,
            num_attention_heads=4,
            ffn_hidden_size=24,
            tensor_model_parallel_size=tp,
            init_method_std=0.3,
        )
        | more
    )


def whole(module):
    return {name: p.detach().full_tensor().clone() for name, p in module.named_parameters()}


def same(got, expected):
    assert got.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(got[name], weight), name


def trained(tie):
    """The trainer's weights at one process."""
    mesh = ParallelMesh.build(MeshSizes())
    with torch.device("meta"):
        model = GPTModel(
            config(share_embeddings_and_output_weights=tie), VOCAB, LENGTH, pg_collection=mesh.groups
        )
    return whole(parallelize(model, mesh, seed=SEED, device=torch.device("cpu")))


def outside(tp, cp, tie):
    """A model, its decoder and a layer in a user's own loop, seeded in both ways, with noise drawn rank by rank before."""
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp, context_parallel_size=cp)
    c = config(tp, share_embeddings_and_output_weights=tie)
    given = GPTModel(c, VOCAB, LENGTH, seed=SEED)
    model_parallel_seed(SEED)
    torch.rand(1 + dist.get_rank())
    model = GPTModel(c, VOCAB, LENGTH)
    assert (model.output_layer.weight is model.embedding.word_embeddings.weight) == tie
    assert not any(p.is_meta for p in model.parameters())
    same(whole(given), whole(model))
    weights = whole(model)
    for prefix, part in (
        ("decoder.", TransformerBlock(c)),
        ("decoder.", TransformerBlock(c, seed=SEED)),
        ("decoder.layers.1.", TransformerLayer(c, 2)),
        ("decoder.layers.1.", TransformerLayer(c, 2, seed=SEED)),
    ):
        expected = {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
        same(whole(part), expected)
    return weights


@pytest.mark.parametrize("tie", [False, True])
def test_a_model_outside_the_trainer_starts_as_the_trainers(tie):
    expected = pool.run(1, trained, tie)[0]
    for world, tp, cp in ((1, 1, 1), (2, 2, 1), (2, 1, 2), (3, 1, 3), (2, 1, 1), (4, 2, 2)):
        for weights in pool.run(world, outside, tp, cp, tie):
            same(weights, expected)


def seedless():
    """Copies (cp or dp) without a seed are refused, by every part; what draws nothing and what has a seed is not."""
    parallel_state.initialize_model_parallel(context_parallel_size=dist.get_world_size())
    c = config()
    torch.manual_seed(0)  # on every rank, but nobody can tell
    for make in (
        lambda c: GPTModel(c, VOCAB, LENGTH),
        TransformerBlock,
        TransformerLayer,
        lambda c: MLP(c, parallel_state.get_process_groups()),
        lambda c: ColumnParallelLinear(4, 4, c),
        lambda c: RowParallelLinear(4, 4, c),
        lambda c: RowParallelLinear(4, 4, c, tp_group=parallel_state.get_tensor_model_parallel_group()),
        lambda c: ColumnParallelLinear(4, 4, c, init_method=nn.init.xavier_normal_),
        lambda c: VocabParallelEmbedding(8, 4, c),
    ):
        with pytest.raises(ValueError, match=r"2 copies of each weight.*model_parallel_seed\(seed\)"):
            make(c)
        make(config(perform_initialization=False))
        with torch.device("meta"):
            make(c)
        model_parallel_seed(1)
        make(c)
        parallel_state.destroy_model_parallel()  # forgets the seed
        parallel_state.initialize_model_parallel(context_parallel_size=dist.get_world_size())
    GPTModel(c, VOCAB, LENGTH, seed=0)


def test_copies_without_a_seed_are_refused():
    pool.run(2, seedless)


def test_data_parallel_copies_are_refused_too():
    pool.run(2, seedless_data_parallel)


def seedless_data_parallel():
    parallel_state.initialize_model_parallel()
    with pytest.raises(ValueError, match="start different"):
        GPTModel(config(), VOCAB, LENGTH)


def lone_layers(tp):
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp)
    c = config(tp)
    model_parallel_seed(SEED)
    torch.rand(1 + dist.get_rank())
    layers = nn.Sequential(
        ColumnParallelLinear(16, 24, c),
        RowParallelLinear(24, 16, c),
        ColumnParallelLinear(16, 24, c, init_method=nn.init.xavier_uniform_),
        ColumnParallelLinear(16, 24, c),
    )
    before = whole(layers)
    init_weights(layers, SEED)
    same(whole(layers), before)  # named as in a Sequential
    init_weights(layers, SEED + 1)
    assert not torch.equal(whole(layers)["2.weight"], before["2.weight"])  # a method's draws follow the seed
    return before


def test_lone_layers_are_named_by_their_order():
    expected = pool.run(1, lone_layers, 1)[0]
    assert not torch.equal(expected["0.weight"], expected["3.weight"])
    for world, tp in ((2, 1), (2, 2), (4, 2)):
        for weights in pool.run(world, lone_layers, tp):
            same(weights, expected)


def by_torch_seed():
    """Without model_parallel_seed a process without copies follows torch.manual_seed, as every torch module does."""
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=dist.get_world_size())
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(whole(GPTModel(config(dist.get_world_size()), VOCAB, LENGTH)))
    same(found[0], found[1])
    name = "embedding.word_embeddings.weight"
    assert not torch.equal(found[0][name], found[2][name])
    return found[0]


def test_torch_manual_seed_counts_where_there_are_no_copies():
    same(pool.run(2, by_torch_seed)[0], pool.run(1, by_torch_seed)[0])


def nothing_drawn():
    parallel_state.initialize_model_parallel()
    before = torch.get_rng_state()
    with torch.device("meta"):
        model = GPTModel(config(), VOCAB, LENGTH)
        with pytest.raises(ValueError, match="seed=3 has no effect"):
            GPTModel(config(), VOCAB, LENGTH, seed=3)
    assert all(p.is_meta for p in model.parameters())
    bare = GPTModel(config(perform_initialization=False), VOCAB, LENGTH)
    assert not any(p.is_meta for p in bare.parameters())
    with pytest.raises(ValueError, match=r"perform_initialization=False.*init_weights\(model, seed\)"):
        TransformerLayer(config(perform_initialization=False), seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    init_weights(bare, SEED)
    same(whole(bare), whole(GPTModel(config(), VOCAB, LENGTH, seed=SEED)))
    assert torch.equal(
        torch.get_rng_state(), before
    )  # a seed of its own draws nothing from the default generator


def test_meta_and_perform_initialization_draw_nothing():
    pool.run(1, nothing_drawn)
