"""Attention over a sequence cut over the context parallel group.

``context_parallel_attention`` is the function, ``DotProductAttention`` the module with
Megatron's signature. Both pick a layout, a schedule, a kernel and a way to move, and refuse
what no path supports before anything is sent.
"""

from __future__ import annotations

import functools
import math

import torch.distributed as dist
from torch import Tensor, nn

from longspan.config.model import (
    CP_COMM_TYPES,
    SUPPORTED_COMM_TYPES,
    AttnMaskType,
    TransformerConfig,
    normal_comm_type,
)
from longspan.context_parallel.kernels import select_kernel
from longspan.context_parallel.keys import MoveKeys
from longspan.context_parallel.layout import SequenceLayout
from longspan.context_parallel.packed import PackedSeqParams
from longspan.context_parallel.schedule import Schedule
from longspan.mesh.installed import process_groups
from longspan.mesh.mesh import ProcessGroupCollection


def check_comm_type(cp_comm_type: str, ranks: int) -> str:
    """The normal name of a communication type; ValueError for one that cannot serve ``ranks`` ranks."""
    name = normal_comm_type(cp_comm_type)
    if name not in CP_COMM_TYPES:
        raise ValueError(f"cp_comm_type {cp_comm_type!r}: one of {', '.join(CP_COMM_TYPES)}.")
    if ranks > 1 and name not in SUPPORTED_COMM_TYPES:
        raise ValueError(
            f"cp_comm_type {name!r} is not supported yet with {ranks} context parallel ranks. "
            f"Use {' or '.join(SUPPORTED_COMM_TYPES)}."
        )
    return name


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, layout: SequenceLayout, ranks: int) -> None:
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        raise ValueError(
            f"query, key and value have {q.dim()}, {k.dim()} and {v.dim()} dims: all three are [s, b, heads, d], or "
            "[t, heads, d] for one pack."
        )
    if not q.dtype == k.dtype == v.dtype or not q.device == k.device == v.device:
        raise ValueError(
            f"query is {q.dtype} on {q.device}, key {k.dtype} on {k.device}, value {v.dtype} on {v.device}: they must be alike."
        )
    if q.shape[1] != k.shape[1]:
        raise ValueError(f"query has a batch of {q.shape[1]}, key of {k.shape[1]}: they must be equal.")
    if layout.ranks != ranks:
        raise ValueError(
            f"the layout is made for {layout.ranks} ranks, the context parallel group has {ranks}. "
            "Make the layout with the group's size."
        )
    if q.shape[0] != layout.local_length or k.shape[0] != q.shape[0] or v.shape[0] != q.shape[0]:
        raise ValueError(
            f"query, key and value have {q.shape[0]}, {k.shape[0]} and {v.shape[0]} rows; the {layout.name} layout "
            f"of {layout.total} tokens over {ranks} ranks holds {layout.local_length} a rank. Shard all three with "
            "layout.shard(tensor, rank)."
        )
    if k.shape[1:] != v.shape[1:] or q.shape[-1] != k.shape[-1]:
        raise ValueError(
            f"query {tuple(q.shape)}, key {tuple(k.shape)} and value {tuple(v.shape)}: head sizes must be equal, "
            "and key and value alike. Unequal head sizes (MLA) are not supported yet."
        )
    if q.shape[-2] % k.shape[-2]:
        raise ValueError(
            f"{q.shape[-2]} query heads do not divide by {k.shape[-2]} key/value heads: each key/value head "
            "serves the same number of query heads."
        )


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: dist.ProcessGroup,
    layout: SequenceLayout,
    causal: bool,
    softmax_scale: float | None,
    cp_comm_type: str,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """q, k, v [s, b, heads, d] -> out [s, b, n, d], lse [b, n, s]."""
    ranks = dist.get_world_size(group)
    comm_type = check_comm_type(cp_comm_type, ranks)
    _check_shapes(q, k, v, layout, ranks)
    schedule = Schedule.of(layout, dist.get_rank(group), causal=causal, all_at_once=comm_type == "all_gather")
    kernel = select_kernel(q.device, q.dtype, q.shape[-1], backend)
    scale = softmax_scale if softmax_scale is not None else 1.0 / math.sqrt(q.shape[-1])
    return MoveKeys.apply(q, k, v, schedule, group, kernel, scale)


