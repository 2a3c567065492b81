"""From documents to rows of tokens: which tokens make a sample, and its labels.

Three plans, all made from the documents' lengths alone, so that any rank can make them
without reading a token and without talking to another:

- `plan_packs`: sample packing. A row holds whole documents (or pieces of those longer
  than a row); each attends only to itself.
- `plan_stream`: no packing. All documents in a row are one stream, cut every sequence_len
  tokens; a row is one sequence, whatever documents it reaches across.
- `plan_rows`: no packing, for samples. A row holds one sample (or piece of a document).

Labels are shifted here, before anything is sharded: the label of a token is the token
after it, even where that one lies in another piece of the same document. Where there is no
next token, and on padding, it is `IGNORE_INDEX`.

Nothing here touches a file: a plan gets its tokens from a function
``read(document, start, stop) -> int64 [stop - start]``.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from longspan.config.model import IGNORE_INDEX
from longspan.errors import UserError

OPEN_PACKS = 256
"""Packs that best-fit chooses from. More would fill rows better by a thousandth and cost time."""

Read = Callable[[int, int, int], np.ndarray]


@dataclass(frozen=True, eq=False)
class Batch:
    """A micro-batch of one rank, before it is cut along the sequence. All int64.

    Attributes:
        tokens: ``[b, s]``.
        labels: ``[b, s]``, already shifted; `IGNORE_INDEX` where there is no target.
        positions: ``[b, s]``; with packing they restart at 0 with each document, in a stream where
            its `EndOfDocument` does so.
        cu_seqlens: ``[d + 1]``, where the documents begin among the b*s tokens taken row by
            row, ending with b*s; padding at the end of a row is a document. None where
            documents are not kept apart: every row is one sequence.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor
    cu_seqlens: torch.Tensor | None

    @property
    def loss_mask(self) -> torch.Tensor:
        """bool ``[b, s]``: the tokens that count in the loss."""
        return self.labels != IGNORE_INDEX

    @property
    def num_valid(self) -> int:
        """How many tokens count in the loss."""
        return int(self.loss_mask.sum())

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device; cu_seqlens stays, since the layout is made on the CPU."""
        return Batch(
            self.tokens.to(device, non_blocking=True),
            self.labels.to(device, non_blocking=True),
            self.positions.to(device, non_blocking=True),
            self.cu_seqlens,
        )


class Row(NamedTuple):
    """One sample, int64: tokens, labels, positions ``[s]`` and document boundaries ``[d + 1]``, 0 to s."""

    tokens: np.ndarray
    labels: np.ndarray
    positions: np.ndarray
    boundaries: np.ndarray


class EndOfDocument(NamedTuple):
    """What the token that ends a document does to a sample of the stream, whose tokens stay as they are.

    The token itself belongs to the document that it ends. (Megatron-LM's reset_position_ids,
    reset_attention_mask and eod_mask_loss.)

    Attributes:
        token: its number.
        resets_positions: positions begin anew at 0 after it.
        cuts_attention: what comes after it does not see it, nor anything before it.
        masks_loss: the token after it is not learned.
    """

    token: int
    resets_positions: bool
    cuts_attention: bool
    masks_loss: bool

    def apply(self, row: Row, used: int) -> Row:
        """The same tokens with other positions, labels and boundaries; ``used`` counts those that are no padding."""
        ends = np.flatnonzero(row.tokens[:used] == self.token)
        size = len(row.tokens)
        boundaries = np.unique(np.concatenate([[0], ends + 1, [used, size]]))
        labels, positions = row.labels, row.positions
        if self.masks_loss:
            labels = labels.copy()
            labels[ends] = IGNORE_INDEX
        if self.resets_positions:
            begins = boundaries[:-1]
            positions = np.arange(size) - np.repeat(begins, np.diff(boundaries))
        return Row(row.tokens, labels, positions, boundaries if self.cuts_attention else row.boundaries)


@dataclass(frozen=True, eq=False)
class Packs:
    """What `plan_packs` found: pieces ``[p]`` in the order of their packs.

    A piece is tokens ``[start, stop)`` of a document; pack i has the pieces
    ``offsets[i]`` to ``offsets[i + 1]``. Arrays, not lists: there may be millions.
    """

    sequence_len: int
    lengths: np.ndarray
    documents: np.ndarray
    starts: np.ndarray
    stops: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        """The number of packs, which is the number of samples."""
        return len(self.offsets) - 1

    @property
    def longest(self) -> int:
        """Tokens of the longest piece."""
        return int((self.stops - self.starts).max(initial=0))

    def pieces(self, index: int) -> list[tuple[int, int, int]]:
        """The (document, start, stop) of a pack, in the order of its row."""
        at = slice(self.offsets[index], self.offsets[index + 1])
        return list(zip(self.documents[at].tolist(), self.starts[at].tolist(), self.stops[at].tolist()))

    def row(self, index: int, read: Read) -> Row:
        """Reads one pack."""
        row = empty_row(self.sequence_len)
        boundaries = [0]
        for document, start, stop in self.pieces(index):
            # One token more than the piece has, if there is one: the label of its last.
            found = read(document, start, min(stop + 1, int(self.lengths[document])))
            begin = boundaries[-1]
            end = begin + stop - start
            row.tokens[begin:end] = found[: stop - start]
            row.labels[begin : begin + len(found) - 1] = found[1:]
            row.positions[begin:end] = np.arange(stop - start)
            boundaries.append(end)
        used = boundaries[-1]
        if used < self.sequence_len:
            row.positions[used:] = np.arange(self.sequence_len - used)
            boundaries.append(self.sequence_len)
        return row._replace(boundaries=np.array(boundaries, dtype=np.int64))


@dataclass(frozen=True, eq=False)
class Stream:
    """What `plan_stream` found: documents ``[d]`` in order, and where each begins, ``[d + 1]``."""

    sequence_len: int
    documents: np.ndarray
    begins: np.ndarray

    def __len__(self) -> int:
        """The number of samples."""
        return -(-int(self.begins[-1]) // self.sequence_len)

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return min(self.sequence_len, int(self.begins[-1]))

    def pieces(self, index: int) -> list[tuple[int, int, int]]:
        """The (document, start, stop) that a sample reaches across."""
        begin = index * self.sequence_len
        return self._range(begin, begin + self.sequence_len)

    def row(self, index: int, read: Read) -> Row:
        """Reads one sample; only the last of all is padded.

        Positions run through: a row is one sequence, and nothing real follows the padding.
        """
        begin = index * self.sequence_len
        pieces = self._range(begin, begin + self.sequence_len + 1)  # one more: the last label
        found = np.concatenate([read(*piece) for piece in pieces])
        row = empty_row(self.sequence_len)
        used = min(len(found), self.sequence_len)
        row.tokens[:used] = found[:used]
        row.labels[: len(found) - 1] = found[1:]
        return row

    def _range(self, begin: int, end: int) -> list[tuple[int, int, int]]:
        end = min(end, int(self.begins[-1]))
        first = int(np.searchsorted(self.begins, begin, side="right")) - 1
        last = int(np.searchsorted(self.begins, end, side="left"))
        pieces = []
        for at in range(first, last):
            low, high = int(self.begins[at]), int(self.begins[at + 1])
            pieces.append((int(self.documents[at]), max(begin, low) - low, min(end, high) - low))
        return pieces


def plan_packs(lengths: Sequence[int] | np.ndarray, sequence_len: int, seed: int) -> Packs:
    """Packs documents into rows of `sequence_len` tokens.

    Documents longer than a row are cut into pieces of a row (the last one shorter). The
    pieces are taken in a seeded random order; each goes into the open pack that it leaves
    the least room in. When `OPEN_PACKS` are open and none has room, the fullest is closed.

    Args:
        lengths: tokens of each document; empty documents are left out.
        sequence_len: tokens of a row.
        seed: of the order. The result depends on these three alone.
    """
    lengths = _checked(lengths, sequence_len)
    documents, starts, stops = _pieces(lengths, sequence_len)
    order = np.random.Generator(np.random.PCG64(seed)).permutation(len(documents))
    pack_of = _best_fit((stops - starts)[order].tolist(), sequence_len)
    # Stable, so pieces keep their random order inside a pack.
    grouped = order[np.argsort(pack_of, kind="stable")]
    offsets = np.concatenate([[0], np.cumsum(np.bincount(pack_of))]).astype(np.int64)
    return Packs(sequence_len, lengths, documents[grouped], starts[grouped], stops[grouped], offsets)


def plan_rows(lengths: Sequence[int] | np.ndarray, sequence_len: int, seed: int) -> Packs:
    """One document a row, or one piece of those longer than a row, in the documents' order.

    Args: as in `plan_packs`; the seed is not used.
    """
    lengths = _checked(lengths, sequence_len)
    pieces = _pieces(lengths, sequence_len)
    return Packs(sequence_len, lengths, *pieces, np.arange(len(pieces[0]) + 1))


def plan_stream(lengths: Sequence[int] | np.ndarray, sequence_len: int, seed: int) -> Stream:
    """Puts documents in a seeded order into one stream, cut every `sequence_len` tokens.

    Args: as in `plan_packs`.
    """
    lengths = _checked(lengths, sequence_len)
    order = np.random.Generator(np.random.PCG64(seed)).permutation(np.flatnonzero(lengths))
    return Stream(sequence_len, order, np.concatenate([[0], np.cumsum(lengths[order])]))


def empty_row(sequence_len: int) -> Row:
    """A row of padding: token 0, no label, one document of its own."""
    return Row(
        np.zeros(sequence_len, dtype=np.int64),
        np.full(sequence_len, IGNORE_INDEX, dtype=np.int64),
        np.arange(sequence_len, dtype=np.int64),
        np.array([0, sequence_len], dtype=np.int64),
    )


def make_batch(rows: Sequence[Row], apart: bool) -> Batch:
    """Puts rows of one length into a `Batch`; where documents are not kept apart it has no cu_seqlens."""
    cu_seqlens = None
    if apart:
        size = len(rows[0].tokens)
        begins = [row.boundaries[:-1] + i * size for i, row in enumerate(rows)]
        cu_seqlens = torch.from_numpy(np.concatenate([*begins, [len(rows) * size]]))
    tokens, labels, positions = (torch.from_numpy(np.stack([row[part] for row in rows])) for part in range(3))
    return Batch(tokens, labels, positions, cu_seqlens)


def _checked(lengths: Sequence[int] | np.ndarray, sequence_len: int) -> np.ndarray:
    if sequence_len < 1:
        raise UserError(f"sequence_len is {sequence_len}; it must be at least 1 token.")
    lengths = np.asarray(lengths, dtype=np.int64)
    if len(lengths) and lengths.min() < 0:
        raise ValueError(f"a document of {lengths.min()} tokens")
    return lengths


def _pieces(lengths: np.ndarray, sequence_len: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(document, start, stop) ``[p]`` of all documents, cut every `sequence_len` tokens."""
    counts = -(-lengths // sequence_len)
    documents = np.repeat(np.arange(len(lengths)), counts)
    number = np.arange(len(documents)) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = number * sequence_len
    return documents, starts, np.minimum(starts + sequence_len, lengths[documents])


def _best_fit(sizes: list[int], capacity: int) -> np.ndarray:
    """The pack number ``[p]`` of each piece; packs are numbered as they are opened."""
    pack_of = np.empty(len(sizes), dtype=np.int64)
    open_packs: list[tuple[int, int]] = []  # (free tokens, pack number), ascending
    opened = 0
    for i, size in enumerate(sizes):
        at = bisect_left(open_packs, (size, -1))  # the first with room for it
        if at < len(open_packs):
            free, pack = open_packs.pop(at)
        else:
            free, pack = capacity, opened
            opened += 1
        pack_of[i] = pack
        if free > size:
            insort(open_packs, (free - size, pack))
            if len(open_packs) > OPEN_PACKS:
                del open_packs[0]  # the fullest
    return pack_of
