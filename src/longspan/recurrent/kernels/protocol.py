"""The interfaces of the kernels of recurrent layers: Mamba-2's scan, the delta rule's, and the convolution before both.

A mixer needs a scan in two cases. If all tokens are here, it needs the outputs alone. If the sequence is cut over
ranks and states travel, it needs two halves: first the state that the span hands on, as if a zero state came in, and
what the span makes of an incoming state (its map); then the outputs, given the state that came in.

    Mamba-2         first_half, second_half: the map is one number of each head, and autograd goes through both
    delta rule      one call: the map is a matrix, and a ``StateExchange`` is called between the halves, in forward and
                    in backward, so that no gradient of the matrix is computed

Scans are called with autocast off.

Shapes: s rows, b sequences, n heads, p head size, d state size, g groups. Two kinds of borders of documents are given,
and a kernel takes what it needs:

    starts          bool [s, b], True at the first token of each document, where the state begins anew; None if no
                    document begins among these rows
    documents       int64 [b k + 1], the borders of the k documents (or parts of documents) of each sequence, in all
                    sequences one after another: 0, ..., s, ..., b s; None where ``starts`` is None
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from longspan.recurrent.delta_rule import StateExchange


class Half(Protocol):
    """The first half of Mamba-2's scan.

    Attributes:
        state: [b, n, p, d], the span's own part of the state after it, at least float32.
        decay: [b, n], what of an incoming state is left after the span; 0 if a document begins inside it.
    """

    @property
    def state(self) -> Tensor: ...

    @property
    def decay(self) -> Tensor: ...


class StateSpaceKernel(Protocol):
    """Mamba-2's scan."""

    name: str

    def first_half(
        self,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        starts: Tensor | None,
        real: Tensor | None,
    ) -> Half:
        """Arguments as those of ``ssd.scan_span``: x [s, b, n, p], dt [s, b, n], A and D [n], B and C [s, b, g, d]."""

    def second_half(self, span: Any, incoming: Tensor | None) -> Tensor:
        """y [s, b, n, p] in the dtype of x.

        Args:
            span: what ``first_half`` returned.
            incoming: [b, n, p, d], the state before the span; None is zero.
        """


class DeltaKernel(Protocol):
    """The gated delta rule, with queries and keys that it divides by their lengths."""

    name: str

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor,
        starts: Tensor | None,
        documents: Tensor | None,
        exchange: StateExchange | None,
    ) -> Tensor:
        """Arguments as those of ``delta_rule.delta_rule``. Returns o [s, b, n_v, d_v] in the dtype of v."""


class ConvolutionKernel(Protocol):
    """The causal depthwise convolution, and SiLU of it."""

    name: str

    def __call__(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, starts: Tensor | None, tail: Tensor | None
    ) -> Tensor:
        """Arguments as those of ``convolution.causal_convolution``. Returns [s, b, c] in the dtype of x."""
