"""Initial weights outside the trainer: by (seed, name, shape) at every layout, and refused where copies would differ."""

import hashlib

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

import pool
from longspan import TransformerConfig, parallel_state
from longspan.config.sizes import MeshSizes
from longspan.mesh.mesh import ParallelMesh
from longspan.models import GPTModel, TransformerBlock, TransformerLayer
from longspan.models.parts import MLP
from longspan.parallelize import parallelize
from longspan.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    init_weights,
    model_parallel_seed,
)
from longspan.tensor_parallel.layers import TensorParallelModule
from longspan.tensor_parallel.random import Constant, Normal, Uniform, draw_part, fill

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


#: names and digests of initial weights of seed 7: no other name and no other bit, or checkpoints and runs change
STARTS = {
    "llama": (
        dict(
            num_query_groups=2,
            normalization="RMSNorm",
            gated_linear_unit=True,
            add_bias_linear=False,
            qk_layernorm=True,
            init_method_std=0.02,
        ),
        {
            "embedding.word_embeddings.weight": "eaab44508e5c",
            "decoder.layers.0.input_layernorm.weight": "27a768d6ab81",
            "decoder.layers.0.self_attention.linear_q.weight": "786a7f09ae7a",
            "decoder.layers.0.self_attention.linear_k.weight": "f5990497b1a5",
            "decoder.layers.0.self_attention.linear_v.weight": "cb8339d4df27",
            "decoder.layers.0.self_attention.q_layernorm.weight": "97e91e4300ec",
            "decoder.layers.0.self_attention.k_layernorm.weight": "97e91e4300ec",
            "decoder.layers.0.self_attention.linear_proj.weight": "4028c81226df",
            "decoder.layers.0.pre_mlp_layernorm.weight": "27a768d6ab81",
            "decoder.layers.0.mlp.linear_gate.weight": "6641750758a3",
            "decoder.layers.0.mlp.linear_up.weight": "afeed415d6eb",
            "decoder.layers.0.mlp.linear_down.weight": "352655581751",
            "decoder.layers.1.input_layernorm.weight": "27a768d6ab81",
            "decoder.layers.1.self_attention.linear_q.weight": "fa40da175485",
            "decoder.layers.1.self_attention.linear_k.weight": "7a1b68743e8c",
            "decoder.layers.1.self_attention.linear_v.weight": "da62fd0bb56e",
            "decoder.layers.1.self_attention.q_layernorm.weight": "97e91e4300ec",
            "decoder.layers.1.self_attention.k_layernorm.weight": "97e91e4300ec",
            "decoder.layers.1.self_attention.linear_proj.weight": "d4500aefcde6",
            "decoder.layers.1.pre_mlp_layernorm.weight": "27a768d6ab81",
            "decoder.layers.1.mlp.linear_gate.weight": "aa09acdbdf03",
            "decoder.layers.1.mlp.linear_up.weight": "2b235d50c503",
            "decoder.layers.1.mlp.linear_down.weight": "ddd551c25679",
            "decoder.final_layernorm.weight": "27a768d6ab81",
            "output_layer.weight": "4ca8a8aa49ec",
        },
    ),
    "gpt2": (
        dict(
            num_layers=1,
            position_embedding_type="learned_absolute",
            share_embeddings_and_output_weights=True,
            layernorm_zero_centered_gamma=True,
            init_method_std=0.02,
        ),
        {
            "embedding.word_embeddings.weight": "eaab44508e5c",
            "embedding.position_embeddings.weight": "d1d06eae6eb9",
            "decoder.layers.0.input_layernorm.weight": "f1999a66979c",
            "decoder.layers.0.input_layernorm.bias": "f1999a66979c",
            "decoder.layers.0.self_attention.linear_q.weight": "786a7f09ae7a",
            "decoder.layers.0.self_attention.linear_q.bias": "f1999a66979c",
            "decoder.layers.0.self_attention.linear_k.weight": "4961b4c16073",
            "decoder.layers.0.self_attention.linear_k.bias": "f1999a66979c",
            "decoder.layers.0.self_attention.linear_v.weight": "eea12661e95c",
            "decoder.layers.0.self_attention.linear_v.bias": "f1999a66979c",
            "decoder.layers.0.self_attention.linear_proj.weight": "e2346d6a79d7",
            "decoder.layers.0.self_attention.linear_proj.bias": "f1999a66979c",
            "decoder.layers.0.pre_mlp_layernorm.weight": "f1999a66979c",
            "decoder.layers.0.pre_mlp_layernorm.bias": "f1999a66979c",
            "decoder.layers.0.mlp.linear_up.weight": "afeed415d6eb",
            "decoder.layers.0.mlp.linear_up.bias": "4319c9b3f67e",
            "decoder.layers.0.mlp.linear_down.weight": "7160f8610cc3",
            "decoder.layers.0.mlp.linear_down.bias": "f1999a66979c",
            "decoder.final_layernorm.weight": "f1999a66979c",
            "decoder.final_layernorm.bias": "f1999a66979c",
        },
    ),
}


