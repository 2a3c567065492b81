"""What recurrent layers and the change of layout around attention send, counted in real processes, against the plans."""

import itertools
import math
import random

import pytest
import torch
import torch.distributed as dist

import hybrids
import pool
from exchanged import Exchanged
from longspan.config.sizes import MeshSizes
from longspan.context_parallel import SequenceLayout
from longspan.context_parallel.move_rows import change_of_layout, tails
from longspan.context_parallel.recurrent_costs import (
    a2a_bytes,
    planned_state_bytes,
    recurrent_sizes,
    state_bytes,
)
from longspan.context_parallel.two_layouts import attention_layout

WIDE = 8  # bytes of an element in float64
CPU = torch.device("cpu")


def random_packs(seed, ranks):
    """One sequence of two lengths; random documents; documents that begin where runs begin; fewer tokens than ranks
    times the convolution."""
    draw = random.Random(seed)
    packs = [(0, 53), (0, 211)]
    for _ in range(3):
        lengths = [draw.choice([1, 2, 5, 19, 40]) for _ in range(draw.randint(1, 7))]
        packs.append((0, *itertools.accumulate(lengths)))
    at_borders = tuple(range(0, 7 * ranks + 1, 7))
    return [*packs, at_borders, (0, 1, ranks + 1)]


def passed(sizes, packs, options, columns):
    """For each pack: this rank's messages and all-to-alls of forward and of backward."""
    model, mesh = hybrids.model_of(sizes, packs, **options)
    rank, found = dist.get_rank(), []
    for cu in packs:
        model.zero_grad()
        tokens, labels = hybrids.batch(cu, columns, masked=False)
        layout = SequenceLayout.contiguous(cu[-1], sizes.cp, cu_seqlens=cu)
        tokens, labels = (layout.shard(x, rank, dim=1, pad_value=0) for x in (tokens, labels))
        with Exchanged() as forward:
            loss = model(tokens, labels=labels, layout=layout).sum()
        with Exchanged() as backward:
            loss.backward()
        found.append(
            [(one.messages, one.all_to_alls, one.to_others(rank, sizes.cp)) for one in (forward, backward)]
        )
    return found


def mixer_of(kind, ranks, **options):
    options = {"layer_types": [kind]} | options
    if ranks == 3:
        options |= {"mamba_num_heads": 12, "mamba_num_groups": 6} if kind == "mamba" else {}
        options |= {"linear_num_key_heads": 6, "linear_num_value_heads": 12} if kind == "gated_delta" else {}
    config = hybrids.config_of(MeshSizes(cp=ranks), **options)
    return options, recurrent_sizes(config, kind, 1)


def tail_bytes(layout, sizes, rank, columns):
    """Bytes to each rank in the exchange of the convolution's tails, forward and backward."""
    move = tails(layout, sizes.kernel - 1, rank, CPU)
    return [[rows * sizes.tail * columns * WIDE for rows in way] for way in (move.sent, move.received)]


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("kind", ["mamba", "gated_delta"])
def test_states_alone_travel_and_their_bytes_are_planned(kind, ranks):
    columns, packs = 1 + ranks % 2, random_packs(ranks, ranks)
    options, sizes = mixer_of(kind, ranks, ssm_cp_type="state")
    by_rank = pool.run(ranks, passed, MeshSizes(cp=ranks), packs, options, columns)
    most = state_bytes(sizes, columns, ranks, WIDE)
    sent = {}
    for number, cu in enumerate(packs):
        layout = SequenceLayout.contiguous(cu[-1], ranks, cu_seqlens=cu)
        planned = planned_state_bytes(sizes, columns, layout, WIDE)
        for rank in range(ranks):
            ways = by_rank[rank][number]
            for (messages, all_to_alls, _), expected in zip(
                ways, tail_bytes(layout, sizes, rank, columns), strict=True
            ):
                assert all_to_alls == [expected], (cu, rank)
                assert len(messages) <= math.ceil(math.log2(ranks)) + 1
                assert sum(size for _, size in messages) <= most
            forward = ways[0][0]
            assert sum(size for _, size in forward) == planned[rank], (cu, rank)
            if cu == tuple(range(0, 7 * ranks + 1, 7)):
                # A document begins at every border, so no state and no tail crosses one.
                assert not any(messages or sum(others) for messages, _, others in ways)
        sent[cu] = [[messages for messages, *_ in by_rank[rank][number]] for rank in range(ranks)]
    # Four times the tokens, and the same messages.
    assert sent[0, 53] == sent[0, 211]
    assert any(sent[0, 53][0])


