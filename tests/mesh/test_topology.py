"""Rank lists against a brute-force oracle over coordinates, and against Megatron's documented examples."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.mesh.topology import RankGenerator, data_parallel_size, hierarchical_groups

ORDER = "tp-cp-ep-dp-pp"


def by_coordinates(sizes, axes, offset=0):
    """The oracle: sizes is {axis: size}, fastest first. Ranks that agree on all other axes share a group."""
    groups = {}
    slowest_first = list(reversed(sizes))
    for rank, place in enumerate(itertools.product(*(range(sizes[axis]) for axis in slowest_first))):
        fixed = tuple(i for axis, i in zip(slowest_first, place) if axis not in axes)
        groups.setdefault(fixed, []).append(offset + rank)
    return sorted(groups.values())


@st.composite
def grids(draw):
    order = draw(st.permutations(["tp", "cp", "ep", "dp", "pp"]))
    sizes = {axis: draw(st.integers(1, 4)) for axis in order}
    sizes[draw(st.sampled_from(["ep", "cp"]))] = 1
    token = draw(st.lists(st.sampled_from(order), min_size=1, max_size=5, unique=True))
    return sizes, token, draw(st.integers(0, 40))


@settings(max_examples=150, deadline=None)
@given(grids())
def test_equals_coordinates(grid):
    sizes, token, offset = grid
    made = RankGenerator(**sizes, order="-".join(sizes), rank_offset=offset)
    groups = made.get_ranks("-".join(token))
    assert groups == by_coordinates(sizes, token, offset)
    assert sorted(itertools.chain(*groups)) == list(range(offset, offset + math.prod(sizes.values())))
    assert made.world_size == math.prod(sizes.values())


def test_megatron_docstring_example():
    """16 GPUs with tp 2, pp 4: the listing in Megatron's initialize_model_parallel."""
    grid = RankGenerator(tp=2, ep=1, dp=2, pp=4, cp=1, order=ORDER)
    assert grid.get_ranks("tp") == [[i, i + 1] for i in range(0, 16, 2)]
    assert grid.get_ranks("dp") == [[0, 2], [1, 3], [4, 6], [5, 7], [8, 10], [9, 11], [12, 14], [13, 15]]
    assert grid.get_ranks("pp") == [[0, 4, 8, 12], [1, 5, 9, 13], [2, 6, 10, 14], [3, 7, 11, 15]]
    assert grid.get_ranks("tp-pp") == [[0, 1, 4, 5, 8, 9, 12, 13], [2, 3, 6, 7, 10, 11, 14, 15]]


def test_all_axes_by_hand():
    grid = RankGenerator(tp=2, ep=1, dp=2, pp=2, cp=2, order=ORDER)
    assert grid.get_ranks("cp") == [[0, 2], [1, 3], [4, 6], [5, 7], [8, 10], [9, 11], [12, 14], [13, 15]]
    assert grid.get_ranks("tp-cp") == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]
    assert grid.get_ranks("dp-cp") == [[0, 2, 4, 6], [1, 3, 5, 7], [8, 10, 12, 14], [9, 11, 13, 15]]
    assert grid.get_ranks("ep") == [[rank] for rank in range(16)]
    swapped = RankGenerator(tp=2, ep=1, dp=2, pp=2, cp=2, order="tp-cp-ep-pp-dp")
    assert swapped.get_ranks("pp") == [[0, 4], [1, 5], [2, 6], [3, 7], [8, 12], [9, 13], [10, 14], [11, 15]]
    assert swapped.get_ranks("dp") == [[rank, rank + 8] for rank in range(8)]


def test_expert_grid():
    grid = RankGenerator(tp=1, ep=4, dp=2, pp=1, cp=1, order=ORDER)
    assert grid.get_ranks("ep") == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert grid.get_ranks("dp") == [[0, 4], [1, 5], [2, 6], [3, 7]]


def test_the_order_of_a_token_does_not_matter():
    grid = RankGenerator(tp=2, ep=1, dp=3, pp=1, cp=2, order=ORDER)
    assert grid.get_ranks("dp-cp") == grid.get_ranks("cp-dp")


def test_rank_offset():
    assert RankGenerator(tp=2, ep=1, dp=2, pp=1, cp=1, order=ORDER, rank_offset=8).get_ranks("dp") == [
        [8, 10],
        [9, 11],
    ]


