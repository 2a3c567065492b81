"""Parts of gpu_check.py about attention: every backend against float64, and the price of cutting."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import dataclass
from pathlib import Path

import attention_gpu
import torch
from common import Rows
from ranks_in_turn import Rank, whole_result
from torch import Tensor

from longspan.context_parallel import SequenceLayout
from longspan.context_parallel.kernels.choose import BACKENDS, OTHER_DEVICE, select_kernel
from longspan.errors import UserError


@dataclass(frozen=True)
class Case:
    """A problem of attention: the last boundary of ``cu`` is its length."""

    name: str
    heads: tuple[int, int]
    d: int
    cu: tuple[int, ...]
    window: int | None = None
    ranks: int = 1


PACK = (0, 700, 701, 1500, 2048)
CASES = (
    Case("one sequence, as many key heads", (8, 8), 64, (0, 2048)),
    Case("one sequence, grouped heads", (8, 2), 128, (0, 2048)),
    Case("odd length, one key head", (4, 1), 64, (0, 1999)),
    Case("packed documents", (8, 2), 64, PACK),
    Case("packed documents, 4 ranks", (8, 2), 64, PACK, ranks=4),
    Case("window of 300", (8, 2), 64, (0, 2048), 300),
    Case("window of 300, packed, 4 ranks", (8, 2), 64, PACK, 300, 4),
    Case("one sequence, heads of 256", (2, 1), 256, (0, 1024)),
)
TINY = (
    Case("one sequence, grouped heads", (4, 2), 16, (0, 67)),
    Case("packed documents, window of 9, 4 ranks", (4, 2), 16, (0, 20, 21, 64), 9, 4),
)


def dense(case: Case, tensors: tuple[Tensor, ...], dtype: torch.dtype) -> dict[str, Tensor]:
    """One dense masked softmax in ``dtype``: out, lse [n, t], dq, dk, dv of q, k, v, dout [t, heads, d]."""
    q, k, v = (x.to(dtype).requires_grad_() for x in tensors[:3])
    row = torch.arange(case.cu[-1], device=q.device)
    document = torch.bucketize(row, torch.tensor(case.cu[1:], device=q.device), right=True)
    seen = (document[:, None] == document[None, :]) & (row[:, None] >= row[None, :])
    if case.window is not None:
        seen &= row[:, None] - row[None, :] < case.window
    k_all, v_all = (x.repeat_interleave(case.heads[0] // case.heads[1], dim=1) for x in (k, v))
    scores = torch.einsum("snd,tnd->nst", q, k_all) / math.sqrt(case.d)
    scores = scores.masked_fill(~seen, float("-inf"))
    out = torch.einsum("nst,tnd->snd", scores.softmax(-1), v_all)
    grads = torch.autograd.grad(out, (q, k, v), tensors[3].to(dtype))
    found = dict(zip(("out", "lse", "dq", "dk", "dv"), (out, scores.logsumexp(-1), *grads)))
    return {name: x.detach() for name, x in found.items()}


def cut(case: Case, tensors: tuple[Tensor, ...], kernel) -> dict[str, Tensor]:
    """The same by a backend, every rank in turn."""
    layout = SequenceLayout.make(
        "auto", case.cu[-1], case.ranks, cu_seqlens=list(case.cu), windows=[case.window]
    )
    more = layout.padded_total - layout.total
    q, k, v, dout = (torch.cat((x, x.new_zeros(more, *x.shape[1:]))).unsqueeze(1) for x in tensors)
    ranks = [Rank(layout, rank, (q, k, v, dout), case.window) for rank in range(case.ranks)]
    got = whole_result(ranks, layout.padded_total, kernel, 1 / math.sqrt(case.d), case.heads[1])
    return {name: x[..., : layout.total] if name == "lse" else x[: layout.total] for name, x in got.items()}


def largest_errors(got: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    return {name: (got[name].double() - x).abs().max().item() for name, x in exact.items()}


def attention(rows: Rows, device: torch.device, tiny: bool) -> None:
    """Each backend in bfloat16 may err at most twice as much as plain bfloat16 arithmetic does, against float64."""
    names = [name for name in BACKENDS[1:] if name not in OTHER_DEVICE[device.type]]
    g = torch.Generator(device=device).manual_seed(0)
    references = []
    for case in TINY if tiny else CASES:
        n, m = case.heads
        tensors = tuple(
            torch.randn(case.cu[-1], heads, case.d, generator=g, device=device).bfloat16()
            for heads in (n, m, m, n)
        )
        exact = dense(case, tensors, torch.float64)
        # kernels keep the log-sum-exp in float32 whatever the inputs are: merging relies on it
        allowed = largest_errors(dense(case, tensors, torch.bfloat16), exact) | {"lse": 0.0}
        references.append((case, tensors, exact, allowed))
    for name in names:
        said: set[str] = set()
        for case, tensors, exact, allowed in references:
            label = f"{name}: {case.name}"
            try:
                kernel, _ = select_kernel(device, torch.bfloat16, case.d, name)
            except UserError as error:
                if str(error) not in said:  # mostly the same for all cases: it is not installed
                    rows.add(label, None, f"skipped: {error}")
                said.add(str(error))
                continue
            try:
                errors = largest_errors(cut(case, tensors, kernel), exact)
            except Exception as error:
                rows.failed(label, error)
                continue
            over = {what: e / max(2 * allowed[what], 2e-3) for what, e in errors.items()}
            ok = all(math.isfinite(x) and x <= 1 for x in over.values())
            worst = max(over, key=lambda what: over[what] if math.isfinite(over[what]) else math.inf)
            rows.add(label, ok, f"worst: {worst}", error=errors[worst], allowed=max(2 * allowed[worst], 2e-3))


def cutting(rows: Rows, device: torch.device, tiny: bool) -> None:
    """Tiles with merging against one flash call, and a pack's variable-length calls against one."""
    packs = json.loads((Path(__file__).parent / "lengths.json").read_text())["packs"]
    runs = {
        "one sequence, 8 ranks x 8K rows": ([65536], 8),
        "a pack of 64K, 8 ranks": (packs["65536"][0], 8),
        "one sequence, 8 ranks x 2K rows": ([16384], 8),
        "a pack of 16K, 8 ranks": (packs["16384"][0], 8),
    }
    if tiny:
        runs = {"one sequence, 4 ranks": ([64], 4), "a pack, 4 ranks": ([30, 1, 33], 4)}
    heads, d, pairs = ((4, 2), 16, 1) if tiny else ((32, 8), 128, 5)
    for name, (lengths, ranks) in runs.items():
        try:
            about, times = attention_gpu.measure(lengths, ranks, heads, d, device, pairs=pairs)
        except Exception as error:
            rows.failed(name, error)
            continue
        ours, peer = (statistics.median(times[which]) for which in (attention_gpu.OURS, attention_gpu.PEER))
        rows.add(
            name, None, about, ranks_ms=ours, one_call_ms=peer, times_one_call=attention_gpu.ratio(times)
        )
