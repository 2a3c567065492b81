"""Collectives with autograd. The group is always an argument.

Each line shows a forward and its transpose in backward, where n is the size of the group:

    reduce          [.., x, ..] partial -> [.., x, ..] sum          backward: identity
    copy            [.., x, ..]         -> [.., x, ..]              backward: sum
    gather(dim)     [.., x, ..]         -> [.., n x, ..]            backward: own part
    scatter(dim)    [.., n x, ..]       -> [.., x, ..]              backward: gather
    all_gather(dim) [.., x, ..]         -> [.., n x, ..]            backward: reduce_scatter
    reduce_scatter  [.., n x, ..]       -> [.., x, ..] sum          backward: all_gather
    all_to_all      rows to every rank                              backward: rows back

``gather`` and ``all_gather`` have the same result and differ in its use. After ``gather`` every
rank computes the same from the result, so each rank's gradient is already complete. After
``all_gather`` each rank uses the rows differently, so gradients are summed over the ranks.

In a group of one rank, every function returns its input.
"""

from __future__ import annotations

import weakref

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 renamed these two functions; torch 2.11 has the old names only.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def all_gather_dim(x: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
    """[.., x, ..] -> [.., n x, ..] along ``dim``, ranks in order. No autograd."""
    n = dist.get_world_size(group)
    if n == 1:
        return x
    x = x.movedim(dim, 0).contiguous()
    out = x.new_empty((n * x.shape[0], *x.shape[1:]))
    _all_gather(out, x, group=group)
    return out.movedim(0, dim)


def reduce_scatter_dim(x: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
    """[.., n x, ..] -> [.., x, ..]: the sum over ranks of this rank's part. No autograd.

    Raises:
        ValueError: the number of ranks does not divide the size along ``dim``.
    """
    n = dist.get_world_size(group)
    if n == 1:
        return x
    x = x.movedim(dim, 0).contiguous()
    if x.shape[0] % n:
        raise ValueError(
            f"cannot reduce-scatter {x.shape[0]} rows over {n} ranks: they must divide. "
            "With sequence parallelism, pad the local sequence to a multiple of tp."
        )
    out = x.new_empty((x.shape[0] // n, *x.shape[1:]))
    _reduce_scatter(out, x, group=group)
    return out.movedim(0, dim)


def all_reduce_sum(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum over the ranks, in a new tensor. No autograd."""
    if dist.get_world_size(group) == 1:
        return x
    x = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, group=group)
    return x


def own_part(x: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
    """[.., n x, ..] -> [.., x, ..]: this rank's slice along ``dim``. No communication.

    Raises:
        ValueError: the number of ranks does not divide the size along ``dim``.
    """
    n = dist.get_world_size(group)
    if n == 1:
        return x
    if x.shape[dim] % n:
        raise ValueError(
            f"cannot split dim {dim} of size {x.shape[dim]} over {n} ranks: it must divide. "
            "Pad it to a multiple, or choose a size that divides it."
        )
    return x.chunk(n, dim)[dist.get_rank(group)].contiguous()


_joined: weakref.WeakSet[dist.ProcessGroup] = weakref.WeakSet()


def join(group: dist.ProcessGroup | None, device: torch.device) -> None:
    """Makes NCCL's communicator of a group, before the first messages between single ranks.

    NCCL makes a communicator at its first use, in which all ranks must take part. In an exchange, however,
    only ranks that send or receive rows take part. Later calls do nothing.
    """
    if (
        group is not None
        and device.type == "cuda"
        and group not in _joined
        and dist.get_world_size(group) > 1
    ):
        dist.all_reduce(torch.zeros(1, device=device), group=group)
        _joined.add(group)


class _Move(torch.autograd.Function):
    """``there`` in forward, its transpose ``back`` in backward; both take (tensor, group, dim)."""

    @staticmethod
    def forward(ctx, x, group, dim, there, back):
        ctx.group, ctx.dim, ctx.back = group, dim, back
        return there(x, group, dim)

    @staticmethod
    def backward(ctx, grad):
        return ctx.back(grad, ctx.group, ctx.dim), None, None, None, None


def _sum(x: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
    return all_reduce_sum(x, group)


def _as_it_is(x: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
    return x.view_as(x)


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group, output_splits, input_splits):
        ctx.group, ctx.splits = group, (output_splits, input_splits)
        return _exchange_rows(x, group, output_splits, input_splits)

    @staticmethod
    def backward(ctx, grad):
        output_splits, input_splits = ctx.splits
        return _exchange_rows(grad, ctx.group, input_splits, output_splits), None, None, None


def _exchange_rows(x, group, output_splits, input_splits):
    rows = x.shape[0] if output_splits is None else sum(output_splits)
    n = dist.get_world_size(group)
    for name, splits, count in (("output", output_splits, rows), ("input", input_splits, x.shape[0])):
        # Without this check, gloo would return uninitialised rows.
        if splits is None and count % n:
            raise ValueError(
                f"all_to_all: {count} {name} rows over {n} ranks without {name} splits: they must divide. "
                "Give the splits, or pad the rows to a multiple."
            )
        if splits is not None and (len(splits) != n or sum(splits) != count):
            raise ValueError(
                f"all_to_all: {name} splits {list(splits)} sum to {sum(splits)}; they must be {n}, one a rank, "
                f"and sum to the {count} rows given."
            )
    out = x.new_empty((rows, *x.shape[1:]))
    dist.all_to_all_single(out, x.contiguous(), output_splits, input_splits, group=group)
    return out


def _alone(group: dist.ProcessGroup) -> bool:
    return dist.get_world_size(group) == 1


def reduce(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Partial sums -> their sum on every rank; backward leaves the gradient unchanged."""
    return x if _alone(group) else _Move.apply(x, group, 0, _sum, _as_it_is)


def copy(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The same tensor on every rank; backward sums the ranks' partial gradients."""
    return x if _alone(group) else _Move.apply(x, group, 0, _as_it_is, _sum)


def gather(x: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
    """[.., x, ..] -> [.., n x, ..] if all ranks compute the same from it; backward takes this rank's part."""
    return x if _alone(group) else _Move.apply(x, group, dim, all_gather_dim, own_part)


def scatter(x: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
    """[.., n x, ..], the same on every rank -> this rank's [.., x, ..]; backward gathers."""
    return x if _alone(group) else _Move.apply(x, group, dim, own_part, all_gather_dim)


def all_gather(x: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
    """[.., x, ..] -> [.., n x, ..] if the ranks use it differently; backward sums and splits."""
    return x if _alone(group) else _Move.apply(x, group, dim, all_gather_dim, reduce_scatter_dim)


def reduce_scatter(x: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
    """[.., n x, ..] partial -> [.., x, ..] summed; backward gathers."""
    return x if _alone(group) else _Move.apply(x, group, dim, reduce_scatter_dim, all_gather_dim)


def all_to_all(
    x: Tensor,
    group: dist.ProcessGroup,
    output_splits: list[int] | None = None,
    input_splits: list[int] | None = None,
) -> Tensor:
    """Sends ``input_splits[i]`` rows (dim 0) to each rank i and receives ``output_splits[i]`` rows from it.

    Without splits the rows are cut evenly. Backward sends the gradients back.

    Raises:
        ValueError: the splits do not fit the rows, or the number of ranks does not divide the rows.
    """
    return x if _alone(group) else _AllToAll.apply(x, group, output_splits, input_splits)
