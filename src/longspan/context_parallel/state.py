"""Recurrent layers: only the state that a span hands on travels, never its tokens.

A rank holds one span of a contiguous layout. The span is an affine map of the state that comes in,
S_out = M S_in + S_span, and what comes in is what all spans before have made of a state of zero: an exclusive
scan over the ranks (Blelloch 1990), by doubling (Hillis and Steele 1986). The maps do not commute, so they are
composed in order: (M2, S2) after (M1, S1) is (M2 M1, M2 S1 + S2).

    forward    a rank's map [b, n, ..] and state [b, n, ..] -> the rank 2^i further on, in round i;
               in the last round its composed state -> the next rank
    backward   the gradient of a rank's incoming state -> the ranks before, by the transposed maps

A rank sends at most ceil(log2 ranks) + 1 states, whatever the length of the sequence, and none over a border at
which a document begins. A map is sent only where the receiver composes it further.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from longspan.context_parallel.layout import SequenceLayout
from longspan.context_parallel.runs_of_tokens import borders
from longspan.mesh.collectives import join


class Hop(NamedTuple):
    """What a rank does in a round.

    Attributes:
        to, source: the ranks to which it sends and from which it receives; None for none.
        with_map, map_comes: whether the map travels beside the state, to ``to`` and from ``source``.
    """

    to: int | None
    source: int | None
    with_map: bool
    map_comes: bool


def plan_scan(resets: Sequence[bool], borders: Sequence[bool]) -> list[list[Hop]]:
    """The rounds of an exclusive scan, for every rank; integers alone, the same on every rank.

    Args:
        resets: for each rank, whether a document begins in its span, so that nothing passes through it.
        borders: for each rank, whether it needs what comes in: its first token continues a document. False
            for the first rank.

    Returns:
        For each rank its hops, one for each round: the doubling rounds, and the one to the next rank.
    """
    ranks = len(resets)
    distances = [2**i for i in range(math.ceil(math.log2(ranks - 1)))] if ranks > 2 else []
    # The first span that a rank's composed map covers before each round.
    covered = [list(range(ranks))]
    for distance in distances:
        before = covered[-1]
        covered.append(
            [
                before[r - distance] if _goes_on(before, resets, r, distance) else before[r]
                for r in range(ranks)
            ]
        )
    wanted = [r + 1 < ranks and borders[r + 1] for r in range(ranks)]
    plan = [[Hop(r + 1 if wanted[r] else None, r - 1 if r and wanted[r - 1] else None, False, False)] for r in range(ranks)]  # fmt: skip
    for distance, before in zip(reversed(distances), reversed(covered[:-1])):
        receivers = [r for r in range(ranks) if wanted[r] and _goes_on(before, resets, r, distance)]
        source = {r: r - distance for r in receivers}
        target = {r - distance: r for r in receivers}
        # A map matters where the sender's range does not yet reach what cannot be reached through.
        maps = {r: not _complete(before, resets, r) for r in target}
        for r in range(ranks):
            s = source.get(r)
            hop = Hop(target.get(r), s, maps.get(r, False), s is not None and maps[s])
            plan[r].insert(0, hop)
        wanted = [wanted[r] or r in target for r in range(ranks)]
    return plan


def _complete(covered: Sequence[int], resets: Sequence[bool], rank: int) -> bool:
    """Whether nothing before the range that a rank's map covers can pass through it."""
    return covered[rank] == 0 or any(resets[covered[rank] : rank + 1])


def _goes_on(covered: Sequence[int], resets: Sequence[bool], rank: int, distance: int) -> bool:
    """Whether the map of the rank ``distance`` before belongs in front of this rank's."""
    return rank >= distance and not _complete(covered, resets, rank)


class Maps(Protocol):
    """How the maps of a kind of layer act on states: products, never their sums."""

    def apply(self, map_: Tensor, state: Tensor) -> Tensor:
        """M S."""

    def compose(self, later: Tensor, earlier: Tensor) -> Tensor:
        """M2 M1."""

    def transpose(self, map_: Tensor) -> Tensor:
        """The map that gradients take, in the other direction."""

    def gradient(self, later: Tensor, incoming: Tensor) -> Tensor:
        """The gradient of M in M S, from that of the product (``later``) and S (``incoming``)."""


class Decays:
    """Maps that are numbers: Mamba-2's decay [b, n] of a state [b, n, p, d]."""

    def apply(self, map_: Tensor, state: Tensor) -> Tensor:
        return map_[..., None, None] * state

    def compose(self, later: Tensor, earlier: Tensor) -> Tensor:
        return later * earlier

    def transpose(self, map_: Tensor) -> Tensor:
        return map_

    def gradient(self, later: Tensor, incoming: Tensor) -> Tensor:
        return (later * incoming).sum((-1, -2))


class Transitions:
    """Maps that are matrices: the delta rule's transition [b, n, d_k, d_k] of a state [b, n, d_k, d_v]."""

    def apply(self, map_: Tensor, state: Tensor) -> Tensor:
        return map_ @ state

    def compose(self, later: Tensor, earlier: Tensor) -> Tensor:
        return later @ earlier

    def transpose(self, map_: Tensor) -> Tensor:
        return map_.mT

    def gradient(self, later: Tensor, incoming: Tensor) -> Tensor:
        return later @ incoming.mT


