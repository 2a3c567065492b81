"""The two ends of a model: token ids (and learned positions) in, logits or losses out."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from longspan.compiled import Compilable
from longspan.config.model import IGNORE_INDEX, TransformerConfig, padded_vocab_size
from longspan.mesh.mesh import ProcessGroupCollection
from longspan.tensor_parallel.cross_entropy import linear_cross_entropy
from longspan.tensor_parallel.layers import ColumnParallelLinear, VocabParallelEmbedding, local
from longspan.tensor_parallel.mappings import gather_from_tensor_model_parallel_region


def check_ids(name: str, ids: Tensor, size: int, what: str, but: int | None = None) -> None:
    """Raises ValueError for an id on the CPU that is neither in 0 .. size - 1 nor ``but``.

    Ids on a GPU are not read, because that would wait for the GPU: the lookup's kernel fails on a wrong id.
    """
    if ids.device.type != "cpu":
        return
    wrong = (ids < 0) | (ids >= size)
    if but is not None:
        wrong &= ids != but
    if wrong.any():
        raise ValueError(
            f"{name} holds {int(ids[wrong][0])}: {what} has {size} entries, from 0 to {size - 1}."
        )


class Embedding(nn.Module):
    """Token ids [b, s] -> [s, b, h] (with sequence parallelism [s/tp, b, h]).

    With ``learned_absolute`` positions, the position's row of a second table is added. This table is cut over
    the tensor parallel ranks and padded like the vocabulary, so one sum over the ranks serves both.

    Args:
        positions: rows of the table of learned positions; None for a model without such a table.
    """

    def __init__(
        self,
        config: TransformerConfig,
        vocab_size: int,
        pg_collection: ProcessGroupCollection,
        positions: int | None = None,
    ):
        super().__init__()
        kwargs = {
            "reduce_scatter_embeddings": config.sequence_parallel,
            "tp_group": pg_collection.tp_mesh,
        }
        h = config.hidden_size
        self.vocab_size = vocab_size
        self.word_embeddings = VocabParallelEmbedding(padded_vocab_size(vocab_size), h, config, **kwargs)
        self.positions = positions
        self.position_embeddings = (
            None
            if positions is None
            else VocabParallelEmbedding(padded_vocab_size(positions), h, config, **kwargs)
        )

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """position_ids [s], [1, s] or [b, s]: positions in documents; used for learned positions only."""
        check_ids("input_ids", input_ids, self.vocab_size, "the vocabulary")
        words = self.word_embeddings
        found = words.look_up(_out_of_padding(input_ids, self.vocab_size, words))
        if self.position_embeddings is not None:
            assert position_ids is not None
            assert self.positions is not None
            check_ids("position_ids", position_ids, self.positions, "the table of learned positions")
            places = _out_of_padding(position_ids, self.positions, self.position_embeddings)
            found = found + self.position_embeddings.look_up(places.to(input_ids.device))
        out = words.leave(found)
        if not words.reduce_scatter_embeddings:
            out = out.transpose(0, 1).contiguous()
        return out


def _out_of_padding(ids: Tensor, size: int, table: VocabParallelEmbedding) -> Tensor:
    """Sets ids of the table's padding rows out of range, so that their lookup fails at every tp size."""
    return ids.masked_fill(ids >= size, table.num_embeddings)


class OutputLayer(ColumnParallelLinear, Compilable):
    """Hidden states [s, b, h] -> logits [b, s, v/tp], or the loss [b, s] of each token in nats.

    The loss is computed without holding all logits at once. The vocabulary is padded to a multiple of 128.
    Padding columns take no part in the loss. With one tensor parallel rank or without ``parallel_output``,
    logits have no padding columns; else these are -inf on the ranks that hold them.
    """

    def __init__(self, config: TransformerConfig, vocab_size: int, pg_collection: ProcessGroupCollection):
        super().__init__(
            config.hidden_size,
            padded_vocab_size(vocab_size),
            config,
            bias=False,
            tp_group=pg_collection.tp_mesh,
        )
        self.vocab_size = vocab_size

    def forward(self, hidden: Tensor, labels: Tensor | None = None, parallel_output: bool = True) -> Tensor:
        if labels is not None:
            check_ids("labels", labels, self.vocab_size, "the vocabulary", but=IGNORE_INDEX)
        x = self.enter(hidden)
        if labels is not None:
            loss = linear_cross_entropy(
                x.reshape(-1, x.shape[-1]),
                local(self.weight),
                labels.t().reshape(-1),
                vocab_size=self.vocab_size,
                group=self.tp_group,
                part=self.part if self.compiled else None,
            )
            # FSDP registers hooks on the tensors that a model returns, so the loss must not be a view.
            return loss.view(x.shape[:2]).t().clone()
        logits = self.project(x).transpose(0, 1)
        if self.tp_size == 1:
            return logits[..., : self.vocab_size]
        if not parallel_output:
            return gather_from_tensor_model_parallel_region(logits, self.tp_group)[..., : self.vocab_size]
        width = logits.shape[-1]
        padding = torch.arange(width, device=logits.device) + self.tp_rank * width >= self.vocab_size
        return logits.masked_fill(padding, float("-inf"))
