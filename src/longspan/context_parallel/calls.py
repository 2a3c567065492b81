"""Calls: the part of a step that one kernel call computes, either one tile, or many tiles as sequences.

A ``TileCall`` is one tile. A ``VarlenCall`` is all tiles of a step with the same mask, for kernels
that take sequences of different lengths in one call (``kernel.varlen``). A run of queries and
all keys that it attends to are one sequence, whose rows are gathered one after another. A causal tile
and the full tiles of the same queries also make one sequence, with the causal keys last (bottom-right
aligned). Tiles whose keys would be copied many times stay ``TileCall``s.

Both kinds hold the rows that they read and write, so the loops over calls (``move_keys``) are the same.
"""

from __future__ import annotations

import bisect
import itertools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from longspan.context_parallel.kernels.protocol import Kernel
from longspan.context_parallel.schedule import Step
from longspan.context_parallel.tiles import Mask, Range, Tile

Rows = slice | Tensor

#: The most key rows that a call may gather, as a multiple of the rows that it reads or of its queries,
#: whichever are more. With more key rows, its tiles stay single calls.
MOST_COPIES = 4


@dataclass(frozen=True)
class TileCall:
    """One tile; an ANTI tile is computed as a causal tile, with its rows in reverse order.

    Attributes:
        q, k: rows of the local q, and of the step's k and v.
        first: whether no earlier call has computed these query rows.
    """

    q: slice
    k: slice
    mask: Mask
    first: bool

    def _turn(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.flip(0) for x in tensors) if self.mask is Mask.ANTI else tensors

    def forward(self, kernel: Kernel, q, k, v, scale):
        """The whole local q and the step's k, v -> (out, lse) of this call's rows."""
        q, k, v = self._turn(q[self.q], k[self.k], v[self.k])
        out, lse = kernel.forward(q, k, v, self.mask is not Mask.FULL, scale)
        return (out.flip(0), lse.flip(-1)) if self.mask is Mask.ANTI else (out, lse)

    def backward(self, kernel: Kernel, dout, q, k, v, out, lse, scale):
        """Like :meth:`forward`, with the whole dout, out and lse -> (dq, dk, dv) of this call's rows."""
        dout, q, k, v, out = self._turn(dout[self.q], q[self.q], k[self.k], v[self.k], out[self.q])
        lse = lse[:, :, self.q]
        if self.mask is Mask.ANTI:
            lse = lse.flip(-1)
        return self._turn(*kernel.backward(dout, q, k, v, out, lse, self.mask is not Mask.FULL, scale))


@dataclass(frozen=True)
class VarlenCall:
    """Many sequences in one call.

    Attributes:
        q, k: rows of the local q, and of the step's k and v, sequence after sequence.
        cu_q, cu_k: boundaries of the sequences in these rows, int32 [sequences + 1].
        max_q, max_k: rows of the longest sequence.
        mask, first: as for :class:`TileCall`, the same for all sequences.
    """

    q: Rows
    k: Rows
    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int
    mask: Mask
    first: bool

    # The call is cached: all layers use it, and copying the boundaries to a GPU would wait for the GPU.
    @classmethod
    @lru_cache(maxsize=64)
    def single(cls, q_rows: int, k_rows: int, mask: Mask, device: torch.device) -> VarlenCall:
        """A call with one sequence of all rows."""
        cu_q, cu_k = (torch.tensor([0, n], dtype=torch.int32, device=device) for n in (q_rows, k_rows))
        return cls(slice(0, q_rows), slice(0, k_rows), cu_q, cu_k, q_rows, k_rows, mask, True)

    def forward(self, kernel, q, k, v, scale):
        """Like :meth:`TileCall.forward`; the batch dim is flattened into the heads."""
        b, n = q.shape[1:3]
        flat = (x.flatten(1, 2) for x in (q[self.q], k[self.k], v[self.k]))
        out, lse = kernel.forward_varlen(*flat, self, scale)
        return out.unflatten(1, (b, n)), lse.unflatten(0, (b, n))

    def backward(self, kernel, dout, q, k, v, out, lse, scale):
        """Like :meth:`TileCall.backward`; the batch dim is flattened into the heads."""
        rows = (dout[self.q], q[self.q], k[self.k], v[self.k], out[self.q])
        flat = (x.flatten(1, 2) for x in rows)
        grads = kernel.backward_varlen(*flat, lse[:, :, self.q].flatten(0, 1), self, scale)
        return tuple(g.unflatten(1, x.shape[1:3]) for g, x in zip(grads, (q, k, v)))


