"""States of recurrent layers handed from rank to rank, against the sequence in one piece; and how many travel."""

import itertools
import math

import pytest
import torch
import torch.distributed as dist

import pool
from longspan.context_parallel.layout import SequenceLayout
from longspan.context_parallel.runs_of_tokens import runs_of
from longspan.context_parallel.state import (
    Decays,
    HandOn,
    StatesOfRanks,
    Transitions,
    plan_scan,
    scan_over_ranks,
)
from longspan.recurrent.delta_rule import delta_rule
from longspan.recurrent.ssd import scan_span, span_output, ssd_scan

F64 = torch.float64


def simulated(resets, borders):
    """What each rank gets by the plan, as the string of the spans composed; * marks a reset."""
    ranks = len(resets)
    plan = plan_scan(resets, borders)
    assert all(len(hops) == len(plan[0]) for hops in plan)
    held = [[rank] for rank in range(ranks)]
    for at in range(len(plan[0]) - 1):
        now = [list(spans) for spans in held]
        for rank in range(ranks):
            hop = plan[rank][at]
            if hop.source is not None:
                assert plan[hop.source][at].to == rank
                assert plan[hop.source][at].with_map == hop.map_comes
                held[rank] = now[hop.source] + now[rank]
    return [
        held[hops[-1].source] if hops[-1].source is not None else None for rank, hops in enumerate(plan)
    ], plan


@pytest.mark.parametrize("ranks", range(1, 9))
def test_every_rank_gets_all_spans_back_to_the_document_that_is_open(ranks):
    for bits in itertools.product([False, True], repeat=ranks - 1):
        for inside in (False, True):
            # A document begins at a border, or also inside each span.
            borders = [False, *bits]
            resets = [inside or not border for border in borders]
            found, plan = simulated(resets, borders)
            for rank in range(ranks):
                if not borders[rank]:
                    assert found[rank] is None
                    continue
                first = max(r for r in range(rank) if r == 0 or resets[r])
                assert found[rank] == list(range(first, rank))
            for hops in plan:
                sent = [hop for hop in hops if hop.to is not None]
                assert len(sent) <= (math.ceil(math.log2(ranks)) if ranks > 1 else 0) + 1
                assert not any(hop.with_map for hop in hops) or not inside


