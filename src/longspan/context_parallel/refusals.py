"""Checks of context parallel attention, made before anything is sent (invariant I5).

Every refusal is a ValueError that names the wrong value, the rule and the remedy.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor

from longspan.config.model import CP_COMM_TYPES, hierarchy_proposal, normal_comm_type
from longspan.context_parallel.layout import SequenceLayout
from longspan.context_parallel.move_heads import check_heads
from longspan.context_parallel.packed import PackedSeqParams


def check_comm_type(cp_comm_type: str, ranks: int, levels: Sequence[int] | None) -> str:
    """The normal name of a communication type; ValueError for a type that does not work with ``ranks`` ranks.

    Args:
        levels: sizes of the hierarchical groups; None without such groups.
    """
    name = normal_comm_type(cp_comm_type)
    if name not in CP_COMM_TYPES:
        raise ValueError(f"cp_comm_type {cp_comm_type!r}: one of {', '.join(CP_COMM_TYPES)}.")
    if name != "a2a+p2p" or ranks == 1:
        return name
    if not levels:
        raise ValueError(
            f"cp_comm_type 'a2a+p2p' with {ranks} context parallel ranks needs hierarchical_context_parallel_sizes "
            f"[inner a2a, outer p2p]: for example {hierarchy_proposal(ranks)}."
        )
    if len(levels) != 2 or levels[0] * levels[1] != ranks:
        raise ValueError(
            f"cp_comm_type 'a2a+p2p' with {ranks} context parallel ranks has hierarchical groups of {list(levels)}: it takes "
            f"two levels whose product is {ranks}, for example {hierarchy_proposal(ranks)}."
        )
    return name


def check_window(window: int | None, causal: bool) -> None:
    """Refuses a window that is below 1, or that is used with full attention."""
    if window is not None and (not isinstance(window, int) or window < 1):
        raise ValueError(f"window={window}: a window holds at least the query itself, so it is 1 or more.")
    if window is not None and not causal:
        raise ValueError(
            f"window={window} with full attention is not supported: a sliding window looks back, so it needs causal=True."
        )


def check_heads_of(name: str, heads: int, ranks: int, levels: Sequence[int] | None) -> None:
    """Refuses to move query heads if the number of ranks that exchange them does not divide their number."""
    if ranks > 1 and name == "a2a":
        check_heads(heads, ranks)
    if ranks > 1 and name == "a2a+p2p" and levels:
        check_heads(heads, levels[0], of=ranks)


def check_shapes(q: Tensor, k: Tensor, v: Tensor, layout: SequenceLayout, ranks: int) -> None:
    """Refuses tensors that do not fit each other or the layout. All three must be [s, b, heads, d]."""
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        raise ValueError(
            f"query, key and value have {q.dim()}, {k.dim()} and {v.dim()} dims: all three are [s, b, heads, d], or "
            "all three [t, heads, d] for one pack."
        )
    if not q.dtype == k.dtype == v.dtype or not q.device == k.device == v.device:
        raise ValueError(
            f"query is {q.dtype} on {q.device}, key {k.dtype} on {k.device}, value {v.dtype} on {v.device}: they must be alike."
        )
    if q.shape[1] != k.shape[1]:
        raise ValueError(f"query has a batch of {q.shape[1]}, key of {k.shape[1]}: they must be equal.")
    check_rows("query", q.shape[0], layout, ranks)
    if k.shape[0] != q.shape[0] or v.shape[0] != q.shape[0]:
        raise ValueError(
            f"query, key and value have {q.shape[0]}, {k.shape[0]} and {v.shape[0]} rows; the three are alike. "
            "Cross-attention is not supported yet."
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


def check_sinks(sinks: Tensor | None, q: Tensor) -> None:
    """Refuses sinks that are not one number for each query head."""
    if sinks is not None and (tuple(sinks.shape) != (q.shape[-2],) or sinks.device != q.device):
        raise ValueError(
            f"sinks {tuple(sinks.shape)} on {sinks.device}, query of {q.shape[-2]} heads on {q.device}: one number for each "
            "query head of this rank, on the same device."
        )


def check_rows(what: str, rows: int, layout: SequenceLayout, ranks: int) -> None:
    """Refuses rows that are not one rank's part of the layout, above all a sequence that has not been cut."""
    if layout.ranks != ranks:
        raise ValueError(
            f"the layout is made for {layout.ranks} ranks, the context parallel group has {ranks}. "
            "Make the layout with the group's size."
        )
    if rows != layout.local_length:
        whole = rows in (layout.total, layout.padded_total)
        raise ValueError(
            f"{what} has {rows} rows; the {layout.name} layout of {layout.total} tokens over {ranks} ranks holds "
            f"{layout.local_length} a rank. {'These are all of them, not cut yet. ' if whole else ''}"
            "Cut every tensor with layout.shard(tensor, rank)."
        )


