"""From a micro-batch to this rank's part of it: the layout of its pack, and the rows that layout gives the rank.

Runs in the loader's thread, a step or two ahead: planning a layout and its schedules is
integer work that must not wait on the step's path.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

from torch import Tensor

from longspan.config.model import IGNORE_INDEX
from longspan.config.resolve import Run
from longspan.context_parallel import SequenceLayout
from longspan.data import Batch
from longspan.errors import UserError


class LocalBatch(NamedTuple):
    """One rank's rows of a micro-batch: tokens and labels [b, rows], int64.

    ``num_valid`` counts the labels of the whole micro-batch.
    """

    tokens: Tensor
    labels: Tensor
    layout: SequenceLayout
    num_valid: int


class Sharder:
    """Cuts micro-batches along the sequence.

    Args:
        rank: in the context parallel group.
        plan: called with each new layout, to compute ahead what the layers will ask of it.
    """

    def __init__(self, run: Run, rank: int, plan: Callable[[SequenceLayout], None]):
        self.run, self.rank, self.plan = run, rank, plan
        self.windows = run.windows
        self._plain = lru_cache(maxsize=4)(self.make_layout)

    def make_layout(self, total: int, cu_seqlens=None) -> SequenceLayout:
        """The layout of a pack of ``total`` tokens, planned."""
        layout = SequenceLayout.make(
            self.run.config.cp_layout,
            total,
            self.run.sizes.cp,
            cu_seqlens=cu_seqlens,
            windows=self.windows,
            multiple_of=self.run.sizes.tp if self.run.sequence_parallel else 1,
        )
        self.plan(layout)
        return layout

    def __call__(self, batch: Batch) -> LocalBatch:
        """This rank's rows.

        Raises:
            UserError: a token beyond the vocabulary.
        """
        tokens, labels = batch.tokens, batch.labels
        vocab = self.run.config.vocab_size
        largest, smallest = int(max(tokens.max(), labels.max())), int(tokens.min())
        if largest >= vocab or smallest < 0:
            raise UserError(
                f"the data holds token {largest if largest >= vocab else smallest}, but vocab_size is {vocab}. It was made with another tokenizer: "
                "give that tokenizer (tokenizer_config), or its vocab_size."
            )
        if batch.cu_seqlens is None:
            layout = self._plain(tokens.shape[1])
        else:  # all rows as one pack: its documents are kept apart anyway
            tokens, labels = tokens.reshape(1, -1), labels.reshape(1, -1)
            layout = self.make_layout(tokens.shape[1], batch.cu_seqlens)
        return LocalBatch(
            layout.shard(tokens, self.rank, dim=1),
            layout.shard(labels, self.rank, dim=1, pad_value=IGNORE_INDEX),
            layout,
            batch.num_valid,
        )
