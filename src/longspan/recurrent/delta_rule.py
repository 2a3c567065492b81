"""The gated delta rule over a span of tokens, in chunks (Gated DeltaNet, Yang et al. 2024, arXiv:2412.06464).

    S_t = exp(g_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,   o_t = S_t^T (scale q_t)

A span is an affine map of its incoming state: S_out = M S_in + S_span. Two spans compose in order: (M2, S2) after
(M1, S1) is (M2 M1, M2 S1 + S2). So a cut sequence needs two halves: the first computes what depends on no incoming
state, S_span and M; the second computes the outputs from the state that arrives.

    delta_rule(..., initial)       one span, with autograd for everything; also the second half
    span_state(...)                the first half alone, with autograd for S_span and M
    incoming_gradient(...)         the gradient that a span hands back alone, for outputs that another kernel computes
    delta_rule(..., exchange=...)  both halves around a user's exchange, with the least work: the exchange gets maps and
                                   states without autograd, and in backward the same maps, transposed, and the
                                   states' gradients, so no gradient of M is computed

Nothing here communicates. The mathematics of the chunks is in ``delta_chunks``. What is kept for backward is the
inputs and one state for each chunk; backward computes the rest again.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from longspan import autocast
from longspan.recurrent.delta_chunks import (
    Factors,
    Gradients,
    Inputs,
    Options,
    Sizes,
    chunked,
    factors,
    gradients,
    outputs,
    scan,
    scan_back,
    unchunk,
)

#: Tokens in a chunk. ``benchmarks/delta_rule.py --chunks 32 64 128`` measures the choice.
CHUNK = 64
#: Chunks are grouped so that a group's values have about this many elements: on a CPU they stay in the cache.
GROUP_ELEMENTS = {"cpu": 1 << 19}
GROUP_ELEMENTS_ELSEWHERE = 1 << 24


class StateExchange(Protocol):
    """Hands states from span to span, in forward and in backward, without autograd.

    Backward reaches a span only if one of its inputs needs a gradient and its outputs take part in the loss, so
    either all spans of a sequence call ``outgoing`` or none does.

    All tensors are at least float32: states and their gradients [b, n_v, d_k, d_v], transitions [b, n_v, d_k, d_k].

    Attributes:
        first: no span comes before this one, so its incoming state is zero and it needs no transition.
        last: no span comes after this one, so nothing needs its state and transition.
    """

    first: bool
    last: bool

    def incoming(self, state: Tensor | None, transition: Tensor | None) -> Tensor | None:
        """The incoming state of this span; called once in forward, also where nothing travels.

        Args:
            state: the span's state from an incoming state of zero; None if ``last`` (and not ``first``).
            transition: M; None if ``first`` or ``last``.

        Returns:
            S_in; ignored if ``first``.
        """
        ...

    def outgoing(self, gradient: Tensor | None) -> Tensor | None:
        """The gradient of this span's outgoing state as later spans cause it; called once in backward.

        With this span's ``gradient`` N, an earlier span's outgoing state has the gradient N + M^T (the result).

        Args:
            gradient: of this span's incoming state, as its own outputs and final state cause it; None if ``first``.

        Returns:
            The gradient; ignored if ``last``.
        """
        ...


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    starts: Tensor | None = None,
    initial: Tensor | None = None,
    *,
    scale: float | None = None,
    normalize: bool = False,
    exchange: StateExchange | None = None,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """The outputs of a span and its final state.

    The decay comes before the correction: v_t is compared with what k_t reads from the decayed state, as in
    transformers' Qwen3-Next.

    Args:
        q, k: [s, b, n_k, d_k]. Each key head serves n_v / n_k consecutive value heads.
        v: [s, b, n_v, d_v].
        g: [s, b, n_v], the log of the decay, at most 0. A padding row has g = 0 and beta = 0: it hands the state on.
        beta: [s, b, n_v], in (0, 1), the strength of the correction.
        starts: bool [s, b], True at the first token of a document, where the state begins anew from zero.
        initial: [b, n_v, d_k, d_v], the state before the first token; None is zero.
        scale: of the queries; None is d_k ** -0.5, as in Qwen3-Next.
        normalize: divides each query and key by its length (the root of its sum of squares + 1e-6), as in
            Qwen3-Next. Without it the caller passes keys of length 1 or less: longer ones make the state grow.
        exchange: gives the incoming state instead of ``initial``.
        chunk: tokens in a chunk; it changes speed and memory only.

    Returns:
        o [s, b, n_v, d_v] in v's dtype, and the state after the last token [b, n_v, d_k, d_v], at least float32.

    Raises:
        ValueError: shapes or dtypes that do not fit, or both ``initial`` and ``exchange``.
    """
    sizes = _sizes(q, k, v, g, beta, starts, chunk)
    if initial is not None and exchange is not None:
        raise ValueError("the incoming state comes from either initial or exchange, and both were given.")
    if initial is not None and tuple(initial.shape) != (sizes.b, sizes.n_v, sizes.d_k, sizes.d_v):
        raise ValueError(
            f"initial {tuple(initial.shape)} must be [b, n_v, d_k, d_v] = "
            f"{(sizes.b, sizes.n_v, sizes.d_k, sizes.d_v)}."
        )
    scale = sizes.d_k**-0.5 if scale is None else scale
    options = Options(scale, normalize, _wide(q, k, v))
    return _apply(Inputs(q, k, v, g, beta, starts), initial, sizes, options, exchange)


def span_state(
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    starts: Tensor | None = None,
    *,
    transition: bool = True,
    normalize: bool = False,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor | None]:
    """The first half alone: a span's own state and its transition matrix, with S_out = M S_in + S_span.

    Args: as those of :func:`delta_rule`.
        transition: False leaves out M, for a span whose incoming state is zero.

    Returns:
        S_span [b, n_v, d_k, d_v] and M [b, n_v, d_k, d_k] (None if left out), at least float32. M is zero for a
        sequence in which a document begins inside the span.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    sizes = _sizes(None, k, v, g, beta, starts, chunk)
    options = Options(1.0, normalize, _wide(k, v))
    initial = None
    if transition:
        # M's columns are states that begin as the columns of the identity and receive values of zero.
        shape = (sizes.b, sizes.n_v, sizes.d_k, sizes.d_v + sizes.d_k)
        initial = torch.zeros(shape, dtype=options.dtype, device=v.device)
        initial[..., sizes.d_v :].diagonal(dim1=-2, dim2=-1).fill_(1)
    _, final = _apply(Inputs(None, k, v, g, beta, starts), initial, sizes, options)
    if not transition:
        return final, None
    return final[..., : sizes.d_v], final[..., sizes.d_v :]


