"""Layouts and schedules: integers only, no process group."""

import functools
import itertools
import json
import statistics
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longspan.context_parallel import Schedule, SequenceLayout
from longspan.context_parallel.calls import VarlenCall, calls_of
from longspan.context_parallel.needed import rows_matrix
from longspan.context_parallel.tiles import Mask

packs = st.lists(st.integers(1, 30), min_size=1, max_size=10)


def layouts(lengths, ranks, multiple=1):
    cu = [0]
    for n in lengths:
        cu.append(cu[-1] + n)
    yield SequenceLayout.contiguous(cu[-1], ranks, cu_seqlens=cu, multiple_of=multiple)
    yield SequenceLayout.zigzag(cu[-1], ranks, cu_seqlens=cu, multiple_of=multiple)
    yield SequenceLayout.per_document_zigzag(cu, ranks, multiple_of=multiple)
    yield SequenceLayout.balanced(cu, ranks, multiple_of=multiple)
    yield SequenceLayout.balanced(cu, ranks, window=[None, 5], multiple_of=multiple)
    chunks = [(i, min(i + 3, cu[-1])) for i in range(0, cu[-1], 3)]
    held = [chunks[r::ranks] for r in range(ranks)]  # in an order of their own: every second one first
    yield SequenceLayout.from_spans([own[1::2] + own[::2] for own in held], cu, multiple_of=multiple)
    for inner in range(2, ranks + 1):
        if ranks % inner == 0:  # after an all-to-all inside groups of ``inner`` ranks
            groups = [range(i, i + inner) for i in range(0, ranks, inner)]
            yield SequenceLayout.zigzag(cu[-1], ranks, cu_seqlens=cu).merged(groups)


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
        everyone = range(layout.ranks)
        held = torch.cat([layout.positions(r) for r in everyone])
        assert sorted(held.tolist()) == list(range(layout.padded_total))
        assert {len(layout.positions(r)) for r in everyone} == {layout.local_length}
        assert "merged" in layout.name or layout.local_length % multiple == 0
        data = torch.randn(sum(lengths), 2)
        whole = torch.cat([layout.shard(data, r, pad_value=7) for r in everyone])
        assert torch.equal(whole[layout._inverse()], data)


def made_with_rows(lengths, ranks, **more):
    """Every way of making a layout by a pack's documents, with ``rows=`` and the like."""
    cu = [0, *itertools.accumulate(lengths)]
    yield SequenceLayout.contiguous(cu[-1], ranks, cu_seqlens=cu, **more)
    yield SequenceLayout.zigzag(cu[-1], ranks, cu_seqlens=cu, **more)
    yield SequenceLayout.per_document_zigzag(cu, ranks, **more)
    yield SequenceLayout.balanced(cu, ranks, window=[None, 5], **more)
    for name in ("auto", "contiguous", "zigzag", "per_document_zigzag", "balanced"):
        for together in (n for n in (1, 2, 3) if ranks % n == 0):
            yield SequenceLayout.make(name, cu[-1], ranks, cu_seqlens=cu, together=together, **more)


@given(packs, st.integers(1, 6), st.sampled_from([1, 2, 3]), st.integers(0, 9))
def test_rows_pad_every_rank_and_change_nothing_else(lengths, ranks, multiple, more):
    plain = list(made_with_rows(lengths, ranks, multiple_of=multiple))
    rows = max(layout.local_length for layout in plain) + more * multiple
    padded = list(made_with_rows(lengths, ranks, multiple_of=multiple, rows=rows))
    for before, after in zip(plain, padded, strict=True):
        assert (after.name, after.local_length, after.total) == (before.name, rows, before.total)
        assert (after.cu_seqlens, after.padded_total) == (before.cu_seqlens, rows * ranks)
        held = torch.cat([after.positions(r) for r in range(ranks)])
        assert sorted(held.tolist()) == list(range(rows * ranks))
        for r in range(ranks):
            assert after.segments(r) == before.segments(r)
            assert torch.equal(after.positions(r)[: before.local_length], before.positions(r))
        data = torch.randn(sum(lengths), 2)
        whole = torch.cat([after.shard(data, r, pad_value=7) for r in range(ranks)])
        assert torch.equal(whole[after._inverse()], data)


@pytest.mark.parametrize("name", ["auto", "contiguous", "zigzag", "per_document_zigzag", "balanced"])
def test_too_few_rows_are_refused(name):
    make = functools.partial(SequenceLayout.make, name, 20, 2, cu_seqlens=[0, 8, 20], multiple_of=2)
    least = make().local_length
    assert make(rows=least) == make()
    with pytest.raises(
        ValueError, match=rf"rows={least - 2} are too few: .* holds {least} a rank. Give that"
    ):
        make(rows=least - 2)
    with pytest.raises(ValueError, match=rf"rows={least + 1} are no multiple of 2: .* in multiples of 2"):
        make(rows=least + 1)


