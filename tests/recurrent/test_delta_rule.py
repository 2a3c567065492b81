"""The gated delta rule in chunks against the recurrence token by token, in float64; spans handed on; precision."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from delta_recurrence import delta_recurrence, transition_matrix
from longspan.recurrent.delta_rule import delta_rule, span_state

TOLERANCE = 1e-10


def draw(s, b=2, n_k=2, n_v=2, d_k=5, d_v=6, seed=0, dtype=torch.float64, normalized=True):
    """q, k, v, g, beta of a span, and an incoming state."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    q, k = normal(s, b, n_k, d_k), normal(s, b, n_k, d_k)
    if normalized:
        q, k = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k))
    g, beta = -normal(s, b, n_v).exp() / 2, normal(s, b, n_v).sigmoid()
    inputs = q, k, normal(s, b, n_v, d_v), g, beta, normal(b, n_v, d_k, d_v)
    return [x.to(dtype).requires_grad_() for x in inputs]


def starts_at(s, b, *places):
    starts = torch.zeros(s, b, dtype=torch.bool)
    for row, column in places:
        starts[row % s, column % b] = True
    return starts


def with_gradients(results, inputs, seed=1):
    """The results, and the gradients of a fixed random sum of them."""
    random = torch.Generator().manual_seed(seed)
    total = sum((r * torch.randn(r.shape, generator=random, dtype=torch.float64)).sum() for r in results)
    return [*results, *torch.autograd.grad(total, inputs)]


def check_equal(found, expected, tolerance=TOLERANCE):
    assert len(found) == len(expected)
    for one, other in zip(found, expected):
        assert one.shape == other.shape
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


spans = st.fixed_dictionaries(
    {
        "s": st.integers(1, 28),
        "places": st.none() | st.lists(st.tuples(st.integers(0, 27), st.integers(0, 1)), max_size=8),
        "chunk": st.sampled_from([1, 3, 8, 64]),
        "repeats": st.sampled_from([1, 2]),
        "seed": st.integers(0, 1000),
    }
)


@settings(max_examples=20, deadline=None)
@given(span=spans, with_state=st.booleans())
def test_outputs_state_and_all_gradients_are_those_of_the_recurrence(span, with_state):
    *inputs, initial = draw(span["s"], n_v=2 * span["repeats"], seed=span["seed"])
    starts = None if span["places"] is None else starts_at(span["s"], 2, *span["places"])
    wanted = [*inputs, initial] if with_state else inputs
    state = initial if with_state else None
    found = delta_rule(*inputs, starts, state, chunk=span["chunk"])
    check_equal(
        with_gradients(found, wanted), with_gradients(delta_recurrence(*inputs, starts, state), wanted)
    )


@settings(max_examples=12, deadline=None)
@given(span=spans)
def test_a_spans_own_state_and_transition_are_those_of_the_recurrence(span):
    q, k, v, g, beta, _ = draw(span["s"], n_v=2 * span["repeats"], seed=span["seed"])
    starts = None if span["places"] is None else starts_at(span["s"], 2, *span["places"])
    found = span_state(k, v, g, beta, starts, chunk=span["chunk"])
    expected = delta_recurrence(q, k, v, g, beta, starts)[1], transition_matrix(k, g, beta, starts)
    check_equal(with_gradients(found, (k, v, g, beta)), with_gradients(expected, (k, v, g, beta)))
    alone, matrix = span_state(k, v, g, beta, starts, transition=False, chunk=span["chunk"])
    assert matrix is None
    check_equal([alone], expected[:1])


def test_groups_of_chunks_with_one_token_documents_give_what_one_chunk_gives():
    """38 chunks of 8 tokens are two groups; documents of one token, and documents that begin inside chunks."""
    s = 299
    inputs = draw(s, b=1, n_k=16, n_v=32, d_k=64, d_v=8)
    starts = starts_at(s, 1, *((row, 0) for row in (8, 9, 10, 77, 100, 101, 256, 298)))
    *rest, initial = inputs
    found, expected = (
        with_gradients(delta_rule(*rest, starts, initial, chunk=chunk), inputs) for chunk in (8, s)
    )
    check_equal(found, expected)


def cut(inputs, starts, bounds):
    """The inputs and starts of each span."""
    return [
        ([x[i:j] for x in inputs], None if starts is None else starts[i:j])
        for i, j in zip(bounds, bounds[1:])
    ]


BOUNDS = (0, 13, 14, 30, 41)


