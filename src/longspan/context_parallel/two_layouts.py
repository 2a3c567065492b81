"""A hybrid model's two layouts: its stream is contiguous, and its attention works on a layout of even work.

A recurrent layer hands a state from run to run, which is cheap where each rank holds one run of tokens. Causal
attention on such runs is uneven: the last rank has the most keys. So the rows of query, key and value go to another
layout before attention, and those of its output come back, each in one all-to-all (``move_rows``).

    q [s, b, n, d], k, v [s, b, m, d] of the stream's rows -> the same of the attention layout's rows
    context [s', b, n, d] -> [s, b, n, d]
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from longspan.config.model import TransformerConfig
from longspan.context_parallel.layout import SequenceLayout
from longspan.context_parallel.move_rows import change_of_layout, move_rows, rows_between
from longspan.context_parallel.once import Store


def attention_layout(
    config: TransformerConfig, stream: SequenceLayout, name: str | None = None
) -> SequenceLayout:
    """The layout of attention in a model whose stream has another; ``stream`` itself if one layout serves both.

    The stream's layout keeps it.

    Args:
        name: ``auto`` or one of ``LAYOUTS``; None takes the config's ``attention_cp_layout``. ``contiguous`` is the
            stream's own layout.
    """
    name = name or config.attention_cp_layout
    if stream.ranks == 1 or not config.recurrent or "attention" not in config.mixers or name == "contiguous":
        return stream
    windows, together = config.attention_windows, heads_together(config, stream.ranks)

    def make() -> SequenceLayout:
        made = SequenceLayout.make(
            name, stream.total, stream.ranks, cu_seqlens=stream.cu_seqlens, windows=windows, together=together
        )
        # Ranks that exchange heads are neighbours, so the ranks of several groups keep their numbers.
        if together in (1, stream.ranks):
            made = renumbered(made, stream)
        # The stream may have more padding, which is no reason to move rows.
        same = all(made.segments(rank) == stream.segments(rank) for rank in range(stream.ranks))
        return stream if same else made

    return stream.once(("attention_layout", name, tuple(windows), together), make)


def renumbered(layout: SequenceLayout, stream: SequenceLayout) -> SequenceLayout:
    """The layout with its ranks in another order, so that more of the tokens stay on their rank of ``stream``.

    Balance and the number of rows that attention sends do not depend on the order.
    """
    counts = rows_between(stream, layout)
    order = np.zeros(layout.ranks, dtype=np.int64)
    for _ in range(layout.ranks):
        # The pair with the most tokens in common comes first.
        rank, part = np.unravel_index(counts.argmax(), counts.shape)
        order[rank] = part
        counts[rank], counts[:, part] = -1, -1
    # The greedy order may be worse than the layout's own.
    counts = rows_between(stream, layout)
    if counts[np.arange(len(order)), order].sum() <= counts.trace():
        return layout
    return dataclasses.replace(
        layout, all_spans=tuple(layout.all_spans[part] for part in order), _made=Store()
    )


def heads_together(config: TransformerConfig, ranks: int) -> int:
    """Number of ranks that exchange heads in every attention layer; 1 if a layer moves only keys.

    Args:
        ranks: context parallel ranks of the call, which may be fewer than the model's.
    """
    inner = (config.hierarchical_context_parallel_sizes or (1,))[0]
    sizes = {"a2a": ranks, "a2a+p2p": inner if ranks % inner == 0 else 1}
    layers = range(1, config.num_layers + 1)
    types = {config.comm_type_of_layer(n) for n in layers if config.parts_of_layer(n).mixer == "attention"}
    return min(sizes.get(name, 1) for name in types)


def to_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    stream: SequenceLayout,
    target: SequenceLayout,
    rank: int,
    group: dist.ProcessGroup,
) -> tuple[Tensor, ...]:
    """Query, key and value in the rows of ``stream`` -> in the rows of ``target``, in one exchange."""
    move = change_of_layout(stream, target, rank, q.device)
    heads = [x.shape[2] for x in (q, k, v)]
    return move_rows(torch.cat([q, k, v], dim=2), move, group).split(heads, dim=2)


def to_stream(
    context: Tensor, stream: SequenceLayout, target: SequenceLayout, rank: int, group: dist.ProcessGroup
) -> Tensor:
    """Attention's output in the rows of ``target`` -> in the rows of ``stream``."""
    return move_rows(context, change_of_layout(target, stream, rank, context.device), group)