def starts(more):
    parallel_state.initialize_model_parallel()
    model = GPTModel(config(**more), 100, 40, seed=SEED)
    return {
        name: hashlib.blake2b(w.numpy().tobytes(), digest_size=6).hexdigest()
        for name, w in whole(model).items()
    }


@pytest.mark.parametrize("name", STARTS)
def test_names_and_initial_bits_stay_as_they_were(name):
    more, expected = STARTS[name]
    got = pool.run(1, starts, more)[0]
    assert list(got) == list(expected)
    assert got == expected


class WithBuffers(TensorParallelModule):
    """A layer whose values are of all kinds, a buffer cut over tensor parallel ranks and a plain one among them."""

    def __init__(self, config):
        super().__init__(config, None)
        self.weight = self._parameter("weight", (4, 6, 8), 2, Normal(0.1))
        self.own = self._parameter(
            "own", (4,), 0, lambda seed, name, shape, rows: torch.arange(*rows).float()
        )
        self._buffer("bias", (8, 3), 0, Uniform(0.1), torch.float64)
        self.register_buffer("plain", torch.empty(5))
        self.initial["plain"] = Constant(2.0)


def buffers(tp):
    """The whole values of a layer made at once and of one that gets memory later."""
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp)
    with torch.device("meta"):
        later = nn.Sequential(WithBuffers(config(tp)))
    later.to_empty(device="cpu")
    init_weights(later, SEED)
    assert later[0].bias.dtype == torch.float64
    held = {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in later.state_dict().items()}
    assert held["0.own"].tolist() == [0, 1, 2, 3]
    assert held["0.plain"].tolist() == [2.0] * 5
    return held


def test_every_dim_of_a_cut_and_buffers_are_filled():
    expected = pool.run(1, buffers, 1)[0]
    for held in pool.run(2, buffers, 2):
        same(held, expected)


def experts(sizes):
    """A weight cut over ep and etp, and then by FSDP over edp; filled, and whole again."""
    mesh = ParallelMesh.build(sizes)
    ep, etp = mesh.groups.ep.size(), mesh.groups.etp.size()
    held = torch.empty(4 // ep, 6, 8 // etp)
    module = nn.Module()
    module.weight = nn.Parameter(
        DTensor.from_local(held, mesh.expert_mesh["ep", "etp"], [Shard(0), Shard(2)], run_check=False)
    )
    if etp == 1:  # FSDP goes with one other axis at a time
        module.weight = nn.Parameter(
            DTensor.from_local(held, mesh.groups.expert_mesh["ep"], [Shard(0)], run_check=False)
        )
        fully_shard(module, mesh=mesh.expert_mesh["edp"])
    fill(module.weight, Normal(0.1), SEED, "experts")
    return module.weight.detach().full_tensor()


@pytest.mark.parametrize(
    "sizes",
    [MeshSizes(dp_shard=4, ep=2), MeshSizes(tp=2, cp=2, ep=2, etp=2), MeshSizes(tp=2, cp=2, ep=4, etp=1)],
    ids=str,
)
def test_weights_of_experts_are_filled_alike_at_every_layout(sizes):
    expected = draw_part(Normal(0.1), SEED, "experts", (4, 6, 8), [(0, 4), (0, 6), (0, 8)])
    for weight in pool.run(sizes.world_size, experts, sizes):
        assert torch.equal(weight, expected)


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
