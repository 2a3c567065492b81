"""Parallel layers against nn.Linear and nn.Embedding: values, every gradient, initial weights. fp64."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard

import pool
from longspan import ModelParallelConfig, parallel_state
from longspan.config.sizes import MeshSizes
from longspan.mesh.mesh import ParallelMesh
from longspan.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    model_parallel_seed,
)

S, B, IN, OUT = 8, 3, 12, 20  # activations [s, b, h]
WORLDS = [1, 2, 4]


def config(**kwargs):
    return ModelParallelConfig(**(dict(params_dtype=torch.float64, init_method_std=0.3) | kwargs))


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def own(x, dim):
    return x.chunk(dist.get_world_size(), dim)[dist.get_rank()]


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


def set_bias(layer):
    """A bias that is not zero, the same at every layout."""
    bias = random(OUT, seed=5)
    local = layer.bias.to_local()
    with torch.no_grad():
        local.copy_(own(bias, 0) if local.shape != bias.shape else bias)


def reference(layer, bias):
    """nn.Linear with the whole weight, its output for x and the gradients of (x, weight, bias) for dout."""
    linear = nn.Linear(IN, OUT, bias=bias, dtype=torch.float64)
    with torch.no_grad():
        linear.weight.copy_(layer.weight.full_tensor())
        if bias:
            linear.bias.copy_(random(OUT, seed=5))
    x = random(S, B, IN, seed=1).requires_grad_()
    y = linear(x)
    y.backward(random(S, B, OUT, seed=2))
    return linear, y.detach(), x.grad


def forward_backward(layer, x, dout, skip_bias_add):
    x = x.clone().requires_grad_()
    y = layer(x)
    if skip_bias_add:
        y, bias = y
        assert (bias is None) == (layer.bias is None)
        y = y if bias is None else y + bias
    y.backward(dout)
    return y.detach(), x.grad


def check_parameters(layer, linear):
    close(layer.weight.grad.full_tensor(), linear.weight.grad)
    if linear.bias is not None:
        close(layer.bias.full_tensor(), linear.bias.detach())
        close(layer.bias.grad.full_tensor(), linear.bias.grad)
        # a copied bias has the same, whole gradient on every rank
        if layer.bias.placements == (Replicate(),):
            close(layer.bias.grad.to_local(), linear.bias.grad)


def column(cases):
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=dist.get_world_size())
    for sequence_parallel, gather_output, skip_bias_add, bias in cases:
        torch.manual_seed(3)
        layer = ColumnParallelLinear(
            IN,
            OUT,
            config(sequence_parallel=sequence_parallel),
            bias=bias,
            gather_output=gather_output,
            skip_bias_add=skip_bias_add,
        )
        assert isinstance(layer.weight, DTensor)
        assert layer.weight.placements == (Shard(0),)
        if bias:
            assert layer.bias.placements == (Shard(0),)
            set_bias(layer)
        linear, want, want_dx = reference(layer, bias)
        x, dout = random(S, B, IN, seed=1), random(S, B, OUT, seed=2)
        if sequence_parallel:
            x, want_dx = own(x, 0), own(want_dx, 0)
        if not gather_output:
            dout, want = own(dout, -1), own(want, -1)
        y, dx = forward_backward(layer, x, dout, skip_bias_add)
        close(y, want)
        close(dx, want_dx)
        check_parameters(layer, linear)


@pytest.mark.parametrize("world", WORLDS)
def test_column_parallel_linear(world):
    cases = [
        (sequence_parallel, gather_output, skip_bias_add, bias)
        for sequence_parallel, gather_output in ((False, False), (False, True), (True, False))
        for skip_bias_add in (False, True)
        for bias in (True, False)
    ]
    pool.run(world, column, cases)


def row(cases):
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=dist.get_world_size())
    for sequence_parallel, input_is_parallel, skip_bias_add, bias in cases:
        torch.manual_seed(3)
        layer = RowParallelLinear(
            IN,
            OUT,
            config(sequence_parallel=sequence_parallel),
            bias=bias,
            input_is_parallel=input_is_parallel,
            skip_bias_add=skip_bias_add,
        )
        assert layer.weight.placements == (Shard(1),)
        if bias:
            assert layer.bias.placements == (Replicate(),)
            set_bias(layer)
        linear, want, want_dx = reference(layer, bias)
        x, dout = random(S, B, IN, seed=1), random(S, B, OUT, seed=2)
        if input_is_parallel:
            x, want_dx = own(x, -1), own(want_dx, -1)
        if sequence_parallel:
            dout, want = own(dout, 0), own(want, 0)
        y, dx = forward_backward(layer, x, dout, skip_bias_add)
        close(y, want)
        close(dx, want_dx)
        check_parameters(layer, linear)


@pytest.mark.parametrize("world", WORLDS)
def test_row_parallel_linear(world):
    cases = [
        (sequence_parallel, input_is_parallel, skip_bias_add, bias)
        for sequence_parallel, input_is_parallel in ((False, True), (False, False), (True, True))
        for skip_bias_add in (False, True)
        for bias in (True, False)
    ]
    pool.run(world, row, cases)


def mlp():
    """Column, gelu, row on one batch of 2-D rows [t, h] too: the pair every transformer layer holds."""
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=dist.get_world_size())
    for shape in ((S, B, IN), (S, IN)):
        for sequence_parallel in (False, True):
            torch.manual_seed(3)
            c = config(sequence_parallel=sequence_parallel)
            up, down = ColumnParallelLinear(IN, OUT, c), RowParallelLinear(OUT, IN, c)
            x = random(*shape, seed=1)
            whole = x.clone().requires_grad_()
            w1, w2 = (m.weight.full_tensor().detach().requires_grad_() for m in (up, down))
            want = F.linear(F.gelu(F.linear(whole, w1)), w2)
            want.backward(random(*shape, seed=2))
            x, dout, dx = (
                own(t, 0) if sequence_parallel else t for t in (x, random(*shape, seed=2), whole.grad)
            )
            x = x.clone().requires_grad_()
            y = down(F.gelu(up(x)))
            y.backward(dout)
            close(y, own(want, 0) if sequence_parallel else want)
            close(x.grad, dx)
            close(up.weight.grad.full_tensor(), w1.grad)
            close(down.weight.grad.full_tensor(), w2.grad)


@pytest.mark.parametrize("world", [2, 4])
def test_a_pair_of_layers(world):
    pool.run(world, mlp)


def returned():
    """The tensor alone; (tensor, bias) only with skip_bias_add."""
    group = dist.group.WORLD  # a bare group, nothing installed
    x = random(S, B, IN)
    for make in (ColumnParallelLinear, RowParallelLinear):
        assert isinstance(make(IN, OUT, config(), tp_group=group)(x), torch.Tensor)
        y, bias = make(IN, OUT, config(), skip_bias_add=True, tp_group=group)(x)
        assert y.shape == (S, B, OUT)
        assert bias.shape == (OUT,)
        y, bias = make(IN, OUT, config(), bias=False, skip_bias_add=True, tp_group=group)(x)
        assert bias is None


def test_what_forward_returns():
    pool.run(1, returned)


def subgroups():
    """tp 2 in a world of 4, the group given in three ways; the other pair computes something else."""
    rank = dist.get_rank()
    bare = [dist.new_group([0, 1]), dist.new_group([2, 3])][rank // 2]
    mesh = ParallelMesh.build(MeshSizes(tp=2, dp_shard=2))
    for group in (bare, mesh.groups.tp, mesh.groups.tp_mesh):
        model_parallel_seed(3, tp_rank=rank % 2)
        layer = RowParallelLinear(IN, OUT, config(), tp_group=group)
        assert layer.weight.to_local().shape == (OUT, IN // 2)
        x = random(S, B, IN, seed=rank // 2)
        y = layer(x.chunk(2, -1)[rank % 2])
        close(y, F.linear(x, layer.weight.full_tensor()))


def test_the_group_is_an_argument():
    pool.run(4, subgroups)


# --- embedding ----------------------------------------------------------------------------

VOCAB, H = 24, 6


def embedding():
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=dist.get_world_size())
    ids = torch.randint(VOCAB, (B, S), generator=torch.Generator().manual_seed(4))  # [b, s]
    ids[0, 0], ids[0, 1] = 0, VOCAB - 1
    for scattered in (False, True):
        torch.manual_seed(3)
        layer = VocabParallelEmbedding(VOCAB, H, config(), reduce_scatter_embeddings=scattered)
        assert layer.weight.placements == (Shard(0),)
        table = layer.weight.full_tensor().detach().requires_grad_()
        want, dout = F.embedding(ids, table), random(B, S, H, seed=2)
        want.backward(dout)
        if scattered:  # [s/tp, b, h]
            want, dout = (own(x.transpose(0, 1), 0) for x in (want, dout))
        out = layer(ids)
        out.backward(dout)
        close(out, want)
        close(layer.weight.grad.full_tensor(), table.grad)
    for wrong in (VOCAB, -1, -100):
        with pytest.raises(IndexError):
            layer(torch.full((B, S), wrong))


@pytest.mark.parametrize("world", WORLDS)
def test_vocab_parallel_embedding(world):
    """An id that no rank holds fails at every tp, instead of becoming a row of zeros."""
    pool.run(world, embedding)


# --- initial weights ----------------------------------------------------------------------


def fan_dependent(weight):
    nn.init.kaiming_uniform_(weight)


def initial(dtype):
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=dist.get_world_size())
    torch.manual_seed(11)
    c = config(params_dtype=dtype, init_method_std=0.02)
    layers = [
        ColumnParallelLinear(IN, OUT, c),
        ColumnParallelLinear(IN, OUT, c, bias=False),
        RowParallelLinear(OUT, IN, c),
        VocabParallelEmbedding(VOCAB, H, c),
        ColumnParallelLinear(IN, OUT, c, init_method=fan_dependent),
        RowParallelLinear(IN, OUT, c, init_method=nn.init.xavier_normal_),
        VocabParallelEmbedding(VOCAB, H, c, init_method=nn.init.ones_),
        ColumnParallelLinear(1000, 1200, c),  # larger than one block
        RowParallelLinear(1000, 1200, c),
    ]
    weights = [layer.weight.full_tensor().detach() for layer in layers]
    for layer in layers:
        assert layer.weight.dtype == (dtype or torch.float32)
        if getattr(layer, "bias", None) is not None:
            assert (layer.bias.full_tensor() == 0).all()
    weights.append(torch.rand(4))  # the generator stands at the same place afterwards
    return [w.numpy(force=True) for w in (x.float() for x in weights)]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_initial_weights_do_not_know_the_layout(dtype):
    one = pool.run(1, initial, dtype)[0]
    for world in (2, 4):
        for results in pool.run(world, initial, dtype):
            for i, (got, want) in enumerate(zip(results, one, strict=True)):
                assert (got == want).all(), f"weight {i} at tp {world}"
    large = one[-2], one[-3]
    assert abs(one[-2].mean()) < 1e-4
    assert all(abs(w.std() / 0.02 - 1) < 0.01 for w in large)
    assert (one[0] == one[1]).mean() < 0.1  # two layers of one shape differ
    assert (one[6] == 1).all()
    assert abs(one[4]).max() <= (6 / IN) ** 0.5 + 1e-2  # kaiming saw the fan-in of the whole


def given_seed(seed):
    torch.manual_seed(seed)
    return ColumnParallelLinear(IN, OUT, config(), tp_group=dist.group.WORLD).weight.full_tensor().tolist()


def test_initial_weights_follow_the_torch_seed():
    first, again, other = (pool.run(2, given_seed, seed)[0] for seed in (1, 1, 2))
    assert first == again
    assert first != other


def not_initialised():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    layer = ColumnParallelLinear(IN, OUT, config(perform_initialization=False), tp_group=dist.group.WORLD)
    assert layer.weight.shape == (OUT, IN)
    assert torch.equal(torch.rand(3), expected)  # nothing was drawn
    with torch.device("meta"):
        layer = ColumnParallelLinear(IN, OUT, config(), tp_group=dist.group.WORLD)
    assert layer.weight.is_meta
    assert layer.weight.to_local().shape == (OUT // 2, IN)


def test_without_initialisation():
    pool.run(2, not_initialised)


# --- refusals -----------------------------------------------------------------------------


def refusals():
    group = dist.group.WORLD
    with pytest.raises(
        ValueError, match=r"ColumnParallelLinear: weight has size 6.*tensor parallel size 4.*multiple"
    ):
        ColumnParallelLinear(8, 6, config(), tp_group=group)
    with pytest.raises(
        ValueError, match=r"RowParallelLinear: weight has size 6.*tensor parallel size 4.*multiple"
    ):
        RowParallelLinear(6, 8, config(), tp_group=group)
    with pytest.raises(ValueError, match=r"VocabParallelEmbedding: weight has size 30.*size 4.*multiple"):
        VocabParallelEmbedding(30, 8, config(), tp_group=group)
    with pytest.raises(ValueError, match=r"gather_output=True with sequence_parallel=True"):
        ColumnParallelLinear(8, 8, config(sequence_parallel=True), gather_output=True, tp_group=group)
    with pytest.raises(ValueError, match=r"sequence_parallel needs input_is_parallel=True"):
        RowParallelLinear(8, 8, config(sequence_parallel=True), input_is_parallel=False, tp_group=group)
    layer = RowParallelLinear(8, 8, config(sequence_parallel=True), tp_group=group)
    with pytest.raises(ValueError, match=r"6 rows over 4 ranks.*pad"):
        layer(random(6, 1, 2))
    layer = RowParallelLinear(8, 8, config(), input_is_parallel=False, tp_group=group)
    with pytest.raises(ValueError, match=r"size 6 over 4 ranks.*divide"):
        layer(random(4, 1, 6))
    with pytest.raises(RuntimeError, match="initialize_model_parallel"):
        ColumnParallelLinear(8, 8, config())


def test_refusals():
    pool.run(4, refusals)
