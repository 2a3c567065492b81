"""Makes this rank's part of the samples: the layout of each micro-batch, and the rank's rows in it.

Two classes have the same interface: a ``Sharder`` gives each data parallel rank its own samples, cut
over its context parallel ranks; a ``HybridSharder`` cuts all samples of a step over all ranks, each
sample over as many ranks as it needs (``context_parallel.hybrid``).

This runs in the loader's thread, a step or two ahead: planning a layout and its schedules of
exchanges is integer work, for which a step should not wait.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from longspan.config.model import IGNORE_INDEX
from longspan.config.run import Run
from longspan.context_parallel import SequenceLayout, hybrid
from longspan.context_parallel.run_layout import run_layout
from longspan.data import Batch, TokenDataset
from longspan.errors import UserError
from longspan.expert_parallel.tokens import Sequences
from longspan.training.schedule import evaluation_limit


class LocalBatch(NamedTuple):
    """One rank's rows of a micro-batch: tokens, labels and positions [b, rows], int64.

    Attributes:
        positions: None if each token's position is its place in its document of the layout.
        sequences: which sequence of the data each row belongs to, for a model with experts.
    """

    tokens: Tensor
    labels: Tensor
    layout: SequenceLayout
    positions: Tensor | None = None
    sequences: Sequences | None = None

    @property
    def num_valid(self) -> int:
        """The number of this rank's tokens that count in the loss."""
        return int((self.labels != IGNORE_INDEX).sum())


class Sharder:
    """Each data parallel rank has its own samples; a micro-batch is cut over the context parallel ranks.

    Args:
        dp_rank, cp_rank: this process's ranks in the dp and the cp group.
        plan: called with each new layout, to compute ahead what the layers will need of it.
    """

    def __init__(self, run: Run, dp_rank: int, cp_rank: int, plan: Callable[[SequenceLayout], None]):
        self.run, self.dp_rank, self.cp_rank, self.plan = run, dp_rank, cp_rank, plan
        self._plain = lru_cache(maxsize=4)(self._make_layout)

    def local_rows(self) -> int:
        """The number of tokens of a sequence on this rank, padding included."""
        return self._plain(self.run.batch.sequence_len).local_length

    def training(self, data: TokenDataset, step: int) -> list[LocalBatch]:
        """This rank's part of the micro-batches of a training step (from 0)."""
        batches = data.micro_batches(
            step,
            global_batch_size=self.run.batch.global_size,
            micro_batch_size=self.run.batch.micro,
            dp_rank=self.dp_rank,
            dp_size=self.run.sizes.dp,
        )
        batches = list(batches)
        layouts = [self._layout(batch) for batch in batches]
        if self.run.sizes.pp > 1:
            # The micro-batches of a step pass through the stages in buffers of one size.
            rows = max(layout.local_length for layout in layouts)
            layouts = [self._with_rows(layout, rows) for layout in layouts]
        return list(map(self._cut, batches, layouts))

    def evaluation(self, data: TokenDataset) -> Iterator[LocalBatch]:
        """This rank's part of each held-out sample, once; every rank has the same number of micro-batches."""
        batches = data.evaluation_batches(
            micro_batch_size=self.run.batch.micro,
            dp_rank=self.dp_rank,
            dp_size=self.run.sizes.dp,
            limit=evaluation_limit(self.run),
        )
        return (self._cut(batch, self._layout(batch)) for batch in batches)

    def _make_layout(self, total: int, cu_seqlens=None) -> SequenceLayout:
        layout = run_layout(self.run, total, cu_seqlens)
        self.plan(layout)
        return layout

    def _with_rows(self, layout: SequenceLayout, rows: int) -> SequenceLayout:
        if rows == layout.local_length:
            return layout
        layout = layout.with_rows(rows)
        self.plan(layout)
        return layout

    def _layout(self, batch: Batch) -> SequenceLayout:
        if batch.cu_seqlens is None:
            return self._plain(batch.tokens.shape[1])
        # All rows become one pack, because its documents are kept apart anyway.
        return self._make_layout(batch.tokens.numel(), batch.cu_seqlens)

    def _cut(self, batch: Batch, layout: SequenceLayout) -> LocalBatch:
        tokens, labels, positions = batch.tokens, batch.labels, batch.positions
        if batch.cu_seqlens is not None:
            tokens, labels, positions = (x.reshape(1, -1) for x in (tokens, labels, positions))
        _check_tokens(self.run, tokens, labels)
        return LocalBatch(
            layout.shard(tokens, self.cp_rank, dim=1),
            layout.shard(labels, self.cp_rank, dim=1, pad_value=IGNORE_INDEX),
            layout,
            layout.shard(positions, self.cp_rank, dim=1) if _positions_differ(self.run) else None,
            self._sequences(batch, layout) if self.run.model.num_moe_experts else None,
        )

    def _sequences(self, batch: Batch, layout: SequenceLayout) -> Sequences:
        """Each row of the batch is a sequence; padding at its end is none of its tokens."""
        rows, size = batch.tokens.shape
        used = torch.tensor(batch.used).unsqueeze(1)
        place = torch.arange(size).expand(rows, -1)
        sequence = torch.where(place < used, torch.arange(rows).unsqueeze(1), -1)
        document, tokens = sequence, used.squeeze(1)
        if batch.cu_seqlens is not None:
            ends = batch.cu_seqlens[1:]
            inside = torch.bucketize(torch.arange(rows * size), ends, right=True).view(rows, size)
            document = torch.where(sequence >= 0, inside, -1)
            tokens = torch.bincount(document[document >= 0], minlength=len(ends))
            sequence, document, place = (x.reshape(1, -1) for x in (sequence, document, place))

        def cut(x: Tensor) -> Tensor:
            return layout.shard(x, self.cp_rank, dim=1, pad_value=-1)

        return Sequences(cut(sequence), cut(document), cut(place), used.squeeze(1), tokens)