windows = st.one_of(st.none(), st.integers(1, 12))


class Packing:
    """Stands for a kernel that takes many sequences in one call."""

    varlen = True


def covered(rows, keys, mask):
    """The pairs of a tile, or of a packed sequence (causal: aligned at the bottom right)."""
    block = torch.ones(rows, keys, dtype=torch.int32)
    if mask is Mask.CAUSAL:
        return block.tril(keys - rows)
    return block.triu() if mask is Mask.ANTI else block


@given(packs, st.integers(1, 6), windows)
def test_packed_calls_compute_the_same_pairs(lengths, ranks, window):
    for layout in layouts(lengths, ranks):
        for rank in range(layout.ranks):
            for step in Schedule.of(layout, rank, window=window).steps:
                width = step.received_rows or layout.local_length
                expected, got = (torch.zeros(layout.local_length, width, dtype=torch.int32) for _ in range(2))
                for tile in step.tiles:
                    q, k = slice(*tile.q), slice(*tile.k)
                    expected[q, k] += covered(q.stop - q.start, k.stop - k.start, tile.mask)
                touched = torch.zeros(layout.local_length, dtype=torch.bool)
                for call in calls_of(step, Packing, torch.device("cpu")):
                    q, k = (torch.arange(layout.local_length)[call.q], torch.arange(width)[call.k])
                    assert not (call.first and touched[q].any())
                    touched[q] = True
                    if not isinstance(call, VarlenCall):
                        got[q[:, None], k] += covered(len(q), len(k), call.mask)
                        continue
                    assert len(q) == len(set(q.tolist())), "a query row twice in one call"
                    for a, b, c, d in zip(call.cu_q, call.cu_q[1:], call.cu_k, call.cu_k[1:]):
                        got[q[a:b, None], k[c:d]] += covered(int(b - a), int(d - c), call.mask)
                assert torch.equal(got, expected)


@given(packs, st.integers(1, 9), st.booleans(), st.booleans(), windows, st.integers(0, 40))
def test_tiles_cover_each_visible_pair_exactly_once(lengths, ranks, causal, all_at_once, window, least):
    """The tiles of all ranks, put back into token numbers, are the mask: no pair missing, none twice."""
    window = window if causal else None
    for layout in layouts(lengths, ranks):
        t = sum(lengths)
        document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
        expected = (document[:, None] == document[None, :]).int()
        if causal:
            expected = expected.tril()
        if window is not None:
            expected = expected.triu(1 - window)
        seen = torch.zeros(t, t, dtype=torch.int32)
        touched = set()
        for rank in range(layout.ranks):
            schedule = Schedule.of(
                layout, rank, causal=causal, window=window, all_at_once=all_at_once, rows_a_step=least
            )
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
                    seen[q[:, None], k[None, :]] += covered(len(q), len(k), tile.mask)
                    area += tile.area
                    rows = {(rank, row) for row in range(*tile.q)}
                    assert (rows.isdisjoint(touched)) == tile.first
                    assert tile.first or rows <= touched
                    touched |= rows
            if causal:
                assert area == schedule.area == layout.area(rank, window)
            wanted = rows_matrix(layout, causal=causal, window=window)[rank].sum()
            assert schedule.received_rows == wanted
        assert torch.equal(seen, expected)


@given(packs, st.integers(2, 8), st.booleans(), windows, st.integers(0, 40))
def test_both_ends_of_a_message_agree(lengths, ranks, all_at_once, window, least):
    for layout in layouts(lengths, ranks):
        schedules = [
            Schedule.of(layout, r, window=window, all_at_once=all_at_once, rows_a_step=least)
            for r in range(layout.ranks)
        ]

        def ends(name, schedules=schedules):
            return [
                (i, r, m.peer, m.rows) if name == "sends" else (i, m.peer, r, m.rows)
                for r, s in enumerate(schedules)
                for i, step in enumerate(s.steps)
                for m in getattr(step, name)
            ]

        assert sorted(ends("sends")) == sorted(ends("receives"))  # in the same step, too


@given(packs, st.integers(1, 8), st.integers(1, 4), windows)
def test_balanced_work(lengths, ranks, multiple, window):
    """Even for tiny packs no rank has more than a chunk's work above the mean."""
    cu = [0]
    for n in lengths:
        cu.append(cu[-1] + 9 * n)
    layout = SequenceLayout.balanced(cu, ranks, window, multiple_of=multiple)
    areas = [layout.area(r, window) for r in range(ranks)]
    longest = max(b - a for a, b in zip(cu, cu[1:]))
    chunk = layout.local_length  # a rank's chunks are no longer than its rows
    assert max(areas) - sum(areas) / ranks <= chunk * min(longest, window or longest)
    assert layout.local_length % multiple == 0


#: documents as they come: a published length distribution, packed (also read by the benchmarks)
PUBLISHED = json.loads((Path(__file__).parents[2] / "benchmarks" / "lengths.json").read_text())


