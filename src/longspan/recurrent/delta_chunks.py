"""The gated delta rule inside chunks: its factors, its scan over the chunks, and the scan's gradients.

In a chunk of c tokens with the incoming state S, let G_i be the sum of the log decays up to token i, and

    D_ij = exp(G_i - G_j) for j <= i, E_i = exp(G_i), F_j = exp(G_c - G_j), a = exp(G_c)
    A_ij = beta_i D_ij (k_i . k_j) for j < i,  T = (I + A)^-1

Then the recurrence is four products of matrices (DeltaNet's WY form with decays: Yang et al. 2024,
arXiv:2406.06484 and arXiv:2412.06464), with the corrected values U:

    U = T beta (V - E K S),  O = E Q S + (D * Q K^T) U,  S_next = a S + K^T (F U)

T is never applied to keys here (the usual form stores T beta E K): K S comes first, so one product fewer is needed,
and the same loop scans a transition matrix, which is a state with values of zero.

A document that begins in the chunk cuts D, E, F and a: they are zero between two documents, for tokens after the
chunk's first document start, for tokens before its last one, and for a chunk with any start.

Shapes: m chunks of a group, N = b n_k key heads and B = b n_v value heads of all sequences of the batch, c tokens,
state width w: d_v, or more if the state's last columns have values of zero.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

#: Added to a vector's sum of squares before its root, as in the models that normalise queries and keys.
EPSILON = 1e-6
#: Smaller log decays count as this one: its exponential is zero in float64 too, and differences stay exact.
SMALLEST_LOG_DECAY = -800.0


class Sizes(NamedTuple):
    """The sizes of a span: s tokens, b sequences, heads and head sizes, and c tokens in a chunk."""

    s: int
    b: int
    n_k: int
    n_v: int
    d_k: int
    d_v: int
    c: int
    group: int

    @property
    def chunks(self) -> int:
        return -(-self.s // self.c)

    def groups(self) -> list[tuple[int, int]]:
        """(first chunk, last chunk + 1) of each group of chunks whose factors are computed together."""
        return [(i, min(i + self.group, self.chunks)) for i in range(0, self.chunks, self.group)]


class Options(NamedTuple):
    """How a span is computed: the queries' scale, whether queries and keys are normalised, the dtype of the sums."""

    scale: float
    normalize: bool
    dtype: torch.dtype


class Inputs(NamedTuple):
    """A span's inputs: q (None where no outputs are needed) and k [s, b, n_k, d_k], v [s, b, n_v, d_v], g and beta
    [s, b, n_v], and bool starts [s, b] or None."""

    q: Tensor | None
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor
    starts: Tensor | None


class Queries(NamedTuple):
    """The queries of a group of chunks.

    Attributes:
        q: [m, B, c, d_k], scaled; scores: [m, B, c, c], which is D * Q K^T.
        root: [m, N, c, 1], the factor that normalised them; None without normalisation.
    """

    q: Tensor
    scores: Tensor
    root: Tensor | None


class Factors(NamedTuple):
    """What a group of chunks needs, independent of the incoming state.

    Attributes:
        k: [m, B, c, d_k], normalised if asked for; v: [m, B, c, d_v].
        beta, enter, leave: [m, B, c, 1], enter is E and leave F; through: [m, B, 1, 1], which is a.
        decay: [m, B, c, c], which is D; overlap: D * K K^T below the diagonal.
        inverse: [m, B, c, c], which is T.
        k_root: [m, N, c, 1], the factor that normalised the keys; None without normalisation.
        queries: None where no outputs are needed.
    """

    k: Tensor
    v: Tensor
    beta: Tensor
    enter: Tensor
    leave: Tensor
    through: Tensor
    decay: Tensor
    overlap: Tensor
    inverse: Tensor
    k_root: Tensor | None
    queries: Queries | None


class Gradients(NamedTuple):
    """Gradients of a group: q and k [m, N, c, d_k], v [m, B, c, d_v], g and beta [m, B, c]."""

    q: Tensor | None
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor


