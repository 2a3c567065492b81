"""Layouts and schedules: integers only, no process group."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longspan.context_parallel import Schedule, SequenceLayout

packs = st.lists(st.integers(1, 30), min_size=1, max_size=10)


def layouts(lengths, ranks, multiple=1):
    cu = [0]
    for n in lengths:
        cu.append(cu[-1] + n)
    yield SequenceLayout.contiguous(cu[-1], ranks, cu_seqlens=cu, multiple_of=multiple)
    yield SequenceLayout.zigzag(cu[-1], ranks, cu_seqlens=cu, multiple_of=multiple)
    yield SequenceLayout.per_document_zigzag(cu, ranks, multiple_of=multiple)


def test_zigzag_of_eight_tokens_over_two_ranks():
    layout = SequenceLayout.zigzag(8, 2)
    assert layout.spans(0) == [(0, 2), (6, 8)]
    assert layout.spans(1) == [(2, 6)]
    assert layout.positions(0).tolist() == [0, 1, 6, 7]
    assert layout.cu_seqlens == (0, 8)


def test_seven_tokens_are_padded_to_eight_and_the_last_one_counts():
    layout = SequenceLayout.zigzag(7, 2)
    assert (layout.total, layout.padded_total, layout.local_length) == (7, 8, 4)
    assert layout.shard(torch.arange(7), 0, pad_value=-1).tolist() == [0, 1, 6, -1]
    assert sum(layout.area(r) for r in range(2)) == 7 * 8 // 2


def test_a_short_document_is_padded_at_its_own_end():
    layout = SequenceLayout.per_document_zigzag([0, 3, 7], 2)
    # document 0 (3 tokens -> 4) is cut 0 | 1 | 2 | pad, document 1 (4 tokens) 3 | 4 | 5 | 6
    assert layout.shard(torch.arange(7), 0, pad_value=-1).tolist() == [0, -1, 3, 6]
    assert layout.shard(torch.arange(7), 1, pad_value=-1).tolist() == [1, 2, 4, 5]


@given(packs, st.integers(1, 9), st.sampled_from([1, 2, 4, 3]))
def test_every_token_is_held_once_by_ranks_with_equal_rows(lengths, ranks, multiple):
    for layout in layouts(lengths, ranks, multiple):
        held = torch.cat([layout.positions(r) for r in range(ranks)])
        assert sorted(held.tolist()) == list(range(layout.padded_total))
        assert {len(layout.positions(r)) for r in range(ranks)} == {layout.local_length}
        assert layout.local_length % multiple == 0
        data = torch.randn(sum(lengths), 2)
        whole = torch.cat([layout.shard(data, r, pad_value=7) for r in range(ranks)])
        assert torch.equal(whole[layout._inverse()], data)


@given(packs, st.integers(1, 9), st.booleans(), st.booleans())
def test_tiles_cover_each_visible_pair_exactly_once(lengths, ranks, causal, all_at_once):
    """The tiles of all ranks, put back into token numbers, are the mask: no pair missing, none twice."""
    for layout in layouts(lengths, ranks):
        t = sum(lengths)
        document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
        expected = (document[:, None] == document[None, :]).int()
        if causal:
            expected = expected.tril()
        seen = torch.zeros(t, t, dtype=torch.int32)
        touched = set()
        for rank in range(ranks):
            schedule = Schedule.of(layout, rank, causal=causal, all_at_once=all_at_once)
            positions = layout.positions(rank)
            area = 0
            for step in schedule.steps:
                keys = positions
                if step.receives:
                    keys = torch.cat(
                        [layout.positions(m.peer)[a:b] for m in step.receives for a, b in m.ranges]
                    )
                    if step.order is not None:
                        keys = torch.cat([keys[a:b] for a, b in step.order])
                for tile in step.tiles:
                    q, k = positions[slice(*tile.q)], keys[slice(*tile.k)]
                    block = torch.ones(len(q), len(k), dtype=torch.int32)
                    seen[q[:, None], k[None, :]] += block.tril() if tile.causal else block
                    area += tile.area
                    rows = {(rank, row) for row in range(*tile.q)}
                    assert (rows.isdisjoint(touched)) == tile.first
                    assert tile.first or rows <= touched
                    touched |= rows
            if causal:
                assert area == layout.area(rank)
        assert torch.equal(seen, expected)


@given(packs, st.integers(2, 8), st.booleans())
def test_both_ends_of_a_message_agree(lengths, ranks, all_at_once):
    for layout in layouts(lengths, ranks):
        schedules = [Schedule.of(layout, r, all_at_once=all_at_once) for r in range(ranks)]
        sent = {
            (r, m.peer): m.ranges for r, s in enumerate(schedules) for step in s.steps for m in step.sends
        }
        received = {
            (m.peer, r): m.ranges for r, s in enumerate(schedules) for step in s.steps for m in step.receives
        }
        assert sent == received


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_causal_zigzag_moves_three_quarters_of_a_ring(ranks):
    layout = SequenceLayout.zigzag(16 * ranks, ranks)
    ring = ranks * (ranks - 1) * layout.local_length
    assert sum(layout.received_rows(r) for r in range(ranks)) == ring * 3 // 4
    assert len({layout.area(r) for r in range(ranks)}) == 1


def test_documents_of_one_rank_travel_nowhere():
    layout = SequenceLayout.contiguous(40, 4, cu_seqlens=[0, 10, 15, 20, 30, 40])
    assert [layout.received_rows(r) for r in range(4)] == [0, 0, 0, 0]


def test_few_tiles_for_a_plain_sequence():
    """Zigzag costs one causal tile and one tile a step; all at once, two."""
    layout = SequenceLayout.zigzag(64, 4)
    for rank in range(4):
        assert all(len(step.tiles) == 1 for step in Schedule.of(layout, rank).steps)
        both = Schedule.of(layout, rank, all_at_once=True).steps
        assert len(both) == 2
        assert len(both[1].tiles) <= 4


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SequenceLayout.zigzag(0, 2), "at least one token"),
        (lambda: SequenceLayout.zigzag(8, 0), "at least one rank"),
        (lambda: SequenceLayout.zigzag(8, 2, cu_seqlens=[0, 4]), "ends at 4, the sequence has 8"),
        (lambda: SequenceLayout.zigzag(8, 2, cu_seqlens=[0, 5, 4, 8]), "must not fall"),
        (lambda: SequenceLayout.zigzag(8, 2, cu_seqlens=[1, 8]), "starts with 0"),
        (lambda: SequenceLayout.zigzag(8, 2).shard(torch.zeros(7), 0), "7 rows"),
        (
            lambda: SequenceLayout.per_document_zigzag([0, 3], 2, cu_seqlens_padded=[0, 6]),
            "pad it to 8",
        ),
    ],
)
def test_refusals_name_number_and_rule(make, message):
    with pytest.raises(ValueError, match=message):
        make()