@pytest.mark.parametrize("places", [None, [(3, 0), (20, 1), (29, 1), (30, 0)]])
def test_spans_composed_in_order_are_the_whole(places):
    *inputs, initial = draw(41, n_v=4)
    starts = None if places is None else starts_at(41, 2, *places)
    maps = [
        span_state(k, v, g, beta, begun, chunk=8) for (_, k, v, g, beta), begun in cut(inputs, starts, BOUNDS)
    ]
    state, outs = initial, []
    for ((q, k, v, g, beta), begun), (own, matrix) in zip(cut(inputs, starts, BOUNDS), maps):
        outs.append(delta_rule(q, k, v, g, beta, begun, state, chunk=8)[0])
        state = matrix @ state + own
    found = with_gradients((torch.cat(outs), state), [*inputs, initial])
    whole = delta_recurrence(*inputs, starts, initial)
    check_equal(found, with_gradients(whole, [*inputs, initial]))
    # (M2, S2) after (M1, S1) is (M2 M1, M2 S1 + S2), in either bracketing.
    (s0, m0), (s1, m1), (s2, m2), (s3, m3) = maps
    late_state, late_matrix = m3 @ s2 + s3, m3 @ m2
    early_state, early_matrix = m1 @ s0 + s1, m1 @ m0
    check_equal([late_matrix @ (early_matrix @ initial + early_state) + late_state], [whole[1]])


class Handed:
    """An exchange between the spans of one process, which run forward in order and backward in reverse."""

    def __init__(self, number, count, maps, gradients):
        self.number, self.first, self.last = number, number == 0, number == count - 1
        self.maps, self.gradients = maps, gradients

    def incoming(self, state, transition):
        assert (state is None) == (self.last and not self.first)
        assert (transition is None) == (self.first or self.last)
        self.maps.append((state, transition))
        if self.first:
            return None
        handed = self.maps[0][0]
        for own, matrix in self.maps[1 : self.number]:
            handed = matrix @ handed + own
        return handed

    def outgoing(self, gradient):
        assert (gradient is None) == self.first
        self.gradients[self.number] = gradient
        if self.last:
            return None
        total = torch.zeros_like(self.maps[0][0])
        for later in sorted((i for i in self.gradients if i > self.number), reverse=True):
            matrix = self.maps[later][1]
            total = self.gradients[later] + (0 if matrix is None else matrix.mT @ total)
        return total


@pytest.mark.parametrize("bounds", [BOUNDS, (0, 20, 41), (0, 41)])
@pytest.mark.parametrize("places", [None, [(3, 0), (20, 1), (29, 1), (30, 0)]])
def test_an_exchange_hands_on_states_and_their_gradients(bounds, places):
    *inputs, _ = draw(41, n_v=4)
    starts = None if places is None else starts_at(41, 2, *places)
    maps, gradients, results = [], {}, []
    for number, (parts, begun) in enumerate(cut(inputs, starts, bounds)):
        exchange = Handed(number, len(bounds) - 1, maps, gradients)
        results.append(delta_rule(*parts, begun, exchange=exchange, chunk=8))
    found = with_gradients((torch.cat([o for o, _ in results]), results[-1][1]), inputs)
    check_equal(found, with_gradients(delta_recurrence(*inputs, starts), inputs))


def test_no_gradients_for_what_needs_none_and_only_the_final_state():
    q, k, v, g, beta, initial = draw(20)
    (found,) = torch.autograd.grad(delta_rule(q, k, v, g, beta, None, initial)[1].sum(), [v])
    (expected,) = torch.autograd.grad(delta_recurrence(q, k, v, g, beta, None, initial)[1].sum(), [v])
    check_equal([found], [expected])
    with torch.no_grad():
        check_equal(delta_rule(q, k, v, g, beta, chunk=8), delta_recurrence(q, k, v, g, beta))


def test_padding_rows_hand_on_the_state():
    *inputs, initial = draw(11)
    longer = [torch.cat([x, torch.zeros_like(x[:6])]) for x in inputs]
    longer[1] = torch.cat([inputs[1], torch.ones_like(inputs[1][:6])])
    check_equal(
        [delta_rule(*longer, None, initial, chunk=4)[1]], [delta_rule(*inputs, None, initial, chunk=4)[1]]
    )


