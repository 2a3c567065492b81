"""The contract of a layer, and the rows that travel beside the activations."""

import dataclasses

import pytest
import torch
import torch.distributed as dist
from torch import nn

import pool
from longspan import TransformerConfig, parallel_state
from longspan.config.sizes import MeshSizes
from longspan.context_parallel import PackedSeqParams, SequenceLayout
from longspan.mesh.mesh import ParallelMesh
from longspan.models import GPTModel, TransformerBlock, TransformerLayer
from longspan.models.decoder import DecoderLayer
from longspan.models.layer import Layer, Rows, make_rows
from longspan.parallelize import parallelize

H, VOCAB = 16, 100


def config(tp=1, **more):
    return TransformerConfig(
        **dict(
            num_layers=2,
            hidden_size=H,
            num_attention_heads=4,
            ffn_hidden_size=24,
            tensor_model_parallel_size=tp,
            params_dtype=torch.float64,
        )
        | more
    )


def real_rows(sizes, rows):
    """Which rows of a pack of 11 tokens each rank takes for tokens, and their token numbers."""
    mesh = ParallelMesh.build(sizes)
    sequence_parallel = sizes.tp > 1
    layout = SequenceLayout.zigzag(11, sizes.cp, multiple_of=sizes.tp, rows=rows)
    rank, part = dist.get_rank(mesh.groups.cp), dist.get_rank(mesh.groups.tp)
    hidden = torch.zeros(rows // sizes.tp, 1, H)
    found = make_rows(
        config(sizes.tp, sequence_parallel=sequence_parallel), mesh.groups, hidden, layout=layout
    )
    assert (found.rank, found.layout) == (rank, layout)
    assert found.rotary[0].shape[0] == rows  # attention sees the rows of all tensor parallel ranks
    again = make_rows(
        config(sizes.tp, sequence_parallel=sequence_parallel), mesh.groups, hidden, layout=layout
    )
    assert again.real is found.real
    expected = (layout.positions(rank) < 11).chunk(sizes.tp)[part]
    if expected.all():
        assert found.real is None
        return len(expected)
    assert torch.equal(found.real, expected)
    return int(found.real.sum())


@pytest.mark.parametrize(
    ("sizes", "rows"),
    [
        (MeshSizes(), 11),
        (MeshSizes(), 14),
        (MeshSizes(cp=2), 8),
        (MeshSizes(tp=2), 14),
        (MeshSizes(tp=2, cp=2), 8),
    ],
    ids=str,
)
def test_rows_tell_tokens_from_padding(sizes, rows):
    """Cut like the activations: with sequence parallelism each rank has its own rows' part. Every token once."""
    assert sum(pool.run(sizes.world_size, real_rows, sizes, rows)) == 11


class Recorder(nn.Module):
    """Stands for an MLP: it keeps the rows it is given."""

    def forward(self, x, rows, memory=None):
        self.rows = rows
        return torch.zeros_like(x)


class Double(Layer):
    """Any other layer in a stack."""

    def __init__(self, number):
        super().__init__(number)
        self.weight = nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
        self.planned = []

    def plan(self, layout):
        self.planned.append(layout)

    def compute(self, x, rows, run, memory):
        return run(lambda y: y * self.weight, x)


def stacks():
    parallel_state.initialize_model_parallel()
    x = torch.randn(6, 1, H, dtype=torch.float64)
    layout = SequenceLayout.contiguous(5, 1, rows=6)
    block = TransformerBlock(config(), seed=1)
    assert list(block.layers) == ["0", "1"]
    assert [layer.number for layer in block.layers.values()] == [1, 2]
    assert all(name.startswith("layers.") for name, _ in block.layers.named_parameters("layers"))

    # the mask reaches the MLP, whatever is recomputed
    for recompute in ("none", "selective", "full"):
        block.layers["1"].mlp = Recorder()
        block.layers["1"].recompute = recompute
        out, _ = block(x, layout=layout)
        out.sum().backward()
        assert block.layers["1"].mlp.rows.real.tolist() == [True] * 5 + [False]

    # any layer serves, as the first one too
    block.layers = nn.ModuleDict({"0": Double(1), "1": Double(2)})
    block.layers["0"].recompute, block.layers["1"].recompute = "full", "selective"
    assert torch.equal(block(x, layout=layout)[0], block.final_layernorm(4 * x))

    # a stack may be empty
    model = GPTModel(config(), VOCAB, 8, seed=1)
    model.decoder.layers = nn.ModuleDict()
    tokens = torch.arange(8).view(1, 8)
    assert model(tokens, labels=tokens).shape == (1, 8)
    packed = PackedSeqParams("thd", torch.tensor([0, 3, 8]), torch.tensor([0, 3, 8]))
    assert model(tokens, labels=tokens, packed_seq_params=packed).shape == (1, 8)


def test_a_stack_takes_any_layers_and_none():
    pool.run(1, stacks)


def parallelized():
    mesh = ParallelMesh.build(MeshSizes(cp=2))
    with torch.device("meta"):
        model = GPTModel(config(), VOCAB, 8, pg_collection=mesh.groups)
    model.decoder.layers = nn.ModuleDict({"0": Double(1)})
    parallelize(model, mesh, seed=1, device=torch.device("cpu"), recompute="selective", mlp_tiles=3)
    (layer,) = model.decoder.layers.values()
    assert (layer.recompute, layer.tiles, layer.offload) == ("selective", 3, None)
    tokens = torch.arange(4).view(1, 4)
    assert model(tokens, labels=tokens).shape == (1, 4)


def test_parallelize_uses_the_contract_only():
    pool.run(2, parallelized)


def public_layer():
    """A TransformerLayer is a decoder's layer that makes its own rows."""
    parallel_state.initialize_model_parallel()
    groups = parallel_state.get_process_groups()
    public, inner = TransformerLayer(config(), 2, seed=3), DecoderLayer(config(), 2, groups, seed=3)
    x = torch.randn(8, 1, H, dtype=torch.float64)
    for layout in (None, SequenceLayout.contiguous(8, 1, cu_seqlens=[0, 3, 8])):
        out, context = public(x, layout=layout)
        assert context is None
        assert torch.equal(out, inner(x, make_rows(config(), groups, x, layout=layout)))
    public.tiles = 3
    assert public.mlp.tiles == 3
    layout = SequenceLayout.zigzag(8, 1)
    public.plan(layout)
    assert layout._made.values
    with pytest.raises(ValueError, match="attention_mask is not supported"):
        public(x, torch.ones(8, 8))


def test_the_public_layer():
    pool.run(1, public_layer)


def test_fsdp_does_not_walk_through_rows():
    """It does so with dataclasses at each layer: 8 ms each time for the layout of a pack of 512 documents."""
    assert not dataclasses.is_dataclass(Rows)
