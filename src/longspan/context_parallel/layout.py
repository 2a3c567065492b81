"""SequenceLayout: which tokens of a sequence (or of a pack of documents) each rank holds.

A *span* is a contiguous run of tokens that one rank holds. A layout is an ordered list of
spans for each rank, with the same number of tokens on each rank. It consists of integers only,
and every rank computes the same layout without communication.

    contiguous   P = 2   rank 0: 0 1 2 3        rank 1: 4 5 6 7
    zigzag       P = 2   rank 0: 0 1 . . 6 7    rank 1: 2 3 4 5      (2P chunks: r and 2P-1-r)
    per-document zigzag  zigzag of every document by itself, as Megatron's packed code assumes
    balanced             chunks of a pack on ranks such that work is even and few rows are sent

Tokens are numbered 0 .. total-1; numbers from ``total`` up to ``padded_total`` stand for
padding, which belongs to no document, attends to nothing and is attended by nothing.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from longspan.context_parallel.balance import TOLERANCE, balanced_chunks
from longspan.context_parallel.needed import rows_matrix
from longspan.context_parallel.once import Once, Store
from longspan.mesh import collectives

Span = tuple[int, int]

#: The names of the layouts that a method makes.
LAYOUTS = ("contiguous", "zigzag", "per_document_zigzag", "balanced")


class Segment(NamedTuple):
    """A run of tokens of one document in consecutive local rows."""

    document: int
    #: The global token numbers are start .. stop - 1.
    start: int
    stop: int
    #: The local row of ``start``.
    row: int


@dataclass(frozen=True)
class SequenceLayout(Once):
    """The spans of every rank: ``contiguous``, ``zigzag``, ``per_document_zigzag`` and ``balanced`` make one.

    Attributes:
        ranks: number of ranks P.
        total: number of tokens without padding.
        padded_total: number of tokens with padding: P x the rows of a rank.
        cu_seqlens: document boundaries [d + 1], from 0 to total.
        all_spans: the spans of each rank, in local order.
        name: the name of the layout, for messages.
    """

    ranks: int
    total: int
    padded_total: int
    cu_seqlens: tuple[int, ...]
    all_spans: tuple[tuple[Span, ...], ...]
    name: str = "custom"
    _made: Store = field(default_factory=Store, compare=False, repr=False)

    # --- makers ---------------------------------------------------------------------------

    @classmethod
    def contiguous(
        cls, total: int, ranks: int, *, cu_seqlens=None, multiple_of: int = 1, rows: int | None = None
    ) -> SequenceLayout:
        """Rank r holds the r-th of P equal runs.

        Args:
            total: number of tokens; any number from 1.
            cu_seqlens: document boundaries [d + 1]; None means one document.
            multiple_of: every rank's rows are padded to a multiple of this number (sequence
                parallelism needs a multiple of tp).
            rows: every rank is padded to this number of rows, so that all layouts of a run have
                equally many (a pipeline needs this); None pads no more than necessary.

        Raises:
            ValueError: ``rows`` is too small or no multiple of ``multiple_of``, or ``total``, ``ranks`` or
                ``cu_seqlens`` is wrong.
        """
        _check_sizes(total, ranks)
        run = _round_up(-(-total // ranks), multiple_of)
        spans = [[(r * run, (r + 1) * run)] for r in range(ranks)]
        return cls._make("contiguous", total, ranks, cu_seqlens, spans)._padded(rows, multiple_of)

    @classmethod
    def zigzag(
        cls, total: int, ranks: int, *, cu_seqlens=None, multiple_of: int = 1, rows: int | None = None
    ) -> SequenceLayout:
        """Of 2P equal chunks, rank r holds the r-th and the r-th from the end, so causal work is equal.

        Arguments and errors are those of :meth:`contiguous`. (Megatron-LM; Zhu 2024, zigzag ring attention.)
        """
        _check_sizes(total, ranks)
        if ranks == 1:
            spans = [[(0, _round_up(total, multiple_of))]]
            return cls._make("zigzag", total, 1, cu_seqlens, spans)._padded(rows, multiple_of)
        chunk = -(-total // (2 * ranks))
        while 2 * chunk % multiple_of:
            chunk += 1
        spans = [_zigzag_chunks(r, ranks, chunk) for r in range(ranks)]
        return cls._make("zigzag", total, ranks, cu_seqlens, spans)._padded(rows, multiple_of)

    @classmethod
    def per_document_zigzag(
        cls,
        cu_seqlens,
        ranks: int,
        *,
        cu_seqlens_padded=None,
        multiple_of: int = 1,
        rows: int | None = None,
    ) -> SequenceLayout:
        """Zigzag of each document by itself, padded to a multiple of 2P, as Megatron's ``thd`` code assumes.

        Args:
            cu_seqlens: document boundaries [d + 1].
            cu_seqlens_padded: boundaries [d + 1] with the padding that the caller put after each document;
                2P must divide every padded length. None pads each document no more than necessary.
            multiple_of, rows: as for :meth:`contiguous`.

        Raises:
            ValueError: as for :meth:`contiguous`, or ``cu_seqlens_padded`` does not fit.
        """
        # Empty documents stay here, because they may have padding.
        edges = _checked(cu_seqlens, None)
        total = edges[-1]
        _check_sizes(total, ranks)
        bounds, lengths = edges[:-1], [stop - start for start, stop in zip(edges, edges[1:])]
        if cu_seqlens_padded is None:
            padded = [_round_up(n, 2 * ranks) for n in lengths] if ranks > 1 else lengths
        else:
            padded_edges = _checked(cu_seqlens_padded, None)
            padded = [stop - start for start, stop in zip(padded_edges, padded_edges[1:])]
            if len(padded) != len(lengths) or any(p < n for p, n in zip(padded, lengths)):
                raise ValueError(
                    "cu_seqlens_padded must hold the same documents, none shorter than in cu_seqlens."
                )
            for n in padded:
                if n % (2 * ranks) and ranks > 1:
                    raise ValueError(
                        f"a padded document of {n} tokens does not divide by 2 x {ranks} ranks; pad it to "
                        f"{_round_up(n, 2 * ranks)}, or pass layout=SequenceLayout.zigzag(..., cu_seqlens=...), "
                        "which needs no padding."
                    )
        spans: list[list[Span]] = [[] for _ in range(ranks)]
        # The next number that stands for padding.
        spare = total
        for start, n, n_padded in zip(bounds, lengths, padded):
            chunk = n_padded // (2 * ranks)
            for r in range(ranks):
                pieces = [(0, n_padded)] if ranks == 1 else _zigzag_chunks(r, ranks, chunk)
                for a, b in pieces:
                    real = max(a, min(b, n))
                    if real > a:
                        spans[r].append((start + a, start + real))
                    if b > real:
                        spans[r].append((spare, spare + b - real))
                        spare += b - real
        short = -sum(b - a for a, b in spans[0]) % multiple_of
        for r in range(ranks):
            if short:
                spans[r].append((spare, spare + short))
                spare += short
        return cls._make("per_document_zigzag", total, ranks, edges, spans)._padded(rows, multiple_of)

    @classmethod
    def balanced(
        cls,
        cu_seqlens,
        ranks: int,
        window: int | Sequence[int | None] | None = None,
        *,
        multiple_of: int = 1,
        rows: int | None = None,
    ) -> SequenceLayout:
        """Chunks of the pack on ranks such that causal work is even and few rows are sent.

        The busiest rank is usually within 2 % of the mean. One document without a window is cut zigzag, which
        is even and sends the fewest rows. See ``balance``.

        Args:
            cu_seqlens: document boundaries [d + 1].
            window: the sliding window in tokens, or a list with the window of each layer, because
                the number of keys that a query attends to is its work.
            multiple_of, rows: as for :meth:`contiguous`.

        Raises:
            ValueError: as for :meth:`contiguous`, or a window is below 1.
        """
        bounds = _boundaries(cu_seqlens, None)
        total = bounds[-1]
        _check_sizes(total, ranks)
        windows = list(window) if isinstance(window, Sequence) else [window]
        longest = max(b - a for a, b in zip(bounds, bounds[1:]))
        if any(w is not None and w < 1 for w in windows):
            raise ValueError(
                f"window={window}: a window holds at least the query itself, so it is 1 or more."
            )
        windows = [None if w is None or w >= longest else w for w in windows]
        if ranks == 1 or (len(bounds) == 2 and windows == [None] * len(windows)):
            whole = cls.zigzag(total, ranks, multiple_of=multiple_of)
            made = cls._make("balanced", total, ranks, bounds, whole.all_spans)
            return made._padded(rows, multiple_of)
        size, held = balanced_chunks(bounds, ranks, windows, multiple_of)
        spans = [[(i * size, (i + 1) * size) for i in chunks] for chunks in held]
        return cls._make("balanced", total, ranks, bounds, spans)._padded(rows, multiple_of)

    @classmethod
    def from_spans(
        cls, spans: Sequence[Sequence[Span]], cu_seqlens, name: str = "custom", *, multiple_of: int = 1
    ) -> SequenceLayout:
        """A layout of any spans that hold every token once; all ranks are padded to the most rows of a rank.

        Args:
            spans: for each rank its (start, stop) runs in local order, without padding.
            cu_seqlens: document boundaries [d + 1].
            multiple_of: every rank's rows are padded to a multiple of this number.

        Raises:
            ValueError: a token is missing or held twice.
        """
        bounds = _boundaries(cu_seqlens, None)
        at = 0
        for start, stop in sorted(span for held in spans for span in held if span[0] < span[1]):
            if start != at:
                what = "missing" if start > at else "held twice"
                raise ValueError(f"spans: token {min(start, at)} is {what}. Every token is on one rank.")
            at = stop
        if at != bounds[-1]:
            raise ValueError(f"spans end at token {at}, cu_seqlens at {bounds[-1]}. The two must be equal.")
        counts = [sum(stop - start for start, stop in held) for held in spans]
        rows, spare, padded = _round_up(max(counts), multiple_of), at, []
        for held, count in zip(spans, counts):
            padded.append([*held, (spare, spare + rows - count)])
            spare += rows - count
        return cls._make(name, at, len(spans), bounds, padded)

    @classmethod
    def make(
        cls,
        name: str,
        total: int,
        ranks: int,
        *,
        cu_seqlens=None,
        windows: Sequence[int | None] = (None,),
        multiple_of: int = 1,
        together: int = 1,
        rows: int | None = None,
    ) -> SequenceLayout:
        """A layout by name; ``auto`` chooses a layout with even work that sends few rows.

        Args:
            name: ``auto`` or one of ``LAYOUTS``.
            windows: the sliding window of each layer, in tokens; None means no window.
            together: number of ranks that exchange heads in every layer. Keys are then sent between
                groups of this many ranks, so ``auto`` and ``balanced`` assign chunks to the groups,
                and the rows of each group are cut into runs for its ranks.
            total, cu_seqlens, multiple_of, rows: as for :meth:`contiguous`.

        Raises:
            ValueError: as for :meth:`contiguous`, or the name is unknown.

        ``auto`` takes ``zigzag`` for one document without a window. Otherwise it takes ``contiguous`` if this
        is even already (few ranks then exchange rows), and ``balanced`` if it is not.
        """
        cu = (0, total) if cu_seqlens is None else _boundaries(cu_seqlens, total)
        if together > 1 and name in ("auto", "balanced"):
            whole = cls.make(
                name,
                total,
                ranks // together,
                cu_seqlens=cu,
                windows=windows,
                multiple_of=multiple_of * together,
            )
            return whole._split(together)._padded(rows, multiple_of)
        if name == "auto":
            longest = max(b - a for a, b in zip(cu, cu[1:]))
            if len(cu) == 2 and ranks > 1 and all(w is None or w >= longest for w in windows):
                name = "zigzag"
            else:
                plain = cls.contiguous(total, ranks, cu_seqlens=cu, multiple_of=multiple_of)
                work = [sum(plain.area(r, w) for w in windows) for r in range(ranks)]
                if max(work) * ranks <= TOLERANCE * sum(work):
                    return plain._padded(rows, multiple_of)
                name = "balanced"
        if name == "balanced":
            return cls.balanced(cu, ranks, list(windows), multiple_of=multiple_of, rows=rows)
        if name == "per_document_zigzag":
            return cls.per_document_zigzag(cu, ranks, multiple_of=multiple_of, rows=rows)
        if name not in LAYOUTS:
            raise ValueError(f"layout {name!r}: auto or one of {', '.join(LAYOUTS)}.")
        make = getattr(cls, name)
        return make(total, ranks, cu_seqlens=cu, multiple_of=multiple_of, rows=rows)

    def with_rows(self, rows: int) -> SequenceLayout:
        """The layout with padding at the end of every rank's rows, up to ``rows`` rows."""
        return self._padded(rows)

    def _padded(self, rows: int | None, multiple_of: int = 1) -> SequenceLayout:
        """The layout with every rank's rows followed by padding, up to ``rows`` rows."""
        if rows is None:
            return self
        if rows % multiple_of or rows < self.local_length:
            fault = f"are no multiple of {multiple_of}" if rows % multiple_of else "are too few"
            raise ValueError(
                f"rows={rows} {fault}: the {self.name} layout of {self.total} tokens over {self.ranks} ranks holds "
                f"{self.local_length} a rank. Give that many or more, in multiples of {multiple_of}."
            )
        short, spare = rows - self.local_length, self.padded_total
        spans = [
            [*held, (spare + r * short, spare + (r + 1) * short)] for r, held in enumerate(self.all_spans)
        ]
        return self._make(self.name, self.total, self.ranks, self.cu_seqlens, spans)

    def _split(self, parts: int) -> SequenceLayout:
        """The layout with every rank's rows cut into runs of equal length, for ``parts`` ranks each."""
        rows, spans = self.local_length // parts, []
        for held in self.all_spans:
            runs: list[list[Span]] = [[] for _ in range(parts)]
            at = 0
            for start, stop in held:
                while start < stop:
                    take = min(stop - start, rows - at % rows)
                    runs[at // rows].append((start, start + take))
                    start, at = start + take, at + take
            spans += runs
        return self._make(self.name, self.total, self.ranks * parts, self.cu_seqlens, spans)

    def merged(self, groups: Sequence[Sequence[int]]) -> SequenceLayout:
        """The layout after an all-to-all inside each group: a merged rank holds its group's tokens, in order.

        Args:
            groups: the ranks of each group. Groups have equally many ranks, and every rank is in one.
        """
        groups = tuple(tuple(group) for group in groups)

        def make() -> SequenceLayout:
            spans = [sorted(span for r in group for span in self.all_spans[r]) for group in groups]
            return self._make(f"{self.name}, merged", self.total, len(groups), self.cu_seqlens, spans)

        return self.once(("merged", groups), make)

    @classmethod
    def _make(cls, name, total, ranks, cu_seqlens, spans) -> SequenceLayout:
        merged = tuple(tuple(_join(s)) for s in spans)
        padded = sum(stop - start for s in merged for start, stop in s)
        return cls(ranks, total, padded, _boundaries(cu_seqlens, total), merged, name)

    # --- which tokens each rank holds -----------------------------------------------------

    @property
    def local_length(self) -> int:
        """Number of rows of each rank, padding included."""
        return self.padded_total // self.ranks

    def spans(self, rank: int) -> list[Span]:
        """The (start, stop) runs that rank ``rank`` holds, in local order; numbers >= total are padding."""
        return list(self.all_spans[rank])

    def positions(self, rank: int) -> Tensor:
        """The global token number of each local row, int64 [rows]; >= total for padding."""
        runs = [torch.arange(start, stop) for start, stop in self.all_spans[rank]]
        return torch.cat(runs) if runs else torch.empty(0, dtype=torch.int64)

    def document_positions(self, rank: int) -> Tensor:
        """Each local row's position in its own document, int64 [rows]; 0 for padding."""

        def make() -> Tensor:
            out = torch.zeros(self.local_length, dtype=torch.int64)
            for s in self.segments(rank):
                first = self.cu_seqlens[s.document]
                out[s.row : s.row + s.stop - s.start] = torch.arange(s.start - first, s.stop - first)
            return out

        return self.once(("document_positions", rank), make)

    def segments(self, rank: int) -> list[Segment]:
        """The spans of a rank cut at document boundaries, in local order; no padding, no empty documents."""

        def make() -> list[Segment]:
            found, row, bounds = [], 0, self.cu_seqlens
            for start, stop in self.all_spans[rank]:
                at = start
                while at < min(stop, self.total):
                    document = bisect.bisect_right(bounds, at) - 1
                    end = min(stop, bounds[document + 1])
                    found.append(Segment(document, at, end, row + at - start))
                    at = end
                row += stop - start
            return found

        return self.once(("segments", rank), make)

    @property
    def longest_document(self) -> int:
        """Number of tokens of the longest document."""
        return max(stop - start for start, stop in zip(self.cu_seqlens, self.cu_seqlens[1:]))

    def area(self, rank: int, window: int | None = None) -> int:
        """Number of causal (query, key) pairs that a rank computes; None means no window."""

        # The number of pairs of the first ``rows`` rows of a document.
        def pairs(rows: int) -> int:
            ramp = rows if window is None else min(rows, window)
            return ramp * (ramp + 1) // 2 + (rows - ramp) * (window or 0)

        starts = ((s, self.cu_seqlens[s.document]) for s in self.segments(rank))
        return sum(pairs(s.stop - start) - pairs(s.start - start) for s, start in starts)

    def received_rows(self, rank: int, window: int | None = None) -> int:
        """Number of key/value rows that a rank receives in one forward pass of ``p2p``."""
        return int(rows_matrix(self, window=window)[rank].sum())

    # --- moving tensors in and out --------------------------------------------------------

    def shard(self, tensor: Tensor, rank: int, dim: int = 0, pad_value: float = 0) -> Tensor:
        """[.., total, ..] -> [.., rows, ..]: a rank's rows of a whole tensor; padding is ``pad_value``.

        Raises:
            ValueError: the tensor's size along ``dim`` is not ``total``, or there is no such rank.
        """
        if tensor.shape[dim] != self.total:
            raise ValueError(
                f"tensor has {tensor.shape[dim]} rows along dim {dim}, the layout is made for {self.total}."
            )
        if not 0 <= rank < self.ranks:
            raise ValueError(f"rank {rank} of a layout of {self.ranks} ranks: from 0 to {self.ranks - 1}.")
        parts = []
        for start, stop in self.all_spans[rank]:
            real = min(stop, self.total)
            if real > start:
                parts.append(tensor.narrow(dim, start, real - start))
            if stop > max(start, real):
                shape = list(tensor.shape)
                shape[dim] = stop - max(start, real)
                parts.append(tensor.new_full(shape, pad_value))
        return torch.cat(parts, dim) if parts else tensor.narrow(dim, 0, 0)

    def unshard(self, local: Tensor, group: dist.ProcessGroup, dim: int = 0) -> Tensor:
        """[.., rows, ..] -> [.., total, ..]: the whole tensor on every rank, without padding.

        It is differentiable, for ranks that all compute the same from the result: in backward each
        rank takes its own rows of the gradient, so a loss computed on every rank counts once.

        Raises:
            ValueError: the tensor's size along ``dim`` is not a rank's number of rows.
        """
        if local.shape[dim] != self.local_length:
            raise ValueError(
                f"tensor has {local.shape[dim]} rows along dim {dim}, a rank holds {self.local_length}."
            )
        gathered = collectives.gather(local, group, dim)
        return gathered.index_select(dim, self._inverse().to(local.device))

    def _inverse(self) -> Tensor:
        """For each token 0 .. total-1 its row among all ranks' rows, rank after rank; int64 [total]."""

        def make() -> Tensor:
            held = torch.cat([self.positions(r) for r in range(self.ranks)])
            inverse = torch.empty(self.padded_total, dtype=torch.int64)
            inverse[held] = torch.arange(self.padded_total)
            return inverse[: self.total]

        return self.once("inverse", make)


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _zigzag_chunks(rank: int, ranks: int, chunk: int) -> list[Span]:
    second = 2 * ranks - 1 - rank
    return [(rank * chunk, (rank + 1) * chunk), (second * chunk, (second + 1) * chunk)]


def _join(spans: Sequence[Span]) -> list[Span]:
    """The spans without empty ones, with adjacent spans joined."""
    joined: list[Span] = []
    for start, stop in spans:
        if start == stop:
            continue
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    return joined


def _check_sizes(total: int, ranks: int) -> None:
    if ranks < 1:
        raise ValueError(f"ranks={ranks}: a layout needs at least one rank.")
    if total < 1:
        raise ValueError(f"total={total}: a layout needs at least one token.")


def _boundaries(cu_seqlens, total: int | None) -> tuple[int, ...]:
    """cu_seqlens as checked integers without empty documents; None means one document of ``total`` tokens."""
    if cu_seqlens is None:
        assert total is not None
        return (0, total)
    given = _checked(cu_seqlens, total)
    return (0, *(b for a, b in zip(given, given[1:]) if b > a))


def _checked(cu_seqlens, total: int | None) -> list[int]:
    """cu_seqlens as integers that start with 0, do not fall and end with ``total``."""
    given = [int(n) for n in (cu_seqlens.tolist() if hasattr(cu_seqlens, "tolist") else cu_seqlens)]
    if len(given) < 2 or given[0] != 0:
        raise ValueError(f"cu_seqlens {given[:8]}: it starts with 0 and ends with the number of tokens.")
    if any(b < a for a, b in zip(given, given[1:])):
        raise ValueError("cu_seqlens must not fall: it is the running sum of the document lengths.")
    if total is not None and given[-1] != total:
        raise ValueError(
            f"cu_seqlens ends at {given[-1]}, the sequence has {total} tokens. The two must be equal."
        )
    return given