def test_a_span_without_tokens_hands_on_the_state_and_its_gradient():
    *inputs, initial = draw(0)
    out, final = delta_rule(*inputs, None, initial)
    assert out.shape == (0, 2, 2, 6)
    check_equal([final, *torch.autograd.grad(final.sum(), [initial])], [initial, torch.ones_like(initial)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_keys_full_corrections_and_strong_decays_give_finite_gradients(dtype):
    """The system of equal keys is the hardest: the powers of A grow like binomials, and the inverse does not."""
    *inputs, initial = draw(130, dtype=dtype)
    with torch.no_grad():
        inputs[1].copy_(inputs[1][:1].expand_as(inputs[1]))
        inputs[4].fill_(0.9999)
        inputs[3][::2] = -1e-3
        inputs[3][5], inputs[3][70], inputs[3][71] = -1e4, -float("inf"), -90.0
    starts = starts_at(130, 2, (0, 0), (64, 0), (70, 1), (129, 0))
    wide = [x.detach().double().requires_grad_() for x in (*inputs, initial)]
    *rest, state = wide
    expected = with_gradients(delta_recurrence(*rest, starts, state), wide)
    found = with_gradients(delta_rule(*inputs, starts, initial), [*inputs, initial])
    assert all(x.isfinite().all() for x in found)
    check_equal([x.double() for x in found], expected, 1e-10 if dtype == torch.float64 else 2e-4)


def chunk_reference():
    return pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")


def reference(q, k, v, g, beta, initial):
    """transformers' chunked form, in our shapes; it normalises queries and keys."""
    rows = [x.transpose(0, 1) for x in (q, k, v, g, beta)]
    out, final = chunk_reference().torch_chunk_gated_delta_rule(
        *rows, initial_state=initial, output_final_state=True, use_qk_l2norm_in_kernel=True
    )
    return out.transpose(0, 1), final


@pytest.mark.parametrize("n_v", [2, 4])
def test_equal_to_transformers_chunked_form(n_v):
    inputs = draw(150, n_v=n_v, d_k=16, d_v=24, dtype=torch.float32, normalized=False)
    *rest, initial = inputs
    found = with_gradients(delta_rule(*rest, None, initial, normalize=True), inputs)
    check_equal(found, with_gradients(reference(*inputs), inputs), 1e-4)


def test_normalisation_is_that_of_the_recurrence_on_normalised_inputs():
    q, k, *rest, initial = draw(21, n_v=4, normalized=False)
    unit_q, unit_k = (x * (x.pow(2).sum(-1, keepdim=True) + 1e-6).rsqrt() for x in (q, k))
    inputs = [q, k, *rest, initial]
    found = with_gradients(delta_rule(q, k, *rest, None, initial, normalize=True, scale=0.3, chunk=8), inputs)
    expected = delta_recurrence(unit_q, unit_k, *rest, None, initial, scale=0.3)
    check_equal(found, with_gradients(expected, inputs))


def test_bfloat16_errors_are_at_most_twice_the_references():
    exact = draw(200, n_v=4, d_k=32, d_v=32, normalized=False)
    low = [x.detach().bfloat16().requires_grad_() for x in exact]
    wide = [x.detach().double().requires_grad_() for x in low]
    low[3:], wide[3:] = (
        [x.detach().to(t).requires_grad_() for x in low[3:]] for t in (torch.float, torch.double)
    )

    def ours(q, k, v, g, beta, initial):
        return delta_rule(q, k, v, g, beta, None, initial, normalize=True)

    truth, found, theirs = (
        with_gradients(function(*inputs), inputs)
        for function, inputs in ((ours, wide), (ours, low), (reference, low))
    )
    for true, own, other in zip(truth, found, theirs):
        assert own.dtype == other.dtype
        errors = [(x.double() - true).norm() / true.norm() for x in (own, other)]
        assert errors[0] <= 2 * errors[1] + 1e-7


def test_autocast_changes_nothing():
    *inputs, initial = draw(20, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = delta_rule(*inputs, None, initial)
    check_equal(found, delta_rule(*inputs, None, initial))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"g": torch.zeros(4, 1, 3)}, r"g is \(4, 1, 3\), not \(4, 1, 2\)"),
        ({"v": torch.zeros(4, 1, 3, 6)}, "3 value heads must be a multiple of the 2 key heads"),
        ({"starts": torch.zeros(4, 1)}, "starts must be bool"),
        ({"initial": torch.zeros(1, 2, 6, 5)}, r"initial \(1, 2, 6, 5\) must be"),
        ({"chunk": 0}, "chunk must be at least 1"),
        (
            {"initial": torch.zeros(1, 2, 5, 6), "exchange": Handed(0, 1, [], {})},
            "either initial or exchange",
        ),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    names = ("q", "k", "v", "g", "beta")
    arguments = dict(zip(names, draw(4, b=1))) | change
    if arguments["v"].shape[2] == 3:
        arguments |= {"g": torch.zeros(4, 1, 3), "beta": torch.zeros(4, 1, 3)}
    with pytest.raises(ValueError, match=message):
        delta_rule(**arguments)
