"""Data: text -> ``.bin``/``.idx`` token files -> rows -> the batches of a rank.

- `indexed`: Megatron's token files, read and written.
- `text`: documents from files, tokenizers, and the cached step from documents to token files.
- `sources`, `json_lines`: records from files, folders and the hub.
- `instruct`, `chat`, `turns`, `templates`: from a record to a sample, and its learned tokens.
- `limited`: calls within limits of time and memory, for rendering chat templates.
- `samples`: samples in token files, with files of masks beside them.
- `packing`: the tokens of each row, with shifted labels; `Batch`.
- `loader`: the rows that each rank trains on at each step; `blend`: several datasets mixed by weights.
- `splits`: from a config to its datasets; `mock`: made-up datasets.
- `preprocess`, `merge`, `gpt2`: parts of `longspan prepare` and `longspan merge`.

Names are imported at their first use, because a check that a file exists must not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from longspan.data.indexed import IndexedDataset, IndexedDatasetWriter, best_dtype
    from longspan.data.loader import Prefetcher, TokenDataset
    from longspan.data.packing import Batch, Packs, Row, Stream, make_batch, plan_packs, plan_stream
    from longspan.data.samples import open_masks, prepare_samples
    from longspan.data.text import (
        eod_id,
        find_sources,
        iter_documents,
        load_tokenizer,
        prepare_dataset,
        tokenize_to_indexed,
        train_tokenizer,
        vocabulary_size,
    )

_NAMES = {
    "indexed": ("IndexedDataset", "IndexedDatasetWriter", "best_dtype"),
    "loader": ("Prefetcher", "TokenDataset"),
    "samples": ("open_masks", "prepare_samples"),
    "packing": ("Batch", "Packs", "Row", "Stream", "make_batch", "plan_packs", "plan_stream"),
    "text": (
        "eod_id",
        "find_sources",
        "iter_documents",
        "load_tokenizer",
        "prepare_dataset",
        "tokenize_to_indexed",
        "train_tokenizer",
        "vocabulary_size",
    ),
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names}

__all__ = [
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
    "open_masks",
    "plan_packs",
    "plan_stream",
    "prepare_dataset",
    "prepare_samples",
    "tokenize_to_indexed",
    "train_tokenizer",
    "vocabulary_size",
]


def __getattr__(name: str):
    if name in _MODULES:
        return getattr(importlib.import_module(f"longspan.data.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'longspan.data' has no attribute {name!r}")
