"""Attention kernels and products of experts on each rank's device, against plain mathematics in float64."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from longspan.context_parallel import SequenceLayout, context_parallel_attention
from longspan.context_parallel.kernels.choose import BACKENDS, OTHER_DEVICE, select_kernel
from longspan.context_parallel.kernels.protocol import Kernel
from longspan.errors import UserError
from longspan.expert_parallel.grouped import Choices, Weights, expert_mlps
from longspan.runs.machine.protocol import Check, Finding, Place

#: the largest error relative to the largest element of the exact result
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
#: kernels of GPUs take 16-bit numbers
DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.bfloat16,)}
REMEDY = "Do not train with it: set attention_backend to another kernel. Its package may not fit this GPU or this torch."
EXPERTS_REMEDY = (
    "The installed torch computes grouped products wrongly on this device: install another build."
)


class Case(NamedTuple):
    """A problem of attention: boundaries of documents, query and key/value heads, head size, window."""

    name: str
    cu_seqlens: tuple[int, ...]
    heads: tuple[int, int]
    head_dim: int
    window: int | None = None


CASES = (
    Case("causal", (0, 640), (4, 4), 64),
    Case("causal, odd length, grouped heads", (0, 251), (4, 2), 128),
    Case("packed documents", (0, 97, 98, 300, 511), (4, 2), 64),
    Case("window of 50", (0, 251), (4, 1), 64, 50),
    Case("window of 50, packed documents", (0, 97, 98, 300, 511), (4, 2), 64, 50),
)


class Tensors(NamedTuple):
    """q and dout [t, n, d], k and v [t, m, d]."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor


def made(case: Case, dtype: torch.dtype, device: torch.device) -> Tensors:
    """Random tensors of a case, the same on every rank."""
    generator = torch.Generator().manual_seed(0)
    (n, m), t = case.heads, case.cu_seqlens[-1]
    drawn = (torch.randn(t, heads, case.head_dim, generator=generator) for heads in (n, m, m, n))
    return Tensors(*(x.to(device, dtype) for x in drawn))


def exact(case: Case, tensors: Tensors) -> dict[str, Tensor]:
    """out, dq, dk and dv by a softmax over all pairs of the sequence in float64."""
    q, k, v = (x.double().requires_grad_() for x in tensors[:3])
    at = torch.arange(case.cu_seqlens[-1], device=q.device)
    document = torch.searchsorted(torch.tensor(case.cu_seqlens, device=q.device), at, right=True)
    distance = at[:, None] - at
    visible = (document[:, None] == document) & (distance >= 0) & (distance < (case.window or len(at)))
    group = case.heads[0] // case.heads[1]
    keys, values = (x.repeat_interleave(group, 1) for x in (k, v))
    scores = torch.einsum("qnd,knd->nqk", q, keys) / math.sqrt(case.head_dim)
    weights = scores.masked_fill(~visible, -math.inf).softmax(-1)
    out = torch.einsum("nqk,knd->qnd", weights, values)
    return _named(out, (q, k, v), tensors.dout.double())


def computed(case: Case, tensors: Tensors, kernel: Kernel) -> dict[str, Tensor]:
    """The same by a kernel."""
    q, k, v = (x.clone().requires_grad_() for x in tensors[:3])
    layout = SequenceLayout.contiguous(case.cu_seqlens[-1], 1, cu_seqlens=list(case.cu_seqlens))
    out, _ = context_parallel_attention(
        q, k, v, group=None, layout=layout, window=case.window, backend=kernel
    )
    return _named(out, (q, k, v), tensors.dout)


def _named(out: Tensor, inputs: Sequence[Tensor], dout: Tensor) -> dict[str, Tensor]:
    gradients = torch.autograd.grad(out, inputs, dout)
    return dict(zip(("out", "dq", "dk", "dv"), (out.detach(), *gradients)))