def calls_of(step: Step, kernel: Kernel, device: torch.device) -> Sequence[TileCall | VarlenCall]:
    """The calls of a step, made once; calls that are the first to compute their rows come first."""

    def make() -> list[TileCall | VarlenCall]:
        return _joined(step.tiles, device) if kernel.varlen else [_single(t) for t in step.tiles]

    return step.once((kernel.varlen, device), make)


def _single(tile: Tile) -> TileCall:
    return TileCall(slice(*tile.q), slice(*tile.k), tile.mask, tile.first)


def _joined(tiles: Sequence[Tile], device: torch.device) -> list[TileCall | VarlenCall]:
    sequences: dict[Range, list[Tile]] = defaultdict(list)
    calls_of_kind: dict[tuple[bool, Mask, int], list[tuple[Range, list[Range]]]] = defaultdict(list)
    for tile in tiles:
        if tile.mask is Mask.ANTI:
            _add(calls_of_kind, (False, Mask.ANTI), tile.q, [tile.k])
        else:
            sequences[tile.q].append(tile)
    for q, same in sorted(sequences.items()):
        causal = [t for t in same if t.mask is Mask.CAUSAL]
        full = [t.k for t in same if t.mask is Mask.FULL]
        mask = Mask.CAUSAL if causal else Mask.FULL
        _add(calls_of_kind, (any(t.first for t in same), mask), q, full + [t.k for t in causal])
    calls: list[TileCall | VarlenCall] = []
    for (first, mask, _), held in sorted(calls_of_kind.items(), key=lambda item: not item[0][0]):
        keys = [k for _, ranges in held for k in ranges]
        read = max(stop for _, stop in keys) - min(start for start, _ in keys)
        queries = sum(stop - start for (start, stop), _ in held)
        if sum(stop - start for start, stop in keys) <= MOST_COPIES * max(read, queries):
            calls.append(_varlen_call(held, mask, first, device))
        else:
            in_call = {(q, k) for q, ranges in held for k in ranges}
            calls += [_single(tile) for tile in tiles if (tile.q, tile.k) in in_call]
    return calls


def _add(calls_of_kind: dict, kind: tuple[bool, Mask], q: Range, keys: list[Range]) -> None:
    """Adds a sequence to the first call of its kind that does not have its query rows yet.

    The sequences of a call stay sorted by their query rows.
    """
    for number in itertools.count():
        held = calls_of_kind[*kind, number]
        at = bisect.bisect_left(held, q, key=lambda sequence: sequence[0])
        before, after = held[at - 1 : at], held[at : at + 1]
        if all(other[1] <= q[0] for other, _ in before) and all(q[1] <= other[0] for other, _ in after):
            held.insert(at, (q, keys))
            return


def _varlen_call(
    held: list[tuple[Range, list[Range]]], mask: Mask, first: bool, device: torch.device
) -> VarlenCall:
    q_lengths = [stop - start for (start, stop), _ in held]
    k_lengths = [sum(stop - start for start, stop in ranges) for _, ranges in held]
    return VarlenCall(
        _rows([q for q, _ in held], device),
        _rows([k for _, ranges in held for k in ranges], device),
        _cumulative(q_lengths, device),
        _cumulative(k_lengths, device),
        max(q_lengths),
        max(k_lengths),
        mask,
        first,
    )


def _rows(ranges: list[Range], device: torch.device) -> Rows:
    """A slice if the ranges are adjacent in order, otherwise the row numbers, int64 [rows]."""
    if all(a[1] == b[0] for a, b in zip(ranges, ranges[1:])):
        return slice(ranges[0][0], ranges[-1][1])
    return torch.cat([torch.arange(*r) for r in ranges]).to(device)


def _cumulative(lengths: list[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)
