"""The documents of a plan: all of one length, so that every micro-batch is the same work."""

from __future__ import annotations

import numpy as np

from longspan.config.run import Run
from longspan.data.loader import TokenDataset

#: any token but the one that ends a document, which is 0
_TOKEN = 1


class EvenDocuments:
    """Documents of equal length, with the interface of ``IndexedDataset``."""

    def __init__(self, length: int, documents: int = 64):
        self.document_lengths = np.full(documents, length, np.int64)

    def __len__(self) -> int:
        return len(self.document_lengths)

    def read(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        stop = int(self.document_lengths[document]) if stop is None else stop
        return np.full(stop - start, _TOKEN, np.int64)


def even_samples(run: Run, document_len: int | None = None) -> TokenDataset:
    """Training samples of a run; packs hold documents of ``document_len`` tokens, by default one a row."""
    length = min(document_len or run.batch.sequence_len, run.batch.sequence_len)
    return TokenDataset(
        [EvenDocuments(length)],  # type: ignore[list-item]
        run.batch.sequence_len,
        run.config.seed,
        sample_packing=run.config.sample_packing,
    )
