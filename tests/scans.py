"""Inputs for the scans of recurrent layers, and outputs and gradients of a kernel, for tests and benchmarks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from longspan.context_parallel import SequenceLayout
from longspan.context_parallel.runs_of_tokens import Marks, marks_of_rank

F64 = torch.float64


class Sizes(NamedTuple):
    """Heads of a scan: groups of B and C, or key heads; heads; d state or key head size; p head size."""

    groups: int
    heads: int
    d: int
    p: int


SMALL = Sizes(2, 4, 5, 3)


def draw(dtype: torch.dtype, *shapes: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=g).to(dtype) for shape in shapes]


def state_space_inputs(s: int, b: int, dtype: torch.dtype, sizes: Sizes = SMALL) -> list[Tensor]:
    """x, dt, A, B, C, D; x, B and C are parts of one tensor, as in a mixer, and the others at least float32."""
    g, n, d, p = sizes
    wide = torch.promote_types(dtype, torch.float32)
    (features,) = draw(dtype, (s, b, g, n // g * p + 2 * d))
    dt, A, D = draw(wide, (s, b, n), (n,), (n,), seed=1)
    x, B, C = features.split([n // g * p, d, d], -1)
    return [x.unflatten(-1, (n // g, p)).flatten(2, 3), dt.exp() / 4, -A.exp(), B, C, D]


def delta_inputs(s: int, b: int, dtype: torch.dtype, sizes: Sizes = SMALL) -> list[Tensor]:
    """q, k, v, g, beta; g and beta are at least float32."""
    m, n, d_k, d_v = sizes
    wide = torch.promote_types(dtype, torch.float32)
    q, k, v = draw(dtype, (s, b, m, d_k), (s, b, m, d_k), (s, b, n, d_v))
    g, beta = draw(wide, (s, b, n), (s, b, n), seed=1)
    return [q, k, v, -g.exp() / 4, beta.sigmoid()]


INPUTS = {"mamba": state_space_inputs, "gated_delta": delta_inputs}


def marks(cu: tuple[int, ...], b: int, device: torch.device, multiple: int = 1) -> Marks:
    """The marks of a pack on one rank."""
    layout = SequenceLayout.contiguous(cu[-1], 1, cu_seqlens=list(cu), multiple_of=multiple)
    return marks_of_rank(layout, 0, device, b)


def scan(kind: str, kernel, tensors: list[Tensor], its: Marks) -> Tensor:
    """The outputs of a scan whose tokens are all here."""
    if kind == "mamba":
        return kernel.second_half(kernel.first_half(*tensors, its.starts, its.real), None)
    q, k, v, g, beta = tensors
    if its.real is not None:
        padding = ~its.real.unsqueeze(-1)
        g, beta = g.masked_fill(padding, 0), beta.masked_fill(padding, 0)
    return kernel(q, k, v, g, beta, its.starts, its.documents, None)


def with_gradients(function, inputs: list[Tensor]) -> list[Tensor]:
    """The result, and the gradients of a fixed random sum of it."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    y = function(leaves)
    (up,) = draw(y.dtype, y.shape, seed=2)
    return [y.detach(), *torch.autograd.grad(y, leaves, up.to(y.device))]


def errors(
    kind: str, kernel, tensors: list[Tensor], cu: tuple[int, ...], device: torch.device, plain
) -> list[float]:
    """The error of y and of every gradient on a device, relative to its size, against ``plain`` in float64 on the CPU.

    The inputs are rounded before, and the gradient of the output too, so that both sides have the same numbers.
    """
    b, cpu = tensors[0].shape[1], torch.device("cpu")
    here, there = marks(cu, b, cpu), marks(cu, b, device)
    (up,) = draw(tensors[0].dtype, scan(kind, plain, tensors, here).shape, seed=2)

    def results(kernel, inputs, its):
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        y = scan(kind, kernel, leaves, its)
        return [y, *torch.autograd.grad(y, leaves, up.to(y.device, y.dtype))]

    found = results(kernel, [x.to(device) for x in tensors], there)
    exact = results(plain, [x.to(F64) for x in tensors], here)
    return [((a.cpu().to(F64) - e).norm() / e.norm().clamp(min=1e-12)).item() for a, e in zip(found, exact)]
