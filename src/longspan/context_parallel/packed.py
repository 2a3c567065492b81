"""PackedSeqParams: how a pack of documents is described, by Megatron's field names."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor


@dataclass
class PackedSeqParams:
    """The documents of a pack.

    Attributes:
        qkv_format: ``"thd"``: tensors are [t, n, d], documents one after another; ``"sbhd"``:
            [s, b, n, d], no packing.
        cu_seqlens_q, cu_seqlens_kv: document boundaries without padding, int32 [d + 1].
        cu_seqlens_q_padded, cu_seqlens_kv_padded: boundaries with the padding behind each document.
        max_seqlen_q, max_seqlen_kv: the longest document, in tokens.
        local_cp_size, cp_group: context parallelism of this call, where it differs from the model's.
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
