"""From documents to rows of tokens: the tokens of each sample, and its labels.

Three functions plan the rows. They need only the documents' lengths, so that any rank can plan
the rows without reading a token and without communication:

- `plan_packs`: sample packing. A row holds whole documents (or pieces of documents longer
  than a row), and each of these attends only to itself.
- `plan_stream`: no packing. All documents one after another are one stream, which is cut every
  sequence_len tokens. A row is one sequence, even if it holds parts of several documents.
- `plan_rows`: no packing, for samples. A row holds one sample (or piece of a document).

Labels are shifted here, before the sequence is cut over ranks: the label of a token is the next
token, even if that token lies in another piece of the same document. A token without a next token,
and padding, have the label `IGNORE_INDEX`.

This module reads no file. Rows get their tokens from a function
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
        positions: ``[b, s]``; with packing they restart at 0 with each document, in a stream only if
            `EndOfDocument` resets them.
        cu_seqlens: ``[d + 1]``, the boundaries of the documents in the b*s tokens, row after row, from 0
            to b*s; padding at the end of a row is a document. None if documents are not kept apart,
            so that every row is one sequence.
        used: for each row its tokens without the padding at its end.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor
    cu_seqlens: torch.Tensor | None
    used: tuple[int, ...]

    @property
    def loss_mask(self) -> torch.Tensor:
        """bool ``[b, s]``: the tokens that count in the loss."""
        return self.labels != IGNORE_INDEX

    @property
    def num_valid(self) -> int:
        """The number of tokens that count in the loss."""
        return int(self.loss_mask.sum())

    def to(self, device: torch.device | str) -> Batch:
        """The batch on another device; cu_seqlens stays on the CPU, where the layout is made."""
        return Batch(
            self.tokens.to(device, non_blocking=True),
            self.labels.to(device, non_blocking=True),
            self.positions.to(device, non_blocking=True),
            self.cu_seqlens,
            self.used,
        )


class Row(NamedTuple):
    """One sample, int64: tokens, labels, positions ``[s]`` and document boundaries ``[d + 1]``, 0 to s.

    ``used`` is the number of its tokens without the padding at its end.
    """

    tokens: np.ndarray
    labels: np.ndarray
    positions: np.ndarray
    boundaries: np.ndarray
    used: int


class EndOfDocument(NamedTuple):
    """The effects of the token that ends a document on a sample of the stream; its tokens do not change.

    The token itself belongs to the document that it ends. (The effects are Megatron-LM's
    reset_position_ids, reset_attention_mask and eod_mask_loss.)

    Attributes:
        token: the token's number.
        resets_positions: positions restart at 0 after it.
        cuts_attention: later tokens attend neither to it nor to tokens before it.
        masks_loss: the token after it is not learned.
    """

    token: int
    resets_positions: bool
    cuts_attention: bool
    masks_loss: bool

    def apply(self, row: Row, used: int) -> Row:
        """The row with changed positions, labels and boundaries; its first ``used`` tokens are no padding."""
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
        if not self.cuts_attention:
            boundaries = row.boundaries
        return row._replace(labels=labels, positions=positions, boundaries=boundaries)


@dataclass(frozen=True, eq=False)
class Packs:
    """The result of `plan_packs`: pieces ``[p]`` in the order of their packs.

    A piece consists of tokens ``[start, stop)`` of a document; pack i has the pieces
    ``offsets[i]`` to ``offsets[i + 1]``. Pieces are in arrays, because there may be millions of them.
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
        """Number of tokens of the longest piece."""
        return int((self.stops - self.starts).max(initial=0))

    def pieces(self, index: int) -> list[tuple[int, int, int]]:
        """The (document, start, stop) of a pack, in the order of its row."""
        at = slice(self.offsets[index], self.offsets[index + 1])
        return list(zip(self.documents[at].tolist(), self.starts[at].tolist(), self.stops[at].tolist()))

    def row(self, index: int, read: Read) -> Row:
        """Reads the row of one pack."""
        row = empty_row(self.sequence_len)
        boundaries = [0]
        for document, start, stop in self.pieces(index):
            # One token more than the piece, if there is one, is the label of its last token.
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
        return row._replace(boundaries=np.array(boundaries, dtype=np.int64), used=used)


