"""Move heads: an all-to-all turns "some tokens, all heads" into "all tokens, some heads".

With P ranks of a group, s rows a rank, n query heads and m key/value heads:

    to heads    q [s, b, n, d] -> [P s, b, n/P, d]     k, v [s, b, m, d] -> [P s, b, c, d]
    to tokens   out [P s, b, n/P, d] -> [s, b, n, d]

(Jacobs et al. 2023, DeepSpeed Ulysses.) A rank with query heads a .. b needs the key/value
heads that these query heads share. If P divides m, each rank gets m/P key/value heads. Otherwise a
head is sent to every rank that needs it, and its gradients are summed on the rank that owns the
rows. Rows arrive rank after rank and are put in sequence order, so that attention has few, long
tiles at every layout.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from longspan.context_parallel.layout import SequenceLayout, Span
from longspan.context_parallel.tiles import Range, join_ranges


@dataclass(frozen=True)
class HeadMove:
    """The heads that each rank gets, and the order of the gathered rows.

    Attributes:
        q_heads, kv_heads: the heads of each rank of the group.
        order: the ranges that put rows from rank order into sequence order.
        inverse: the ranges that put rows from sequence order into rank order.
    """

    group: dist.ProcessGroup
    q_heads: tuple[tuple[int, ...], ...]
    kv_heads: tuple[tuple[int, ...], ...]
    order: tuple[Range, ...]
    inverse: tuple[Range, ...]

    @classmethod
    def of(
        cls, group: dist.ProcessGroup, layout: SequenceLayout, ranks: tuple[int, ...], n: int, m: int
    ) -> HeadMove:
        """The move inside ``group``, which holds the layout's ``ranks``.

        Raises:
            ValueError: the query heads do not divide by the group's size.
        """

        def make() -> tuple:
            check_heads(n, len(ranks))
            order, inverse = _orders([layout.spans(r) for r in ranks], layout.local_length)
            return *split_heads(n, m, len(ranks)), order, inverse

        return cls(group, *layout.once(("head_move", ranks, n, m), make))


def check_heads(n: int, ranks: int, of: int | None = None) -> None:
    """Raises ValueError if ``ranks`` does not divide ``n`` query heads.

    Args:
        of: number of all context parallel ranks, for the message; None means ``ranks``.
    """
    if n % ranks:
        good = [d for d in range(1, ranks + 1) if n % d == 0 and ranks % d == 0]
        raise ValueError(
            f"cp_comm_type a2a over {ranks} ranks: {n} query heads (after tensor parallelism) do not divide by {ranks}. "
            f"Use p2p or all_gather, or a2a+p2p with hierarchical_context_parallel_sizes [{good[-1]}, {(of or ranks) // good[-1]}]."
        )


def split_heads(n: int, m: int, ranks: int) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """(query heads, key/value heads) of each rank.

    Runs of ``unit`` query heads of a rank share one key/value head. A rank gets one key/value head for
    each run, so its groups have equal sizes, also if a group is split over ranks.
    """
    each, share = n // ranks, n // m
    unit = math.gcd(each, share)
    q_heads = tuple(tuple(range(r * each, (r + 1) * each)) for r in range(ranks))
    kv_heads = tuple(tuple(h // share for h in heads[::unit]) for heads in q_heads)
    return q_heads, kv_heads


def _orders(spans: list[list[Span]], rows: int) -> tuple[tuple[Range, ...], tuple[Range, ...]]:
    """The ranges that sort the ranks' rows by token, and the ranges that undo this."""
    # A piece is (first token, first row, end of the rows), with rows numbered in order of arrival.
    pieces = []
    for number, held in enumerate(spans):
        at = number * rows
        for start, stop in held:
            pieces.append((start, at, at + stop - start))
            at += stop - start
    pieces.sort()
    back, at = [], 0
    for _, start, stop in pieces:
        back.append((start, (at, at + stop - start)))
        at += stop - start
    order = join_ranges((start, stop) for _, start, stop in pieces)
    return order, join_ranges(r for _, r in sorted(back))


def _sort(x: Tensor, ranges: tuple[Range, ...]) -> Tensor:
    return x if len(ranges) == 1 else torch.cat([x[start:stop] for start, stop in ranges])


