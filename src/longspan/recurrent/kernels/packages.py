"""The kernels of installed packages, behind the protocols of ``protocol``. No package is imported with this module.

    MambaSsm        mamba_ssm.ops.triton.ssd_combined.mamba_chunk_scan_combined
    Fla             fla.ops.gated_delta_rule.chunk_gated_delta_rule
    CausalConv1d    causal_conv1d.causal_conv1d_fn

The packages are batch-first, [b, s, ..]; everything here is [s, b, ..], and a transposed view is enough where a
package takes strides. The functions are arguments, so that tests give their own. The packages' arguments and layouts
follow their public source; nothing here has run on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from longspan.recurrent.delta_rule import StateExchange, incoming_gradient, span_state

#: Tokens of a chunk of mamba-ssm's scan: the default of its own Mamba-2 layer.
MAMBA_CHUNK = 256


def _batch_first(x: Tensor) -> Tensor:
    """[s, b, ..] -> [b, s, ..] and back, a view."""
    return x.transpose(0, 1)


def _numbers(starts: Tensor | None) -> Tensor | None:
    """int32 [b, s], contiguous: the number of each row's document; a document that is open before the rows has 0."""
    return None if starts is None else starts.t().cumsum(1, dtype=torch.int32).contiguous()


class MambaSpan(NamedTuple):
    """The first half by mamba-ssm.

    Attributes:
        state, decay: as in ``protocol.Half``.
        own: [s, b, n, p], y if a zero state comes in.
        C: [s, b, g, d].
        since: [s, b, n], what of an incoming state is left at each token.
    """

    state: Tensor
    decay: Tensor
    own: Tensor
    C: Tensor
    since: Tensor


class MambaSsm:
    """Mamba-2's scan by mamba-ssm.

    First half: one run of the package from a zero state gives y and the state after the span, and the package
    differentiates both. The decay of the whole span is plain PyTorch: sums of dt A in float64, as in ``ssd``.

    Second half, in plain PyTorch: the recurrence is linear in the state, so an incoming state adds
    ``since_t C_t S`` to y_t. The package's ``initial_states`` would need a second run.

    The package takes dt after softplus, in float32 like A and D, and documents as ``seq_idx`` [b, s].
    """

    name = "mamba-ssm"

    def __init__(self, function: Callable):
        self.function = function

    def first_half(self, x, dt, A, B, C, D, starts, real) -> MambaSpan:
        wide = torch.promote_types(x.dtype, torch.float32)
        dt, A = dt.to(wide), A.to(wide)
        if real is not None:
            dt = dt.masked_fill(~real.unsqueeze(-1), 0)
        numbers = _numbers(starts)
        own, state = self.function(
            *(_batch_first(x), _batch_first(dt), A, _batch_first(B), _batch_first(C), MAMBA_CHUNK),
            D=D,
            seq_idx=numbers,
            return_final_states=True,
        )
        sums = (dt.double() * A.double()).cumsum(0)
        since, decay = (t.exp().to(wide) for t in (sums, sums[-1]))
        if numbers is not None:
            begun = _batch_first(numbers).unsqueeze(-1) > 0
            since, decay = since.masked_fill(begun, 0), decay.masked_fill(begun[-1], 0)
        return MambaSpan(state.to(wide), decay, _batch_first(own), C, since)

    def second_half(self, span: MambaSpan, incoming: Tensor | None) -> Tensor:
        if incoming is None:
            return span.own
        C = span.C.to(incoming.dtype)
        states = incoming.unflatten(1, (C.shape[2], -1))
        seen = torch.einsum("sbgd,bgepd->sbgep", C, states).flatten(2, 3)
        return (span.own + seen * span.since.unsqueeze(-1)).to(span.own.dtype)