def chunked(x: Tensor, sizes: Sizes, chunks: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Rows of ``chunks`` of x [s, b, n, ..] as [m, b n, c, ..], contiguous; rows after the last are zero."""
    first, last = chunks
    rows = x[first * sizes.c : last * sizes.c]
    m = last - first
    if len(rows) < m * sizes.c:
        whole = rows.new_zeros((m * sizes.c, *x.shape[1:]))
        whole[: len(rows)] = rows
        rows = whole
    # One copy changes the order and the dtype, so that all products work on contiguous matrices.
    heads = rows.unflatten(0, (m, sizes.c)).movedim(1, 3)
    copy = torch.empty(heads.shape, dtype=dtype, device=x.device).copy_(heads)
    return copy.view(m, -1, sizes.c, *x.shape[3:])


def unchunk(part: Tensor, whole: Tensor, sizes: Sizes, chunks: tuple[int, int]) -> None:
    """Writes [m, b n, c, ..] into its rows of ``whole`` [s, b, n, ..]: the opposite of :func:`chunked`."""
    first, last = chunks
    rows = whole[first * sizes.c : last * sizes.c]
    m, c = last - first, sizes.c
    heads = part.view(m, *whole.shape[1:3], c, *whole.shape[3:]).movedim(3, 1)
    if len(rows) == m * c:
        rows.unflatten(0, (m, c)).copy_(heads)
    else:
        rows.copy_(heads.reshape(m * c, *whole.shape[1:])[: len(rows)])


def factors(
    inputs: Inputs,
    sizes: Sizes,
    options: Options,
    chunks: tuple[int, int],
    outputs: bool = True,
    inverse: Tensor | None = None,
) -> Factors:
    """The factors of a group of chunks.

    Args:
        chunks: (first chunk, last chunk + 1).
        outputs: False leaves out the queries.
        inverse: T of an earlier call, which saves its computation; None computes it.
    """
    (q, k, v, g, beta, starts), (scale, normalize, dtype) = inputs, options
    keys, k_root = _unit(chunked(k, sizes, chunks, dtype), normalize)
    strength = chunked(beta, sizes, chunks, dtype).unsqueeze(-1)
    # The sums are float64, so that the differences after a strong decay keep float32's precision.
    log = chunked(g, sizes, chunks, torch.float64).clamp(min=SMALLEST_LOG_DECAY).cumsum(-1)
    lower = torch.ones(sizes.c, sizes.c, dtype=torch.bool, device=k.device).tril()
    enter, leave, through = log, log[..., -1:] - log, log[..., -1:]
    if starts is None:
        hidden = ~lower
    else:
        # [m, b, c]: how many documents have begun in the chunk up to this token.
        begun = chunked(starts.unsqueeze(2), sizes, chunks, torch.int32).cumsum(-1)
        begun = begun.repeat_interleave(sizes.n_v, 1)
        hidden = (begun.unsqueeze(-1) != begun.unsqueeze(-2)) | ~lower
        enter = enter.masked_fill(begun > 0, float("-inf"))
        leave = leave.masked_fill(begun < begun[..., -1:], float("-inf"))
        through = through.masked_fill(begun[..., -1:] > 0, float("-inf"))
    # Above the diagonal the difference is positive and could overflow, so it is hidden before the exponential.
    decay = (log.unsqueeze(-1) - log.unsqueeze(-2)).to(dtype).masked_fill_(hidden, float("-inf")).exp_()
    # The products of keys and queries are computed once for all value heads of a key head.
    overlap = (_per_value_head(keys @ keys.mT) * _grouped(decay, sizes)).view(decay.shape).tril_(-1)
    if inverse is None:
        identity = torch.eye(sizes.c, dtype=dtype, device=k.device).expand_as(overlap)
        inverse = torch.linalg.solve_triangular(strength * overlap, identity, upper=False, unitriangular=True)
    queries = None
    if q is not None and outputs:
        unit, q_root = _unit(chunked(q, sizes, chunks, dtype), normalize)
        unit = unit * scale
        scores = (_per_value_head(unit @ keys.mT) * _grouped(decay, sizes)).view(decay.shape)
        queries = Queries(_repeated(unit, sizes), scores, q_root)
    return Factors(
        _repeated(keys, sizes),
        chunked(v, sizes, chunks, dtype),
        strength,
        enter.exp().to(dtype).unsqueeze(-1),
        leave.exp().to(dtype).unsqueeze(-1),
        through.exp().to(dtype).unsqueeze(-1),
        decay,
        overlap,
        inverse,
        k_root,
        queries,
    )


def _unit(x: Tensor, normalize: bool) -> tuple[Tensor, Tensor | None]:
    """x over its length along the last dim, and the factor; x itself and None without normalisation."""
    if not normalize:
        return x, None
    root = torch.linalg.vecdot(x, x).unsqueeze(-1).add_(EPSILON).rsqrt_()
    return x * root, root


def _grouped(x: Tensor, sizes: Sizes) -> Tensor:
    """[m, B, ..] -> [m, N, n_v / n_k, ..], a view."""
    return x.view(x.shape[0], sizes.b * sizes.n_k, sizes.n_v // sizes.n_k, *x.shape[2:])


def _per_value_head(x: Tensor) -> Tensor:
    """[m, N, ..] -> [m, N, 1, ..], which is broadcast over the value heads of a key head."""
    return x.unsqueeze(2)


def _repeated(x: Tensor, sizes: Sizes) -> Tensor:
    """[m, N, ..] -> [m, B, ..]: each key head for all its value heads."""
    repeats = sizes.n_v // sizes.n_k
    return x if repeats == 1 else x.repeat_interleave(repeats, 1)


def _summed(x: Tensor, sizes: Sizes) -> Tensor:
    """[m, B, ..] -> [m, N, ..]: the sum over the value heads of each key head."""
    return x if sizes.n_v == sizes.n_k else _grouped(x, sizes).sum(2)


def scan(f: Factors, states: list[Tensor]) -> list[Tensor]:
    """Hands the state through the chunks of a group.

    Args:
        states: m + 1 buffers [B, d_k, w]; the first holds the incoming state, the others are written.

    Returns:
        U of each chunk, [B, c, w].
    """
    corrected = []
    values, readout = f.beta * f.v, f.beta * f.enter
    for i in range(len(f.k)):
        errors = _minus(values[i], readout[i], f.k[i] @ states[i])
        u = f.inverse[i] @ errors
        corrected.append(u)
        # The product above is complete, so the incoming state may be overwritten: the two buffers may be one.
        torch.mul(states[i], f.through[i], out=states[i + 1])
        states[i + 1].baddbmm_(f.k[i].mT, u * f.leave[i])
    return corrected


def _minus(values: Tensor, factor: Tensor, read: Tensor) -> Tensor:
    """values - factor * read, where read [.., w] may be wider than the values, which are zero there."""
    d_v = values.shape[-1]
    if read.shape[-1] == d_v:
        return torch.addcmul(values, factor, read, value=-1)
    errors = read * -factor
    errors[..., :d_v] += values
    return errors


def outputs(queries: Queries, enter: Tensor, states: Tensor, corrected: Tensor) -> Tensor:
    """O [m, B, c, d_v] from E, the incoming states [m, B, d_k, d_v] and U [m, B, c, d_v]."""
    return (queries.q @ states).mul_(enter).add_(queries.scores @ corrected)


def scan_back(f: Factors, d_out: Tensor | None, d_state: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Hands the state's gradient back through the chunks of a group; it needs no state.

    Args:
        d_out: [m, B, c, d_v], or None without queries; d_state: [B, d_k, w], of the last chunk's outgoing state.

    Returns:
        The gradient of the first chunk's incoming state, and for each chunk the gradient of its outgoing state and
        [B, c, w] of ``beta (V - E K S)``.
    """
    d_states, d_errors = [], []
    queries = f.queries
    if d_out is not None and queries is not None:
        d_scored, d_read = queries.scores.mT @ d_out, d_out * f.enter
    else:
        queries = None
    for i in reversed(range(len(f.k))):
        d_u = (f.k[i] @ d_state).mul_(f.leave[i])
        if queries is not None:
            d_u += d_scored[i]
        d_error = f.inverse[i].mT @ d_u
        d_states.append(d_state)
        d_errors.append(d_error)
        d_state = d_state * f.through[i]
        d_state.baddbmm_(f.k[i].mT, d_error * (f.beta[i] * f.enter[i]), alpha=-1)
        if queries is not None:
            d_state.baddbmm_(queries.q[i].mT, d_read[i])
    return d_state, d_states[::-1], d_errors[::-1]


def gradients(
    f: Factors, sizes: Sizes, states: Tensor, d_out: Tensor | None, d_state: Tensor, scale: float
) -> tuple[Gradients, Tensor]:
    """The gradients of a group's inputs.

    Args:
        states: [m, B, d_k, w], the incoming state of each chunk.
        d_out: [m, B, c, d_v], or None without queries; d_state: [B, d_k, w], of the last chunk's outgoing state.

    Returns:
        The gradients, and the gradient of the first chunk's incoming state.
    """
    d_first, d_state_list, d_error_list = scan_back(f, d_out, d_state)
    d_states, d_errors = torch.stack(d_state_list), torch.stack(d_error_list)
    read = f.k @ states
    errors = _minus(f.v, f.enter, read)
    u = f.inverse @ (f.beta * errors)
    d_v = d_errors[..., : sizes.d_v] * f.beta
    d_read = d_errors * (f.beta * -f.enter)
    # (I + A) U = beta (V - E K S) gives dA = -T^T dU U^T = -(the errors' gradient) U^T, without the inverse's gradient.
    d_system = (d_errors @ u.mT).neg_().tril_(-1)
    d_beta = torch.linalg.vecdot(d_errors, errors) + torch.linalg.vecdot(d_system, f.overlap)
    d_system *= f.beta
    pairs = d_system * f.overlap
    d_dots = d_system.mul_(f.decay)
    d_dots = _summed(d_dots, sizes)
    d_k = d_read @ states.mT
    d_log = torch.linalg.vecdot(f.k, d_k)
    # What the state receives from token j is scaled by F_j, so its logarithm is G_c - G_j.
    d_written = (u * f.leave) @ d_states.mT
    d_leave = torch.linalg.vecdot(f.k, d_written)
    d_k = _summed(d_k.add_(d_written), sizes)
    k = _once(f.k, sizes)
    d_k += (d_dots + d_dots.mT) @ k
    d_q = None
    if d_out is not None and f.queries is not None:
        queries = f.queries
        d_scores = d_out @ u.mT
        pairs.addcmul_(d_scores, queries.scores)
        d_scores = _summed(d_scores.mul_(f.decay), sizes)
        d_q = (d_out * f.enter) @ states.mT
        d_log += torch.linalg.vecdot(queries.q, d_q)
        d_q = _summed(d_q, sizes) + d_scores @ k
        q = _once(queries.q, sizes)
        d_k += d_scores.mT @ q
        d_q = _unit_back(d_q * scale, q if queries.root is None else q / scale, queries.root)
    d_k = _unit_back(d_k, k, f.k_root)
    d_log += pairs.sum(-1) - pairs.sum(-2) - d_leave
    d_through = (states * d_states).sum((-1, -2)) * f.through[..., 0, 0]
    d_log[..., -1] += d_leave.sum(-1) + d_through
    d_g = d_log.flip(-1).cumsum(-1).flip(-1)
    return Gradients(d_q, d_k, d_v, d_g, d_beta), d_first


def _once(x: Tensor, sizes: Sizes) -> Tensor:
    """[m, B, ..] with equal rows for the value heads of a key head -> [m, N, ..], a view."""
    return x if sizes.n_v == sizes.n_k else _grouped(x, sizes)[:, :, 0]


def _unit_back(d_unit: Tensor, unit: Tensor, root: Tensor | None) -> Tensor:
    """The gradient of x, where ``unit = root * x``; without normalisation, that of ``unit``."""
    if root is None:
        return d_unit
    return root * (d_unit - unit * torch.linalg.vecdot(unit, d_unit).unsqueeze(-1))