def _exchange(send: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[P, ..] -> [P, ..]: sent entry i goes to rank i, and received entry i comes from rank i."""
    received = torch.empty_like(send)
    dist.all_to_all_single(received, send, group=group)
    return received


def _to_heads(move: HeadMove, tensors: tuple[Tensor, ...], heads: list) -> list[Tensor]:
    """[s, b, h, d] each -> [P s, b, c, d] each, in one exchange."""
    P, counts = len(heads[0]), [len(h[0]) for h in heads]
    s, b, _, d = tensors[0].shape
    send = tensors[0].new_empty((P, s, b, sum(counts), d))
    for r in range(P):
        for x, of_rank, part in zip(tensors, heads, send[r].split(counts, dim=2)):
            part.copy_(_take_heads(x, of_rank[r]))
    received = _sort(_exchange(send, move.group).flatten(0, 1), move.order)
    return list(received.split(counts, dim=2))


def _to_tokens(move: HeadMove, tensors: list[Tensor], heads: list, sizes: list[int]) -> list[Tensor]:
    """[P s, b, c, d] each -> [s, b, h, d] each, in one exchange; heads from several ranks are summed."""
    P, counts = len(heads[0]), [len(h[0]) for h in heads]
    together = tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim=2)
    rows = _sort(together, move.inverse).contiguous()
    received = _exchange(rows.unflatten(0, (P, -1)), move.group)
    results = []
    for i, (of_ranks, size) in enumerate(zip(heads, sizes)):
        parts = [received[r].split(counts, dim=2)[i] for r in range(P)]
        # Each head comes once, in order.
        if sum(map(len, of_ranks)) == size:
            results.append(torch.cat(parts, dim=2))
            continue
        wide = torch.promote_types(together.dtype, torch.float32)
        total = received.new_zeros((*parts[0].shape[:2], size, parts[0].shape[3]), dtype=wide)
        for part, of_rank in zip(parts, of_ranks):
            for column, head in enumerate(of_rank):
                total[:, :, head] += part[:, :, column]
        results.append(total.to(together.dtype))
    return results


def _take_heads(x: Tensor, heads: tuple[int, ...]) -> Tensor:
    if heads == tuple(range(heads[0], heads[0] + len(heads))):
        return x[:, :, heads[0] : heads[0] + len(heads)]
    return x[:, :, list(heads)]


class _ToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, move: HeadMove):
        ctx.move, ctx.sizes = move, [q.shape[2], k.shape[2], v.shape[2]]
        heads = [move.q_heads, move.kv_heads, move.kv_heads]
        return tuple(_to_heads(move, (q, k, v), heads))

    @staticmethod
    def backward(ctx, *grads):
        move = ctx.move
        heads = [move.q_heads, move.kv_heads, move.kv_heads]
        return *_to_tokens(move, list(grads), heads, ctx.sizes), None


class _ToTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx, out, move: HeadMove):
        ctx.move = move
        return _to_tokens(move, [out], [move.q_heads], [sum(map(len, move.q_heads))])[0]

    @staticmethod
    def backward(ctx, grad):
        return _to_heads(ctx.move, (grad,), [ctx.move.q_heads])[0], None


def to_heads(q: Tensor, k: Tensor, v: Tensor, move: HeadMove) -> tuple[Tensor, Tensor, Tensor]:
    """q [s, b, n, d], k, v [s, b, m, d] -> [P s, b, n/P, d], [P s, b, c, d] twice, rows in sequence order."""
    return _ToHeads.apply(q, k, v, move)


def to_tokens(out: Tensor, move: HeadMove) -> Tensor:
    """[P s, b, n/P, d] -> [s, b, n, d]"""
    return _ToTokens.apply(out, move)


def lse_to_tokens(lse: Tensor, move: HeadMove) -> Tensor:
    """[b, n/P, P s] -> [b, n, s]"""
    rows = lse.permute(2, 0, 1).unsqueeze(-1)
    size = sum(map(len, move.q_heads))
    return _to_tokens(move, [rows], [move.q_heads], [size])[0].squeeze(-1).permute(1, 2, 0)