@dataclass(frozen=True, eq=False)
class Stream:
    """The result of `plan_stream`: documents ``[d]`` in order, and the beginning of each, ``[d + 1]``."""

    sequence_len: int
    documents: np.ndarray
    begins: np.ndarray

    def __len__(self) -> int:
        """The number of samples."""
        return -(-int(self.begins[-1]) // self.sequence_len)

    @property
    def longest(self) -> int:
        """Number of tokens of the longest row."""
        return min(self.sequence_len, int(self.begins[-1]))

    def pieces(self, index: int) -> list[tuple[int, int, int]]:
        """The (document, start, stop) of all pieces in a sample."""
        begin = index * self.sequence_len
        return self._range(begin, begin + self.sequence_len)

    def row(self, index: int, read: Read) -> Row:
        """Reads the row of one sample; only the last sample is padded.

        Positions do not restart, because a row is one sequence and padding comes last.
        """
        begin = index * self.sequence_len
        # One token more is read, because it is the label of the last token.
        pieces = self._range(begin, begin + self.sequence_len + 1)
        found = np.concatenate([read(*piece) for piece in pieces])
        row = empty_row(self.sequence_len)
        used = min(len(found), self.sequence_len)
        row.tokens[:used] = found[:used]
        row.labels[: len(found) - 1] = found[1:]
        return row._replace(used=used)

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

    Documents longer than a row are cut into pieces as long as a row (the last piece may be shorter).
    The pieces are taken in a seeded random order. Each piece goes into the open pack in which it leaves
    the least room, or into a new pack. If then more than `OPEN_PACKS` are open, the fullest is closed.

    Args:
        lengths: number of tokens of each document; empty documents are left out.
        sequence_len: number of tokens of a row.
        seed: seed of the order. The result depends only on these three arguments.

    Raises:
        UserError: sequence_len is below 1.
    """
    lengths = _checked(lengths, sequence_len)
    documents, starts, stops = _pieces(lengths, sequence_len)
    order = np.random.Generator(np.random.PCG64(seed)).permutation(len(documents))
    pack_of = _best_fit((stops - starts)[order].tolist(), sequence_len)
    # The sort is stable, so pieces keep their random order inside a pack.
    grouped = order[np.argsort(pack_of, kind="stable")]
    offsets = np.concatenate([[0], np.cumsum(np.bincount(pack_of))]).astype(np.int64)
    return Packs(sequence_len, lengths, documents[grouped], starts[grouped], stops[grouped], offsets)


def plan_rows(lengths: Sequence[int] | np.ndarray, sequence_len: int, seed: int) -> Packs:
    """Each row holds one document, or one piece of a document longer than a row, in the documents' order.

    Arguments and errors are those of `plan_packs`; the seed is not used.
    """
    lengths = _checked(lengths, sequence_len)
    pieces = _pieces(lengths, sequence_len)
    return Packs(sequence_len, lengths, *pieces, np.arange(len(pieces[0]) + 1))


def plan_stream(lengths: Sequence[int] | np.ndarray, sequence_len: int, seed: int) -> Stream:
    """Puts documents in a seeded order into one stream, which is cut every `sequence_len` tokens.

    Arguments and errors are those of `plan_packs`.
    """
    lengths = _checked(lengths, sequence_len)
    order = np.random.Generator(np.random.PCG64(seed)).permutation(np.flatnonzero(lengths))
    return Stream(sequence_len, order, np.concatenate([[0], np.cumsum(lengths[order])]))


def empty_row(sequence_len: int) -> Row:
    """A row of padding: every token is 0 without a label, and the row is one document."""
    return Row(
        np.zeros(sequence_len, dtype=np.int64),
        np.full(sequence_len, IGNORE_INDEX, dtype=np.int64),
        np.arange(sequence_len, dtype=np.int64),
        np.array([0, sequence_len], dtype=np.int64),
        0,
    )


def make_batch(rows: Sequence[Row], apart: bool) -> Batch:
    """Puts rows of one length into a `Batch`; it has no cu_seqlens if documents are not kept apart."""
    cu_seqlens = None
    if apart:
        size = len(rows[0].tokens)
        begins = [row.boundaries[:-1] + i * size for i, row in enumerate(rows)]
        cu_seqlens = torch.from_numpy(np.concatenate([*begins, [len(rows) * size]]))
    tokens, labels, positions = (torch.from_numpy(np.stack([row[part] for row in rows])) for part in range(3))
    return Batch(tokens, labels, positions, cu_seqlens, tuple(row.used for row in rows))


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


def _best_fit(sizes: list[int], capacity: int, most_open: int = OPEN_PACKS) -> np.ndarray:
    """The pack number ``[p]`` of each piece; packs are numbered as they are opened."""
    pack_of = np.empty(len(sizes), dtype=np.int64)
    # Pairs (free tokens, pack number), ascending.
    open_packs: list[tuple[int, int]] = []
    opened = 0
    for i, size in enumerate(sizes):
        # The fullest pack with room for the piece.
        at = bisect_left(open_packs, (size, -1))
        if at < len(open_packs):
            free, pack = open_packs.pop(at)
        else:
            free, pack = capacity, opened
            opened += 1
        pack_of[i] = pack
        if free > size:
            insort(open_packs, (free - size, pack))
            if len(open_packs) > most_open:
                # the fullest pack
                del open_packs[0]
    return pack_of
