"""Mamba-2's scan and its convolution against the sequential recurrences: outputs, states and all gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import recurrences
from longspan.recurrent import ssd
from longspan.recurrent.convolution import causal_convolution, convolution_tail
from longspan.recurrent.ssd import scan_span, span_output, ssd_scan, state_after

F64 = torch.float64
#: Lengths of 0 and 1 are among them. Where every row may begin a document, documents have one token.
LENGTHS = st.integers(0, 20)


def starts_of(length, batch, seed, share):
    """bool [s, b] with about this share of first tokens; None if the share is 0."""
    if not share:
        return None
    return torch.rand(length, batch, generator=torch.Generator().manual_seed(seed)) < share


def gradients(function, inputs, draw=0):
    """What ``function()`` returns, and the gradients of a random weighted sum of it."""
    results = function()
    generator = torch.Generator().manual_seed(draw)
    total = sum((r * torch.randn(r.shape, generator=generator, dtype=F64).to(r.dtype)).sum() for r in results)
    grads = torch.autograd.grad(total, inputs, allow_unused=True, materialize_grads=True)
    return [*(r.detach() for r in results), *grads]


def assert_close(found, expected, limit=1e-10):
    assert len(found) == len(expected)
    for number, (a, b) in enumerate(zip(found, expected)):
        assert a.shape == b.shape, number
        assert bool(torch.isfinite(a).all()), number
        if a.numel():
            assert (a - b).abs().max() <= limit * max(1, b.abs().max()), number


class Inputs:
    """Random inputs of the scan; ``scan`` are those with a gradient."""

    def __init__(self, s, b=2, n=4, p=3, g=2, d=5, seed=0, initial=True, skip=True, dtype=F64, steps=1.0):
        torch.manual_seed(seed)
        self.x, self.dt = torch.randn(s, b, n, p, dtype=F64), steps * torch.rand(s, b, n, dtype=F64)
        self.B, self.C = torch.randn(2, s, b, g, d, dtype=F64)
        self.A, self.D = -2 * torch.rand(n, dtype=F64), torch.randn(n, dtype=F64) if skip else None
        self.initial = torch.randn(b, n, p, d, dtype=F64) if initial else None
        for name, value in vars(self).items():
            setattr(self, name, None if value is None else value.to(dtype).requires_grad_())

    @property
    def all(self):
        return [value for value in vars(self).values() if value is not None]

    def rows(self, part):
        return self.x[part], self.dt[part], self.A, self.B[part], self.C[part], self.D

    @property
    def whole(self):
        return self.rows(slice(None))

    def double(self):
        """The same values in float64."""
        copy = object.__new__(Inputs)
        for name, value in vars(self).items():
            setattr(copy, name, None if value is None else value.detach().to(F64).requires_grad_())
        return copy


@settings(max_examples=40)
@given(
    LENGTHS,
    st.sampled_from([1, 3, 4, 8, 64]),
    st.sampled_from([(4, 1), (4, 2), (3, 3), (1, 1)]),
    st.sampled_from([0, 0.1, 0.5, 1]),
    st.booleans(),
    st.booleans(),
    st.integers(1, 2),
    st.integers(0, 1000),
)
def test_the_scan_equals_the_recurrence(length, chunk, heads, share, initial, skip, batch, seed):
    n, g = heads
    inputs = Inputs(length, batch, n, 3, g, 2, seed, initial, skip)
    starts = starts_of(length, batch, seed, share)
    found = gradients(lambda: ssd_scan(*inputs.whole, starts, inputs.initial, chunk=chunk), inputs.all)
    expected = gradients(lambda: recurrences.state_space(*inputs.whole, starts, inputs.initial), inputs.all)
    assert_close(found, expected)


@pytest.mark.parametrize("at_once", [1, 1 << 20])
@pytest.mark.parametrize("length", [8, 29])
def test_several_chunks_at_once_equal_one_after_another(monkeypatch, length, at_once):
    monkeypatch.setattr(ssd, "CPU_ELEMENTS", at_once)
    inputs = Inputs(length)
    starts = starts_of(length, 2, 1, 0.15)
    found = gradients(lambda: ssd_scan(*inputs.whole, starts, inputs.initial, chunk=4), inputs.all)
    expected = gradients(lambda: recurrences.state_space(*inputs.whole, starts, inputs.initial), inputs.all)
    assert_close(found, expected)


def in_spans(bounds, inputs, weight, bias, starts, chunk):
    """Convolution and scan of one span after another: y, the final state.

    All first halves come first. Then the pairs (decay, state) are composed, as ranks do it.
    """
    spans, tail, valid = [], None, None
    for first, end in zip(bounds, bounds[1:]):
        part = slice(first, end)
        x, dt, A, B, C, D = inputs.rows(part)
        own = None if starts is None else starts[part]
        flat = x.flatten(2)
        x = causal_convolution(flat, weight, bias, own, tail, valid).view_as(x)
        tail, valid = convolution_tail(flat, weight.shape[1], own, tail, valid)
        spans.append(scan_span(x, dt, A, B, C, D, own, chunk=chunk))
    outputs = []
    decay, state = torch.ones_like(spans[0].decay), torch.zeros_like(spans[0].state)
    for span in spans:
        incoming = state + decay[..., None, None] * inputs.initial
        outputs.append(span_output(span, incoming))
        decay, state = span.decay * decay, state_after(span, state)
    return torch.cat(outputs), state + decay[..., None, None] * inputs.initial


@settings(max_examples=25)
@given(
    LENGTHS,
    st.lists(st.integers(0, 20), min_size=1, max_size=6),
    st.sampled_from([2, 5]),
    st.integers(1, 5),
    st.sampled_from([0, 0.1, 0.5, 1]),
    st.integers(0, 1000),
)
def test_a_sequence_in_spans_equals_one_piece(length, cuts, chunk, kernel, share, seed):
    inputs = Inputs(length, 2, 2, 2, 1, 3, seed)
    weight, bias = torch.randn(4, kernel, dtype=F64), torch.randn(4, dtype=F64)
    leaves = [*inputs.all, weight.requires_grad_(), bias.requires_grad_()]
    starts = starts_of(length, 2, seed, share)
    bounds = [0, *sorted(min(cut, length) for cut in cuts), length]

    def one_piece():
        x, *others = inputs.whole
        x = recurrences.convolution(x.flatten(2), weight, bias, starts).view_as(x)
        return recurrences.state_space(x, *others, starts, inputs.initial)

    found = gradients(lambda: in_spans(bounds, inputs, weight, bias, starts, chunk), leaves)
    assert_close(found, gradients(one_piece, leaves))


@settings(max_examples=25)
@given(
    LENGTHS,
    st.integers(1, 5),
    st.sampled_from([0, 0.2, 1]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 1000),
)
def test_the_convolution_equals_its_sum(length, kernel, share, has_tail, has_bias, seed):
    torch.manual_seed(seed)
    x, weight = torch.randn(length, 2, 3, dtype=F64), torch.randn(3, kernel, dtype=F64)
    bias = torch.randn(3, dtype=F64) if has_bias else None
    tail = torch.randn(kernel - 1, 2, 3, dtype=F64) if has_tail else None
    # Only the last rows can belong to the open document.
    valid = torch.rand(kernel - 1, 2).sort(0).values > 0.5 if has_tail else None
    starts = starts_of(length, 2, seed, share)
    leaves = [t.requires_grad_() for t in (x, weight, bias, tail) if t is not None]
    arguments = (x, weight, bias, starts, tail, valid)
    found = gradients(lambda: [causal_convolution(*arguments)], leaves)
    assert_close(found, gradients(lambda: [recurrences.convolution(*arguments)], leaves))


def test_the_convolution_in_blocks_equals_its_sum(monkeypatch):
    monkeypatch.setattr("longspan.recurrent.convolution.CPU_ELEMENTS", 12)
    x, weight, tail = (torch.randn(*shape, dtype=F64) for shape in ((11, 2, 3), (3, 4), (3, 2, 3)))
    leaves = [t.requires_grad_() for t in (x, weight, tail)]
    for share in (0, 0.3):
        arguments = (x, weight, None, starts_of(11, 2, 1, share), tail)
        found = gradients(lambda given=arguments: [causal_convolution(*given)], leaves)
        assert_close(found, gradients(lambda given=arguments: [recurrences.convolution(*given)], leaves))


def test_a_tail_passes_through_short_spans_until_a_document_begins():
    x = torch.randn(6, 1, 2)
    starts = torch.tensor([[True], [False], [False], [False], [True], [False]])
    tail, valid = convolution_tail(x[:0], 4)
    assert not valid.any()
    seen = []
    for t in range(6):
        tail, valid = convolution_tail(x[t : t + 1], 4, starts[t : t + 1], tail, valid)
        seen.append(valid.sum().item())
        assert not tail[~valid].any()
    assert seen == [1, 2, 3, 3, 1, 2]
    assert torch.equal(tail[1:], x[4:])


def test_padding_hands_the_state_on_and_has_a_finite_output():
    inputs = Inputs(17)
    real = torch.rand(17, 2) < 0.6
    found = gradients(lambda: ssd_scan(*inputs.whole, None, inputs.initial, real, chunk=4), inputs.all)
    x, dt, *others = inputs.whole
    dt = dt * real.unsqueeze(-1)
    expected = gradients(lambda: recurrences.state_space(x, dt, *others, None, inputs.initial), inputs.all)
    assert_close(found, expected)
    span = scan_span(*inputs.whole, real=torch.zeros(17, 2, dtype=torch.bool))
    assert bool((span.decay == 1).all())
    assert not span.state.any()


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("steps", [1e-12, 1e2, 1e5, 1e12])
def test_large_steps_and_vanishing_decays_stay_finite(dtype, steps):
    inputs = Inputs(23, dtype=dtype, steps=steps)
    with torch.no_grad():
        inputs.dt[3:9] = 0
    starts = starts_of(23, 2, 3, 0.2)
    found = gradients(lambda: ssd_scan(*inputs.whole, starts, inputs.initial, chunk=8), inputs.all)
    exact = inputs.double()
    expected = gradients(lambda: recurrences.state_space(*exact.whole, starts, exact.initial), exact.all)
    assert_close(found, expected, 1e-10 if dtype == F64 else 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_rounds_its_inputs_and_results_only(dtype):
    """Twice the error of exact results that are rounded once, with 1e-5 for the sums in float32."""
    inputs = Inputs(300, 1, 4, 8, 1, 16, dtype=dtype, steps=0.1)
    starts = starts_of(300, 1, 5, 0.02)
    found = gradients(lambda: ssd_scan(*inputs.whole, starts, inputs.initial), inputs.all)
    assert found[0].dtype == dtype
    assert found[1].dtype == torch.float32
    exact = inputs.double()
    expected = gradients(lambda: recurrences.state_space(*exact.whole, starts, exact.initial), exact.all)
    for a, b in zip(found, expected):
        rounding = (b.to(dtype).to(F64) - b).abs().max()
        assert (a.to(F64) - b).abs().max() <= 2 * rounding + 1e-5 * b.abs().max()


def test_backward_keeps_the_inputs_one_state_per_chunk_and_numbers_per_head():
    inputs = Inputs(256, 1, 4, 16, 1, 16)
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y, state = ssd_scan(*inputs.whole, starts_of(256, 1, 0, 0.05), inputs.initial, chunk=64)
    own = sum(t.numel() for t in inputs.all) + 256 // 64 * state.numel()
    assert sum(kept.values()) <= 8 * (own + state.numel() + 16 * inputs.dt.numel())


def test_autocast_does_not_reach_inside():
    inputs = Inputs(9, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y, state = ssd_scan(*inputs.whole, None, inputs.initial)
    expected, final = ssd_scan(*inputs.whole, None, inputs.initial)
    assert torch.equal(y, expected)
    assert torch.equal(state, final)


def test_shapes_that_do_not_fit_are_refused():
    x, dt, A, B, C, D = Inputs(6).whole
    with pytest.raises(ValueError, match="4 heads do not divide into 3 groups"):
        scan_span(x, dt, A, torch.zeros(6, 2, 3, 5), torch.zeros(6, 2, 3, 5), D)
    with pytest.raises(ValueError, match=r"dt is \[5, 2, 4\] and must be \[6, 2, 4\]; starts is \[2, 6\]"):
        scan_span(x, dt[1:], A, B, C, D, torch.zeros(2, 6, dtype=torch.bool))
    with pytest.raises(ValueError, match="chunk is 0"):
        scan_span(x, dt, A, B, C, D, chunk=0)
    with pytest.raises(ValueError, match="the incoming state"):
        span_output(scan_span(x, dt, A, B, C, D), torch.zeros(2, 4, 5, 3))
    with pytest.raises(ValueError, match=r"tail is \[2, 1, 2\].*need \[3, 1, 2\]"):
        causal_convolution(torch.zeros(5, 1, 2), torch.zeros(2, 4), tail=torch.zeros(2, 1, 2))
    with pytest.raises(ValueError, match="needs a tail"):
        convolution_tail(torch.zeros(5, 1, 2), 4, tail_valid=torch.zeros(3, 1, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"weight is \[3, 4\]"):
        causal_convolution(torch.zeros(5, 1, 2), torch.zeros(3, 4))
