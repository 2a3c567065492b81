"""Which rank trains on what: the same tokens at a step, whatever the layout."""

import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.data.indexed import IndexedDataset, IndexedDatasetWriter
from longspan.data.loader import Prefetcher, TokenDataset
from longspan.data.packing import IGNORE_INDEX, EndOfDocument
from longspan.errors import UserError
from tiny import write_numbered


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two files with 60 documents of 0 to 49 tokens."""
    folder = tmp_path_factory.mktemp("data")
    lengths = (np.arange(60) * 37 % 50).tolist()  # number 0 and number 50 are empty
    one = write_numbered(folder / "one", lengths[:25], 1)
    return [one, write_numbered(folder / "two", lengths[25:], 1 + one.num_tokens)]


@pytest.fixture(scope="module")
def datasets(files):
    return {
        (packing, split): TokenDataset(files, 32, 5, packing, split, val_set_size=0.2)
        for packing in (True, False)
        for split in ("train", "validation")
    }


def tokens_of(dataset):
    rows = [dataset.row(i) for i in range(len(dataset))]
    return sorted(t for row in rows for t in row.tokens.tolist() if t)


def test_all_tokens_of_all_files(files):
    total = sum(f.num_tokens for f in files)
    for sample_packing in (True, False):
        dataset = TokenDataset(files, 32, 5, sample_packing)
        assert dataset.num_tokens == total
        assert tokens_of(dataset) == list(range(1, total + 1))
    assert len(dataset) == -(-total // 32)


@pytest.mark.parametrize("val_set_size", [0.2, 1, 7, 1e-9])
def test_splits_share_nothing(files, val_set_size):
    sides = [TokenDataset(files, 32, 5, True, split, val_set_size) for split in ("train", "validation")]
    assert not set(sides[0].documents) & set(sides[1].documents)
    assert len(sides[0].documents) + len(sides[1].documents) == 58  # two of the 60 are empty
    assert len(sides[1].documents) == {0.2: 12, 1: 1, 7: 7, 1e-9: 1}[val_set_size]
    total = sum(f.num_tokens for f in files)
    assert sorted(tokens_of(sides[0]) + tokens_of(sides[1])) == list(range(1, total + 1))
    # The same documents are held out whatever the rows are.
    assert np.array_equal(
        sides[1].documents, TokenDataset(files, 8, 5, False, "validation", val_set_size).documents
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "validation"}, "val_set_size is 0"),
        ({"val_set_size": 58}, "58 of 58 documents"),
        ({"val_set_size": 0.999}, "58 of 58 documents"),
        ({"val_set_size": -1}, "val_set_size is -1"),
        ({"val_set_size": 1.5}, "val_set_size is 1.5"),
        ({"split": "test"}, "'test'"),
        ({"seed": -1}, "seed is -1"),
        ({"sequence_len": 0}, "sequence_len is 0"),
        ({"datasets": []}, "no document"),
    ],
)
def test_bad_arguments(files, arguments, message):
    with pytest.raises(UserError, match=message):
        TokenDataset(**{"datasets": files, "sequence_len": 32, "seed": 0, **arguments})


def test_rows(datasets):
    for dataset in datasets.values():
        for index in (None, -1):
            tokens, labels, positions, boundaries, used = dataset.row(index)
            assert used == 0
            assert not tokens.any()
            assert np.all(labels == IGNORE_INDEX)
            assert positions.tolist() == list(range(32))
            assert boundaries.tolist() == [0, 32]
        for index in (-2, len(dataset)):
            with pytest.raises(IndexError):
                dataset.row(index)


@pytest.mark.parametrize("token", [5, 7])
@pytest.mark.parametrize("split", ["train", "validation"])
def test_what_follows_an_end_of_document_is_not_counted_as_learned(tmp_path, token, split):
    """Ends that stand last in the stream, inside documents and in a row: the number is that of the labels."""
    with IndexedDatasetWriter(tmp_path / "d", np.uint16) as writer:
        for length in (3, 1, 4, 9, 2, 6):
            writer.add_document([7, *[5] * (length - 2), 7][:length])
    data = TokenDataset(
        [IndexedDataset(tmp_path / "d")],
        *(4, 1, False, split, 0.3),
        end_of_document=EndOfDocument(token, False, False, True),
    )
    learned = sum(int((data.row(i).labels != IGNORE_INDEX).sum()) for i in range(len(data)))
    assert data.num_learned == learned < data.num_tokens - 1


def test_order_of_epochs(datasets, files):
    train, validation = datasets[True, "train"], datasets[True, "validation"]
    orders = [train.order(epoch).tolist() for epoch in range(3)]
    assert all(sorted(order) == list(range(len(train))) for order in orders)
    assert orders[0] != orders[1] != orders[2]
    assert train.order(0).tolist() == orders[0]
    other = TokenDataset(files, 32, 6, True, "train", 0.2)
    assert other.order(0).tolist()[: len(train)] != orders[0]
    assert validation.order(3).tolist() == list(range(len(validation)))


@settings(deadline=None, max_examples=50)
@given(step=st.integers(0, 50), size=st.integers(1, 100))
def test_global_batch_is_a_place_in_the_endless_order(datasets, step, size):
    train = datasets[True, "train"]
    epochs = (step + 1) * size // len(train) + 1
    endless = np.concatenate([train.order(epoch) for epoch in range(epochs)])
    assert train.global_batch(step, size) == endless[step * size : (step + 1) * size].tolist()


@pytest.mark.parametrize("sample_packing", [True, False])
@pytest.mark.parametrize(("micro", "dp"), [(1, 1), (1, 8), (2, 2), (8, 1), (4, 2), (1, 4)])
def test_a_step_is_the_same_at_every_layout(datasets, sample_packing, micro, dp):
    dataset = datasets[sample_packing, "train"]
    for step in (0, 1, 7, 1000):
        rows = [dataset.row(i) for i in dataset.global_batch(step, 8)]
        ranks = [
            dataset.micro_batches(step, global_batch_size=8, micro_batch_size=micro, dp_rank=r, dp_size=dp)
            for r in range(dp)
        ]
        for place, row in enumerate(rows):
            at, j = divmod(place, micro)
            m, rank = divmod(at, dp)
            batch = ranks[rank][m]
            assert batch.tokens.shape == (micro, 32)
            assert batch.tokens[j].tolist() == row.tokens.tolist()
            assert batch.labels[j].tolist() == row.labels.tolist()
            assert batch.positions[j].tolist() == row.positions.tolist()
            assert (batch.cu_seqlens is None) == (not sample_packing)
        assert {len(batches) for batches in ranks} == {8 // micro // dp}


def test_micro_batches_refuse(datasets):
    dataset = datasets[True, "train"]
    with pytest.raises(UserError, match="the next good one is 12"):
        dataset.micro_batches(0, global_batch_size=10, micro_batch_size=2, dp_rank=0, dp_size=3)
    with pytest.raises(UserError, match="next good one is 2"):
        dataset.micro_batches(0, global_batch_size=0, micro_batch_size=2, dp_rank=0, dp_size=1)
    with pytest.raises(UserError, match="micro_batch_size is 0"):
        dataset.micro_batches(0, global_batch_size=8, micro_batch_size=0, dp_rank=0, dp_size=1)
    with pytest.raises(ValueError, match="dp_rank 2 of 2"):
        dataset.micro_batches(0, global_batch_size=8, micro_batch_size=1, dp_rank=2, dp_size=2)


@pytest.mark.parametrize("sample_packing", [True, False])
@pytest.mark.parametrize("limit", [None, 1, 5, 10_000])
@pytest.mark.parametrize(("micro", "dp"), [(1, 1), (3, 1), (2, 4), (1, 7), (5, 16)])
def test_evaluation_takes_each_sample_once(datasets, sample_packing, limit, micro, dp):
    dataset = datasets[sample_packing, "validation"]
    ranks = [
        list(dataset.evaluation_batches(micro_batch_size=micro, dp_rank=r, dp_size=dp, limit=limit))
        for r in range(dp)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    count = min(limit or len(dataset), len(dataset))
    wanted = [dataset.row(i) for i in range(count)]
    found = sorted(t for batches in ranks for b in batches for t in b.tokens.flatten().tolist() if t)
    assert found == sorted(t for row in wanted for t in row.tokens.tolist() if t)
    assert sum(b.num_valid for batches in ranks for b in batches) == sum(
        int((row.labels != IGNORE_INDEX).sum()) for row in wanted
    )
    assert all(b.tokens.shape == (micro, 32) for batches in ranks for b in batches)


def test_evaluation_refuses_at_once(datasets):
    with pytest.raises(UserError, match="limited to 0"):
        datasets[True, "validation"].evaluation_batches(micro_batch_size=1, dp_rank=0, dp_size=1, limit=0)


def test_prefetcher_gives_the_steps_in_order(datasets):
    dataset = datasets[True, "train"]

    def make(step):
        return dataset.micro_batches(step, global_batch_size=4, micro_batch_size=2, dp_rank=0, dp_size=1)

    with Prefetcher(make, 3, 9) as batches:
        found = list(batches)
    assert len(found) == 6
    for step, made in zip(range(3, 9), found):
        assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(made, make(step)))


def test_prefetcher_works_ahead_but_not_far():
    made = []
    with Prefetcher(lambda step: made.append(step) or step, 0, 100) as steps:
        assert next(steps) == 0
        until = time.monotonic() + 5
        while len(made) < 3 and time.monotonic() < until:
            time.sleep(0.001)
        time.sleep(0.02)
        assert made == [0, 1, 2]
    with pytest.raises(StopIteration):
        next(steps)


def test_prefetcher_raises_in_the_caller_and_ends():
    def make(step):
        if step == 2:
            raise UserError("bad step")
        return step

    steps = Prefetcher(make, 0, 5)
    assert [next(steps), next(steps)] == [0, 1]
    with pytest.raises(UserError, match="bad step"):
        next(steps)
    assert not any(t.name.startswith("longspan-data") for t in threading.enumerate())
    assert list(steps) == []


def test_prefetcher_without_steps():
    assert list(Prefetcher(lambda step: step, 4, 4)) == []
