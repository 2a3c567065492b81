"""Context parallelism: one sequence, or one pack of documents, cut over many ranks.

layout (who holds which tokens) -> schedule (what to receive, what to compute) -> kernels
(one tile of attention) -> keys (moving rows) -> attention (all of it behind one call).
"""

from longspan.context_parallel.attention import DotProductAttention, context_parallel_attention
from longspan.context_parallel.layout import SequenceLayout
from longspan.context_parallel.packed import PackedSeqParams
from longspan.context_parallel.schedule import Schedule

__all__ = [
    "DotProductAttention",
    "PackedSeqParams",
    "Schedule",
    "SequenceLayout",
    "context_parallel_attention",
]