class Fla:
    """The gated delta rule by flash-linear-attention.

    If all tokens are here, it is one call of the package, differentiated by it. If states travel, the package computes
    outputs and gradients from the state that came in, and the state that the first rank hands on. What a rank between
    the first and the last hands on needs the transition matrix too: ``span_state`` gives both in plain PyTorch, and in
    backward ``incoming_gradient`` what the rank hands back. The package has functions of its own for that (fla.ops.cp),
    but they change from release to release and send their messages themselves. Two ranks need no plain PyTorch.

    With an exchange, inputs alone are kept, and backward runs the package's forward again: its inner functions, which
    would avoid this, change too.

    The package takes log decays in float32, as many key heads as value heads (newer releases repeat them themselves),
    and documents as ``cu_seqlens`` of one sequence, with one initial state for each document.
    """

    name = "fla"

    def __init__(self, function: Callable):
        self.function = function

    def __call__(self, q, k, v, g, beta, starts, documents, exchange: StateExchange | None) -> Tensor:
        if exchange is None:
            return self.run(q, k, v, g, beta, None, starts, documents)[0]
        return _Spans.apply(q, k, v, g, beta, starts, documents, exchange, self.run)

    def run(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor,
        initial: Tensor | None,
        starts: Tensor | None,
        documents: Tensor | None,
        final: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """The outputs [s, b, n_v, d_v], and the state after the last token [b, n_v, d_k, d_v] if ``final``.

        Args:
            initial: [b, n_v, d_k, d_v], the state before the first token; None is zero.
        """
        s, b, n, _ = v.shape
        repeats = n // k.shape[2]
        if repeats > 1:
            q, k = (x.repeat_interleave(repeats, 2) for x in (q, k))
        tensors = [_batch_first(x) for x in (q, k, v, g, beta)]
        if documents is not None:
            tensors = [x.reshape(1, b * s, *x.shape[2:]) for x in tensors]
            each = (len(documents) - 1) // b
            if initial is not None:
                # The first document of a sequence goes on from the incoming state, unless it begins here.
                first = initial if starts is None else initial.masked_fill(starts[0].view(b, 1, 1, 1), 0)
                others = first.new_zeros(b, each - 1, *first.shape[1:])
                initial = torch.cat([first.unsqueeze(1), others], 1).flatten(0, 1)
        out, state = self.function(
            *(x.contiguous() for x in tensors),
            scale=k.shape[-1] ** -0.5,
            initial_state=initial,
            output_final_state=final,
            use_qk_l2norm_in_kernel=True,
            cu_seqlens=documents,
        )
        if documents is not None:
            out = out.view(b, s, *out.shape[2:])
            state = state.unflatten(0, (b, each))[:, -1] if final else None
        return _batch_first(out), state


class _Spans(torch.autograd.Function):
    """Both halves of a span around an exchange of states; see ``Fla``."""

    @staticmethod
    def forward(ctx, q, k, v, g, beta, starts, documents, exchange, run):
        middle = not exchange.first and not exchange.last
        incoming = None
        if not exchange.first:
            own = span_state(k, v, g, beta, starts, normalize=True) if middle else (None, None)
            incoming = exchange.incoming(*own)
        out, final = run(q, k, v, g, beta, incoming, starts, documents, final=exchange.first)
        if exchange.first:
            exchange.incoming(final, None)
        ctx.save_for_backward(q, k, v, g, beta, starts, documents, incoming)
        ctx.of = exchange, run
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        *inputs, starts, documents, incoming = ctx.saved_tensors
        exchange, run = ctx.of
        d_final = None
        if not exchange.last:
            middle = not exchange.first
            own = incoming_gradient(*inputs, d_out, starts, normalize=True) if middle else None
            d_final = exchange.outgoing(own)
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in inputs]
            state = None if incoming is None else incoming.detach().requires_grad_()
            out, final = run(*leaves, state, starts, documents, final=d_final is not None)
        results, ups = (
            ([out], [d_out]) if d_final is None else ([out, final], [d_out, d_final.to(final.dtype)])
        )
        wanted = leaves if state is None else [*leaves, state]
        grads = torch.autograd.grad(results, wanted, ups)
        if exchange.last and not exchange.first:
            exchange.outgoing(grads[-1])
        return *grads[:5], None, None, None, None


class CausalConv1d:
    """The convolution and SiLU by causal-conv1d.

    The package takes no state together with documents, so the tail becomes rows in front of x; the rows that come out
    of them are dropped. It takes x [b, c, s] with channels next to each other in memory, which a view of [s, b, c] has.
    """

    name = "causal-conv1d"

    def __init__(self, function: Callable):
        self.function = function

    def __call__(self, x, weight, bias, starts, tail) -> Tensor:
        before = 0
        if tail is not None:
            before = len(tail)
            x = torch.cat([tail.to(x.dtype), x])
            if starts is not None:
                starts = torch.cat([starts.new_zeros(before, starts.shape[1]), starts])
        y = self.function(
            x.contiguous().permute(1, 2, 0), weight, bias, seq_idx=_numbers(starts), activation="silu"
        )
        return y.permute(2, 0, 1)[before:]
