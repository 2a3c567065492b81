"""Plans of moves against brute force: rows between layouts, tails of the convolution, features to heads. Integers only."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tiny
from longspan.config.recurrent import heads_problem
from longspan.config.sizes import MeshSizes
from longspan.context_parallel import SequenceLayout
from longspan.context_parallel.layout import LAYOUTS
from longspan.context_parallel.move_features import FeatureMove
from longspan.context_parallel.move_rows import (
    Piece,
    change_of_layout,
    plan_rows,
    rows_between,
    tail_rows,
    tails,
)
from longspan.context_parallel.recurrent_costs import planned_state_bytes, recurrent_sizes, state_bytes
from longspan.context_parallel.runs_of_tokens import borders, runs_of
from longspan.context_parallel.two_layouts import attention_layout, renumbered

CPU = torch.device("cpu")
#: with few tokens for many ranks: runs shorter than the convolution, ranks of padding alone
packs = st.lists(st.integers(1, 20), min_size=1, max_size=8)
ranks = st.integers(1, 6)


def stream_of(lengths, ranks, multiple=1, spare=0):
    cu = [0, *itertools.accumulate(lengths)]
    layout = SequenceLayout.contiguous(cu[-1], ranks, cu_seqlens=cu, multiple_of=multiple)
    return layout.with_rows(layout.local_length + spare)


def result_of(moves, tokens):
    """The token in every row of every rank after a move, -1 for a row of zeros.

    Args:
        tokens: for each rank, the token of each of its rows.
    """
    messages = []
    for move, held in zip(moves, tokens):
        rows = [held[row] for row in move.send.tolist()]
        assert len(rows) == sum(move.sent)
        edges = [0, *itertools.accumulate(move.sent)]
        messages.append([rows[a:b] for a, b in itertools.pairwise(edges)])
    results = []
    for rank, move in enumerate(moves):
        received = [message[rank] for message in messages]
        assert [len(rows) for rows in received] == move.received
        places = move.place.tolist()
        assert len(set(places)) == len(places)
        result = [-1] * move.rows
        for place, token in zip(places, itertools.chain(*received), strict=True):
            result[place] = token
        results.append(result)
    return results


def real(layout, rank):
    """The token of each row of a rank, -1 for padding."""
    return [token if token < layout.total else -1 for token in layout.positions(rank).tolist()]


@given(packs, ranks, st.sampled_from(["auto", *LAYOUTS]), st.integers(1, 3), st.integers(0, 3))
def test_a_change_of_layout_and_back(lengths, ranks, name, multiple, spare):
    stream = stream_of(lengths, ranks, multiple, spare)
    other = SequenceLayout.make(name, stream.total, ranks, cu_seqlens=stream.cu_seqlens)
    counts = []
    for source, target in ((stream, other), (other, stream)):
        moves = [change_of_layout(source, target, rank, CPU) for rank in range(ranks)]
        tokens = [real(source, rank) for rank in range(ranks)]
        assert result_of(moves, tokens) == [real(target, rank) for rank in range(ranks)]
        counts.append(rows_between(source, target))
        assert counts[-1].tolist() == [move.sent for move in moves]
    assert np.array_equal(counts[0], counts[1].T)


@given(packs, ranks, st.integers(0, 7), st.integers(1, 3), st.integers(0, 3))
def test_tails_are_the_tokens_before_a_run_of_the_same_document(lengths, ranks, width, multiple, spare):
    layout = stream_of(lengths, ranks, multiple, spare)
    runs = runs_of(layout)
    expected = []
    for start, stop in runs:
        tail = [-1] * width
        document = max(edge for edge in layout.cu_seqlens if edge <= start)
        for back in range(1, width + 1):
            if start < stop and start - back >= document:
                tail[width - back] = start - back
        expected.append(tail)
    moves = [tails(layout, width, rank, CPU) for rank in range(ranks)]
    assert result_of(moves, [real(layout, rank) for rank in range(ranks)]) == expected
    assert tail_rows(layout, width).tolist() == [sum(move.sent) for move in moves]
    # Nothing travels over a border at which a document begins.
    for tail, needed in zip(expected, borders(layout)[1]):
        assert any(token >= 0 for token in tail) == (needed and width > 0)


@given(st.data())
def test_any_pieces_reach_all_ranks_that_want_them(data):
    """Tokens in any pieces, of which several ranks may want the same and nobody wants some."""
    total, ranks = data.draw(st.integers(1, 25)), data.draw(st.integers(1, 5))

    def cuts():
        edges = data.draw(st.sets(st.integers(1, total), max_size=6))
        return itertools.pairwise([0, *sorted(edges - {total}), total])

    held = [[] for _ in range(ranks)]
    tokens = [[] for _ in range(ranks)]
    for start, stop in cuts():
        rank = data.draw(st.integers(0, ranks - 1))
        held[rank].append(Piece(start, stop, len(tokens[rank])))
        tokens[rank] += range(start, stop)
    wanted, expected, rows = [], [], total + 3
    for _ in range(ranks):
        pieces, result, row = [], [-1] * rows, data.draw(st.integers(0, 3))
        for start, stop in cuts():
            if data.draw(st.booleans()):
                pieces.append(Piece(start, stop, row))
                result[row : row + stop - start] = range(start, stop)
                row += stop - start
        wanted.append(pieces)
        expected.append(result)
    moves = [plan_rows(held, wanted, rank, rows) for rank in range(ranks)]
    assert result_of(moves, tokens) == expected


@given(packs, ranks, st.sampled_from(LAYOUTS))
def test_ranks_are_renumbered_so_that_fewer_rows_move(lengths, ranks, name):
    stream = stream_of(lengths, ranks)
    layout = SequenceLayout.make(name, stream.total, ranks, cu_seqlens=stream.cu_seqlens)
    found = renumbered(layout, stream)
    assert rows_between(stream, found).trace() >= rows_between(stream, layout).trace()
    assert sorted(found.all_spans) == sorted(layout.all_spans)
    assert (found.local_length, found.cu_seqlens) == (layout.local_length, layout.cu_seqlens)
    assert all(found.segments(rank) for rank in range(ranks) if found.spans(rank)[0][0] < found.total)


def test_half_of_a_sequence_that_is_cut_zigzag_stays():
    stream = SequenceLayout.contiguous(64, 8)
    assert rows_between(stream, SequenceLayout.zigzag(64, 8)).trace() == 8
    assert rows_between(stream, renumbered(SequenceLayout.zigzag(64, 8), stream)).trace() == 32


def hybrid_config(ranks, **options):
    linear = {
        f"linear_{key}": 2 for key in ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim")
    }
    options = {"layer_types": ["gated_delta", "attention"]} | linear | options
    return tiny.transformer_config(MeshSizes(cp=ranks), **options)


@pytest.mark.parametrize("name", ["contiguous", "auto"])
def test_padding_of_the_stream_is_no_reason_to_move_rows(name):
    """Sequence parallelism and pipelines pad the stream, and attention needs no padding."""
    stream = stream_of([8, 8], 2, spare=5)
    assert attention_layout(hybrid_config(2, attention_cp_layout=name), stream) is stream
    if name == "contiguous":
        stream = stream_of([9], 2, multiple=4)
        assert attention_layout(hybrid_config(2, attention_cp_layout=name), stream) is stream


def test_groups_that_exchange_heads_stay_together():
    options = {"cp_comm_type": "a2a+p2p", "hierarchical_context_parallel_sizes": (2, 2)}
    stream = stream_of([7, 30, 3], 4)
    found = attention_layout(hybrid_config(4, **options), stream)
    plain = SequenceLayout.make("auto", 40, 4, cu_seqlens=stream.cu_seqlens, windows=[None], together=2)
    assert found.all_spans == plain.all_spans


def test_a_group_of_a_call_may_be_smaller_than_the_models():
    """Megatron's packed_seq_params.cp_group: heads move in the group of the call."""
    stream = stream_of([40], 2)
    found = attention_layout(hybrid_config(4, cp_comm_type="a2a", attention_cp_layout="balanced"), stream)
    assert found is stream


