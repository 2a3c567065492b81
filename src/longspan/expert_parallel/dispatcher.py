"""Rows to the ranks of their experts, and one weighted sum back for each: the three ways behind one protocol.

    send      rows x [t, h] with choices [t, k]  ->  rows [n, h] that chose an expert of this rank
    (the experts of this rank compute a weighted sum of each row [n, h])
    combine   [n, h]  ->  [t, h]: the sum over the ranks that a row went to, on the rank it came from

    local         one rank has all experts          nothing travels
    alltoall      a row travels once to each rank that holds an expert it chose     all-to-all, uneven
    allgather     every row travels to every rank   all-gather there, reduce-scatter back

The ranks are those of expert parallelism x expert tensor parallelism. The ranks of an expert tensor parallel group hold
parts of the same experts, so a row goes to all of them, and their partial sums add up on the way back like those of
different experts.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from longspan.mesh import collectives
from longspan.mesh.mesh import ProcessGroupCollection
from longspan.sums import add_rows


class Received(NamedTuple):
    """What this rank computes.

    Attributes:
        rows: [n, h]; scores: [n, k].
        experts: int64 [n, k], numbers among the experts of this rank; any number where ``kept`` is False.
        kept: bool [n, k], the choices that are computed here.
    """

    rows: Tensor
    scores: Tensor
    experts: Tensor
    kept: Tensor


class Dispatcher(Protocol):
    """An exchange is made once for a pass, and used again when the pass is recomputed.

    Attributes:
        sent: rows that left this rank in the last call.
    """

    sent: int

    def exchange(self, indices: Tensor, kept: Tensor) -> Any:
        """Which rows travel where, agreed on by the ranks: indices int64 [t, k] of all experts, kept bool [t, k]."""

    def send(self, x: Tensor, scores: Tensor, indices: Tensor, kept: Tensor, exchange: Any) -> Received: ...

    def combine(self, rows: Tensor, like: Tensor, exchange: Any) -> Tensor:
        """[n, h] -> [t, h], the shape of ``like``."""


class LocalDispatcher:
    """All experts are here."""

    sent = 0

    def exchange(self, indices: Tensor, kept: Tensor) -> None:
        return None

    def send(self, x: Tensor, scores: Tensor, indices: Tensor, kept: Tensor, exchange: Any) -> Received:
        return Received(x, scores, indices, kept)

    def combine(self, rows: Tensor, like: Tensor, exchange: Any) -> Tensor:
        return rows


class _Split:
    """What both exchanges need of the grid of experts: who holds which."""

    def __init__(self, groups: ProcessGroupCollection, num_experts: int, fixed_order: bool):
        self.group, self.sent, self.fixed_order = groups.tp_ep, 0, fixed_order
        self.per_rank = num_experts // dist.get_world_size(groups.ep)
        self.here = dist.get_rank(groups.ep)
        members = dist.get_process_group_ranks(groups.tp_ep)
        own, tensor = dist.get_rank(), dist.get_process_group_ranks(groups.etp)
        place = {
            rank + other - own: index
            for index, rank in enumerate(dist.get_process_group_ranks(groups.ep))
            for other in tensor
        }
        #: for each rank of the group its index among the expert parallel ranks
        self.ep_of = [place[rank] for rank in members]
        self._ep_of: Tensor | None = None

    def received(self, rows: Tensor, scores: Tensor, indices: Tensor, kept: Tensor) -> Received:
        here = kept & (indices // self.per_rank == self.here)
        return Received(rows, scores, indices % self.per_rank, here)


class _Uneven(NamedTuple):
    """Rows that this rank sends, in the order of ranks, and how many go to and come from each."""

    rows: Tensor
    sent: list[int]
    received: list[int]


class AllToAllDispatcher(_Split):
    """A row travels once to each rank that holds an expert it chose, and one sum comes back."""

    def exchange(self, indices: Tensor, kept: Tensor) -> _Uneven:
        ranks = len(self.ep_of)
        owner = torch.where(kept, indices // self.per_rank, -1)
        if self._ep_of is None or self._ep_of.device != indices.device:
            self._ep_of = torch.tensor(self.ep_of, device=indices.device)
        wanted = (owner.unsqueeze(0) == self._ep_of.view(-1, 1, 1)).any(2)  # [ranks, t]
        rows = wanted.nonzero()[:, 1]
        counts = wanted.sum(1)
        theirs = torch.empty_like(counts)
        dist.all_to_all_single(theirs, counts, group=self.group)
        sent, received = torch.stack([counts, theirs]).tolist()
        assert len(sent) == ranks
        return _Uneven(rows, sent, received)

    def send(self, x: Tensor, scores: Tensor, indices: Tensor, kept: Tensor, exchange: _Uneven) -> Received:
        rows, sent, received = exchange

        def moved(part: Tensor) -> Tensor:
            return collectives.all_to_all(part[rows], self.group, received, sent)

        self.sent = sum(sent) - sent[dist.get_rank(self.group)]
        # One message for both: the expert, or -1 where the choice does not count.
        choices = moved(torch.where(kept, indices, -1))
        return self.received(moved(x), moved(scores), choices.clamp(min=0), choices >= 0)

    def combine(self, rows: Tensor, like: Tensor, exchange: _Uneven) -> Tensor:
        back = collectives.all_to_all(rows, self.group, exchange.sent, exchange.received)
        # Ranks come in order, and so do the terms of a row's sum.
        total = back.new_zeros(like.shape)
        add_rows(total, exchange.rows, back, self.fixed_order)
        return total


class AllGatherDispatcher(_Split):
    """Every row travels to every rank: less bookkeeping, for few ranks or many choices."""

    def exchange(self, indices: Tensor, kept: Tensor) -> int:
        """The most rows of a rank; all are padded to them."""
        most = torch.tensor(len(indices), device=indices.device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX, group=self.group)
        return int(most)

    def send(self, x: Tensor, scores: Tensor, indices: Tensor, kept: Tensor, exchange: int) -> Received:
        def gather(part: Tensor) -> Tensor:
            short = exchange - len(part)
            if short:
                part = torch.cat([part, part.new_zeros(short, *part.shape[1:])])
            return collectives.all_gather(part, self.group, 0)

        self.sent = len(x) * (len(self.ep_of) - 1)
        # Padding is 0 while it travels, and -1 afterwards.
        choices = gather(torch.where(kept, indices, -1) + 1) - 1
        return self.received(gather(x), gather(scores), choices.clamp(min=0), choices >= 0)

    def combine(self, rows: Tensor, like: Tensor, exchange: int) -> Tensor:
        return collectives.reduce_scatter(rows, self.group, 0)[: len(like)]


def make_dispatcher(
    kind: str, groups: ProcessGroupCollection, num_experts: int, fixed_order: bool = False
) -> Dispatcher:
    """The dispatcher of a layer.

    Args:
        kind: ``alltoall`` or ``allgather``.
        fixed_order: a row's sum has one order on CUDA too.
    """
    if dist.get_world_size(groups.tp_ep) == 1:
        return LocalDispatcher()
    return (AllToAllDispatcher if kind == "alltoall" else AllGatherDispatcher)(
        groups, num_experts, fixed_order
    )