def test_an_axis_of_size_one_may_be_left_out():
    grid = RankGenerator(tp=2, ep=1, dp=2, pp=1, cp=1, order="tp-dp")
    assert grid.get_ranks("cp") == [[0], [1], [2], [3]]
    assert grid.get_ranks("dp") == [[0, 2], [1, 3]]


@pytest.mark.parametrize("axis", ["tp", "ep", "dp", "pp", "cp"])
def test_a_larger_axis_may_not(axis):
    sizes = dict(tp=1, ep=1, dp=1, pp=1, cp=1) | {axis: 3}
    order = "-".join(name for name in sizes if name != axis)
    with pytest.raises(RuntimeError, match=rf"{axis} has size 3 but order '{order}' does not name it.*Add"):
        RankGenerator(**sizes, order=order)


def test_experts_and_context_are_two_grids():
    with pytest.raises(ValueError, match=r"ep=2 and cp=4.*two grids.*cp=1"):
        RankGenerator(tp=1, ep=2, dp=1, pp=1, cp=4, order=ORDER)


@pytest.mark.parametrize("order", ["tp-cp-ep-dp-pp-tp", "tp-cp-ep-dp-xp", "", "tp_cp_ep_dp_pp"])
def test_orders_that_are_none(order):
    with pytest.raises(RuntimeError, match=r"order.*at most once"):
        RankGenerator(tp=2, ep=1, dp=1, pp=1, cp=1, order=order)


def test_other_refusals():
    grid = RankGenerator(tp=2, ep=1, dp=1, pp=1, cp=1, order=ORDER)
    with pytest.raises(ValueError, match=r"'tp-xp': 'xp' is not an axis.*tp, cp, ep, dp, pp"):
        grid.get_ranks("tp-xp")
    with pytest.raises(ValueError, match=r"dp=0.*at least 1"):
        RankGenerator(tp=2, ep=1, dp=0, pp=1, cp=1, order=ORDER)


# --- hierarchical groups ------------------------------------------------------------------


def test_megatron_hierarchy():
    """The example of Megatron's create_hierarchical_groups: 16 ranks, sizes 2, 2, 4."""
    assert hierarchical_groups(list(range(16)), [2, 2, 4]) == [
        [[i, i + 1] for i in range(0, 16, 2)],
        [[0, 2], [1, 3], [4, 6], [5, 7], [8, 10], [9, 11], [12, 14], [13, 15]],
        [[0, 4, 8, 12], [1, 5, 9, 13], [2, 6, 10, 14], [3, 7, 11, 15]],
    ]


def test_hierarchy_of_strided_ranks():
    """The context parallel group of tp rank 1 at tp 2, cp 8; inner 4, outer 2."""
    assert hierarchical_groups([1, 3, 5, 7, 9, 11, 13, 15], [4, 2]) == [
        [[1, 3, 5, 7], [9, 11, 13, 15]],
        [[1, 9], [3, 11], [5, 13], [7, 15]],
    ]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.randoms())
def test_levels_differ_in_one_digit(sizes, random):
    ranks = random.sample(range(1000), math.prod(sizes))
    levels = hierarchical_groups(ranks, sizes)
    assert len(levels) == len(sizes)
    stride = 1
    for size, groups in zip(sizes, levels):
        assert sorted(itertools.chain(*groups)) == sorted(ranks)
        for group in groups:
            places = [ranks.index(rank) for rank in group]
            assert places == [places[0] + i * stride for i in range(size)]
            assert places[0] // stride % size == 0
        stride *= size


def test_hierarchy_refusals():
    with pytest.raises(ValueError, match=r"2 x 3 = 6.*8 ranks.*product"):
        hierarchical_groups(list(range(8)), [2, 3])
    with pytest.raises(ValueError, match=r"\[-2, -2\].*at least 1"):
        hierarchical_groups(list(range(4)), [-2, -2])


# --- what is left for data parallelism ----------------------------------------------------


def test_data_parallel_size():
    assert data_parallel_size(16, 2, 2, 2) == 2
    assert data_parallel_size(1, 1, 1, 1) == 1
    with pytest.raises(
        ValueError, match=r"tensor 2 x context 3 x pipeline 1 = 6 does not divide 8.*multiple of 6"
    ):
        data_parallel_size(8, 2, 3, 1)
    with pytest.raises(ValueError, match=r"tensor 0.*at least 1"):
        data_parallel_size(8, 0, 1, 1)
