"""Context parallelism: one sequence, or one pack of documents, cut over many ranks.

layout (which rank holds which tokens; balance assigns chunks) -> tiles, schedule (which rows to
receive, which tiles to compute) -> calls, kernels (one call of attention) -> move_keys, move_heads
(moving rows) -> attention (one function that uses all of these, after the checks of refusals).
"""

from longspan.context_parallel import hybrid
from longspan.context_parallel.attention import DotProductAttention, context_parallel_attention
from longspan.context_parallel.layout import SequenceLayout
from longspan.context_parallel.multimodal import (
    expand_image_tokens,
    get_image_index,
    get_shifted_labels,
)
from longspan.context_parallel.packed import (
    PackedSeqParams,
    check_sequence_alignment,
    get_batch_on_this_cp_rank,
    get_packed_seq_params,
    get_padding,
)
from longspan.context_parallel.schedule import Schedule

__all__ = [
    "DotProductAttention",
    "PackedSeqParams",
    "Schedule",
    "SequenceLayout",
    "check_sequence_alignment",
    "context_parallel_attention",
    "expand_image_tokens",
    "get_batch_on_this_cp_rank",
    "get_image_index",
    "get_packed_seq_params",
    "get_padding",
    "get_shifted_labels",
    "hybrid",
]