@pytest.mark.parametrize(
    ("kind", "ranks", "few"),
    [
        ("mamba", 2, {}),
        ("mamba", 3, {}),
        ("mamba", 4, {"mamba_num_groups": 2}),
        ("gated_delta", 2, {}),
        ("gated_delta", 3, {}),
        ("gated_delta", 4, {"linear_num_key_heads": 1}),
    ],
)
def test_heads_travel_in_the_bytes_of_the_formula(kind, ranks, few):
    columns, packs = 1 + ranks % 2, random_packs(ranks, ranks)
    options, sizes = mixer_of(kind, ranks, ssm_cp_type="a2a", **few)
    by_rank = pool.run(ranks, passed, MeshSizes(cp=ranks), packs, options, columns)
    for number, cu in enumerate(packs):
        layout = SequenceLayout.contiguous(cu[-1], ranks, cu_seqlens=cu)
        expected = a2a_bytes(sizes, layout.local_length, columns, ranks, WIDE)
        for rank in range(ranks):
            forward, backward = by_rank[rank][number]
            there, back = tail_bytes(layout, sizes, rank, columns)
            assert forward[0] == backward[0] == []
            # The tails, features to heads, and outputs to tokens; backward in the other order.
            assert (forward[1][0], backward[1][-1]) == (there, back)
            assert len(forward[1]) == len(backward[1]) == 3
            assert sum(forward[2][1:]) == sum(backward[2][:-1]) == expected, (cu, rank)


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("name", ["auto", "contiguous"])
def test_rows_go_to_attention_and_back_in_one_exchange_each(ranks, name):
    columns, packs = 2, random_packs(ranks, ranks)
    options = {"layer_types": ["attention", "mamba", "attention"], "attention_cp_layout": name}
    config = hybrids.config_of(MeshSizes(cp=ranks), **options)
    query = config.num_attention_heads * config.kv_channels * columns * WIDE
    key = config.num_query_groups * config.kv_channels * columns * WIDE
    by_rank = pool.run(ranks, passed, MeshSizes(cp=ranks), packs, options | {"ssm_cp_type": "state"}, columns)
    sizes = recurrent_sizes(config, "mamba", 1)
    moved = 0
    for number, cu in enumerate(packs):
        stream = SequenceLayout.contiguous(cu[-1], ranks, cu_seqlens=cu)
        layout = attention_layout(config, stream)
        for rank in range(ranks):
            forward, backward = (all_to_alls for _, all_to_alls, _ in by_rank[rank][number])
            tail, tail_back = tail_bytes(stream, sizes, rank, columns)
            if layout is stream:
                assert (forward, backward) == ([tail], [tail_back])
                continue
            moved += 1
            there = change_of_layout(stream, layout, rank, CPU)
            back = change_of_layout(layout, stream, rank, CPU)
            around = [[n * (query + 2 * key) for n in there.sent], [n * query for n in back.sent]]
            assert forward == [*around, tail, *around]
            # The gradients of the output go to attention's layout, and those of query, key and value come back.
            around = [[n * query for n in back.received], [n * (query + 2 * key) for n in there.received]]
            assert backward == [*around, tail_back, *around]
    assert (moved > 0) == (name == "auto")