def context_parallel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: dist.ProcessGroup,
    layout: SequenceLayout,
    causal: bool = True,
    window: int | None = None,
    softmax_scale: float | None = None,
    cp_comm_type: str = "p2p",
    deterministic: bool = False,
) -> tuple[Tensor, Tensor]:
    """Exact attention for one pack of documents cut over a group of ranks.

    A query sees the keys of its own document (up to itself when ``causal``).

    Args:
        q: [t, n, d], this rank's rows of the pack as ``layout`` holds them.
        k, v: [t, m, d]; m divides n.
        group: the ranks the pack is cut over.
        layout: who holds which tokens.
        window: sliding windows are not supported yet.
        softmax_scale: None is 1 / sqrt(d).
        cp_comm_type: ``p2p`` (step by step) or ``all_gather`` (all at once).
        deterministic: two runs give equal bits. Gradients are always summed in a fixed
            order here, so this only matters to kernels that are not deterministic themselves.

    Returns:
        out [t, n, d] in q's dtype and lse [n, t] (natural log, at least float32). Padding
        rows are 0 and -inf.

    Raises:
        ValueError: shapes, layout, type or window do not fit; nothing was sent.
    """
    if q.dim() != 3:
        raise ValueError(
            f"q has shape {tuple(q.shape)}; one pack is [t, n, d]. Batches go through DotProductAttention."
        )
    if window is not None:
        raise ValueError(f"window={window}: sliding windows are not supported yet. Use window=None.")
    if deterministic and q.device.type == "cuda":
        raise ValueError(
            "deterministic=True is not supported on CUDA yet: PyTorch's flash backward uses atomics."
        )
    out, lse = _attend(
        q.unsqueeze(1),
        k.unsqueeze(1),
        v.unsqueeze(1),
        group=group,
        layout=layout,
        causal=causal,
        softmax_scale=softmax_scale,
        cp_comm_type=cp_comm_type,
    )
    return out.squeeze(1), lse.squeeze(0)


def check_packed(params: PackedSeqParams | None, query: Tensor, layout: SequenceLayout | None) -> None:
    """Refuses packing that would be ignored: a format that is not known, boundaries beside a layout, two kinds of them."""
    if params is None:
        return
    cu = params.cu_seqlens_q
    given = [x for x in (cu, params.cu_seqlens_kv, params.cu_seqlens_q_padded) if x is not None]
    if params.qkv_format not in ("thd", "sbhd") and (given or params.qkv_format is not None):
        raise ValueError(
            f"packed_seq_params.qkv_format {params.qkv_format!r}: 'thd' for packed documents ([t, heads, d]), 'sbhd' otherwise."
        )
    if layout is not None and given:
        raise ValueError(
            "packed_seq_params with boundaries and layout= both say where documents end. Give one of them."
        )
    for name in ("cu_seqlens", "cu_seqlens_{}_padded"):
        ours, theirs = (
            getattr(params, name.format(x) if "{}" in name else f"{name}_{x}") for x in ("q", "kv")
        )
        if theirs is not None and (ours is None or ours.tolist() != theirs.tolist()):
            raise ValueError(
                "packed_seq_params: the boundaries of queries and of keys differ. Cross-attention is not supported yet."
            )
    batch = query.shape[1] if query.dim() == 4 else 1
    if params.qkv_format == "thd" and batch != 1:
        raise ValueError(f"packed documents (thd) come as one row [t, heads, d], not as a batch of {batch}.")
    if params.qkv_format == "sbhd" and cu is not None and len(cu) - 1 != batch:
        raise ValueError(
            f"qkv_format 'sbhd' with {len(cu) - 1} documents in a batch of {batch}: each row is one document. Use 'thd' for "
            "several documents in a row."
        )


