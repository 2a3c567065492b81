"""Blends: shares at every prefix, whole epochs of every member, the same at every layout and after a resume."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.data.blend import PERIOD, BlendedDataset, common_counts, period
from longspan.data.loader import TokenDataset
from longspan.data.packing import IGNORE_INDEX
from tiny import write_numbered

# weights of blends as people write them, lopsided ones among them
WEIGHTS = st.lists(st.one_of(st.integers(1, 12), st.integers(1, 2000)), min_size=1, max_size=9)


@pytest.fixture(scope="module")
def members(tmp_path_factory):
    """Three datasets of 5, 13 and 40 rows of 16 tokens; every token is known again by its number."""
    folder = tmp_path_factory.mktemp("blend")
    made, first = [], 1
    for name, documents in (("a", 5), ("b", 13), ("c", 40)):
        made.append(TokenDataset([write_numbered(folder / name, [16] * documents, first)], 16, seed=7))
        first += 16 * documents
    assert [len(member) for member in made] == [5, 13, 40]
    return made


@given(weights=WEIGHTS)
@settings(max_examples=200)
def test_shares_are_within_one_sample_at_any_prefix(weights):
    counts = common_counts([Fraction(w) for w in weights])
    givers, turns = period(counts)
    assert len(givers) == sum(counts)
    places = np.arange(1, len(givers) + 1)
    for member, weight in enumerate(weights):
        given_so_far = np.cumsum(givers == member)
        assert np.abs(given_so_far - places * weight / sum(weights)).max() < 1
        assert turns[givers == member].tolist() == list(range(counts[member]))


@given(weights=st.lists(st.floats(1e-9, 1e9), min_size=1, max_size=40))
@settings(max_examples=50)
def test_any_weights_are_counts_of_a_bounded_period(weights):
    counts = common_counts(weights)
    assert sum(counts) <= PERIOD
    assert min(counts) >= 1
    for count, weight in zip(counts, weights):
        assert abs(count / sum(counts) - weight / sum(weights)) <= (1 + len(weights)) / PERIOD + 1e-12


def test_decimal_weights_are_exact():
    assert common_counts([0.1, 0.2, 0.7]) == (1, 2, 7)
    assert common_counts([Fraction("0.3"), Fraction("0.3")]) == (1, 1)
    assert common_counts([0.999999, 0.000001]) == (999999, 1)
    with pytest.raises(ValueError, match="above 0"):
        common_counts([1, 0])


@given(
    weights=st.lists(st.integers(1, 9), min_size=3, max_size=3),
    start=st.integers(0, 10**9),
    size=st.integers(1, 300),
)
@settings(max_examples=50)
def test_each_member_gives_each_sample_once_an_epoch(members, weights, start, size):
    blend = BlendedDataset(members, weights)
    # the whole line up to here, by member: the samples given are the next ones of its own epochs
    step = start % 50
    line = [s for k in range(step + 1) for s in blend.global_batch(k, size)]
    first = np.concatenate([[0], np.cumsum([len(m) for m in members])])
    for number, member in enumerate(members):
        mine = [s - first[number] for s in line if first[number] <= s < first[number + 1]]
        epochs = -(-len(mine) // len(member))
        endless = np.concatenate([member.order(e) for e in range(epochs)]) if epochs else []
        assert mine == list(endless[: len(mine)])
    # far on: looked up, not reached
    givers, turns = blend.deal(start, start + size)
    for number, weight in enumerate(weights):
        assert abs(int((givers == number).sum()) - size * weight / sum(weights)) < 2
        mine = turns[givers == number]
        assert mine.tolist() == list(range(mine[0], mine[0] + len(mine))) if len(mine) else True
        if len(mine):
            assert abs(int(mine[0]) - start * weight / sum(weights)) <= 1


@given(step=st.integers(0, 10**6), weights=st.lists(st.integers(1, 9), min_size=3, max_size=3))
@settings(max_examples=25)
def test_a_step_is_the_same_at_every_layout_and_after_a_resume(members, step, weights):
    blend, resumed = BlendedDataset(members, weights), BlendedDataset(members, weights)
    wanted = [blend.row(i).tokens.tolist() for i in blend.global_batch(step, 12)]
    for micro, dp in ((1, 1), (3, 1), (1, 4), (2, 3), (2, 1)):
        ranks = [
            resumed.micro_batches(step, global_batch_size=12, micro_batch_size=micro, dp_rank=r, dp_size=dp)
            for r in range(dp)
        ]
        for place, row in enumerate(wanted):
            at, j = divmod(place, micro)
            assert ranks[at % dp][at // dp].tokens[j].tolist() == row


def test_rows_of_a_blend(members):
    blend = BlendedDataset(members, [1, 1, 1])
    assert len(blend) == 58
    assert blend.num_tokens == 58 * 16
    assert blend.longest_document == 16
    found = sorted(t for i in range(58) for t in blend.row(i).tokens.tolist())
    assert found == list(range(1, 58 * 16 + 1))
    assert blend.boundaries(57) == [0, 16]
    for empty in (None, -1):
        assert np.all(blend.row(empty).labels == IGNORE_INDEX)
    with pytest.raises(IndexError):
        blend.row(58)
    with pytest.raises(ValueError, match="3 members and 2 weights"):
        BlendedDataset(members, [1, 2])


def test_an_evaluation_takes_each_sample_once_and_a_short_one_is_mixed(members):
    blend = BlendedDataset(members, [2, 1, 1], held_out=True)
    batches = list(blend.evaluation_batches(micro_batch_size=2, dp_rank=0, dp_size=1))
    found = sorted(t for batch in batches for t in batch.tokens.flatten().tolist())
    assert found == list(range(1, 58 * 16 + 1))
    owner = [int(np.searchsorted([80, 288, 928], blend.row(i).tokens[0])) for i in range(8)]
    assert [owner.count(member) for member in range(3)] == [4, 2, 2]


def test_millions_of_samples_cost_a_table(members):
    blend = BlendedDataset(members, [0.123457, 0.376543, 0.5])
    givers, turns = blend.deal(10**12, 10**12 + 1000)
    assert abs(int((givers == 2).sum()) - 500) <= 1
    assert abs(int(turns[givers == 0][0]) - 123457 * 10**6) <= 1
