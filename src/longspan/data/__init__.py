"""Data: text -> ``.bin``/``.idx`` token files -> rows -> the batches of a rank.

- `indexed`: Megatron's token files, read and written.
- `text`: documents from files, tokenizers, and the cached way from one to the other.
- `packing`: which tokens make a row, with shifted labels; `Batch`.
- `loader`: which rows a rank trains on at which step.
"""

from longspan.data.indexed import IndexedDataset, IndexedDatasetWriter, best_dtype
from longspan.data.loader import Prefetcher, TokenDataset
from longspan.data.packing import IGNORE_INDEX, Batch, Packs, Row, Stream, make_batch, plan_packs, plan_stream
from longspan.data.text import (
    eod_id,
    find_sources,
    iter_documents,
    load_tokenizer,
    prepare_dataset,
    tokenize_to_indexed,
    train_tokenizer,
)

__all__ = [
    "IGNORE_INDEX",
    "Batch",
    "IndexedDataset",
    "IndexedDatasetWriter",
    "Packs",
    "Prefetcher",
    "Row",
    "Stream",
    "TokenDataset",
    "best_dtype",
    "eod_id",
    "find_sources",
    "iter_documents",
    "load_tokenizer",
    "make_batch",
    "plan_packs",
    "plan_stream",
    "prepare_dataset",
    "tokenize_to_indexed",
    "train_tokenizer",
]
