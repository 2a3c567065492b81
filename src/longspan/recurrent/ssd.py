"""The state-space scan of Mamba-2, in chunks, and in two halves around the state that comes in.

The recurrence, for each head, with a state S of [p, d] (p head size, d state size):

    S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T        y_t = S_t C_t + D x_t

Its chunked form is the "state-space duality" of Dao and Gu (Transformers are SSMs, 2024): inside a chunk the
recurrence is a masked matrix product like attention, and only one state per chunk is handed on.

A span of a longer sequence is scanned in two halves, so that context parallelism can send states while it
computes:

    scan_span     everything that does not depend on the incoming state. Its result holds what the span
                  hands on: ``state`` [b, n, p, d], as if a zero state came in, and ``decay`` [b, n]
    span_output   y, given the incoming state

The state after the span is ``decay * incoming + state``. No matrix product runs twice, whether a state comes
in or not. For backward, the halves keep their inputs, one state per chunk and a few numbers per token and
head; the matrices of a chunk are computed again.

Numbers: decays are base-2 exponentials of differences of cumulative sums of dt A within a chunk. The sums are
float64, because their differences are small next to them. All other computation has at least float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from longspan import autocast
from longspan.matmul import product

#: Tokens of a chunk. ``benchmarks/recurrent.py --chunks`` compares sizes.
CHUNK = 128
#: So many elements of the matrices [chunks, b, n, chunk, chunk] are computed at once. On a CPU they stay in
#: its cache; other devices need fewer and larger kernels.
CPU_ELEMENTS, DEVICE_ELEMENTS = 1 << 19, 1 << 25
LOG2E = math.log2(math.e)


class SpanScan(NamedTuple):
    """The first half of a scan.

    Attributes:
        state: [b, n, p, d], the span's own part of the state after it, at least float32.
        decay: [b, n], what of an incoming state is left after the span; 0 if a document begins inside it.
        own: [s, b, n, p], y without what the states at the beginning of chunks add.
        states: [chunks, b, n, p, d], the states at the beginning of chunks, if a zero state comes in.
        C: [s, b, g, d].
        since: [s, b, n], what of the state at the beginning of its chunk is left at each token.
        before: [chunks, b, n], what of an incoming state is left at the beginning of each chunk.
        chunk: the number of tokens of a chunk.
        dtype: of y.
    """

    state: Tensor
    decay: Tensor
    own: Tensor
    states: Tensor
    C: Tensor
    since: Tensor
    before: Tensor
    chunk: int
    dtype: torch.dtype


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    starts: Tensor | None = None,
    initial: Tensor | None = None,
    real: Tensor | None = None,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """The scan of a whole sequence, or of a span whose incoming state is at hand: both halves.

    Args:
        initial: [b, n, p, d], the state before the first token; None is zero.
        x, dt, A, B, C, D, starts, real, chunk: see :func:`scan_span`.

    Returns:
        y [s, b, n, p] in the dtype of x, and the state after the last token [b, n, p, d], at least float32.
    """
    span = scan_span(x, dt, A, B, C, D, starts, real, chunk)
    return span_output(span, initial), state_after(span, initial)


def scan_span(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    starts: Tensor | None = None,
    real: Tensor | None = None,
    chunk: int = CHUNK,
) -> SpanScan:
    """The first half of a scan: everything that does not depend on the incoming state.

    Args:
        x: [s, b, n, p]; s may be any number, also 0.
        dt: [s, b, n], the step sizes, not negative (after softplus). 0 leaves the state as it is.
        A: [n], negative.
        B, C: [s, b, g, d]; each of g groups serves n / g heads in a row.
        D: [n], the weight of x in y; None is zero.
        starts: bool [s, b], True at the first token of each document, where the state begins anew; None if
            no document begins in the span.
        real: bool [s, b], False where a row is padding, which hands on the state unchanged. Its output has
            no meaning, but is finite if its inputs are. None if all rows are tokens.
        chunk: tokens of a chunk.

    Raises:
        ValueError: shapes that do not fit, or a chunk of less than one token.
    """
    _check(x, dt, A, B, C, D, starts, real, chunk)
    wide = torch.promote_types(x.dtype, torch.float32)
    dt = dt.to(wide)
    if real is not None:
        dt = dt.masked_fill(~real.unsqueeze(-1), 0)
    decays = _decays(dt, A, starts, chunk)
    own, states, state = _Own.apply(x, dt, B, C, D, decays.log, decays.until, decays.chunk, decays.document)
    return SpanScan(state, decays.total, own, states, C, decays.since, decays.before, chunk, x.dtype)


def span_output(span: SpanScan, incoming: Tensor | None = None) -> Tensor:
    """The second half of a scan: y [s, b, n, p] of a span, given the state [b, n, p, d] that comes in.

    Args:
        incoming: None is a zero state.
    """
    if incoming is not None and incoming.shape != span.state.shape:
        raise ValueError(
            f"the incoming state is {_shape(incoming)}, but the span needs [b, n, p, d] = {_shape(span.state)}."
        )
    if incoming is not None:
        incoming = incoming.to(span.state.dtype)
    return _Output.apply(
        span.own, span.C, span.states, span.since, span.before, incoming, span.chunk, span.dtype
    )


def state_after(span: SpanScan, incoming: Tensor | None = None) -> Tensor:
    """The state after a span [b, n, p, d], at least float32, given the state that comes in (None is zero)."""
    if incoming is None:
        return span.state
    return torch.addcmul(span.state, span.decay[..., None, None], incoming.to(span.state.dtype))


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)


def _check(x, dt, A, B, C, D, starts, real, chunk) -> None:
    if x.dim() != 4 or B.dim() != 4:
        raise ValueError(
            f"x is [s, b, n, p] and B is [s, b, g, d], but their shapes are {_shape(x)} and {_shape(B)}."
        )
    s, b, n, _ = x.shape
    g, d = B.shape[2:]
    if g == 0 or n % g:
        raise ValueError(f"{n} heads do not divide into {g} groups of B and C; n must be a multiple of g.")
    if chunk < 1:
        raise ValueError(f"a chunk has at least one token, but chunk is {chunk}.")
    shapes = {
        "dt": (dt, [s, b, n]),
        "A": (A, [n]),
        "B": (B, [s, b, g, d]),
        "C": (C, [s, b, g, d]),
        "D": (D, [n]),
        "starts": (starts, [s, b]),
        "real": (real, [s, b]),
    }
    errors = [
        f"{name} is {_shape(tensor)} and must be {expected}"
        for name, (tensor, expected) in shapes.items()
        if tensor is not None and _shape(tensor) != expected
    ]
    if errors:
        raise ValueError(f"with x [s, b, n, p] = {_shape(x)}: " + "; ".join(errors) + ".")


class _Decays(NamedTuple):
    """The decays of a span, all made of dt A; l is the number of tokens of a chunk.

    log: [chunks, b, n, l], cumulative sums in each chunk of the base-2 logarithms of decays.
    since: [s, b, n], from the beginning of the chunk to each token.
    until: [s, b, n], from each token to the end of the chunk.
    chunk: [chunks, b, n], of whole chunks; before: [chunks, b, n], of all chunks before; total: [b, n].
    document: int64 [chunks, b, l], numbers of documents in each chunk; None if no document begins.
    """

    log: Tensor
    since: Tensor
    until: Tensor
    chunk: Tensor
    before: Tensor
    total: Tensor
    document: Tensor | None


def _decays(dt: Tensor, A: Tensor, starts: Tensor | None, chunk: int) -> _Decays:
    """Small tensors, so plain autograd computes their gradients."""
    s, b, n = dt.shape
    chunks = -(-s // chunk)
    # The smallest positive number is about 2^-149 (float64: 2^-1074), so a smaller decay is zero either way.
    # The limit keeps the sums small enough for exact differences.
    steps = (dt.double() * (A.double() * LOG2E)).clamp(min=-1080.0 if dt.dtype == torch.float64 else -152.0)
    if starts is not None:
        # The decay into a document's first token multiplies no state.
        steps = steps.masked_fill(starts.unsqueeze(-1), 0)
    padding = (0, 0, 0, 0, 0, chunks * chunk - s)
    log = F.pad(steps, padding).view(chunks, chunk, b, n).cumsum(1)
    last = log[:, -1]
    summed = last.cumsum(0)
    since, until, whole, before, total = (
        t.to(dt.dtype).exp2() for t in (log, last.unsqueeze(1) - log, last, summed - last, last.sum(0))
    )
    document = None
    if starts is not None:
        # All exponentials above are at most 1, so masking them afterwards leaves no NaN in a gradient.
        document = F.pad(starts, padding[2:]).view(chunks, chunk, b).cumsum(1)
        begun = document[:, -1:]
        since = since.masked_fill((document > 0).unsqueeze(-1), 0)
        until = until.masked_fill((document < begun).unsqueeze(-1), 0)
        begins = begun > 0
        earlier = begins.cumsum(0) - begins.long() > 0
        whole = whole.masked_fill(begins.transpose(1, 2), 0)
        before = before.masked_fill(earlier.transpose(1, 2), 0)
        total = total.masked_fill(begins.any(0).transpose(0, 1), 0)
        document = document.transpose(1, 2)
    log = log.permute(0, 2, 3, 1).to(dt.dtype).contiguous()
    return _Decays(log, since.flatten(0, 1)[:s], until.flatten(0, 1)[:s], whole, before, total, document)


class _Piece(NamedTuple):
    """Chunks of one length that are computed at once: ``size`` from number ``first``, of ``length`` tokens."""

    first: int
    size: int
    length: int
    rows: slice

    @property
    def chunks(self) -> slice:
        return slice(self.first, self.first + self.size)

    def of(self, t: Tensor) -> Tensor:
        """[s, ..] -> [k, l, ..], the piece's rows, a view."""
        return t[self.rows].unflatten(0, (self.size, self.length))