@torch.no_grad()
def incoming_gradient(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    d_out: Tensor,
    starts: Tensor | None = None,
    *,
    scale: float | None = None,
    normalize: bool = False,
    chunk: int = CHUNK,
) -> Tensor:
    """The gradient of a span's incoming state as its own outputs cause it, [b, n_v, d_k, d_v], at least float32.

    It depends on no state. For those who compute outputs and other gradients by another kernel.

    Args: as those of :func:`delta_rule`.
        d_out: [s, b, n_v, d_v], the gradient of the outputs.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    sizes = _sizes(q, k, v, g, beta, starts, chunk)
    scale = sizes.d_k**-0.5 if scale is None else scale
    span = _Span(Inputs(q, k, v, g, beta, starts), sizes, Options(scale, normalize, _wide(q, k, v)))
    with autocast.off(v):
        return span.incoming_gradient(d_out, span.state(sizes.d_v)).unflatten(0, (sizes.b, sizes.n_v))


def _wide(*tensors: Tensor) -> torch.dtype:
    """The dtype of states and sums: float64 if a tensor is float64, else float32."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def _sizes(
    q: Tensor | None, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, starts: Tensor | None, chunk: int
) -> Sizes:
    """The sizes of a span, checked.

    Raises:
        ValueError: something does not fit.
    """
    if k.dim() != 4 or v.dim() != 4:
        raise ValueError(f"k {tuple(k.shape)} and v {tuple(v.shape)} must be [s, b, heads, head size].")
    s, b, n_k, d_k = k.shape
    n_v, d_v = v.shape[2:]
    expected = {
        "q": (q, (s, b, n_k, d_k)),
        "v": (v, (s, b, n_v, d_v)),
        "g": (g, (s, b, n_v)),
        "beta": (beta, (s, b, n_v)),
        "starts": (starts, (s, b)),
    }
    wrong = [
        f"{name} is {tuple(x.shape)}, not {shape}"
        for name, (x, shape) in expected.items()
        if x is not None and tuple(x.shape) != shape
    ]
    if wrong:
        raise ValueError(f"beside k {tuple(k.shape)} and {n_v} value heads of {d_v}: {'; '.join(wrong)}.")
    if n_v % n_k:
        raise ValueError(f"{n_v} value heads must be a multiple of the {n_k} key heads.")
    if starts is not None and starts.dtype != torch.bool:
        raise ValueError(f"starts must be bool, not {starts.dtype}.")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, not {chunk}.")
    c = max(1, min(chunk, s))
    elements = GROUP_ELEMENTS.get(v.device.type, GROUP_ELEMENTS_ELSEWHERE)
    group = max(1, elements // max(1, b * n_v * c * max(d_k, d_v, c)))
    return Sizes(s, b, n_k, n_v, d_k, d_v, c, group)


def _apply(
    inputs: Inputs,
    initial: Tensor | None,
    sizes: Sizes,
    options: Options,
    exchange: StateExchange | None = None,
) -> tuple[Any, Tensor]:
    """The autograd function. States are kept only if there will be a backward pass."""
    *tensors, starts = inputs
    wanted = any(x is not None and x.requires_grad for x in (*tensors, initial))
    keep = wanted and torch.is_grad_enabled()
    with autocast.off(inputs.v):
        return _DeltaRule.apply(*tensors, initial, starts, sizes, options, exchange, keep)


class _Span:
    """The chunks of a span in one pass: it makes the factors of each group.

    Args:
        twice: the pass goes through the chunks twice, so T of each group is kept from the first time to the second.
    """

    def __init__(self, inputs: Inputs, sizes: Sizes, options: Options, twice: bool = False):
        self.inputs, self.sizes, self.options, self.twice = inputs, sizes, options, twice
        self.inverses: dict[tuple[int, int], Tensor] = {}

    def factors(self, group: tuple[int, int], outputs: bool = True) -> Factors:
        inverse = self.inverses.pop(group, None)
        f = factors(self.inputs, self.sizes, self.options, group, outputs, inverse)
        if self.twice and inverse is None:
            self.inverses[group] = f.inverse
        return f

    def gradient_of_outputs(self, d_out: Tensor | None, group: tuple[int, int]) -> Tensor | None:
        return None if d_out is None else chunked(d_out, self.sizes, group, self.options.dtype)

    def state(self, width: int) -> Tensor:
        """A state of zero, [B, d_k, width]."""
        shape = (self.sizes.b * self.sizes.n_v, self.sizes.d_k, width)
        return torch.zeros(shape, dtype=self.options.dtype, device=self.inputs.v.device)

    def own(self) -> tuple[Tensor, Tensor]:
        """The first half: S_span [B, d_k, d_v] and M [B, d_k, d_k]."""
        d_v = self.sizes.d_v
        state = self.state(d_v + self.sizes.d_k)
        state[..., d_v:].diagonal(dim1=-2, dim2=-1).fill_(1)
        for group in self.sizes.groups():
            f = self.factors(group, outputs=False)
            scan(f, [state] * (len(f.k) + 1))
        return state[..., :d_v].contiguous(), state[..., d_v:].contiguous()

    def forward(self, state: Tensor, keep: bool) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """The outputs [s, b, n_v, d_v], the final state, and all chunks' incoming states if they are kept.

        Args:
            state: [B, d_k, w], the incoming state.
        """
        sizes, v = self.sizes, self.inputs.v
        if not sizes.chunks:
            # A span of no tokens hands the state on, and an autograd function must not return its input.
            state = state.clone()
        kept = state.new_empty(sizes.chunks if keep else min(sizes.group, sizes.chunks), *state.shape)
        out = None if self.inputs.q is None else torch.empty(v.shape, dtype=v.dtype, device=v.device)
        for first, last in sizes.groups():
            f = self.factors((first, last))
            states = kept[first:last] if keep else kept[: last - first]
            states[0] = state
            state = torch.empty_like(state)
            u = scan(f, [*states, state])
            if out is not None and f.queries is not None:
                part = outputs(f.queries, f.enter, states, torch.stack(u))
                unchunk(part, out, sizes, (first, last))
        return out, state, kept if keep else None

    def incoming_gradient(self, d_out: Tensor | None, d_state: Tensor) -> Tensor:
        """The gradient of the incoming state alone, [B, d_k, d_v]."""
        for group in reversed(self.sizes.groups()):
            f = self.factors(group, d_out is not None)
            d_state, *_ = scan_back(f, self.gradient_of_outputs(d_out, group), d_state)
        return d_state

    def backward(self, states: Tensor, d_out: Tensor | None, d_state: Tensor) -> tuple[Gradients, Tensor]:
        """The gradients of q, k, v, g and beta, and that of the incoming state, [B, d_k, w]."""
        sizes, (q, k, v, g, beta, _) = self.sizes, self.inputs
        d_q = None if q is None else (torch.zeros_like(q) if d_out is None else torch.empty_like(q))
        whole = Gradients(d_q, *(torch.empty_like(x) for x in (k, v, g, beta)))
        for first, last in reversed(sizes.groups()):
            group = first, last
            f = self.factors(group, d_out is not None)
            d_part = self.gradient_of_outputs(d_out, group)
            part, d_state = gradients(f, sizes, states[first:last], d_part, d_state, self.options.scale)
            for of_group, of_all in zip(part, whole):
                if of_group is not None and of_all is not None:
                    unchunk(of_group, of_all, sizes, group)
        return whole, d_state


class _DeltaRule(torch.autograd.Function):
    """(q or None, k, v, g, beta, initial or None) -> (o or None, the final state).

    The initial state may be wider than v, [b, n_v, d_k, w]: its last columns have values of zero.
    """

    @staticmethod
    def forward(ctx, q, k, v, g, beta, initial, starts, sizes, options, exchange, keep):
        middle = exchange is not None and not exchange.first and not exchange.last
        span = _Span(Inputs(q, k, v, g, beta, starts), sizes, options, twice=middle)
        heads, dtype = (sizes.b, sizes.n_v), options.dtype
        state = span.state(sizes.d_v) if initial is None else initial.flatten(0, 1).to(dtype)
        if exchange is not None and not exchange.first:
            own = (x.unflatten(0, heads) for x in span.own()) if middle else (None, None)
            state = exchange.incoming(*own).flatten(0, 1).to(dtype)
        out, final, states = span.forward(state, keep)
        final = final.unflatten(0, heads)
        if exchange is not None and exchange.first:
            exchange.incoming(final, None)
        ctx.of = (sizes, options, exchange, None if initial is None else initial.dtype)
        ctx.save_for_backward(q, k, v, g, beta, starts, states)
        ctx.set_materialize_grads(False)
        return out, final

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out, d_final):
        *inputs, states = ctx.saved_tensors
        sizes, options, exchange, initial_dtype = ctx.of
        middle = exchange is not None and not exchange.first and not exchange.last
        span = _Span(Inputs(*inputs), sizes, options, twice=middle)
        heads, dtype = (sizes.b, sizes.n_v), options.dtype
        d_state = span.state(states.shape[-1]) if d_final is None else d_final.flatten(0, 1).to(dtype)
        if exchange is not None and not exchange.last:
            own = span.incoming_gradient(d_out, d_state).unflatten(0, heads) if middle else None
            d_state = d_state + exchange.outgoing(own).flatten(0, 1).to(dtype)
        grads, d_state = span.backward(states, d_out, d_state)
        d_state = d_state.unflatten(0, heads)
        if exchange is not None and exchange.last and not exchange.first:
            exchange.outgoing(d_state)
        d_initial = None if initial_dtype is None else d_state.to(initial_dtype)
        return *grads, d_initial, None, None, None, None, None
