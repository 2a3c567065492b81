"""Attention over a sequence cut over the context parallel group.

``context_parallel_attention`` is the function, ``DotProductAttention`` the module with
Megatron's signature. Both choose a schedule, a kernel and a communication type. Unsupported
arguments are refused before anything is sent (``refusals``).

The four communication types are made of two moves:

    p2p, all_gather    move keys, step by step or all at once
    a2a                move heads, so that every rank has the whole sequence
    a2a+p2p            move heads inside the inner groups, then keys across the outer ones
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor, nn

from longspan import autocast
from longspan.config.model import AttnMaskType, TransformerConfig
from longspan.context_parallel.kernels.choose import chosen_kernel
from longspan.context_parallel.kernels.protocol import Kernel
from longspan.context_parallel.layout import SequenceLayout
from longspan.context_parallel.move_heads import HeadMove, lse_to_tokens, to_heads, to_tokens
from longspan.context_parallel.move_keys import MoveKeys
from longspan.context_parallel.packed import PackedSeqParams
from longspan.context_parallel.refusals import (
    check_comm_type,
    check_heads_of,
    check_packed,
    check_padded_rows,
    check_shapes,
    check_sinks,
    check_uncut,
    check_window,
    group_of_call,
)
from longspan.context_parallel.schedule import Schedule
from longspan.mesh.collectives import join
from longspan.mesh.default_groups import process_groups
from longspan.mesh.mesh import ProcessGroupCollection

Groups = Sequence[dist.ProcessGroup]


def _size(group: dist.ProcessGroup | None) -> int:
    return 1 if group is None else dist.get_world_size(group)


def _levels(groups: Groups | None) -> list[int] | None:
    return [_size(group) for group in groups] if groups else None


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: dist.ProcessGroup | None,
    hierarchical_groups: Groups | None,
    layout: SequenceLayout,
    causal: bool,
    window: int | None,
    softmax_scale: float | None,
    sinks: Tensor | None,
    cp_comm_type: str,
    deterministic: bool,
    backend: str | Kernel = "auto",
    rows_a_step: int | None = None,
) -> tuple[Tensor, Tensor]:
    """q, k, v [s, b, heads, d] -> out [s, b, n, d], lse [b, n, s]. ``group`` None means one rank."""
    q, k, v = autocast.cast(q, k, v)
    ranks, n, m = _size(group), q.shape[-2], k.shape[-2]
    comm_type = check_comm_type(cp_comm_type, ranks, _levels(hierarchical_groups))
    check_window(window, causal)
    check_shapes(q, k, v, layout, ranks)
    check_sinks(sinks, q)
    check_heads_of(comm_type, n, ranks, _levels(hierarchical_groups))
    kernel = backend
    if isinstance(kernel, str):
        kernel = chosen_kernel(q.device, q.dtype, q.shape[-1], kernel, deterministic)
    scale = softmax_scale if softmax_scale is not None else 1.0 / math.sqrt(q.shape[-1])
    rank = 0 if group is None else dist.get_rank(group)
    inner, outer = _moves(comm_type, group, hierarchical_groups)
    schedule, together = _plan(layout, rank, comm_type, _size(inner), causal, window, rows_a_step)
    join(outer, q.device)
    with autocast.off(q):
        if inner is None:
            return MoveKeys.apply(q, k, v, sinks, schedule, outer, kernel, scale)
        move = HeadMove.of(inner, layout, together, n, m)
        if sinks is not None:
            heads = move.q_heads[dist.get_rank(inner)]
            sinks = sinks[heads[0] : heads[0] + len(heads)]
        out, lse = MoveKeys.apply(*to_heads(q, k, v, move), sinks, schedule, outer, kernel, scale)
        return to_tokens(out, move), lse_to_tokens(lse, move)


def _moves(
    comm_type: str, group: dist.ProcessGroup | None, hierarchical_groups: Groups | None
) -> tuple[dist.ProcessGroup | None, dist.ProcessGroup | None]:
    """(the group that moves heads, the group that moves keys); None for a move that is not made."""
    if _size(group) == 1 or comm_type in ("p2p", "all_gather"):
        return None, group
    if comm_type == "a2a":
        return group, None
    assert hierarchical_groups is not None
    inner, outer = hierarchical_groups
    return (None if _size(inner) == 1 else inner), outer


def _plan(
    layout: SequenceLayout,
    rank: int,
    comm_type: str,
    inner: int,
    causal: bool,
    window: int | None,
    rows_a_step: int | None = None,
) -> tuple[Schedule, tuple[int, ...]]:
    """The schedule that moves keys, and the ``inner`` ranks that exchange heads, this rank among them."""

    def make() -> tuple[Schedule, tuple[int, ...]]:
        groups = [tuple(range(first, first + inner)) for first in range(0, layout.ranks, inner)]
        merged = layout if inner == 1 else layout.merged(groups)
        at_once = comm_type == "all_gather"
        schedule = Schedule.of(
            merged,
            rank // inner,
            causal=causal,
            window=window,
            all_at_once=at_once,
            rows_a_step=rows_a_step,
        )
        return schedule, groups[rank // inner]

    return layout.once(("attention", rank, comm_type, inner, causal, window, rows_a_step), make)


def context_parallel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: dist.ProcessGroup | None,
    layout: SequenceLayout,
    causal: bool = True,
    window: int | None = None,
    softmax_scale: float | None = None,
    sinks: Tensor | None = None,
    cp_comm_type: str = "p2p",
    deterministic: bool = False,
    hierarchical_groups: Groups | None = None,
    backend: str | Kernel = "auto",
    rows_a_step: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Exact attention for one pack of documents, or a batch of sequences, cut over a group of ranks.

    A query attends to the keys of its own document (up to itself if ``causal``).

    Args:
        q: [t, n, d], this rank's rows of the pack in the layout's order; or [s, b, n, d], a
            batch of b sequences that are all cut by the same layout.
        k, v: [t, m, d] or [s, b, m, d]; m divides n.
        group: the ranks that the pack is cut over; None means this rank alone.
        layout: which tokens each rank holds.
        window: a query attends to itself and the ``window - 1`` tokens before it; None means no limit.
        softmax_scale: None means 1 / sqrt(d).
        sinks: [n], a logit for each query head that joins the softmax's denominator and has no value
            (gpt-oss, arXiv 2508.10925); -inf is no sink, None is none in any head. Every rank passes all of them, and
            gets the gradient of its own rows: sum it over ``group``.
        cp_comm_type: ``p2p`` (keys step by step), ``all_gather`` (keys all at once), ``a2a``
            (heads; the number of ranks divides n) or ``a2a+p2p``.
        deterministic: two runs give equal bits. Gradients are always summed in a fixed
            order here, so this argument only affects kernels that are not deterministic themselves.
        hierarchical_groups: for ``a2a+p2p``, this rank's inner group (consecutive ranks of
            ``group``) and outer group.
        backend: a name of ``attention_backend``, or a kernel of one's own (``kernels.protocol``).
        rows_a_step: key/value rows that one exchange should bring at least; None is
            ``schedule.ROWS_A_STEP``. The same on all ranks.

    Returns:
        out in q's shape and dtype (autocast's dtype if autocast is on), and lse [n, t] or [b, n, s]
        (natural log, at least float32; with the sinks in it). Padding rows are 0 and -inf.

    Raises:
        ValueError: shapes, sinks, layout, communication type, heads or window do not fit; nothing was sent.
    """
    pack = q.dim() == k.dim() == v.dim() == 3
    if pack:
        q, k, v = (x.unsqueeze(1) for x in (q, k, v))
    out, lse = _attend(
        q,
        k,
        v,
        group=group,
        hierarchical_groups=hierarchical_groups,
        layout=layout,
        causal=causal,
        window=window,
        softmax_scale=softmax_scale,
        sinks=sinks,
        cp_comm_type=cp_comm_type,
        deterministic=deterministic,
        backend=backend,
        rows_a_step=rows_a_step,
    )
    return (out.squeeze(1), lse.squeeze(0)) if pack else (out, lse)


