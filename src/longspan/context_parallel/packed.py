"""Packs of documents with Megatron's names: parameters, padding, and a rank's slices of a batch.

These functions are for code that was written for Megatron. longspan itself needs no such padding,
because a ``SequenceLayout`` takes any lengths.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from longspan.context_parallel.layout import SequenceLayout
from longspan.mesh.default_groups import process_groups

#: An entry of a batch whose name begins with one of these words describes the batch and holds no tokens.
METADATA = ("cu_seqlens", "cu_seq_lens", "max_seqlen", "max_length", "local_cp_size")


@dataclass
class PackedSeqParams:
    """The documents of a pack.

    Attributes:
        qkv_format: ``"thd"``: tensors are [t, n, d], documents one after another; ``"sbhd"``:
            [s, b, n, d], no packing.
        cu_seqlens_q, cu_seqlens_kv: document boundaries without padding, int32 [d + 1].
        cu_seqlens_q_padded, cu_seqlens_kv_padded: boundaries with the padding after each document,
            int32 [d + 1].
        max_seqlen_q, max_seqlen_kv: the longest document, in tokens.
        local_cp_size, cp_group: the context parallel size and group of this call, if they differ from
            the model's; a size of 1 without a group means no context parallelism.
    """

    qkv_format: str | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_kv: Tensor | None = None
    cu_seqlens_q_padded: Tensor | None = None
    cu_seqlens_kv_padded: Tensor | None = None
    max_seqlen_q: int | None = None
    max_seqlen_kv: int | None = None
    local_cp_size: int | None = None
    cp_group: dist.ProcessGroup | None = None

    def group_only(self) -> PackedSeqParams:
        """The parameters of the group only, to pass on with a layout that was made from the documents."""
        return PackedSeqParams(local_cp_size=self.local_cp_size, cp_group=self.cp_group)


def get_padding(
    seq_len: int,
    cp_size: int,
    tp_size: int,
    has_sp: bool,
    decoder_tp_comm_overlap: bool = False,
    decoder_seq_len: int | None = None,
    fp8_enabled: bool = False,
    fp8_recipe: str | None = None,
) -> int:
    """The number of tokens to add, so that a sequence divides as Megatron's layers require.

    Args:
        has_sp: the model uses sequence parallelism, so tp_size must divide the rows.
        decoder_tp_comm_overlap: with has_sp, pad to ``decoder_seq_len`` at all sizes.
        fp8_enabled, fp8_recipe: without context and sequence parallelism, 16 (32 for ``"mxfp8"``)
            must divide the rows.

    Raises:
        ValueError: decoder_tp_comm_overlap without a decoder_seq_len of at least seq_len.
    """
    if has_sp and decoder_tp_comm_overlap:
        if decoder_seq_len is None or decoder_seq_len < seq_len:
            raise ValueError(
                f"decoder_seq_len={decoder_seq_len} with decoder_tp_comm_overlap: give the padded length, at least "
                f"seq_len ({seq_len})."
            )
        return decoder_seq_len - seq_len
    unit = (2 * cp_size if cp_size > 1 else 1) * (tp_size if has_sp else 1)
    if cp_size == 1 and not has_sp and fp8_enabled:
        unit = 32 if fp8_recipe == "mxfp8" else 16
    return -seq_len % unit


def get_packed_seq_params(
    tokens: Tensor,
    img_seq_len: int,
    padding_needed: int,
    cp_size: int,
    use_packed_sequence: bool = False,
) -> PackedSeqParams:
    """Describes a batch whose rows are one document each, text and image tokens together.

    Args:
        tokens: [b, s], the text tokens, padding included.
        img_seq_len: image tokens of each row, beside those in ``tokens``; 0 if ``tokens`` hold them already.
        padding_needed: number of tokens at the end of each row that are padding.
        use_packed_sequence: rows are packed even without padding.

    Returns:
        ``thd`` with padded boundaries if cp_size > 1 and there is padding or packing, else ``sbhd``.

    Raises:
        ValueError: img_seq_len is negative, or padding_needed is negative or leaves no token of a row.
    """
    if img_seq_len < 0:
        raise ValueError(
            f"img_seq_len={img_seq_len}: the number of image tokens beside the text of each row, so 0 or more."
        )
    rows, padded = tokens.shape[0], tokens.shape[1] + img_seq_len
    real = padded - padding_needed
    if real < 1 or padding_needed < 0:
        raise ValueError(
            f"padding_needed={padding_needed} of {padded} tokens a row: at least one token must be left, and it is not negative."
        )
    edges = torch.arange(rows + 1, dtype=torch.int32, device=tokens.device)
    padded_edges, kind = None, "sbhd"
    if cp_size > 1 and (padding_needed > 0 or use_packed_sequence):
        padded_edges, kind = edges * padded, "thd"
    return PackedSeqParams(
        qkv_format=kind,
        cu_seqlens_q=edges * real,
        cu_seqlens_kv=edges * real,
        cu_seqlens_q_padded=padded_edges,
        cu_seqlens_kv_padded=padded_edges,
        max_seqlen_q=padded,
        max_seqlen_kv=padded,
    )


def check_sequence_alignment(sequence_len: int, cp_size: int) -> int:
    """The number of tokens that a rank holds of a sequence cut zigzag.

    Raises:
        ValueError: 2 x cp_size does not divide the length; the message names the next length that works.
    """
    if sequence_len < 1 or cp_size < 1:
        raise ValueError(f"sequence_len {sequence_len} over cp_size {cp_size}: both are at least 1.")
    unit = 2 * cp_size if cp_size > 1 else 1
    if sequence_len % unit:
        raise ValueError(
            f"sequence_len {sequence_len} does not divide by 2 x cp_size = {unit} (zigzag gives each rank two chunks). "
            f"The next length that does is {-(-sequence_len // unit) * unit}."
        )
    return sequence_len // cp_size


def get_batch_on_this_cp_rank(
    batch: dict[str, Any], cp_size: int | None = None, cp_rank: int | None = None
) -> dict[str, Any]:
    """[b, s, ..] tensors -> [b, s / cp, ..]: this rank's zigzag slices of a batch.

    The sequence is cut as a whole, even if ``cu_seqlens`` names several documents: its layout is
    ``SequenceLayout.zigzag(s, cp, cu_seqlens=...)``. For ``thd``, where each document is cut by itself, use
    ``SequenceLayout.per_document_zigzag(cu_seqlens, cp).shard``.

    Args:
        batch: tensors by name (None stays None); a 4-D ``attention_mask`` [b, 1, s, s] is cut along its
            queries. Entries whose names begin with a word of ``METADATA``, and single numbers, stay the same.
        cp_size, cp_rank: None takes the size or rank of the installed context parallel group.

    Raises:
        ValueError: 2 x cp_size does not divide s, two tensors have different lengths, a tensor has too few
            dims, or there is no such rank.
    """
    if cp_size is None or cp_rank is None:
        group = process_groups().cp
        cp_size = dist.get_world_size(group) if cp_size is None else cp_size
        cp_rank = dist.get_rank(group) if cp_rank is None else cp_rank
    if not 0 <= cp_rank < cp_size:
        raise ValueError(f"cp_rank {cp_rank} of cp_size {cp_size}: from 0 to {cp_size - 1}.")
    dims = {
        name: 2 if name == "attention_mask" and value.dim() == 4 else 1
        for name, value in batch.items()
        if isinstance(value, Tensor) and value.dim() > 0 and not name.startswith(METADATA)
    }
    for name, dim in dims.items():
        if batch[name].dim() <= dim:
            raise ValueError(
                f"batch[{name!r}] has shape {tuple(batch[name].shape)}: a batch holds tensors [b, s, ..]."
            )
    lengths = {name: batch[name].shape[dim] for name, dim in dims.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(
            "the tensors of a batch have different lengths: "
            + ", ".join(f"{name} {length}" for name, length in lengths.items())
            + " tokens a row. Give the whole sequence of each (labels are shifted, not shortened, before the cut)."
        )
    if cp_size == 1:
        return batch
    cut = dict(batch)
    for name, dim in dims.items():
        length = lengths[name]
        if length % (2 * cp_size):
            raise ValueError(
                f"batch[{name!r}] has {length} tokens a row, which does not divide by 2 x cp_size = {2 * cp_size}. Pad it to "
                f"{-(-length // (2 * cp_size)) * 2 * cp_size}, or use SequenceLayout.zigzag(total, ranks).shard, which takes "
                "any length."
            )
        cut[name] = SequenceLayout.zigzag(length, cp_size).shard(batch[name], cp_rank, dim=dim)
    return cut
