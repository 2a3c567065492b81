"""The part of gpu_check.py about recurrent layers: every scan against float64, and its time, forward and backward."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable

import common
import torch
from common import Rows

import scans
from longspan.recurrent.kernels.choose import select_kernel
from longspan.recurrent.kernels.plain import PlainDelta, PlainStateSpace
from scans import Sizes

PLAIN = {"mamba": PlainStateSpace(), "gated_delta": PlainDelta()}
#: small for the comparison with float64 on the CPU, and those of a model for the time
SMALL = {"mamba": Sizes(2, 8, 128, 64), "gated_delta": Sizes(2, 4, 128, 128)}
LARGE = {"mamba": Sizes(8, 32, 128, 64), "gated_delta": Sizes(16, 32, 128, 128)}
TINY = {"mamba": Sizes(2, 4, 8, 8), "gated_delta": Sizes(2, 4, 8, 8)}
PACK = (0, 700, 701, 1029)
#: relative errors of norms that are allowed; packages round states and products to bfloat16 too
ALLOWED = {torch.float32: 1e-4, torch.bfloat16: 5e-3}
OF_PACKAGES = 3e-2


def recurrent(rows: Rows, device: torch.device, tiny: bool) -> None:
    """Plain PyTorch and the packages that are installed: Mamba-2 and the gated delta rule, packed and whole."""
    for kind, plain in PLAIN.items():
        large = TINY[kind] if tiny else LARGE[kind]
        sizes = (large.p, large.d) if kind == "mamba" else (large.d, large.p)
        package, reason = select_kernel(kind, device, torch.bfloat16, sizes)
        if package.name == "torch":
            rows.add(f"{kind}: package", None, f"skipped: {reason}")
        kernels = {"torch": plain} if package.name == "torch" else {"torch": plain, package.name: package}
        for name, kernel in kernels.items():
            for dtype in ALLOWED if name == "torch" else (torch.bfloat16,):
                _compare(rows, device, kind, name, kernel, dtype, TINY[kind] if tiny else SMALL[kind])
        for length in (64, 128) if tiny else (4096, 16384):
            tensors = [x.to(device) for x in scans.INPUTS[kind](length, 1, torch.bfloat16, large)]
            marks = scans.marks((0, length), 1, device)
            for name, kernel in kernels.items():
                label = f"{kind}, {name}: {length:,} tokens, {large.heads} heads, bfloat16"
                try:
                    leaves = [x.detach().requires_grad_() for x in tensors]
                    y = scans.scan(kind, kernel, leaves, marks)
                    (up,) = scans.draw(torch.bfloat16, y.shape)
                    step = _step(kind, kernel, leaves, marks, up.to(device))
                    step()
                    times = [common.device_ms(step, device) for _ in range(1 if tiny else 5)]
                except Exception as error:
                    rows.failed(label, error)
                    continue
                rows.add(label, None, "forward and backward", ms=statistics.median(times))


def _step(kind: str, kernel, leaves, marks, up) -> Callable[[], object]:
    return lambda: torch.autograd.grad(scans.scan(kind, kernel, leaves, marks), leaves, up)


def _compare(
    rows: Rows, device: torch.device, kind: str, name: str, kernel, dtype: torch.dtype, sizes: Sizes
) -> None:
    """A row: the largest error of outputs and gradients of a pack."""
    allowed = ALLOWED[dtype] if name == "torch" else OF_PACKAGES
    label = f"{kind}, {name}: a pack, {str(dtype).removeprefix('torch.')}"
    try:
        tensors = scans.INPUTS[kind](PACK[-1], 1, dtype, sizes)
        found = scans.errors(kind, kernel, tensors, PACK, device, PLAIN[kind])
    except Exception as error:
        rows.failed(label, error)
        return
    ok = all(math.isfinite(x) and x <= allowed for x in found)
    rows.add(label, ok, error=max(found), allowed=allowed)