def cut(starts, ranks):
    """(first row of each rank, resets, borders) of contiguous spans; the sequence has one row of the batch."""
    s = len(starts)
    edges = [s * rank // ranks for rank in range(ranks + 1)]
    spans = [starts[a:b] for a, b in itertools.pairwise(edges)]
    return edges, [bool(any(span)) for span in spans], [r > 0 and not span[0] for r, span in enumerate(spans)]


def draw(seed, s):
    torch.manual_seed(seed)
    b, n_k, n_v, d_k, d_v = 2, 2, 4, 3, 5
    k = torch.nn.functional.normalize(torch.randn(s, b, n_k, d_k, dtype=F64), dim=-1)
    values = [torch.randn(s, b, n_k, d_k, dtype=F64), k, torch.randn(s, b, n_v, d_v, dtype=F64)]
    values += [-torch.rand(s, b, n_v, dtype=F64), torch.rand(s, b, n_v, dtype=F64)]
    starts = torch.rand(s) < (0.0, 0.15, 0.5)[seed % 3]
    starts[0] = True
    return values, starts, torch.randn(s, b, n_v, d_v, dtype=F64)


def compare(gathered, whole):
    for part, expected in zip(gathered, whole):
        torch.testing.assert_close(part, expected, rtol=1e-10, atol=1e-11)


def by_delta_rule(seed, s):
    values, starts, weights = draw(seed, s)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    edges, resets, borders = cut(starts.tolist(), ranks)
    rows = slice(edges[rank], edges[rank + 1])
    own = [value[rows].clone().requires_grad_() for value in values]
    shapes = (2, 4, 3, 5), (2, 4, 3, 3)
    exchange = StatesOfRanks(
        dist.group.WORLD, resets, borders, Transitions(), *shapes, F64, torch.device("cpu")
    )
    out, _ = delta_rule(*own, starts[rows, None].expand(-1, 2), exchange=exchange, chunk=4)
    (out * weights[rows]).sum().backward()

    all_rows = [value.clone().requires_grad_() for value in values]
    whole, _ = delta_rule(*all_rows, starts[:, None].expand(-1, 2), chunk=4)
    (whole * weights).sum().backward()
    compare([out, *(x.grad for x in own)], [whole[rows], *(x.grad[rows] for x in all_rows)])
    return exchange.sent, sum(borders)


def by_ssd(seed, s):
    rank, ranks = dist.get_rank(), dist.get_world_size()
    _, starts, _ = draw(seed, s)
    b, n, p, g, d = 2, 4, 3, 2, 5
    shapes = [(s, b, n, p), (s, b, n), (n,), (s, b, g, d), (s, b, g, d), (n,)]
    values = [torch.randn(shape, dtype=F64) for shape in shapes]
    values[1], values[2] = values[1].abs(), -values[2].abs()
    weights = torch.randn(s, b, n, p, dtype=F64)
    edges, resets, borders = cut(starts.tolist(), ranks)
    rows = slice(edges[rank], edges[rank + 1])
    by_rows = [value.dim() > 1 for value in values]
    own = [(v[rows] if cut_ else v).clone().requires_grad_() for v, cut_ in zip(values, by_rows)]
    exchange = StatesOfRanks(
        dist.group.WORLD, resets, borders, Decays(), (b, n, p, d), (b, n), F64, torch.device("cpu")
    )
    span = scan_span(*own, starts[rows, None].expand(-1, b), chunk=4)
    out = span_output(span, HandOn.apply(span.state, span.decay, exchange))
    (out * weights[rows]).sum().backward()
    for parameter, cut_ in zip(own, by_rows):
        if not cut_:  # every rank has its share of these gradients
            dist.all_reduce(parameter.grad)

    all_rows = [value.clone().requires_grad_() for value in values]
    whole, _ = ssd_scan(*all_rows, starts[:, None].expand(-1, b), chunk=4)
    (whole * weights).sum().backward()
    expected = [x.grad[rows] if cut_ else x.grad for x, cut_ in zip(all_rows, by_rows)]
    compare([out, *(x.grad for x in own)], [whole[rows], *expected])
    return exchange.sent, sum(borders)


@pytest.mark.parametrize("layer", [by_delta_rule, by_ssd])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_spans_of_ranks_compute_what_one_piece_computes(layer, ranks):
    for seed, s in ((0, 29), (1, 23), (2, 16), (4, 40)):
        found = pool.run(ranks, layer, seed, s)
        most = 2 * ((math.ceil(math.log2(ranks)) if ranks > 1 else 0) + 1)
        assert all(sent <= most for sent, _ in found)
        # Nothing travels over a border at which a document begins.
        assert any(sent for sent, _ in found) == bool(found[0][1])


def by_scan_over_ranks(cu, matrices):
    """The public function with random states and maps, and every gradient, against a loop over the ranks."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    layout = SequenceLayout.contiguous(cu[-1], ranks, cu_seqlens=cu)
    torch.manual_seed(3)
    states = torch.randn(ranks, 2, 3, 4, 5, dtype=F64)
    maps = torch.randn(ranks, 2, 3, *((4, 4) if matrices else ()), dtype=F64)
    weights = torch.randn(ranks, 2, 3, 4, 5, dtype=F64)
    starts = set(cu[:-1])
    for r, (first, stop) in enumerate(runs_of(layout)):
        if any(first <= edge < stop for edge in starts):
            maps[r] = 0
    own = [x[rank].clone().requires_grad_() for x in (states, maps)]
    incoming = scan_over_ranks(tuple(own), dist.group.WORLD, layout)
    (incoming * weights[rank]).sum().backward()

    whole = [x.clone().requires_grad_() for x in (states, maps)]
    state, expected = whole[0][0] * 0, []
    for r, (first, stop) in enumerate(runs_of(layout)):
        continues = first < stop and first not in starts
        expected.append(state if continues else state * 0)
        map_ = whole[1][r] if matrices else whole[1][r][..., None, None]
        state = (map_ @ state if matrices else map_ * state) + whole[0][r]
    (torch.stack(expected) * weights).sum().backward()
    # A map of zero cuts the sequence: it has no gradient here, because no state comes into such a run to be multiplied.
    compare([incoming, own[0].grad], [expected[rank], whole[0].grad[rank]])
    if maps[rank].any():
        compare([own[1].grad], [whole[1].grad[rank]])


@pytest.mark.parametrize("matrices", [False, True])
@pytest.mark.parametrize("ranks", [1, 3, 4])
def test_scan_over_ranks(ranks, matrices):
    for cu in ((0, 29), (0, 3, 11, 29), (0, 1, 2, 5)):
        pool.run(ranks, by_scan_over_ranks, cu, matrices)


def test_recurrent_layers_need_one_run_a_rank():
    with pytest.raises(
        ValueError, match=r"zigzag, where a rank holds several runs.*SequenceLayout.contiguous"
    ):
        runs_of(SequenceLayout.zigzag(29, 2))
    assert runs_of(SequenceLayout.contiguous(5, 4)) == [(0, 2), (2, 4), (4, 5), (5, 5)]
