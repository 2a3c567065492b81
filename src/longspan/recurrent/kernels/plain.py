"""The kernels in plain PyTorch, for every device and dtype."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from longspan.recurrent.convolution import causal_convolution
from longspan.recurrent.delta_rule import delta_rule
from longspan.recurrent.ssd import SpanScan, scan_span, span_output


class PlainStateSpace:
    """``recurrent.ssd``: both halves have autograd functions of their own."""

    name = "torch"

    def first_half(self, x, dt, A, B, C, D, starts, real) -> SpanScan:
        return scan_span(x, dt, A, B, C, D, starts, real)

    def second_half(self, span: SpanScan, incoming: Tensor | None) -> Tensor:
        return span_output(span, incoming)


class PlainDelta:
    """``recurrent.delta_rule``."""

    name = "torch"

    def __call__(self, q, k, v, g, beta, starts, documents, exchange) -> Tensor:
        return delta_rule(q, k, v, g, beta, starts, normalize=True, exchange=exchange)[0]


class PlainConvolution:
    """``recurrent.convolution``."""

    name = "torch"

    def __call__(self, x, weight, bias, starts, tail) -> Tensor:
        return F.silu(causal_convolution(x, weight, bias, starts, tail))
