"""Made-up documents: the same by seed, any range of any of them, learnable."""

import numpy as np
import pytest

from longspan.data.mock import MockDocuments


@pytest.mark.parametrize(("vocab", "length"), [(2, 1), (97, 50), (32768, 4096), (1000, 1_000_000)])
def test_any_length_and_vocabulary(vocab, length):
    data, again = MockDocuments(vocab, length, 3), MockDocuments(vocab, length, 3)
    assert len(data) == 2000
    assert data.num_tokens == int(data.document_lengths.sum())
    assert 1 <= data.document_lengths.min() <= data.document_lengths.max() <= 2 * length
    assert data.document_lengths.max() > length
    number = int(data.document_lengths.argmax())
    whole = data.read(number)
    assert len(whole) == data.document_lengths[number]
    assert 0 <= whole.min() <= whole.max() < vocab
    assert whole.tolist() == again.read(number).tolist()
    start, stop = len(whole) // 3, len(whole) // 2 + 1
    assert data.read(number, start, stop).tolist() == whole[start:stop].tolist()


def test_there_is_something_to_learn_at_every_distance():
    data = MockDocuments(1000, 2000, 3)
    long = [data.read(d) for d in range(400) if data.document_lengths[d] > 1000]
    tokens = np.concatenate(long)
    assert (tokens < 32).mean() > 0.3  # of 1000: small numbers are frequent
    assert np.mean([np.mean(np.diff(d) % 1000 == 1) for d in long]) > 0.6  # mostly the next number
    for document in long[:20]:  # and the whole comes again
        assert any(np.array_equal(document[p:], document[:-p]) for p in range(16, 129))
    assert data.read(0).tolist() != MockDocuments(1000, 2000, 4).read(0).tolist()
