"""Initial weights that know no layout, and generator states an axis."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pool
from longspan import parallel_state
from longspan.tensor_parallel import get_rng_tracker, model_parallel_seed
from longspan.tensor_parallel.random import (
    Constant,
    Normal,
    RNGStatesTracker,
    Uniform,
    draw_part,
    draw_rows,
    hash_seed,
)


def whole(shape, seed=1, name="layer.weight", std=0.5, dtype=torch.float32):
    return draw_part(Normal(std), seed, name, shape, [(0, size) for size in shape], dtype)


def ramp(seed, name, shape, rows):
    """Initial values of one's own: each row its number, and something random beside it."""
    return torch.arange(*rows).view(-1, *[1] * (len(shape) - 1)) + Uniform(0.1)(seed, name, shape, rows)


def in_small_blocks(seed, name, shape, rows):
    """Values that are drawn in blocks of 20 elements or one row."""
    return draw_rows(seed, name, shape, rows, lambda x, g: x.normal_(generator=g), block_numel=20)


@st.composite
def cuts(draw):
    shape = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=4)))
    if draw(st.booleans()):  # many blocks
        shape = (shape[0] * 7, *shape[1:])

    def cut(size):
        return tuple(sorted(draw(st.tuples(st.integers(0, size), st.integers(0, size)))))

    return shape, [cut(size) for size in shape], draw(st.sampled_from([1, 8, 20, 1 << 20]))