class DotProductAttention(nn.Module):
    """Megatron's core attention (there: ``TEDotProductAttention``), without parameters.

    ``forward(query, key, value) -> (context, softmax_lse)``: query [s, b, n, d], key and
    value [s, b, m, d], where s is the number of this rank's rows; context has query's shape, lse is
    [b, n, s]. With ``qkv_format="thd"``: [t, n, d] and lse [n, t]. Where the config's ``softmax_type`` is
    ``learnable``, ``softmax_offset`` [n] is this rank's part of the parameter that Megatron's module holds itself.

    Without ``layout=``, the rows are zigzag of the whole sequence (``sbhd``) or of each padded
    document (``thd``). ``packed_seq_params.cp_group`` replaces the group for one call, and
    ``local_cp_size=1`` switches context parallelism off.

    Args:
        layer_number: from 1; selects the communication type and the window if they differ between layers.
        softmax_scale: None takes config.softmax_scale, and 1 / sqrt(head size) if that is None.
        attention_type, attention_dropout, k_channels, v_channels: Megatron's arguments; unsupported
            values (cross-attention, dropout, unequal head sizes) are refused.

    Raises:
        ValueError: a value is not supported, or the config does not fit the groups.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType = AttnMaskType.causal,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        softmax_scale: float | None = None,
        *,
        attention_type: str = "self",
        attention_dropout: float | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
    ):
        super().__init__()
        groups = process_groups(pg_collection)
        self.cp_group, self.hierarchical_groups = groups.cp, groups.hcp or None
        if config.context_parallel_size > _size(self.cp_group):
            raise ValueError(
                f"config.context_parallel_size is {config.context_parallel_size}, the context parallel group has "
                f"{_size(self.cp_group)} ranks. Initialise with the same sizes."
            )
        if attention_type != "self":
            raise ValueError(f"attention_type {attention_type!r} is not supported yet: self-attention only.")
        if attention_dropout:
            raise ValueError(
                f"attention_dropout={attention_dropout} is not supported: its pattern would depend on the layout. Use 0."
            )
        if k_channels != v_channels:
            raise ValueError(
                f"k_channels {k_channels} and v_channels {v_channels} differ: unequal head sizes (MLA) are not supported yet."
            )
        self.channels, self.attn_mask_type = k_channels, attn_mask_type
        self.softmax_scale = config.softmax_scale if softmax_scale is None else softmax_scale
        self.softmax_type = config.softmax_type
        self.window = config.window_of_layer(layer_number)
        check_window(self.window, attn_mask_type.is_causal)
        chosen = cp_comm_type or config.comm_type_of_layer(layer_number)
        levels = _levels(self.hierarchical_groups)
        self.cp_comm_type = check_comm_type(chosen, _size(self.cp_group), levels)
        heads = config.num_attention_heads // config.tensor_model_parallel_size
        check_heads_of(self.cp_comm_type, heads, _size(self.cp_group), levels)
        self.backend, self.deterministic = config.attention_backend, config.deterministic_mode

    def plan(self, layout: SequenceLayout) -> None:
        """Computes in advance what ``forward`` needs of a layout, so that a loader's thread can do it."""
        inner, _ = _moves(self.cp_comm_type, self.cp_group, self.hierarchical_groups)
        _plan(
            layout,
            dist.get_rank(self.cp_group),
            self.cp_comm_type,
            _size(inner),
            self.attn_mask_type.is_causal,
            self.window,
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        layout: SequenceLayout | None = None,
        *,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        softmax_offset: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        if self.channels is not None and query.shape[-1] != self.channels:
            raise ValueError(
                f"query has heads of size {query.shape[-1]}, but k_channels is {self.channels}. Leave k_channels out, or give that size."
            )
        if attention_mask is not None:
            raise ValueError(
                "attention_mask is not supported: a mask of size s x s is never built. Use attn_mask_type, and "
                "packed_seq_params or a layout with cu_seqlens to keep documents apart."
            )
        if attention_bias is not None:
            raise ValueError("attention_bias is not supported: no kernel here adds one. Leave it None.")
        if (softmax_offset is not None) != (self.softmax_type == "learnable"):
            raise ValueError(
                f"softmax_offset is {'None' if softmax_offset is None else 'given'}, softmax_type is {self.softmax_type!r}: "
                "'learnable' takes the sinks of this rank's query heads [n], and the other types take none."
            )
        if self.softmax_type == "off-by-one":
            softmax_offset = query.new_zeros(query.shape[-2])
        group = group_of_call(packed_seq_params, self.cp_group)
        levels = self.hierarchical_groups
        if group is not self.cp_group and self.cp_comm_type == "a2a+p2p" and group is not None:
            raise ValueError(
                "cp_comm_type 'a2a+p2p' with packed_seq_params.cp_group: the hierarchical groups belong to the model's own "
                "group. Use p2p, all_gather or a2a in models whose group changes."
            )
        check_packed(packed_seq_params, query.shape[1] if query.dim() == 4 else 1, layout)
        packed = query.dim() == 3
        if packed:
            query, key, value = (x.unsqueeze(1) for x in (query, key, value))
        if layout is None:
            layout = default_layout(self.cp_group, query.shape[0], packed_seq_params)
        causal = (attn_mask_type or self.attn_mask_type).is_causal
        check_padded_rows(packed_seq_params, layout.total, causal)
        context, lse = _attend(
            query,
            key,
            value,
            group=group,
            hierarchical_groups=levels,
            layout=layout,
            causal=causal,
            window=self.window,
            softmax_scale=self.softmax_scale,
            sinks=softmax_offset,
            cp_comm_type=self.cp_comm_type,
            deterministic=self.deterministic,
            backend=self.backend,
        )
        return (context.squeeze(1), lse.squeeze(0)) if packed else (context, lse)


def place_in_call(
    cp_group: dist.ProcessGroup, packed_seq_params: PackedSeqParams | None = None
) -> tuple[int, int]:
    """(this process's rank, number of ranks) in the context parallel group of a call.

    Args:
        cp_group: the model's group, which ``packed_seq_params`` may replace.

    Raises:
        ValueError: this process is not in the group of ``packed_seq_params``, or its sizes differ.
    """
    group = group_of_call(packed_seq_params, cp_group)
    return (0 if group is None else dist.get_rank(group)), _size(group)


def default_layout(
    cp_group: dist.ProcessGroup, rows: int, packed_seq_params: PackedSeqParams | None = None
) -> SequenceLayout:
    """Zigzag of the whole sequence, or of each padded document, as Megatron's callers cut their rows.

    Args:
        cp_group: the model's group, which ``packed_seq_params`` may replace.
        rows: number of this rank's rows.

    Raises:
        ValueError: ``packed_seq_params`` lacks boundaries, or the rows are no zigzag of a whole sequence.
    """
    ranks = _size(group_of_call(packed_seq_params, cp_group))
    if packed_seq_params is not None and packed_seq_params.qkv_format == "thd":
        cu = packed_seq_params.cu_seqlens_q
        padded = packed_seq_params.cu_seqlens_q_padded
        if cu is None and padded is None:
            raise ValueError("packed_seq_params with qkv_format 'thd' needs cu_seqlens_q.")
        return SequenceLayout.per_document_zigzag(
            padded if cu is None else cu, ranks, cu_seqlens_padded=cu if padded is None else padded
        )
    check_uncut(packed_seq_params, rows, ranks)
    return _zigzag(rows * ranks, ranks)


@functools.lru_cache(maxsize=64)
def _zigzag(total: int, ranks: int) -> SequenceLayout:
    """The zigzag layout of a size, cached so that all layers share the layout and its schedules."""
    layout = SequenceLayout.zigzag(total, ranks)
    if layout.padded_total != total:
        raise ValueError(
            f"{total // ranks} rows a rank over {ranks} ranks are no zigzag of a whole sequence: it needs an even "
            "number. Pass layout=SequenceLayout.zigzag(total, ranks), which says where the padding is."
        )
    return layout
