"""Made-up documents, to try or time a layout without data and without a tokenizer.

They contain patterns at every distance. Small token numbers are frequent (about 1/number), a token
is mostly followed by the next number, and each document repeats itself with its own period, so that
a model that attends to enough earlier tokens can predict the next token.
"""

from __future__ import annotations

import math

import numpy as np

MOCK = 3
"""The purpose of these random numbers, among those of `loader`."""


class MockDocuments:
    """Documents with the interface of `IndexedDataset`, computed when they are read.

    Args:
        sequence_len: documents have 16 to 2 * sequence_len tokens; short documents are more frequent.
        documents: the number of documents.
    """

    def __init__(self, vocab_size: int, sequence_len: int, seed: int, documents: int = 2000):
        self.vocab_size, self.seed = vocab_size, seed
        generator = np.random.Generator(np.random.PCG64([seed, MOCK]))
        low, high = math.log(min(16, 2 * sequence_len)), math.log(2 * sequence_len + 1)
        self.document_lengths = np.exp(generator.uniform(low, high, documents)).astype(np.int64)
        """int64 ``[documents]``: tokens of each document."""
        self.num_tokens = int(self.document_lengths.sum())

    def __len__(self) -> int:
        """The number of documents."""
        return len(self.document_lengths)

    def token_range(self, most: int) -> tuple[int, int]:
        """The smallest and the largest possible token."""
        return 0, self.vocab_size - 1

    def read(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Tokens ``[start, stop)`` of a document, int64 ``[stop - start]``; computes no other token of it."""
        stop = int(self.document_lengths[document]) if stop is None else stop
        generator = np.random.Generator(np.random.PCG64([self.seed, MOCK, document]))
        period = int(generator.integers(16, 129))
        # There are runs of successive numbers; the first number has a probability of about 1 / number.
        starts = generator.random(period) < 0.25
        starts[0] = True
        begin = np.maximum.accumulate(np.where(starts, np.arange(period), 0))
        base = (self.vocab_size ** generator.random(period)).astype(np.int64) - 1
        motif = (base[begin] + np.arange(period) - begin) % self.vocab_size
        return motif[np.arange(start, stop) % period]
