"""Context parallelism: one sequence, or one pack of documents, cut over many ranks.

layout (who holds which tokens; balance deals out chunks) -> tiles, schedule (what to
receive, what to compute) -> calls, kernels (one call of attention) -> keys, heads (moving
rows) -> attention (all of it behind one function; checks say no).
"""

from longspan.context_parallel import hybrid
from longspan.context_parallel.attention import DotProductAttention, context_parallel_attention
from longspan.context_parallel.layout import SequenceLayout
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
    "get_batch_on_this_cp_rank",
    "get_packed_seq_params",
    "get_padding",
    "hybrid",
]