@given(st.data())
def test_each_rank_gets_the_features_of_its_heads(data):
    groups, each = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 6))
    ranks = data.draw(st.integers(1, 8))
    # (features of a head, or of all heads of the group; whether they are shared)
    kinds = data.draw(st.lists(st.tuples(st.integers(1, 3), st.booleans()), min_size=1, max_size=4))
    parts = [(size if shared else size * each, shared) for size, shared in kinds]
    heads = groups * each
    if heads_problem(groups, heads, ranks):
        with pytest.raises(ValueError, match="ssm_cp_type a2a"):
            FeatureMove.of(groups, parts, each, ranks)
        return
    move = FeatureMove.of(groups, parts, each, ranks)
    # Each column by name: (group, part, head or None where the part is shared, number).
    names = [
        (group, part, None if shared else head, number)
        for group in range(groups)
        for part, (size, shared) in enumerate(kinds)
        for head in ([None] if shared else range(group * each, (group + 1) * each))
        for number in range(size)
    ]
    for rank in range(ranks):
        own = range(rank * heads // ranks, (rank + 1) * heads // ranks)
        of_rank = sorted({head // each for head in own})
        expected = [
            name
            for group in of_rank
            for name in names
            if name[0] == group and (name[2] is None or name[2] in own)
        ]
        assert [names[column] for column in move.columns[rank].tolist()] == expected
        assert (move.groups, move.heads) == (len(of_rank), len(own))
    columns = torch.cat(move.columns).tolist()
    assert move.repeated == (len(set(columns)) < len(columns)) or not any(shared for _, shared in kinds)


@given(packs, ranks, st.integers(1, 3))
def test_no_documents_need_more_states_than_the_bound(lengths, ranks, batch):
    layout = stream_of(lengths, ranks)
    sizes = recurrent_sizes(hybrid_config(1), "gated_delta", 1)
    found = planned_state_bytes(sizes, batch, layout, 4)
    assert max(found) <= state_bytes(sizes, batch, ranks, 4)
    if not any(borders(layout)[1]):
        assert not any(found)
