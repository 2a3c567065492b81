"""From a config to its three datasets: split in file order, blends, parts without a document."""

import numpy as np
import pytest

from longspan.config.load import make_config
from longspan.data.blend import BlendedDataset
from longspan.data.indexed import IndexedDatasetWriter
from longspan.data.loader import TokenDataset
from longspan.data.splits import named_files, open_parts, split_ranges
from longspan.errors import UserError


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """a: 100 documents of 10 tokens (document d holds token d), b: 40 of 10, none: 3 empty ones."""
    folder = tmp_path_factory.mktemp("sources")
    for name, documents, length in (("a", 100, 10), ("b", 40, 10), ("none", 3, 0)):
        with IndexedDatasetWriter(folder / name, np.uint16) as writer:
            for number in range(documents):
                writer.add_document(np.full(length, number))
    return folder


def parts(**values):
    reading = make_config({"sequence_len": 10, "vocab_size": 100, **values})
    assert not reading.problems
    return open_parts(reading.config)


def documents(data):
    """The numbers of the documents in a dataset: their token."""
    return sorted({t for i in range(len(data)) for t in data.row(i).tokens.tolist()})


def test_split_is_contiguous_in_file_order(files):
    train, valid, test = parts(data_path=[f"{files}/a"], split="80,15,5")
    assert documents(train) == list(range(80))
    assert documents(valid) == list(range(80, 95))
    assert documents(test) == list(range(95, 100))


def test_split_rounds_sums_of_shares():
    assert split_ranges(100, [0.969, 0.03, 0.001]) == [(0, 97), (97, 100), (100, 100)]
    assert split_ranges(1000, [0.969, 0.03, 0.001]) == [(0, 969), (969, 999), (999, 1000)]
    assert split_ranges(7, [1.0, 0.0, 0.0]) == [(0, 7), (7, 7), (7, 7)]


def test_the_default_split_may_leave_parts_empty_and_one_given_may_not(files):
    train, valid, test = parts(data_path=[f"{files}/a"])
    assert (len(documents(train)), len(documents(valid)), test) == (97, 3, None)
    with pytest.raises(
        UserError, match=r"split '969,30,1' leaves no document .* for test \(documents: 100 of"
    ):
        parts(data_path=[f"{files}/a"], split="969,30,1")
    with pytest.raises(UserError, match="for training"):
        parts(data_path=[f"{files}/none"])


def test_prefixes_without_weights_are_one_dataset(files):
    train, valid, _ = parts(data_path=[f"{files}/a", f"{files}/b"], split="50,50")
    assert type(train) is TokenDataset
    assert len(train) == 70
    assert documents(train) == list(range(50))
    assert documents(valid) == [*range(20, 40), *range(50, 100)]  # of b, of a


def test_weights_blend_every_part(files):
    train, valid, _ = parts(data_path=["0.25", f"{files}/a", "0.75", f"{files}/b"], split="90,10,0")
    assert isinstance(train, BlendedDataset)
    assert train.counts == (1, 3)
    assert len(train) == 90 + 36
    assert len(valid) == 10 + 4
    with pytest.raises(UserError, match="none: no document with a token in it for training, but a weight"):
        parts(data_path=["1", f"{files}/a", "1", f"{files}/none"])


def test_files_of_their_own_for_each_part(files):
    train, valid, test = parts(
        train_data_path=[f"{files}/a"], test_data_path=["1", f"{files}/a", "2", f"{files}/b"]
    )
    assert (len(train), valid, len(test)) == (100, None, 140)
    with pytest.raises(UserError, match="valid_data_path: no document"):
        parts(train_data_path=[f"{files}/a"], valid_data_path=[f"{files}/none"])


def test_weights_of_datasets(files):
    sources = [{"path": f"{files}/a", "weight": 1}, {"path": f"{files}/b", "weight": 0.5}]
    train, valid, test = parts(datasets=sources, val_set_size=0.1)
    assert isinstance(train, BlendedDataset)
    assert train.counts == (2, 1)
    assert (len(train), len(valid), test) == (90 + 36, 10 + 4, None)
    assert not set(map(tuple, pairs(train))) & set(map(tuple, pairs(valid)))
    plain, *_ = parts(datasets=[{"path": f"{files}/a"}, {"path": f"{files}/b"}], val_set_size=0.1)
    assert type(plain) is TokenDataset


def pairs(blend):
    """(member, document) of every row."""
    return [(n, int(m.row(i).tokens[0])) for n, m in enumerate(blend.members) for i in range(len(m))]


def test_mock_data_is_cut_too():
    train, valid, test = parts(mock_data=True, sequence_len=64)
    assert train.num_tokens > 10 * valid.num_tokens > 10 * test.num_tokens > 0
    assert max(train.row(0).tokens) < 100


def test_every_file_is_named_once(files):
    reading = make_config({"data_path": ["1", f"{files}/a", "2", f"{files}/b"]})
    assert [name for name, _ in named_files(reading.config)] == [f"{files}/a", f"{files}/b"]