def _pieces(s: int, chunk: int, at_once: int) -> Iterator[_Piece]:
    full, rest = divmod(s, chunk)
    for first in range(0, full, at_once):
        count = min(at_once, full - first)
        yield _Piece(first, count, chunk, slice(first * chunk, (first + count) * chunk))
    if rest:
        yield _Piece(full, 1, rest, slice(full * chunk, s))


def _pieces_of(x: Tensor, chunk: int) -> list[_Piece]:
    s, b, n, _ = x.shape
    elements = CPU_ELEMENTS if x.device.type == "cpu" else DEVICE_ELEMENTS
    return list(_pieces(s, chunk, max(1, elements // max(1, b * n * chunk * chunk))))


def _heads(t: Tensor) -> Tensor:
    """[k, l, b, n, p] -> [k b n, l, p], a view if there is one chunk."""
    return t.permute(0, 2, 3, 1, 4).flatten(0, 2)


def _rows(t: Tensor, k: int, b: int) -> Tensor:
    """[k b n, l, p] -> [k, l, b, n, p], a view; the inverse of ``_heads``."""
    return t.view(k, b, -1, *t.shape[1:]).permute(0, 3, 1, 2, 4)


def _grouped(t: Tensor, g: int) -> Tensor:
    """[k, l, b, n, p] -> [k b g, l, n/g p]: the heads of a group side by side."""
    return _heads(t.reshape(*t.shape[:3], g, -1))


def _ungrouped(t: Tensor, k: int, b: int, n: int) -> Tensor:
    """[k b g, l, n/g p] -> [k, l, b, n, p]; the inverse of ``_grouped``."""
    return _rows(t, k, b).reshape(k, t.shape[1], b, n, -1)


def _products(a: Tensor, b: Tensor) -> Tensor:
    """[z, m, k] @ [z, k, n] -> [z, m, n]"""
    return product(a[0], b[0]).unsqueeze(0) if a.shape[0] == 1 else torch.bmm(a, b)


def _visible(document: Tensor | None, piece: _Piece, device: torch.device) -> Tensor:
    """bool [k, b, 1, l, l] or [l, l]: the later or same token of the same document, x the earlier one."""
    causal = torch.ones(piece.length, piece.length, dtype=torch.bool, device=device).tril()
    if document is None:
        return causal
    own = document[piece.chunks, :, : piece.length]
    return (causal & (own.unsqueeze(-1) == own.unsqueeze(-2))).unsqueeze(2)


class _Matrices:
    """The matrices of one piece: y of a chunk is ``(scores * decay) @ (dt x)`` for each head.

    Attributes:
        scores: [k, b, g, 1, l, l], C_t . B_u, 0 where token t does not see u.
        decay: [k, b, g, n/g, l, l], from token u to token t; 1 above the diagonal, where scores are 0.
    """

    def __init__(self, piece: _Piece, B: Tensor, C: Tensor, log: Tensor, document: Tensor | None):
        k, b, g, l = piece.size, B.shape[1], B.shape[2], piece.length
        self.B, self.C = (_heads(piece.of(t).to(log.dtype)) for t in (B, C))
        visible = _visible(document, piece, B.device)
        self.visible = visible if document is None else visible.unsqueeze(2)
        scores = _products(self.C, self.B.transpose(1, 2)).view(k, b, g, 1, l, l)
        self.scores = scores.masked_fill_(~self.visible, 0)
        own = log[piece.chunks, ..., :l].unflatten(2, (g, -1))
        # Above the diagonal a difference is positive and could overflow.
        self.decay = (own.unsqueeze(-1) - own.unsqueeze(-2)).clamp_(max=0).exp2_()


class _Own(torch.autograd.Function):
    """(own, states, state) of a span, of x, dt, B, C, D and decays; see ``SpanScan`` and ``_Decays``."""

    @staticmethod
    def forward(ctx, x, dt, B, C, D, log, until, decay, document):
        ctx.set_materialize_grads(False)
        s, b, n, p = x.shape
        g, d = B.shape[2:]
        own = dt.new_empty(x.shape)
        states, state = dt.new_empty(len(decay), b, n, p, d), dt.new_zeros(b, n, p, d)
        with autocast.off(x):
            for piece in _pieces_of(x, log.shape[3]):
                k, l = piece.size, piece.length
                matrices = _Matrices(piece, B, C, log, document)
                xs = piece.of(x).to(dt.dtype)
                steps = xs * piece.of(dt).unsqueeze(-1)
                mixed = (matrices.decay * matrices.scores).view(-1, l, l)
                out = _rows(torch.bmm(mixed, _heads(steps)), k, b)
                if D is None:
                    piece.of(own).copy_(out)
                else:
                    torch.addcmul(out, xs, D.to(dt.dtype).unsqueeze(-1), out=piece.of(own))
                steps *= piece.of(until).unsqueeze(-1)
                added = _products(_grouped(steps, g).transpose(1, 2), matrices.B).view(k, b, n, p, d)
                for i in range(k):
                    number = piece.first + i
                    states[number] = state
                    state = torch.addcmul(added[i], decay[number, ..., None, None], state)
        ctx.save_for_backward(x, dt, B, C, D, log, until, decay, document, states)
        return own, states, state

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_own, grad_states, grad_state):
        x, dt, B, C, D, log, until, decay, document, states = ctx.saved_tensors
        s, b, n, p = x.shape
        g, d = B.shape[2:]
        grads = [torch.empty_like(t) for t in (x, dt, B, C)]
        grad_until, grad_decay = torch.empty_like(until), torch.empty_like(decay)
        # The last chunk may be shorter than its row of the logarithms.
        grad_log = torch.zeros_like(log)
        grad_D = None if D is None else dt.new_zeros(n)
        if grad_own is None:
            grad_own = torch.zeros_like(dt).unsqueeze(-1).expand(x.shape)
        # The gradient of the state after the chunk at hand.
        after = dt.new_zeros(b, n, p, d) if grad_state is None else grad_state
        for piece in reversed(_pieces_of(x, log.shape[3])):
            k, l = piece.size, piece.length
            grad_x, grad_dt, grad_B, grad_C = (piece.of(t) for t in grads)
            grad_added = dt.new_empty(k, b, n, p, d)
            for i in reversed(range(k)):
                number = piece.first + i
                grad_added[i] = after
                grad_decay[number] = (after * states[number]).sum((-1, -2))
                after = after * decay[number, ..., None, None]
                if grad_states is not None:
                    after += grad_states[number]
            grad_added = grad_added.view(k * b * g, -1, d)

            matrices = _Matrices(piece, B, C, log, document)
            xs, ys, step = piece.of(x).to(dt.dtype), piece.of(grad_own), piece.of(dt).unsqueeze(-1)
            steps, left = xs * step, piece.of(until).unsqueeze(-1)
            # What the tokens add to the state after the chunk.
            grad_steps = _ungrouped(_products(matrices.B, grad_added.transpose(1, 2)), k, b, n)
            piece.of(grad_until).copy_((grad_steps * steps).sum(-1))
            grad_Bs = _products(_grouped(steps * left, g), grad_added)
            # What they add to the outputs of the chunk.
            steps_, ys_ = _heads(steps), _heads(ys)
            mixed = (matrices.decay * matrices.scores).view(-1, l, l)
            grad_steps = torch.addcmul(_rows(torch.bmm(mixed.transpose(1, 2), ys_), k, b), grad_steps, left)
            matrices.decay *= torch.bmm(ys_, steps_.transpose(1, 2)).view_as(matrices.decay)
            grad_scores = matrices.decay.sum(3, keepdim=True).masked_fill_(~matrices.visible, 0)
            grad_scores = grad_scores.view(-1, l, l)
            grad_B.copy_(_rows(grad_Bs + _products(grad_scores.transpose(1, 2), matrices.C), k, b))
            grad_C.copy_(_rows(_products(grad_scores, matrices.B), k, b))
            # A token's decay to itself is always 1: without the diagonal, the sums cancel less.
            grad_decays = matrices.decay.mul_(matrices.scores)
            grad_decays.diagonal(dim1=-2, dim2=-1).zero_()
            grad_log[piece.chunks, ..., :l] = (grad_decays.sum(-1) - grad_decays.sum(-2)).view(k, b, n, l)
            grad_dt.copy_((grad_steps * xs).sum(-1))
            grad_steps = grad_steps * step
            if D is not None:
                grad_D += (ys * xs).sum((0, 1, 2, 4))
                grad_steps.addcmul_(ys, D.to(dt.dtype).unsqueeze(-1))
            grad_x.copy_(grad_steps)
        # The decays are powers of 2, and their gradients above are those of a natural exponential.
        grad_log *= math.log(2)
        grad_D = None if D is None else grad_D.to(D.dtype)
        return (*grads, grad_D, grad_log, grad_until, grad_decay, None)


class _Output(torch.autograd.Function):
    """y of a span: its own part, and what the states at the beginning of chunks add."""

    @staticmethod
    def forward(ctx, own, C, states, since, before, incoming, chunk, dtype):
        ctx.save_for_backward(C, states, since, before, incoming)
        ctx.chunk = chunk
        s, b, n, p = own.shape
        y = own.new_empty(own.shape, dtype=dtype)
        with autocast.off(own):
            for piece in _pieces_of(own, chunk):
                seen = _seen(piece, C, states, before, incoming)[2]
                torch.add(piece.of(own), seen * piece.of(since).unsqueeze(-1), out=piece.of(y))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        C, states, since, before, incoming = ctx.saved_tensors
        g, (b, n, p, d) = C.shape[2], states.shape[1:]
        grad_C, grad_states, grad_since = (torch.empty_like(t) for t in (C, states, since))
        grad_before = grad_incoming = None
        if incoming is not None:
            grad_before, grad_incoming = torch.zeros_like(before), torch.zeros_like(incoming)
        grad_own = grad_y.to(since.dtype)
        for piece in _pieces_of(grad_own, ctx.chunk):
            k = piece.size
            Cs, state, seen = _seen(piece, C, states, before, incoming)
            ys = piece.of(grad_own)
            piece.of(grad_since).copy_((ys * seen).sum(-1))
            ys = _grouped(ys * piece.of(since).unsqueeze(-1), g)
            piece.of(grad_C).copy_(_rows(_products(ys, state), k, b))
            grad_state = _products(ys.transpose(1, 2), Cs).view(k, b, n, p, d)
            grad_states[piece.chunks] = grad_state
            if incoming is not None:
                grad_before[piece.chunks] = (grad_state * incoming).sum((-1, -2))
                grad_incoming += torch.einsum("kbnpd,kbn->bnpd", grad_state, before[piece.chunks])
        return grad_own, grad_C, grad_states, grad_since, grad_before, grad_incoming, None, None


def _seen(
    piece: _Piece, C: Tensor, states: Tensor, before: Tensor, incoming: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """C [k b g, l, d], the states at the beginning of chunks [k b g, n/g p, d], and their product [k, l, b, n, p]."""
    k, b, n, d = piece.size, *states.shape[1:3], states.shape[4]
    Cs, state = _heads(piece.of(C).to(states.dtype)), states[piece.chunks]
    if incoming is not None:
        state = torch.addcmul(state, before[piece.chunks, ..., None, None], incoming)
    state = state.reshape(len(Cs), -1, d)
    return Cs, state, _ungrouped(_products(Cs, state.transpose(1, 2)), k, b, n)
