"""Megatron's mapping functions: the table in their documentation, forward and backward, for [s, b, h]."""

import pytest
import torch
import torch.distributed as dist

import pool
from longspan import parallel_state, tensor_parallel
from longspan.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
    scatter_to_tensor_model_parallel_region,
)


def random(shape, n, seed):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(n)]


def check_region(move, whole_in, whole_out, forward, backward, **options):
    """move: a mapping; whole_in, whole_out: shapes of one rank's tensors."""
    rank, n = dist.get_rank(), dist.get_world_size()
    xs, grads = random(whole_in, n, 1), random(whole_out, n, 2)
    x = xs[rank].clone().requires_grad_()
    out = move(x, **options)
    (grad,) = torch.autograd.grad(out, x, grads[rank])
    torch.testing.assert_close(out, forward(xs), rtol=0, atol=1e-13)
    torch.testing.assert_close(grad, backward(grads), rtol=0, atol=1e-13)


def check_all(installed):
    rank, n = dist.get_rank(), dist.get_world_size()
    if installed:
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=n)
        group = {}
    else:
        group = {"group": dist.group.WORLD}
    s, b, h = 2 * n, 3, 4 * n
    whole, narrow, short = (s, b, h), (s, b, h // n), (s // n, b, h)

    def own(dim):
        return lambda xs: xs[rank].chunk(n, dim)[rank]

    def joined(dim):
        return lambda xs: torch.cat(xs, dim)

    def summed(xs):
        return sum(xs)

    def same(xs):
        return xs[rank]

    def own_of_sum(xs):
        return sum(xs).chunk(n, 0)[rank]

    for move, before, after, forward, backward in (
        (copy_to_tensor_model_parallel_region, whole, whole, same, summed),
        (reduce_from_tensor_model_parallel_region, whole, whole, summed, same),
        (scatter_to_tensor_model_parallel_region, whole, narrow, own(-1), joined(-1)),
        (gather_from_tensor_model_parallel_region, narrow, whole, joined(-1), own(-1)),
        (scatter_to_sequence_parallel_region, whole, short, own(0), joined(0)),
        (gather_from_sequence_parallel_region, short, whole, joined(0), own_of_sum),
        (reduce_scatter_to_sequence_parallel_region, whole, short, own_of_sum, joined(0)),
    ):
        check_region(move, before, after, forward, backward, **group)
    check_region(
        gather_from_sequence_parallel_region,
        short,
        whole,
        joined(0),
        own(0),
        tensor_parallel_output_grad=False,
        **group,
    )


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("installed", [True, False])
def test_regions(world, installed):
    pool.run(world, check_all, installed)


def all_to_all():
    rank = dist.get_rank()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    group = parallel_state.get_tensor_model_parallel_group()
    x = torch.arange(4.0).view(4, 1).add(10 * rank).requires_grad_()
    out = tensor_parallel.all_to_all(group, x)
    assert out.flatten().tolist() == [2 * rank, 2 * rank + 1, 10 + 2 * rank, 11 + 2 * rank]
    # uneven: rank 0 sends 1 and 3 rows, rank 1 sends 4 and 0
    sends, receives = ([1, 3], [1, 4]) if rank == 0 else ([4, 0], [3, 0])
    out = tensor_parallel.all_to_all(group, x, output_split_sizes=receives, input_split_sizes=sends)
    assert out.flatten().tolist() == ([0, 10, 11, 12, 13] if rank == 0 else [1, 2, 3])
    out.backward(100 * rank + torch.arange(float(len(out))).view(-1, 1))
    assert x.grad.flatten().tolist() == ([0, 100, 101, 102] if rank == 0 else [1, 2, 3, 4])


def test_all_to_all():
    pool.run(2, all_to_all)


def refusals():
    group = dist.group.WORLD
    with pytest.raises(ValueError, match=r"size 5 over 2 ranks.*divide"):
        scatter_to_sequence_parallel_region(torch.ones(5, 1, 4), group)
    with pytest.raises(ValueError, match=r"size 3 over 2 ranks.*divide"):
        scatter_to_tensor_model_parallel_region(torch.ones(4, 1, 3), group)
    with pytest.raises(ValueError, match=r"5 rows over 2 ranks.*divide.*multiple of tp"):
        reduce_scatter_to_sequence_parallel_region(torch.ones(5, 1, 4), group)
    with pytest.raises(RuntimeError, match="initialize_model_parallel"):
        copy_to_tensor_model_parallel_region(torch.ones(2, 2))


def test_refusals():
    pool.run(2, refusals)


def moves_between_tokens_and_features():
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=4)
    rank = dist.get_rank()
    whole = torch.arange(8 * 12, dtype=torch.float64).view(8, 12)
    by_tokens = whole.chunk(4)[rank].clone().requires_grad_()
    by_features = tensor_parallel.all_to_all_sp2hp(by_tokens)
    assert torch.equal(by_features, whole.chunk(4, dim=1)[rank])
    assert torch.equal(tensor_parallel.all_to_all_hp2sp(by_features), by_tokens)
    by_features.backward(2 * whole.chunk(4, dim=1)[rank])
    assert torch.equal(by_tokens.grad, 2 * by_tokens)
    part = whole.chunk(4, dim=1)[rank].clone().requires_grad_()
    gathered = tensor_parallel.all_gather_last_dim_from_tensor_parallel_region(part)
    assert torch.equal(gathered, whole)
    gathered.backward(whole)
    assert torch.equal(part.grad, 4 * part)
    assert torch.equal(tensor_parallel.reduce_scatter_last_dim_to_tensor_parallel_region(whole), 4 * part)


def test_moves_between_tokens_and_features():
    pool.run(4, moves_between_tokens_and_features)
