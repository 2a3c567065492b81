"""The rows that each rank trains on at each step.

The order of the data is a function of (data, seed, global batch) only: a sample of step k
is looked up, without iterating. So a resume needs no state, and a run with another layout
or another number of loader threads trains on the same tokens.

The samples of all epochs, each epoch in its own seeded order, are one endless line. With a
global batch of g, step k takes places k*g to (k+1)*g of this line. Of these, micro-batch m of
data-parallel rank r takes places ``(m * dp_size + r) * micro_batch_size + j``.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import numpy as np

from longspan.data.indexed import IndexedDataset
from longspan.data.packing import (
    IGNORE_INDEX,
    Batch,
    EndOfDocument,
    Packs,
    Row,
    Stream,
    empty_row,
    make_batch,
    plan_packs,
    plan_rows,
    plan_stream,
)
from longspan.errors import UserError

# Seeds are sequences [seed, purpose, ...], so that no two purposes share random numbers. Zero is not
# used as a purpose, because numpy treats [s] and [s, 0] alike, and the rows are planned with [s].
ORDER, HOLD_OUT = 1, 2


class TokenDataset:
    """The samples of one split of some token files.

    Args:
        datasets: the files; their documents have consecutive numbers over all files.
        sequence_len: tokens of a sample.
        seed: seed of the held-out documents, the packs and the order; 0 or more.
        sample_packing: rows of whole documents (see `packing`); otherwise one stream.
        split: "train", "validation", or "whole": all documents, in their own order.
        val_set_size: documents held out for validation: below 1 a share of all (at least one
            document), otherwise a number of documents.
        masks: for each file of samples, the mask of tokens that count in the loss (`samples.open_masks`);
            None for a file of documents. A sample is never cut: without packing each has its own row.
        excess_length_strategy: handling of samples longer than a row: "drop", "truncate" or "raise".
        end_of_document: the effects of the token that ends a document in the stream; None means no effects.

    Attributes:
        apart: whether the documents of a row do not attend to each other.
        num_excess: number of samples of this split that were dropped or truncated.

    Raises:
        UserError: a split has no documents, or a value is out of range.
    """

    def __init__(
        self,
        datasets: list[IndexedDataset],
        sequence_len: int,
        seed: int,
        sample_packing: bool = True,
        split: str = "train",
        val_set_size: float = 0.0,
        masks: Sequence[IndexedDataset | None] = (),
        excess_length_strategy: str = "drop",
        end_of_document: EndOfDocument | None = None,
    ):
        if split not in ("train", "validation", "whole"):
            raise UserError(f"split {split!r} is neither 'train' nor 'validation'.")
        if seed < 0:
            raise UserError(f"seed is {seed}; it must be 0 or more.")
        self.datasets = list(datasets)
        self.sequence_len = sequence_len
        self.seed = seed
        self.sample_packing = sample_packing
        self.end_of_document = end_of_document
        self.apart = sample_packing or (end_of_document is not None and end_of_document.cuts_attention)
        self.split = split
        # The first document of each file in the common numbering.
        self._first = np.concatenate([[0], np.cumsum([len(d) for d in self.datasets])]).astype(np.int64)
        lengths = np.concatenate([np.empty(0, np.int64), *(d.document_lengths for d in self.datasets)])
        self.masks = list(masks) or [None] * len(self.datasets)
        self.has_samples = any(mask is not None for mask in self.masks)
        if end_of_document is not None and (sample_packing or self.has_samples):
            raise UserError(
                "reset_position_ids, reset_attention_mask and eod_mask_loss are for a stream of documents; here "
                + ("documents are packed and kept apart" if sample_packing else "each row holds one sample")
                + " already. Leave them out."
            )
        training, validation = _split(np.flatnonzero(lengths), val_set_size, seed)
        self.documents = validation if split == "validation" else training
        """int64 ``[d]``: the numbers of this split's documents, ascending; empty ones are left out."""
        if not len(self.documents):
            raise UserError(
                "No validation documents are held out: val_set_size is 0. Set it to a part of the documents "
                "(0.01) or to their number."
                if split == "validation"
                else "The dataset has no document with a token in it."
            )
        lengths = lengths[self.documents]
        self.num_excess = 0
        if self.has_samples:
            lengths = self._fit(lengths, excess_length_strategy)
        self.num_tokens = int(lengths.sum())
        plan = plan_packs if sample_packing else plan_rows if self.has_samples else plan_stream
        self._plan = plan(lengths, sequence_len, seed)
        # Two orders are kept, because a global batch may reach beyond the end of an epoch.
        self.order = lru_cache(maxsize=2)(self._order)

    def __len__(self) -> int:
        """The number of samples of an epoch."""
        return len(self._plan)

    def row(self, index: int | None) -> Row:
        """Sample `index`; for None or -1 an empty row of padding.

        Returns:
            int64 arrays: tokens, labels, positions ``[s]`` and boundaries ``[d + 1]``.

        Raises:
            IndexError: there is no such sample.
        """
        if index is None or index == -1:
            return empty_row(self.sequence_len)
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        row = self._plan.row(index, self._read)
        if self.has_samples:
            self._hide_prompts(index, row)
        if self.end_of_document is not None:
            used = sum(stop - start for _, start, stop in self._plan.pieces(index))
            row = self.end_of_document.apply(row, used)
        return row

    def boundaries(self, index: int) -> list[int]:
        """The boundaries of the documents of sample `index`, without padding.

        No file is read, except if the stream is cut at its end-of-document tokens.
        """
        lengths = [stop - start for _, start, stop in self._plan.pieces(index)]
        # The row is one sequence, even if it holds several documents.
        if not self.apart:
            return [0, sum(lengths)]
        if not self.sample_packing:
            return [int(b) for b in self.row(index).boundaries if b <= sum(lengths)]
        return [sum(lengths[:i]) for i in range(len(lengths) + 1)]

    def sources(self, index: int) -> list[tuple[str, int, int, int]]:
        """The parts of sample `index`: (prefix of file, document in it, first token, end). Reads no file."""
        found = []
        for document, start, stop in self._plan.pieces(index):
            at, number = self._place(document)
            path = getattr(self.datasets[at], "bin_path", None)
            found.append(("" if path is None else str(path.with_suffix("")), number, start, stop))
        return found

    @property
    def num_learned(self) -> int:
        """Number of learned tokens of an epoch, without the first token of a document (or of the stream)."""
        lengths = self._plan.lengths if isinstance(self._plan, Packs) else np.array([self.num_tokens])
        if not self.has_samples:
            unlearned = self._num_ends() if self.end_of_document and self.end_of_document.masks_loss else 0
            return int(np.maximum(lengths - 1, 0).sum()) - unlearned
        files = np.searchsorted(self._first, self.documents, side="right") - 1
        total = 0
        for at, mask in enumerate(self.masks):
            mine = files == at
            kept, numbers = lengths[mine], self.documents[mine] - self._first[at]
            if mask is None:
                total += int((kept - 1).sum())
                continue
            cut = kept < mask.document_lengths[numbers]
            total += int(_learned(mask)[numbers[~cut]].sum())
            total += sum(
                int(mask.read(int(n), 1, int(length)).sum()) for n, length in zip(numbers[cut], kept[cut])
            )
        return total

    def _num_ends(self) -> int:
        """Number of end-of-document tokens of the stream that have a next token. Reads the whole stream."""
        assert isinstance(self._plan, Stream)
        assert self.end_of_document is not None
        token, count, last = self.end_of_document.token, 0, False
        for document, length in zip(self._plan.documents.tolist(), np.diff(self._plan.begins).tolist()):
            ends = self._read(document, 0, length) == token
            count, last = count + int(ends.sum()), bool(ends[-1])
        return count - last

    @property
    def num_documents(self) -> int:
        """The number of documents of this split, without dropped samples."""
        return len(self.documents)

    @property
    def longest_document(self) -> int:
        """The most tokens that attend to each other: the longest document or piece, or row of a stream."""
        return self._plan.longest

    def has_targets(self, most: int) -> bool:
        """Whether a token of this split counts in the loss.

        Only about the first ``most`` tokens are read; if none of them counts and there are more, the result
        is True. A sample's first token is never a label, and truncated tokens are not learned.
        """
        if isinstance(self._plan, Stream):
            return self.num_tokens > 1
        for document, length in enumerate(self._plan.lengths.tolist()):
            at, number = self._place(document)
            mask = self.masks[at]
            if length > 1 and (mask is None or mask.read(number, 1, length).any()):
                return True
            most -= length
            if most < 0:
                return True
        return False

    def _place(self, document: int) -> tuple[int, int]:
        """(file, document's number in the file) of this split's `document`."""
        number = int(self.documents[document])
        at = int(np.searchsorted(self._first, number, side="right")) - 1
        return at, number - int(self._first[at])

    def _read(self, document: int, start: int, stop: int) -> np.ndarray:
        at, number = self._place(document)
        return self.datasets[at].read(number, start, stop)

    def _fit(self, lengths: np.ndarray, strategy: str) -> np.ndarray:
        """The documents' lengths with samples limited to a row; removes dropped samples from `documents`."""
        files = np.searchsorted(self._first, self.documents, side="right") - 1
        excess = np.array([mask is not None for mask in self.masks])[files] & (lengths > self.sequence_len)
        self.num_excess = int(excess.sum())
        if not self.num_excess:
            return lengths
        if strategy == "raise":
            at, number = self._place(int(np.argmax(excess)))
            raise UserError(
                f"{self.datasets[at].bin_path}: sample {number} has {int(lengths[np.argmax(excess)])} tokens, sequence_len is "
                f"{self.sequence_len} ({self.num_excess} samples are longer). Raise sequence_len, or say excess_length_strategy: drop "
                "or truncate."
            )
        if strategy == "truncate":
            return np.where(excess, self.sequence_len, lengths)
        self.documents, lengths = self.documents[~excess], lengths[~excess]
        if not len(lengths):
            raise UserError(
                f"every one of the {self.num_excess} {self.split} samples is longer than sequence_len {self.sequence_len}, and "
                "dropped. Raise sequence_len, or say excess_length_strategy: truncate."
            )
        return lengths

    def _hide_prompts(self, index: int, row: Row) -> None:
        """Removes the labels of tokens that must not be learned."""
        begin = 0
        # Samples are never cut.
        assert isinstance(self._plan, Packs)
        for document, start, stop in self._plan.pieces(index):
            at, number = self._place(document)
            mask = self.masks[at]
            if mask is not None:
                # A label is the next token, so the next token's mask applies to it.
                learned = mask.read(number, start + 1, min(stop + 1, int(self._plan.lengths[document])))
                row.labels[begin : begin + len(learned)][learned == 0] = IGNORE_INDEX
            begin += stop - start

    def _order(self, epoch: int) -> np.ndarray:
        """int64 ``[samples]``: an epoch's order, cached as `order`; only training samples are shuffled."""
        if self.split != "train":
            order = np.arange(len(self))
        else:
            generator = np.random.Generator(np.random.PCG64([self.seed, ORDER, epoch]))
            order = generator.permutation(len(self))
        # The array is cached and shared.
        order.setflags(write=False)
        return order

    def global_batch(self, step: int, size: int) -> list[int]:
        """The sample numbers of training step `step` (from 0) with `size` sequences a step."""
        places = (divmod(place, len(self)) for place in range(step * size, (step + 1) * size))
        return [int(self.order(epoch)[at]) for epoch, at in places]

    def micro_batches(
        self, step: int, *, global_batch_size: int, micro_batch_size: int, dp_rank: int, dp_size: int
    ) -> list[Batch]:
        """The micro-batches that one data-parallel rank computes in training step `step`, in order.

        Raises:
            UserError: the global batch is not a multiple of micro_batch_size * dp_size.
        """
        _check_rank(micro_batch_size, dp_rank, dp_size)
        width = micro_batch_size * dp_size
        if global_batch_size < 1 or global_batch_size % width:
            raise UserError(
                f"global_batch_size {global_batch_size} is not a multiple of micro_batch_size "
                f"{micro_batch_size} x data-parallel size {dp_size} = {width}; the next good one is "
                f"{max(1, -(-global_batch_size // width)) * width}."
            )
        samples = self.global_batch(step, global_batch_size)
        mine = range(dp_rank * micro_batch_size, global_batch_size, width)
        return [self._batch(samples[begin : begin + micro_batch_size]) for begin in mine]

    def evaluation_batches(
        self, *, micro_batch_size: int, dp_rank: int, dp_size: int, limit: int | None = None
    ) -> Iterator[Batch]:
        """Every sample once, in the samples' order, over all ranks.

        Args:
            limit: the most samples over all ranks; None means all samples.

        Returns:
            The batches of one rank, which are read while iterating. Each rank has the same number of batches,
            because collectives must match. The last batch may have empty rows, which add nothing.

        Raises:
            UserError: the limit or the micro-batch size is below 1.
        """
        _check_rank(micro_batch_size, dp_rank, dp_size)
        if limit is not None and limit < 1:
            raise UserError(f"evaluation is limited to {limit} samples; it must be at least 1.")
        count = len(self) if limit is None else min(limit, len(self))
        width = micro_batch_size * dp_size
        begins = range(dp_rank * micro_batch_size, -(-count // width) * width, width)
        return (
            self._batch([i if i < count else None for i in range(begin, begin + micro_batch_size)])
            for begin in begins
        )

    def _batch(self, samples: list[int | None] | list[int]) -> Batch:
        return make_batch([self.row(sample) for sample in samples], self.apart)


class Prefetcher:
    """Iterates over ``make(step)`` for first_step <= step < last_step, which one thread calls in advance.

    While the caller works on one step, at most the next two steps are made, in order. Errors of
    ``make`` are raised from ``next``. Use it as a context manager, or call `close`.
    """

    AHEAD = 2

    def __init__(self, make: Callable[[int], Any], first_step: int, last_step: int):
        self._make = make
        self._steps = iter(range(first_step, last_step))
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="longspan-data")
        self._made: deque[Future] = deque()
        for _ in range(self.AHEAD):
            self._submit()

    def _submit(self) -> None:
        step = next(self._steps, None)
        if step is not None:
            self._made.append(self._thread.submit(self._make, step))

    def __iter__(self) -> Prefetcher:
        return self

    def __next__(self) -> Any:
        if not self._made:
            self.close()
            raise StopIteration
        made = self._made.popleft()
        self._submit()
        try:
            return made.result()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Ends the thread after its present step, and drops results that were made in advance."""
        self._steps = iter(())
        self._made.clear()
        self._thread.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def _split(documents: np.ndarray, val_set_size: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(training, validation) document numbers, ascending; each document is in one of the two."""
    if val_set_size < 0 or (val_set_size >= 1 and val_set_size != int(val_set_size)):
        raise UserError(
            f"val_set_size is {val_set_size}; it is a part of the documents (0 to 1) or their number."
        )
    if val_set_size == 0:
        return documents, documents[:0]
    held = int(val_set_size) if val_set_size >= 1 else max(1, round(val_set_size * len(documents)))
    if held >= len(documents):
        raise UserError(
            f"val_set_size {val_set_size} holds out {held} of {len(documents)} documents, which leaves none "
            "to train on. Make it smaller, or give more documents."
        )
    order = np.random.Generator(np.random.PCG64([seed, HOLD_OUT])).permutation(documents)
    return np.sort(order[held:]), np.sort(order[:held])


def _learned(mask: IndexedDataset) -> np.ndarray:
    """The number of learned tokens of each sample, int64 ``[d]``; a sample's first token is never a label."""
    lengths = mask.document_lengths
    counts = np.zeros(len(lengths), dtype=np.int64)
    full = np.flatnonzero(lengths)
    if len(full):
        parts = list(mask.pieces(mask.num_tokens))
        flags = parts[0] if len(parts) == 1 else np.concatenate(parts)
        begins = (np.cumsum(lengths) - lengths)[full]
        counts[full] = np.add.reduceat(flags, begins, dtype=np.int64) - flags[begins]
    return counts


def _check_rank(micro_batch_size: int, dp_rank: int, dp_size: int) -> None:
    if micro_batch_size < 1:
        raise UserError(f"micro_batch_size is {micro_batch_size}; it must be at least 1 sequence.")
    if not 0 <= dp_rank < dp_size:
        raise ValueError(f"dp_rank {dp_rank} of {dp_size}")