def balanced_figures(packs, ranks, window=None):
    """max/mean area and received rows of a ring, for each pack."""
    imbalance, received = [], []
    for lengths in packs:
        layout = SequenceLayout.balanced(list(itertools.accumulate(lengths, initial=0)), ranks, window)
        areas = [layout.area(r, window) for r in range(ranks)]
        imbalance.append(max(areas) * ranks / sum(areas))
        rows = sum(layout.received_rows(r, window) for r in range(ranks))
        received.append(rows / (ranks - 1) / layout.padded_total)
        assert layout.padded_total - layout.total < 64 * ranks
    return imbalance, received


@pytest.mark.parametrize("window", [None, 1024])
def test_published_packs_of_64k_tokens_over_8_ranks(window):
    imbalance, received = balanced_figures(PUBLISHED["packs"]["65536"], 8, window)
    assert statistics.mean(imbalance) <= 1.02
    assert max(imbalance) <= 1.05
    assert statistics.mean(received) <= 0.3


@pytest.mark.parametrize("ranks", [2, 3, 5, 6])
def test_published_packs_of_16k_tokens(ranks):
    imbalance, received = balanced_figures(PUBLISHED["packs"]["16384"], ranks)
    assert max(imbalance) <= 1.02
    assert statistics.mean(received) <= 0.3


def test_published_packs_of_512k_tokens_over_64_ranks():
    imbalance, received = balanced_figures(PUBLISHED["packs_512k"], 64)
    assert max(imbalance) <= 1.03
    assert statistics.mean(received) <= 0.2


def test_auto_balances_documents_and_cuts_one_sequence_zigzag():
    def name(*args, **kwargs):
        return SequenceLayout.make("auto", *args, **kwargs).name

    assert name(64, 4) == name(64, 4, cu_seqlens=[0, 64]) == "zigzag"
    assert name(64, 4, cu_seqlens=[0, 10, 64]) == "balanced"
    assert name(6400, 4, windows=[80, 16]) == name(64, 1) == "contiguous"
    assert name(6400, 4, windows=[80, None]) == name(6400, 4, windows=[3000]) == "balanced"
    assert name(64, 4, cu_seqlens=range(0, 65, 8)) == "contiguous"  # even already
    assert name(64, 4, windows=[64]) == "zigzag"


def test_where_heads_move_the_groups_hold_what_keys_travel_between():
    cu = list(itertools.accumulate(PUBLISHED["packs"]["16384"][0], initial=0))
    make = functools.partial(SequenceLayout.make, "auto", cu[-1], 8, cu_seqlens=cu, multiple_of=3)
    assert make(together=8).name == "contiguous"  # all heads move, no key does
    groups = [range(i, i + 2) for i in range(0, 8, 2)]
    layout, outer = make(together=2), SequenceLayout.balanced(cu, 4, multiple_of=6)
    merged = layout.merged(groups)
    assert layout.local_length % 3 == 0
    assert [merged.area(r) for r in range(4)] == [outer.area(r) for r in range(4)]
    assert sum(merged.received_rows(r) for r in range(4)) == sum(outer.received_rows(r) for r in range(4))
    naive = make().merged(groups)
    assert sum(merged.received_rows(r) for r in range(4)) < sum(naive.received_rows(r) for r in range(4))


def test_schedules_of_different_kinds_are_not_mixed_up():
    layout = SequenceLayout.zigzag(64, 4)
    assert len(Schedule.of(layout, 0, all_at_once=True).steps) == 2
    assert len(Schedule.of(layout, 0, rows_a_step=1).steps) == 4


def test_one_rank_pads_nothing():
    assert SequenceLayout.per_document_zigzag([0, 3, 4], 1).padded_total == 4


def test_steps_that_bring_few_rows_are_one_exchange():
    """512 ranks are not 511 tiny messages one after another."""
    layout = SequenceLayout.zigzag(512 * 4, 512)
    assert len(Schedule.of(layout, 3).steps) <= 1 + 4
    assert len(Schedule.of(layout, 3, rows_a_step=0).steps) > 500
    long = SequenceLayout.zigzag(1 << 16, 8)
    assert len(Schedule.of(long, 3).steps) == 8  # steps worth their while stay


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
        assert all(len(step.tiles) == 1 for step in Schedule.of(layout, rank, rows_a_step=0).steps)
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
        (lambda: SequenceLayout.balanced([0, 8], 2, window=0), "1 or more"),
        (lambda: SequenceLayout.make("striped", 8, 2), "'striped': auto or one of contiguous"),
        (
            lambda: SequenceLayout.per_document_zigzag([0, 3], 2, cu_seqlens_padded=[0, 6]),
            "pad it to 8",
        ),
    ],
)
def test_refusals_name_number_and_rule(make, message):
    with pytest.raises(ValueError, match=message):
        make()
