"""Every collective, forward and backward, against what one process computes from all ranks' tensors."""

import pytest
import torch
import torch.distributed as dist

import pool
from longspan.mesh import collectives


def tensors(shape, n, seed):
    """The tensors of all ranks; any rank can make them."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(n)]


def parts(x, n, dim):
    return list(x.chunk(n, dim))


def oracle(name, xs, grads, rank, dim):
    """(output, input gradient) of one rank, from the inputs and output gradients of all of them."""
    n = len(xs)
    if name == "reduce":
        return sum(xs), grads[rank]
    if name == "copy":
        return xs[rank], sum(grads)
    if name == "gather":
        return torch.cat(xs, dim), parts(grads[rank], n, dim)[rank]
    if name == "scatter":
        return parts(xs[rank], n, dim)[rank], torch.cat(grads, dim)
    if name == "all_gather":
        return torch.cat(xs, dim), parts(sum(grads), n, dim)[rank]
    return parts(sum(xs), n, dim)[rank], torch.cat(grads, dim)  # reduce_scatter


def check_all():
    group, rank, n = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    for name in ("reduce", "copy", "gather", "scatter", "all_gather", "reduce_scatter"):
        for dim in (0, 1, 2, -1, -3):
            shape = [2 * n, 3 * n, n]
            xs = tensors(shape, n, 1)
            out_shape = (
                list(oracle(name, xs, xs, rank, dim)[0].shape) if name not in ("reduce", "copy") else shape
            )
            grads = tensors(out_shape, n, 2)
            x = xs[rank].clone().requires_grad_()
            args = () if name in ("reduce", "copy") else (dim,)
            out = getattr(collectives, name)(x, group, *args)
            (grad,) = torch.autograd.grad(out, x, grads[rank])
            want, want_grad = oracle(name, xs, grads, rank, dim)
            for what, got, expected in (("output", out, want), ("gradient", grad, want_grad)):
                assert got.shape == expected.shape, (name, dim, what)
                assert torch.allclose(got, expected, rtol=1e-13, atol=1e-13), (name, dim, what)
            assert (x == xs[rank]).all(), f"{name} wrote into its input"


@pytest.mark.parametrize("world", [1, 2, 3])
def test_forward_and_backward(world):
    pool.run(world, check_all)


def strides_and_types():
    group, rank, n = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    x = torch.arange(6.0).view(2, 3).t() + rank  # not contiguous
    both = [torch.arange(6.0).view(2, 3).t() + r for r in range(n)]
    assert torch.equal(collectives.all_gather(x, group, 1), torch.cat(both, 1))
    assert torch.equal(collectives.reduce(x, group), sum(both))
    assert torch.equal(collectives.scatter(x.t(), group, 0), x.t()[rank : rank + 1])
    ids = torch.tensor([[2**40 + rank]])
    assert collectives.all_gather_dim(ids, group, 0).tolist() == [[2**40 + r] for r in range(n)]
    assert collectives.all_reduce_sum(ids, group).item() == sum(2**40 + r for r in range(n))
    assert ids.item() == 2**40 + rank  # a new tensor
    # a sum() hands back expanded (stride 0) gradients
    for name in ("reduce", "copy", "gather", "scatter", "all_gather", "reduce_scatter"):
        x = torch.ones(2, 2, requires_grad=True)
        getattr(collectives, name)(x, group, *(() if name in ("reduce", "copy") else (0,))).sum().backward()
        expected = n if name in ("copy", "all_gather") else 1
        assert (x.grad == expected).all(), name
    wide = torch.ones(4, 2, dtype=torch.bfloat16) * (rank + 1)
    out = collectives.reduce_scatter(wide, group, 0)
    assert out.dtype == torch.bfloat16
    assert (out == 3).all()


def test_strides_types_and_expanded_gradients():
    pool.run(2, strides_and_types)


def subgroups():
    """Two groups of two in a world of four do not hear each other."""
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    rank = dist.get_rank()
    mine = [rank % 2, rank % 2 + 2]
    x = torch.tensor([float(rank)])
    assert collectives.reduce(x, groups[rank % 2]).item() == sum(mine)
    assert collectives.all_gather(x, groups[rank % 2], 0).tolist() == mine


def test_subgroups():
    pool.run(4, subgroups)


# --- all to all ---------------------------------------------------------------------------


def exchange(splits):
    """splits[i][j]: rows rank i sends to rank j; None cuts evenly."""
    group, rank, n = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    if splits is None:
        given, splits = False, [[2] * n] * n
    else:
        given = True
    xs = [tensors((sum(row), 3), 1, 10 + i)[0] for i, row in enumerate(splits)]
    pieces = [x.split(row) for x, row in zip(xs, splits)]
    received = [splits[i][rank] for i in range(n)]
    x = xs[rank].clone().requires_grad_()
    out = collectives.all_to_all(x, group, *((received, splits[rank]) if given else ()))
    assert torch.equal(out, torch.cat([pieces[i][rank] for i in range(n)]))
    grads = [tensors((sum(row[j] for row in splits), 3), 1, 20 + j)[0] for j in range(n)]
    (grad,) = torch.autograd.grad(out, x, grads[rank])
    home = [grads[j].split([row[j] for row in splits])[rank] for j in range(n)]
    assert torch.equal(grad, torch.cat(home))
    back = collectives.all_to_all(out, group, *((splits[rank], received) if given else ()))
    assert torch.equal(back, xs[rank])


@pytest.mark.parametrize(
    "splits",
    [None, [[1, 2], [3, 0]], [[0, 0], [0, 4]], [[0, 5, 1], [2, 0, 0], [1, 1, 7]], [[0, 0, 0]] * 3],
    ids=["even", "uneven", "one_sends", "three_ranks", "nothing"],
)
def test_all_to_all(splits):
    pool.run(2 if splits is None else len(splits), exchange, splits)


def refusals():
    group = dist.group.WORLD
    with pytest.raises(ValueError, match=r"5 output rows over 2 ranks.*divide.*pad"):
        collectives.all_to_all(torch.ones(5, 1), group)
    with pytest.raises(ValueError, match=r"input splits \[1, 2\] sum to 3.*4 rows"):
        collectives.all_to_all(torch.ones(4, 1), group, [2, 2], [1, 2])
    with pytest.raises(ValueError, match=r"output splits \[4\].*2, one a rank"):
        collectives.all_to_all(torch.ones(4, 1), group, [4], [2, 2])
    with pytest.raises(ValueError, match=r"reduce-scatter 3 rows over 2 ranks.*divide.*pad"):
        collectives.reduce_scatter(torch.ones(3, 2), group, 0)
    with pytest.raises(ValueError, match=r"dim 1 of size 5 over 2 ranks.*divide"):
        collectives.scatter(torch.ones(2, 5), group, 1)


def test_sizes_that_do_not_divide_are_refused():
    """Without a check of its own, gloo answers an uneven all_to_all with uninitialised rows."""
    pool.run(2, refusals)


def alone():
    x = torch.ones(3, requires_grad=True)
    group = dist.group.WORLD
    for name in ("reduce", "copy"):
        assert getattr(collectives, name)(x, group) is x
    for name in ("gather", "scatter", "all_gather", "reduce_scatter"):
        assert getattr(collectives, name)(x, group, 0) is x
    assert collectives.all_to_all(x, group) is x


def test_a_group_of_one_costs_nothing():
    pool.run(1, alone)
