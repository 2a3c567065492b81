"""Products of many matrices with runs of rows, and the MLPs of many experts built on them.

    grouped_product     x [p, a], weights [E, a, b] -> [p, b]        rows of run e times weights[e]
    grouped_gradient    x [p, a], y [p, b] -> [E, a, b]              x_e^T y_e of each run e
    expert_mlps         x [n, h] -> [n, h]                           each row to several experts, weighted and summed

``torch.nn.functional.grouped_mm`` computes the first two where it can. It refuses float64, and strides that are no
multiples of 16 bytes; then a loop over the experts computes the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from longspan.matmul import product
from longspan.sums import add_rows

_grouped_mm: Any = getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)

#: of (gate, up), or of (up) without a gated linear unit
Activation = Callable[..., Tensor]


class Choices(NamedTuple):
    """Pairs of a row and an expert, sorted by expert.

    Attributes:
        row: int64 [p], the row of each pair.
        at: int64 [p], where the pair's score stands in the flattened [n, k]; n k for a pair of padding, whose score
            is 0.
        counts: int64 [E], pairs of each expert.
        ends: int32 [E], the index after each expert's last pair.
        grouped: products are ``grouped_mm``'s where it can; False computes expert by expert.
        fixed_order: sums over the pairs of a row have one order on CUDA too.
    """

    row: Tensor
    at: Tensor
    counts: Tensor
    ends: Tensor
    grouped: bool = True
    fixed_order: bool = False

    @classmethod
    def of(
        cls,
        experts: Tensor,
        kept: Tensor,
        num_experts: int,
        grouped: bool = True,
        fixed_order: bool = False,
        pairs_each: int | None = None,
    ) -> Choices:
        """From the expert of each choice [n, k], and which choices count (bool [n, k]).

        Pairs of one expert are in the order of their rows, so that sums have one order.

        Args:
            pairs_each: fills each expert up to so many pairs; they are pairs with the first row.
        """
        at = kept.flatten().nonzero().squeeze(1)
        expert = experts.flatten()[at]
        counts = torch.bincount(expert, minlength=num_experts)
        if pairs_each is not None and len(experts):
            missing = (pairs_each - counts).clamp(min=0)
            numbers = torch.arange(num_experts, device=counts.device)
            expert = torch.cat([expert, numbers.repeat_interleave(missing)])
            at = torch.cat([at, at.new_full((len(expert) - len(at),), kept.numel())])
            counts = counts + missing
        at = at[expert.argsort(stable=True)]
        row = torch.where(at < kept.numel(), at // experts.shape[1], 0)
        return cls(row, at, counts, counts.cumsum(0).to(torch.int32), grouped, fixed_order)

    def of_pairs(self, scores: Tensor, dtype: torch.dtype) -> Tensor:
        """The score of each pair: [n, k] -> [p, 1]."""
        return torch.cat([scores.flatten(), scores.new_zeros(1)])[self.at].to(dtype).unsqueeze(1)

    def to_scores(self, values: Tensor, like: Tensor) -> Tensor:
        """A number of each pair to the place of its score: [p] -> [n, k], 0 for choices that are no pair."""
        flat = like.new_zeros(like.numel() + 1)
        return flat.index_copy_(0, self.at, values.to(like.dtype))[:-1].view_as(like)


def _grouped(a: Tensor, b: Tensor) -> bool:
    """Does grouped_mm take these? On CUDA it is used for bfloat16 only, which is what its kernels are for."""
    dtypes = (torch.bfloat16,) if a.is_cuda else (torch.float32, torch.bfloat16, torch.float16)
    if _grouped_mm is None or a.dtype not in dtypes or a.dtype != b.dtype or not a.shape[0]:
        return False
    # Strides are the sizes of features; the number of rows is in none of them.
    sizes = (a.shape[-1], b.shape[-1], *(b.shape[1:2] if b.dim() == 3 else ()))
    return all(size * a.element_size() % 16 == 0 for size in sizes)


def grouped_product(x: Tensor, weights: Tensor, choices: Choices) -> Tensor:
    """x [p, a], weights [E, a, b] of any strides -> [p, b]. No autograd."""
    if choices.grouped and _grouped(x, weights):
        return _grouped_mm(x, weights, offs=choices.ends)
    out = x.new_empty(x.shape[0], weights.shape[2])
    begin = 0
    for expert, count in enumerate(choices.counts.tolist()):
        if count:
            out[begin : begin + count] = product(x[begin : begin + count], weights[expert])
        begin += count
    return out


def grouped_gradient(x: Tensor, y: Tensor, choices: Choices) -> Tensor:
    """x [p, a], y [p, b] -> [E, a, b]; zeros for an expert without pairs. No autograd."""
    if choices.grouped and _grouped(x, y):
        return _grouped_mm(x.t(), y, offs=choices.ends)
    out = x.new_zeros(len(choices.counts), x.shape[1], y.shape[1])
    begin = 0
    for expert, count in enumerate(choices.counts.tolist()):
        if count:
            out[expert] = product(x[begin : begin + count].t(), y[begin : begin + count])
        begin += count
    return out


def _bias_gradient(y: Tensor, choices: Choices) -> Tensor:
    """y [p, b] -> [E, b]: the sum over each expert's pairs, in float32 at least: thousands of terms of bfloat16 would
    stop growing."""
    expert = torch.repeat_interleave(torch.arange(len(choices.counts), device=y.device), choices.counts)
    wide = torch.promote_types(y.dtype, torch.float32)
    total = torch.zeros(len(choices.counts), y.shape[1], dtype=wide, device=y.device)
    add_rows(total, expert, y, choices.fixed_order)
    return total.to(y.dtype)


class Weights(NamedTuple):
    """The weights of the experts on this rank, as linear layers keep them: [E, output, input], biases [E, output].

    ``gate`` is None without a gated linear unit, ``*_bias`` without biases.
    """

    gate: Tensor | None
    up: Tensor
    down: Tensor
    gate_bias: Tensor | None = None
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None


class _ExpertMLPs(torch.autograd.Function):
    """``out[r] = sum over pairs (r, e) of score x down_e(act(gate_e x_r, up_e x_r))``

    What is kept for backward is the input once a row, and the products of gate and up once a pair. The output of
    ``down`` is kept nowhere: the gradient of a score is <d out, down a> = <down^T d out, a>, and ``down^T d out`` is
    computed anyway (SonicMoE, arXiv 2512.14080). The rows of the input are gathered again in backward.
    """

    @staticmethod
    def forward(ctx, x, scores, choices, activation, gate, up, down, gate_bias, up_bias, down_bias):
        rows = x[choices.row]
        repeats = choices.counts

        def hidden(rows, weight, bias):
            y = grouped_product(rows, weight.transpose(1, 2), choices)
            return y if bias is None else y.add_(bias.repeat_interleave(repeats, 0))

        gates = None if gate is None else hidden(rows, gate, gate_bias)
        ups = hidden(rows, up, up_bias)
        del rows
        score = choices.of_pairs(scores, x.dtype)
        a = activation(ups) if gates is None else activation(gates, ups)
        y = grouped_product(a * score, down.transpose(1, 2), choices)
        if down_bias is not None:
            y = y + down_bias.repeat_interleave(repeats, 0) * score
        ctx.choices, ctx.activation = choices, activation
        ctx.save_for_backward(x, scores, gates, ups, gate, up, down, down_bias)
        ctx.has_bias = gate_bias is not None, up_bias is not None
        out = torch.zeros_like(x)
        add_rows(out, choices.row, y, choices.fixed_order)
        return out

    @staticmethod
    def backward(ctx, grad):
        x, scores, gates, ups, gate, up, down, down_bias = ctx.saved_tensors
        choices, needs = ctx.choices, ctx.needs_input_grad
        d_out = grad[choices.row]
        score = choices.of_pairs(scores, x.dtype)
        with torch.enable_grad():
            inputs = [part.detach().requires_grad_() for part in (gates, ups) if part is not None]
            a = ctx.activation(*inputs)
        d_down = d_down_bias = None
        if needs[6]:
            d_down = grouped_gradient(d_out, a.detach() * score, choices)
        if down_bias is not None and needs[9]:
            d_down_bias = _bias_gradient(d_out * score, choices)
        d_a = grouped_product(d_out, down, choices)
        d_score = (d_a * a.detach()).sum(1, dtype=scores.dtype)
        if down_bias is not None:
            d_score = d_score + (d_out * down_bias.repeat_interleave(choices.counts, 0)).sum(
                1, dtype=scores.dtype
            )
        d_scores = choices.to_scores(d_score, scores)
        del d_out
        d_hidden = torch.autograd.grad(a, inputs, d_a.mul_(score))
        d_gates, d_ups = (None, *d_hidden) if gate is None else d_hidden
        d_rows = grouped_product(d_ups, up, choices)
        if gate is not None:
            d_rows += grouped_product(d_gates, gate, choices)
        d_x = torch.zeros_like(x) if needs[0] else None
        if d_x is not None:
            add_rows(d_x, choices.row, d_rows, choices.fixed_order)
        del d_rows
        rows = x[choices.row]
        d_gate = grouped_gradient(d_gates, rows, choices) if gate is not None and needs[4] else None
        d_up = grouped_gradient(d_ups, rows, choices) if needs[5] else None
        d_gate_bias = _bias_gradient(d_gates, choices) if ctx.has_bias[0] else None
        d_up_bias = _bias_gradient(d_ups, choices) if ctx.has_bias[1] else None
        return d_x, d_scores, None, None, d_gate, d_up, d_down, d_gate_bias, d_up_bias, d_down_bias


def expert_mlps(
    x: Tensor, scores: Tensor, choices: Choices, weights: Weights, activation: Activation
) -> Tensor:
    """Each row through the experts it chose, weighted by its scores and summed.

    Args:
        x: [n, h]; scores: [n, k], of which the pairs in ``choices`` count.
        activation: works on each element by itself (``tensor_parallel.mlp.mlp_activation``).

    Returns:
        [n, h]; zeros for a row without a pair.
    """
    return _ExpertMLPs.apply(x, scores, choices, activation, *weights)