def error_of(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest error, relative to each tensor's largest element; infinite if a result is not finite."""
    errors = [
        ((got[name].double() - x.double()).abs().max() / x.double().abs().max()).item()
        for name, x in expected.items()
    ]
    return max(error if math.isfinite(error) else math.inf for error in errors)


def backends(device: str) -> list[str]:
    """The names of the kernels of a device."""
    return [name for name in BACKENDS if name != "auto" and name not in OTHER_DEVICE[device]]


def checks_of_attention(device: str, kernels: dict[str, Kernel] | None = None) -> list[Check]:
    """A check for each attention kernel: forward and gradients, packed, with windows and grouped heads.

    Args:
        device: ``cpu`` or ``cuda``.
        kernels: kernels to check, by name; None takes those of :func:`backends`.
    """
    chosen: dict[str, Kernel | None] = dict(kernels) if kernels else dict.fromkeys(backends(device))
    return [
        Check(
            f"attention {name}",
            functools.partial(_errors, name, kernel),
            functools.partial(judge_errors, f"attention {name}", REMEDY),
            REMEDY,
            seconds=60.0,
            exchanges=False,
        )
        for name, kernel in chosen.items()
    ]


Errors = dict[str, float] | str
"""case -> largest error relative to its bound; or why there is none."""


def _errors(name: str, kernel: Kernel | None, place: Place) -> Errors:
    """The errors of a kernel on this rank, or why it is not installed."""
    found, reason = {}, ""
    for case in CASES:
        for dtype in DTYPES[place.device.type]:
            if kernel is None:
                try:
                    chosen = select_kernel(place.device, dtype, case.head_dim, name).kernel
                except UserError as error:
                    # Example: a kernel may be installed and not take this data type.
                    text = str(error).removeprefix(f"attention_backend {name!r} ").removesuffix(" Use auto.")
                    reason = reason or text
                    continue
            else:
                chosen = kernel
            tensors = made(case, dtype, place.device)
            largest = error_of(computed(case, tensors, chosen), exact(case, tensors))
            found[f"{case.name}, {str(dtype).removeprefix('torch.')}"] = largest / BOUNDS[dtype]
    return found or reason


def judge_errors(name: str, remedy: str, answers: Sequence[Errors], place: Place) -> list[Finding]:
    """Names the ranks on which an error is larger than its bound, with the worst case."""
    reasons = [answer for answer in answers if isinstance(answer, str)]
    if len(reasons) == len(answers):
        return [Finding(name, "absent", f"not checked: it {reasons[0]}")]
    findings = []
    if reasons:
        without = [rank for rank, answer in enumerate(answers) if isinstance(answer, str)]
        text = f"{place.named(without)}: it {reasons[0]} Other ranks can use it."
        findings.append(Finding(name, "broken", text, "Install the same packages on every machine."))
    errors = {rank: answer for rank, answer in enumerate(answers) if not isinstance(answer, str)}
    wrong = [rank for rank, cases in errors.items() if max(cases.values()) > 1]
    if wrong:
        cases = errors[wrong[0]]
        worst = max(cases, key=lambda case: cases[case])
        text = f"{place.named(wrong)}: {worst}: {cases[worst]:.2g} times the allowed error"
        findings.append(Finding(name, "wrong", text, remedy))
    if not findings:
        largest = max(max(cases.values()) for cases in errors.values())
        count = len(next(iter(errors.values())))
        text = f"{count} cases, forward and gradients; the largest error is {largest:.2g} of what is allowed"
        findings.append(Finding(name, "ok", text, figures={"error_over_bound": largest}))
    return findings


# --- experts ----------------------------------------------------------------------------------

Mlps = Callable[[Tensor, Tensor, Choices, Weights], Tensor]
"""Rows, scores, choices and weights of experts -> rows."""


def check_of_experts(mlps: Mlps | None = None) -> Check:
    """The check of grouped products of experts, one of them without a row, against the loop over the experts.

    Args:
        mlps: the function to check; None takes :func:`longspan.expert_parallel.grouped.expert_mlps`.
    """
    return Check(
        "grouped experts",
        functools.partial(_errors_of_experts, mlps or own_experts),
        functools.partial(judge_errors, "grouped experts", EXPERTS_REMEDY),
        EXPERTS_REMEDY,
        seconds=60.0,
        exchanges=False,
    )


def own_experts(x: Tensor, scores: Tensor, choices: Choices, weights: Weights) -> Tensor:
    """The function that is checked unless another one is given."""
    return expert_mlps(x, scores, choices, weights, lambda gate, up: F.silu(gate) * up)


def _errors_of_experts(mlps: Mlps, place: Place) -> Errors:
    """The errors of outputs and gradients on this rank, against the loop over the experts in float64."""
    rows, hidden, inner, experts, chosen = 100, 64, 48, 5, 2
    generator = torch.Generator().manual_seed(0)
    # The last expert gets no row.
    choice = torch.randint(experts - 1, (rows, chosen), generator=generator).to(place.device)
    shapes = [
        (rows, hidden),
        (rows, chosen),
        *[(experts, inner, hidden)] * 2,
        (experts, hidden, inner),
        (rows, hidden),
    ]
    drawn = [torch.randn(shape, generator=generator).to(place.device) for shape in shapes]

    def run(dtype: torch.dtype, grouped: bool) -> dict[str, Tensor]:
        choices = Choices.of(choice, torch.ones_like(choice, dtype=torch.bool), experts, grouped=grouped)
        # Both runs begin from numbers that the narrow type can hold.
        *inputs, dout = (x.to(narrow).to(dtype) for x in drawn)
        inputs = [x.requires_grad_() for x in inputs]
        x, scores, *weights = inputs
        function = mlps if grouped else own_experts
        out = function(x, scores, choices, Weights(*weights))
        gradients = torch.autograd.grad(out, inputs, dout)
        names = ("out", "d_x", "d_scores", "d_gate", "d_up", "d_down")
        return dict(zip(names, (out.detach(), *gradients)))

    found = {}
    for narrow in DTYPES[place.device.type]:
        error = error_of(run(narrow, True), run(torch.float64, False))
        found[str(narrow).removeprefix("torch.")] = error / BOUNDS[narrow]
    return found