class DotProductAttention(nn.Module):
    """Megatron's core attention (there: ``TEDotProductAttention``), without parameters.

    ``forward(query, key, value) -> (context, softmax_lse)``: query [s, b, n, d], key and
    value [s, b, m, d], s this rank's rows; context has query's shape, lse is [b, n, s]. With
    ``qkv_format="thd"``: [t, n, d] and lse [n, t].

    The rows are taken as zigzag of the whole sequence (``sbhd``) or of each padded document
    (``thd``); ``layout=`` says otherwise.

    Args:
        layer_number: from 1; picks the communication type where config gives a list.
        softmax_scale: None is 1 / sqrt(head size).
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType = AttnMaskType.causal,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        softmax_scale: float | None = None,
    ):
        super().__init__()
        self.cp_group = process_groups(pg_collection).cp
        if config.context_parallel_size > dist.get_world_size(self.cp_group):
            raise ValueError(
                f"config.context_parallel_size is {config.context_parallel_size}, the context parallel group has "
                f"{dist.get_world_size(self.cp_group)} ranks. Initialise with the same sizes."
            )
        self.causal = attn_mask_type.is_causal
        self.softmax_scale = softmax_scale
        self.cp_comm_type = check_comm_type(
            cp_comm_type or config.comm_type_of_layer(layer_number), dist.get_world_size(self.cp_group)
        )
        self.backend = config.attention_backend

    def default_layout(self, rows: int, packed_seq_params: PackedSeqParams | None = None) -> SequenceLayout:
        """Zigzag of the whole sequence, or of each padded document: what Megatron-style callers hand in.

        Args:
            rows: this rank's rows.
        """
        ranks = dist.get_world_size(self.cp_group)
        if packed_seq_params is not None and packed_seq_params.qkv_format == "thd":
            cu = packed_seq_params.cu_seqlens_q
            padded = packed_seq_params.cu_seqlens_q_padded
            if cu is None and padded is None:
                raise ValueError("packed_seq_params with qkv_format 'thd' needs cu_seqlens_q.")
            return SequenceLayout.per_document_zigzag(
                padded if cu is None else cu, ranks, cu_seqlens_padded=cu if padded is None else padded
            )
        return _zigzag(rows * ranks, ranks)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        layout: SequenceLayout | None = None,
    ) -> tuple[Tensor, Tensor]:
        if attention_mask is not None:
            raise ValueError(
                "attention_mask is not supported: a mask of size s x s is never built. Use attn_mask_type, and "
                "packed_seq_params or a layout with cu_seqlens to keep documents apart."
            )
        group = self.cp_group
        if packed_seq_params is not None and (
            packed_seq_params.cp_group is not None or packed_seq_params.local_cp_size is not None
        ):
            raise ValueError(
                "packed_seq_params.cp_group and local_cp_size (context parallelism that changes from call to call) "
                "are not supported yet. Leave them None."
            )
        check_packed(packed_seq_params, query, layout)
        packed = query.dim() == 3
        if packed:
            query, key, value = (x.unsqueeze(1) for x in (query, key, value))
        if layout is None:
            layout = self.default_layout(query.shape[0], packed_seq_params)
        context, lse = _attend(
            query,
            key,
            value,
            group=group,
            layout=layout,
            causal=self.causal,
            softmax_scale=self.softmax_scale,
            cp_comm_type=self.cp_comm_type,
            backend=self.backend,
        )
        return (context.squeeze(1), lse.squeeze(0)) if packed else (context, lse)


@functools.lru_cache(maxsize=64)
def _zigzag(total: int, ranks: int) -> SequenceLayout:
    """Zigzag layouts by size, so that every layer reads one schedule."""
    layout = SequenceLayout.zigzag(total, ranks)
    if layout.padded_total != total:
        raise ValueError(
            f"{total // ranks} rows a rank over {ranks} ranks are no zigzag of a whole sequence: it needs an even "
            "number. Pass layout=SequenceLayout.zigzag(total, ranks), which says where the padding is."
        )
    return layout
