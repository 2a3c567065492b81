"""Rows of tokens: every token once, every label right, no row too long, always the same."""

import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.data import packing
from longspan.data.packing import IGNORE_INDEX, empty_row, make_batch, plan_packs, plan_stream
from longspan.errors import UserError

some_lengths = st.lists(st.integers(0, 40), max_size=30)
some_sequence_len = st.integers(1, 17)
some_seed = st.integers(0, 2**40)


def read(document, start, stop):
    """Tokens that say where they are from; 0 is left for padding."""
    return np.arange(start, stop, dtype=np.int64) + 1 + document * 1000


def label_of(token, lengths):
    """The token after this one in its document."""
    document, place = divmod(token - 1, 1000)
    return token + 1 if place + 1 < lengths[document] else IGNORE_INDEX


@settings(deadline=None)
@given(some_lengths, some_sequence_len, some_seed)
def test_packs_hold_every_token_once_with_its_label(lengths, sequence_len, seed):
    packs = plan_packs(lengths, sequence_len, seed)
    seen = []
    for i in range(len(packs)):
        row = packs.row(i, read)
        pieces = packs.pieces(i)
        assert all(part.dtype == np.int64 for part in row[:4])
        assert row.used == sum(stop - start for _, start, stop in pieces)
        assert all(len(part) == sequence_len for part in row[:3])
        assert sum(stop - start for _, start, stop in pieces) <= sequence_len
        assert row.boundaries[0] == 0
        assert row.boundaries[-1] == sequence_len
        assert np.all(np.diff(row.boundaries) > 0)
        spans = list(zip(row.boundaries[:-1], row.boundaries[1:]))
        assert len(spans) - len(pieces) in (0, 1)
        for (begin, end), (document, start, stop) in zip(spans, pieces):
            assert row.tokens[begin:end].tolist() == read(document, start, stop).tolist()
            assert row.labels[begin:end].tolist() == [label_of(t, lengths) for t in row.tokens[begin:end]]
            assert row.positions[begin:end].tolist() == list(range(end - begin))
            seen += row.tokens[begin:end].tolist()
        for begin, end in spans[len(pieces) :]:  # padding is a document of its own
            assert not row.tokens[begin:end].any()
            assert np.all(row.labels[begin:end] == IGNORE_INDEX)
            assert row.positions[begin:end].tolist() == list(range(end - begin))
    assert sorted(seen) == [t for d, n in enumerate(lengths) for t in read(d, 0, n).tolist()]


@settings(deadline=None)
@given(some_lengths, some_sequence_len, some_seed)
def test_only_whole_rows_of_a_long_document_cut_it(lengths, sequence_len, seed):
    packs = plan_packs(np.array(lengths, dtype=np.int64), sequence_len, seed)
    for i in range(len(packs)):
        for document, start, stop in packs.pieces(i):
            assert start % sequence_len == 0
            assert stop == min(start + sequence_len, lengths[document])


@settings(deadline=None)
@given(some_lengths, some_sequence_len, some_seed)
def test_stream_holds_every_token_once_with_its_label(lengths, sequence_len, seed):
    stream = plan_stream(lengths, sequence_len, seed)
    rows = [stream.row(i, read) for i in range(len(stream))]
    total = sum(lengths)
    assert len(rows) == -(-total // sequence_len)
    tokens = [t for row in rows for t in row.tokens.tolist()]
    labels = [t for row in rows for t in row.labels.tolist()]
    assert tokens[total:] == [0] * (len(tokens) - total)
    tokens = tokens[:total]
    assert labels[: max(0, total - 1)] == tokens[1:]
    assert all(label == IGNORE_INDEX for label in labels[max(0, total - 1) :])
    order = [d for i in range(len(stream)) for d, start, _ in stream.pieces(i) if start == 0]
    assert tokens == [t for d in order for t in read(d, 0, lengths[d]).tolist()]
    assert sorted(order) == [d for d, n in enumerate(lengths) if n]
    for row in rows:
        assert row.positions.tolist() == list(range(sequence_len))
        assert row.boundaries.tolist() == [0, sequence_len]


@pytest.mark.parametrize("plan", [plan_packs, plan_stream])
def test_order_is_seeded(plan):
    lengths = np.arange(1, 200) % 37

    def pieces(seed):
        made = plan(lengths, 64, seed)
        return [made.pieces(i) for i in range(len(made))]

    assert pieces(3) == pieces(3)
    assert pieces(3) != pieces(4)


def test_plan_never_changes():
    """A resume on another machine or version must pack alike; a change here breaks old runs."""
    lengths = np.arange(1, 500) * 7919 % 301
    packs = plan_packs(lengths, 128, 1234)
    parts = (packs.documents, packs.starts, packs.stops, packs.offsets)
    digest = hashlib.blake2b(b"".join(p.astype("<i8").tobytes() for p in parts), digest_size=6)
    assert digest.hexdigest() == "cc13ea9151a2"
    stream = plan_stream(lengths, 128, 1234)
    digest = hashlib.blake2b(stream.documents.astype("<i8").tobytes(), digest_size=6)
    assert digest.hexdigest() == "18799b3b8556"


def test_packs_are_full():
    lengths = np.random.default_rng(0).lognormal(5, 1.5, 20_000).astype(np.int64) + 1
    packs = plan_packs(lengths, 4096, 0)
    assert lengths.sum() / (len(packs) * 4096) > 0.99


def test_at_most_so_many_packs_are_open():
    # 6 opens A; 7 opens B; 8 opens C and closes the fullest, itself; 3 fits B best; 4 A.
    assert packing._best_fit([6, 7, 8, 3, 4, 2], 10, most_open=2).tolist() == [0, 1, 2, 1, 0, 3]


def test_best_fit_takes_the_fullest_that_has_room():
    assert packing._best_fit([5, 7, 3, 5, 10, 1], 10).tolist() == [0, 1, 1, 0, 2, 3]


def test_bad_arguments():
    for plan in (plan_packs, plan_stream):
        with pytest.raises(UserError, match="at least 1"):
            plan([1], 0, 0)
        with pytest.raises(ValueError, match="-1 tokens"):
            plan([-1], 4, 0)


def test_batch_counts_documents_row_by_row():
    packs = plan_packs([3, 6, 4], 6, 0)
    rows = [packs.row(i, read) for i in range(len(packs))]
    batch = make_batch([*rows, empty_row(6)], apart=True)
    assert batch.tokens.shape == batch.labels.shape == batch.positions.shape == (len(rows) + 1, 6)
    assert all(
        t.dtype == torch.int64 for t in (batch.tokens, batch.labels, batch.positions, batch.cu_seqlens)
    )
    assert batch.cu_seqlens[0] == 0
    assert batch.cu_seqlens[-1] == batch.tokens.numel()
    assert torch.all(batch.cu_seqlens.diff() > 0)
    starts = torch.zeros(batch.tokens.numel(), dtype=torch.bool)
    starts[batch.cu_seqlens[:-1]] = True
    assert torch.equal(starts, batch.positions.flatten() == 0)
    assert batch.num_valid == 2 + 5 + 3
    assert torch.equal(batch.loss_mask, batch.labels != IGNORE_INDEX)
    moved = batch.to("cpu")
    assert torch.equal(moved.labels, batch.labels)
    assert moved.cu_seqlens is batch.cu_seqlens


def test_batch_without_packing_has_no_boundaries():
    batch = make_batch([empty_row(4), empty_row(4)], apart=False)
    assert batch.cu_seqlens is None
    assert batch.num_valid == 0