@settings(max_examples=200, deadline=None)
@given(
    cut=cuts(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    initial=st.sampled_from([Normal(0.5), Uniform(0.2), Constant(3.0), ramp, in_small_blocks]),
)
def test_any_part_is_the_slice_of_the_whole(cut, dtype, initial):
    shape, ranges, block = cut
    # elements of a block: from one row each to all in one
    part = draw_part(initial, 1, "layer.weight", shape, ranges, dtype, block)
    want = draw_part(initial, 1, "layer.weight", shape, [(0, size) for size in shape], dtype, block)
    want = want[tuple(slice(*edges) for edges in ranges)]
    assert part.dtype == dtype
    assert part.shape == want.shape
    assert torch.equal(part, want)


def test_parts_of_a_tensor_of_many_real_blocks():
    shape = (700, 3001)  # 349 rows a block
    everything = whole(shape)
    for rows, columns in (((300, 699), (0, 3001)), ((348, 350), (7, 9))):
        part = draw_part(Normal(0.5), 1, "layer.weight", shape, [rows, columns])
        assert torch.equal(part, everything[slice(*rows), slice(*columns)])
    assert abs(everything.std() / 0.5 - 1) < 0.01
    assert abs(everything.mean()) < 0.002
    assert not torch.equal(everything[:300], everything[349:649])  # blocks differ


def test_kinds_of_values():
    parts = {
        kind: draw_part(kind, 1, "a", (300, 40), [(0, 300), (0, 40)]) for kind in (Normal(0.2), Uniform(0.2))
    }
    for part in parts.values():
        assert abs(part.std() / 0.2 - 1) < 0.02
    assert parts[Normal(0.2)].abs().max() > 0.6
    assert parts[Uniform(0.2)].abs().max() <= 0.2 * 3**0.5
    assert (draw_part(Constant(-1.5), 1, "a", (3, 4), [(1, 3), (2, 4)]) == torch.full((2, 2), -1.5)).all()


def test_depends_on_seed_and_name_alone():
    shape = (5, 6)
    first = whole(shape)
    torch.rand(10)
    assert torch.equal(whole(shape), first)
    assert not torch.equal(whole(shape, seed=2), first)
    assert not torch.equal(whole(shape, name="other.weight"), first)
    torch.testing.assert_close(whole(shape, std=1.0), 2 * first)
    state = torch.get_rng_state()
    whole(shape)
    assert torch.equal(torch.get_rng_state(), state)  # the default generator is not touched


def test_precision_and_device_do_not_change_it():
    """float32 on the CPU whatever the defaults are; lower precision is that, rounded."""
    shape = (5, 6)
    first = whole(shape)
    assert torch.equal(whole(shape, dtype=torch.bfloat16), first.bfloat16())
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(whole(shape), first)
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        assert torch.equal(whole(shape), first)


def test_seeds_are_pinned():
    """Another number here would give every seed other initial weights."""
    assert hash_seed(0, "a", 1) == 6452566503321283255
    assert 0 <= hash_seed(7) < 2**63
    assert len({hash_seed(seed, name) for seed in range(50) for name in "abc"}) == 150


# --- the tracker --------------------------------------------------------------------------


def test_fork_leaves_the_default_generator_alone():
    tracker = RNGStatesTracker()
    torch.manual_seed(5)
    want = torch.rand(4)
    torch.manual_seed(5)
    tracker.add("noise", 9)
    got = [torch.rand(2)]
    with tracker.fork("noise"):
        torch.rand(7)
    got.append(torch.rand(2))
    assert torch.equal(torch.cat(got), want)


def test_a_state_is_continued_where_it_got_to():
    tracker = RNGStatesTracker()
    tracker.add("a", 9)
    tracker.add("b", 9)
    with tracker.fork("a"):
        first = torch.rand(3)
    with tracker.fork("a"):
        second = torch.rand(3)
    with tracker.fork("b"):
        both = torch.rand(6)
    torch.manual_seed(9)
    assert torch.equal(torch.cat([first, second]), torch.rand(6))
    assert torch.equal(both[:3], first)


def test_forks_nest_and_survive_errors():
    tracker = RNGStatesTracker()
    tracker.add("a", 1)
    tracker.add("b", 2)
    before = torch.get_rng_state()
    drawn = []

    def work():
        with tracker.fork("a"):
            drawn.append(torch.rand(2))
            with tracker.fork("b"):
                torch.rand(5)
            drawn.append(torch.rand(2))
            raise KeyError

    with pytest.raises(KeyError):
        work()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(torch.cat(drawn), torch.rand(4))


def test_tracker_refusals():
    tracker = RNGStatesTracker()
    tracker.add("a", 1)
    with pytest.raises(ValueError, match=r"'a' exists already.*reset"):
        tracker.add("a", 2)
    with pytest.raises(ValueError, match=r"'b' does not exist.*model_parallel_seed"), tracker.fork("b"):
        pass
    tracker.reset()
    tracker.add("a", 2)


def streams(tp, cp):
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp, context_parallel_size=cp)
    model_parallel_seed(1234)
    shared = torch.rand(3).tolist()
    with get_rng_tracker().fork():
        apart = torch.rand(3).tolist()
    model_parallel_seed(1234)  # again: from the start
    assert torch.rand(3).tolist() == shared
    with get_rng_tracker().fork():
        assert torch.rand(3).tolist() == apart
    model_parallel_seed(1235)
    assert torch.rand(3).tolist() != shared
    return parallel_state.get_tensor_model_parallel_rank(), shared, apart


def test_model_parallel_seed():
    """One stream all ranks share, one that differs over tp and only over tp."""
    results = pool.run(4, streams, 2, 2)
    assert len({tuple(shared) for _, shared, _ in results}) == 1
    assert len({tuple(apart) for _, _, apart in results}) == 2
    assert len({(rank, tuple(apart)) for rank, _, apart in results}) == 2
    assert all(shared != apart for _, shared, apart in results)


def test_model_parallel_seed_without_groups():
    with pytest.raises(RuntimeError, match="initialize_model_parallel"):
        model_parallel_seed(1)
    model_parallel_seed(1, tp_rank=0)
    with get_rng_tracker().fork():
        first = torch.rand(2)
    model_parallel_seed(1, tp_rank=1)
    with get_rng_tracker().fork():
        assert not torch.equal(torch.rand(2), first)
    get_rng_tracker().reset()