def check_uncut(params: PackedSeqParams | None, rows: int, ranks: int) -> None:
    """Refuses an ``sbhd`` batch if a rank has as many rows as ``packed_seq_params`` names for all ranks."""
    if ranks == 1 or params is None or params.qkv_format != "sbhd":
        return
    # The number is compared first, because reading a tensor waits for the device, and each layer would do so.
    if params.max_seqlen_q and params.max_seqlen_q > rows:
        return
    edges = [x for x in (params.cu_seqlens_q, params.cu_seqlens_q_padded) if x is not None]
    lengths = [int(x.diff().max()) for x in edges if len(x) > 1]
    longest = max([*lengths, params.max_seqlen_q or 0])
    if 0 < longest <= rows:
        raise ValueError(
            f"each of {ranks} context parallel ranks has {rows} rows, together {rows * ranks}, but packed_seq_params gives "
            f"sequences of at most {longest}. The sequence was not cut: get_batch_on_this_cp_rank does it."
        )


def check_packed(params: PackedSeqParams | None, batch: int, layout: SequenceLayout | None) -> None:
    """Refuses packing that would be ignored: an unknown format, boundaries beside a layout, boundaries of
    queries and keys that differ, or boundaries that do not fit the batch."""
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
    if params.qkv_format == "thd" and batch != 1:
        raise ValueError(f"packed documents (thd) come as one row [t, heads, d], not as a batch of {batch}.")
    if params.qkv_format == "sbhd" and cu is not None and len(cu) - 1 != batch:
        raise ValueError(
            f"qkv_format 'sbhd' with {len(cu) - 1} documents in a batch of {batch}: each row is one document. Use 'thd' for "
            "several documents in a row."
        )


def check_padded_rows(params: PackedSeqParams | None, total: int, causal: bool) -> None:
    """Refuses full attention over ``sbhd`` rows that end with padding: every token would attend to it."""
    if causal or params is None or params.qkv_format != "sbhd" or params.cu_seqlens_q is None:
        return
    shortest = int(params.cu_seqlens_q.diff().min())
    if shortest < total:
        raise ValueError(
            f"qkv_format 'sbhd' with a row of {shortest} tokens padded to {total}: full attention would see the padding. "
            "Use 'thd' with cu_seqlens_q_padded, which keeps it out."
        )


def group_of_call(
    params: PackedSeqParams | None, default: dist.ProcessGroup | None
) -> dist.ProcessGroup | None:
    """The context parallel group of one call; None means that one rank holds the whole sequence.

    Args:
        params: may replace the group (``cp_group``) or switch context parallelism off (``local_cp_size=1``).
        default: the model's group.

    Raises:
        ValueError: this rank is not in ``cp_group``, or its size is not ``local_cp_size``.
    """
    if params is None or (params.cp_group is None and params.local_cp_size is None):
        return default
    group, size = params.cp_group, params.local_cp_size
    found = 1 if group is None else dist.get_world_size(group)
    if group is not None and dist.get_rank(group) < 0:
        raise ValueError(
            "packed_seq_params.cp_group: this rank is not in it. Give every rank the group it belongs to."
        )
    if size is not None and size != found:
        remedy = "Give the group in cp_group." if group is None else "The two must be equal."
        raise ValueError(
            f"packed_seq_params.local_cp_size is {size}, cp_group has {found} rank{'s' if found > 1 else ''}. {remedy}"
        )
    return group if found > 1 else None