class HybridSharder:
    """All documents of a step are cut over all ranks of dp x cp, each over as many ranks as it needs.

    Args:
        rank: this process's rank among the ``ranks`` ranks of dp x cp.
        plan: as for :class:`Sharder`.
    """

    def __init__(self, run: Run, rank: int, ranks: int, plan: Callable[[SequenceLayout], None]):
        self.run, self.rank, self.ranks, self.plan = run, rank, ranks, plan
        assert run.batch.most_tokens is not None
        self.max_tokens = run.batch.most_tokens

    def local_rows(self) -> int:
        """The largest number of tokens of a micro-batch on this rank."""
        return self.max_tokens

    def training(self, data: TokenDataset, step: int) -> list[LocalBatch]:
        """Like :meth:`Sharder.training`; the number of micro-batches differs by step, but not by rank."""
        return list(self._micro_batches(data, data.global_batch(step, self.run.batch.global_size)))

    def evaluation(self, data: TokenDataset) -> Iterator[LocalBatch]:
        """Like :meth:`Sharder.evaluation`."""
        count = min(len(data), evaluation_limit(self.run) or len(data))
        width = self.run.batch.micro * self.run.sizes.dp
        for begin in range(0, count, width):
            yield from self._micro_batches(data, list(range(begin, min(begin + width, count))))

    def _micro_batches(self, data: TokenDataset, samples: list[int]) -> Iterator[LocalBatch]:
        # (sample, first token, token after the last)
        documents = []
        for sample in samples:
            bounds = data.boundaries(sample)
            documents += [(sample, *ends) for ends in zip(bounds, bounds[1:])]
        lengths = [stop - start for _, start, stop in documents]
        read = lru_cache(maxsize=len(samples))(data.row)
        for micro_batch in hybrid.schedule(lengths, self.ranks, self.max_tokens):
            _, layout = hybrid.layout_of(lengths, micro_batch, self.run.row_multiple)
            self.plan(layout)
            tokens = torch.zeros(1, layout.local_length, dtype=torch.int64)
            labels = torch.full_like(tokens, IGNORE_INDEX)
            positions = torch.zeros_like(tokens)
            index, place = torch.full_like(tokens, -1), torch.zeros_like(tokens)
            at = 0
            numbers = {
                n: i for i, n in enumerate(sorted({n for pieces in micro_batch for n, _, _ in pieces}))
            }
            for document, start, stop in sorted(micro_batch[self.rank]):
                sample, first, _ = documents[document]
                row = read(sample)
                for part, held in ((tokens, row.tokens), (labels, row.labels), (positions, row.positions)):
                    part[0, at : at + stop - start] = torch.from_numpy(held[first + start : first + stop])
                index[0, at : at + stop - start] = numbers[document]
                place[0, at : at + stop - start] = torch.arange(start, stop)
                at += stop - start
            _check_tokens(self.run, tokens, labels)
            counts = torch.tensor([lengths[n] for n in numbers])
            # A document is what a sequence is elsewhere: those of a row may lie in different micro-batches.
            sequences = Sequences(index, index, place, counts, counts)
            kept = sequences if self.run.model.num_moe_experts else None
            yield LocalBatch(tokens, labels, layout, positions if _positions_differ(self.run) else None, kept)


def _positions_differ(run: Run) -> bool:
    """Whether a token's position differs from its place among the tokens that attend to each other.

    It does if only one of positions and attention begins anew at the end of a document.
    """
    return run.config.reset_position_ids != run.config.reset_attention_mask


def _check_tokens(run: Run, tokens: Tensor, labels: Tensor) -> None:
    """Raises a UserError if a token is not in the vocabulary."""
    vocab = run.vocab_size
    largest, smallest = int(max(tokens.max(), labels.max())), int(tokens.min())
    if largest >= vocab or smallest < 0:
        raise UserError(
            f"the data holds token {largest if largest >= vocab else smallest}, but vocab_size is {vocab}. It was made with another tokenizer: "
            "give that tokenizer (tokenizer_config), or its vocab_size."
        )