class StatesOfRanks:
    """Hands the states of one layer from rank to rank; the ``StateExchange`` of the delta rule.

    An object serves one forward pass and its backward pass.

    Args:
        group: the ranks, in the order of their spans.
        resets, borders: of :func:`plan_scan`.
        maps: how the layer's maps act.
        shape, map_shape: of a state and of a map.
        dtype: of both, at least float32.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        resets: Sequence[bool],
        borders: Sequence[bool],
        maps: Maps,
        shape: Sequence[int],
        map_shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
    ):
        self.shape, self.map_shape = torch.Size(shape), torch.Size(map_shape)
        self.dtype, self.device = dtype, device
        join(group, device)
        self.group, self.maps = group, maps
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        self.first, self.last = self.rank == 0, self.rank == self.ranks - 1
        self._forward = plan_scan(resets, borders)[self.rank]
        # In the other direction a rank needs what comes back over the border behind it.
        back = [*borders[1:], False][::-1]
        self._backward = [
            hop._replace(to=self._mirrored(hop.to), source=self._mirrored(hop.source))
            for hop in plan_scan(resets[::-1], back)[self.ranks - 1 - self.rank]
        ]
        self._map: Tensor | None = None
        #: states that this rank has sent, for those who count
        self.sent = 0

    @classmethod
    def of(
        cls,
        group: dist.ProcessGroup,
        layout: SequenceLayout,
        maps: Maps,
        shape: Sequence[int],
        map_shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> StatesOfRanks:
        """The exchange between the ranks of a contiguous layout.

        Raises:
            ValueError: as :func:`runs_of`.
        """
        return cls(group, *borders(layout), maps, shape, map_shape, dtype, device)

    def _mirrored(self, rank: int | None) -> int | None:
        return None if rank is None else self.ranks - 1 - rank

    def incoming(self, state: Tensor | None, transition: Tensor | None) -> Tensor:
        """The state that comes into this rank's span, [b, n, ..]; zero where none does.

        Args:
            state: what the span makes of a state of zero.
            transition: its map; may be None on the first and the last rank.
        """
        self._map = transition
        return self._scan(self._forward, state, transition)

    def outgoing(self, gradient: Tensor | None) -> Tensor:
        """The gradient of the state that this rank hands on, as later spans cause it.

        Args:
            gradient: of this rank's incoming state, as its own outputs cause it.
        """
        map_ = None if self._map is None else self.maps.transpose(self._map)
        return self._scan(self._backward, gradient, map_)

    def _scan(self, hops: list[Hop], state: Tensor | None, map_: Tensor | None) -> Tensor:
        for hop in hops[:-1]:
            earlier, earlier_map = self._exchange(hop, state, map_)
            if earlier is not None:
                # The plan lets a rank receive only where it has both.
                assert state is not None
                assert map_ is not None
                state = self.maps.apply(map_, earlier) + state
                map_ = None if earlier_map is None else self.maps.compose(map_, earlier_map)
        found, _ = self._exchange(hops[-1], state, None)
        return torch.zeros(self.shape, dtype=self.dtype, device=self.device) if found is None else found

    def _exchange(
        self, hop: Hop, state: Tensor | None, map_: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Sends and receives [state, map] as one flat message. Returns (state, map), None for what does not come."""
        ops, buffer, size = [], None, self.shape.numel()
        if hop.to is not None:
            assert state is not None
            parts = [state, map_] if hop.with_map and map_ is not None else [state]
            message = torch.cat([part.reshape(-1).to(self.dtype) for part in parts])
            ops.append(dist.P2POp(dist.isend, message, group=self.group, group_peer=hop.to))
            self.sent += 1
        if hop.source is not None:
            length = size + self.map_shape.numel() * hop.map_comes
            buffer = torch.empty(length, dtype=self.dtype, device=self.device)
            ops.append(dist.P2POp(dist.irecv, buffer, group=self.group, group_peer=hop.source))
        for work in dist.batch_isend_irecv(ops) if ops else []:
            work.wait()
        if buffer is None:
            return None, None
        map_came = buffer[size:].view(self.map_shape) if hop.map_comes else None
        return buffer[:size].view(self.shape), map_came


class HandOn(torch.autograd.Function):
    """The incoming state of a span whose halves are differentiated by autograd, as Mamba-2's are.

    ``HandOn.apply(state, map, exchange) -> incoming``, where exchange is a :class:`StatesOfRanks`. All ranks have to
    reach backward.
    """

    @staticmethod
    def forward(ctx, state, map_, exchange):
        incoming = exchange.incoming(state, map_)
        ctx.exchange = exchange
        ctx.save_for_backward(incoming)
        return incoming

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        (incoming,) = ctx.saved_tensors
        later = ctx.exchange.outgoing(gradient)
        return later, ctx.exchange.maps.gradient(later, incoming), None


def scan_over_ranks(own: tuple[Tensor, Tensor], group: dist.ProcessGroup, layout: SequenceLayout) -> Tensor:
    """The state that comes into this rank's run of tokens, composed of what the runs before hand on.

    Args:
        own: what this rank's run makes of a state: (state [b, n, ..] that it makes of a zero state, its map). The map
            is a decay [b, n], or a matrix [b, n, d, d] that is multiplied from the left. Both in at least float32.
            Where a document begins inside the run, the map is zero.
        layout: contiguous; its documents decide between which ranks a state travels.

    Returns:
        [b, n, ..], zero where the rank's first token begins a document. Gradients flow to both parts of ``own``, and
        all ranks have to reach backward.

    Raises:
        ValueError: a rank holds more than one run of the layout's tokens.
    """
    state, map_ = own
    maps = Decays() if map_.dim() == 2 else Transitions()
    exchange = StatesOfRanks.of(group, layout, maps, state.shape, map_.shape, state.dtype, state.device)
    return HandOn.apply(state, map_, exchange)
