"""Attention of every rank of a layout, one rank after another on one device.

The whole sequence's keys are at hand, so nothing travels: a rank's rows are gathered instead of received. Kernels,
tiles, variable-length calls and merging are those of a run on as many devices.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longspan.context_parallel import Schedule, SequenceLayout
from longspan.context_parallel.kernels.protocol import Kernel
from longspan.context_parallel.move_keys import backward_step, forward_step
from longspan.context_parallel.schedule import Step


def step_rows(step: Step, layout: SequenceLayout, rank: int, device: torch.device) -> Tensor:
    """The tokens whose keys a step computes with, in the order its tiles count them."""
    if not step.receives:
        return layout.positions(rank).to(device)
    rows = torch.cat([layout.positions(m.peer)[a:b] for m in step.receives for a, b in m.ranges])
    if step.order is not None:
        rows = torch.cat([rows[a:b] for a, b in step.order])
    return rows.to(device)


class Rank:
    """One rank's part of a problem: its own rows, and the key rows of each of its steps.

    Args:
        q, dout: [padded total, 1, n, d]; k, v: [padded total, 1, m, d], of the whole sequence.
    """

    def __init__(
        self,
        layout: SequenceLayout,
        rank: int,
        tensors: tuple[Tensor, Tensor, Tensor, Tensor],
        window: int | None = None,
    ):
        q, k, v, dout = tensors
        schedule = Schedule.of(layout, rank, window=window)
        self.own = layout.positions(rank).to(q.device)
        self.q, self.dout = q[self.own], dout[self.own]
        self.steps = []
        for step in schedule.steps:
            rows = step_rows(step, layout, rank, q.device)
            self.steps.append((step, rows, k[rows], v[rows]))

    def forward(self, kernel: Kernel, scale: float) -> tuple[Tensor, Tensor]:
        """out [rows, 1, n, d] and lse [1, n, rows], both in at least float32."""
        wide = torch.promote_types(self.q.dtype, torch.float32)
        out = torch.zeros(self.q.shape, dtype=wide, device=self.q.device)
        lse = out.new_full((1, self.q.shape[2], self.q.shape[0]), float("-inf"))
        for step, _, k, v in self.steps:
            forward_step(out, lse, self.q, k, v, step, kernel, scale)
        return out, lse

    def backward(self, kernel: Kernel, scale: float, out: Tensor, lse: Tensor) -> tuple[Tensor, list]:
        """dq [rows, 1, n, d], and for each step its key rows' (positions, dk, dv), in at least float32."""
        dq, home = torch.zeros_like(out), []
        out = out.to(self.q.dtype)
        for step, rows, k, v in self.steps:
            dk, dv = (torch.zeros(x.shape, dtype=dq.dtype, device=x.device) for x in (k, v))
            backward_step(dq, dk, dv, self.dout, self.q, k, v, out, lse, step, kernel, scale)
            home.append((rows, dk, dv))
        return dq, home


def whole_result(
    ranks: list[Rank], total: int, kernel: Kernel, scale: float, kv_heads: int
) -> dict[str, Tensor]:
    """out, lse, dq, dk and dv of the whole sequence [total, ..] (lse [n, total]), put together from all ranks."""
    q = ranks[0].q
    wide = torch.promote_types(q.dtype, torch.float32)

    def zeros(heads: int) -> Tensor:
        return torch.zeros((total, 1, heads, q.shape[3]), dtype=wide, device=q.device)

    found = {"out": zeros(q.shape[2]), "dq": zeros(q.shape[2]), "dk": zeros(kv_heads), "dv": zeros(kv_heads)}
    lse = torch.zeros(q.shape[2], total, dtype=wide, device=q.device)
    for rank in ranks:
        out, lse_own = rank.forward(kernel, scale)
        dq, home = rank.backward(kernel, scale, out, lse_own)
        found["out"][rank.own], found["dq"][rank.own], lse[:, rank.own] = out, dq, lse_own[0]
        for rows, dk, dv in home:
            found["dk"].index_add_(0, rows, dk)
            found["dv"].index_add_(0, rows, dv)
    return {name: x.squeeze(1) for name, x in found.items()} | {"lse": lse}
