"""Move keys: each rank receives the key/value rows that its queries need, and keeps its queries.

For one rank with s rows, which receives r_i rows at step i (see ``schedule``):

    forward    k, v [s, b, m, d]  -> [r_i, 2, b, m, d] from the peers of step i
    backward   the same once more, and dk, dv [r_i, 2, b, m, d] back to the owners

Rows are sent directly from owner to user while the previous step computes. Received rows are
not kept for backward, because every rank would then hold the whole sequence's keys. Backward
receives the rows again (as in ring attention; Liu et al. 2023). Gradients are sent and summed in
at least float32, in the order of the steps, so two runs give equal bits.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from longspan.context_parallel.calls import calls_of
from longspan.context_parallel.kernels.protocol import Kernel, merge
from longspan.context_parallel.schedule import Message, Schedule, Step
from longspan.context_parallel.sinks import add_sinks, sink_gradients
from longspan.context_parallel.tiles import Mask, Range
from longspan.sums import add_rows


class _Exchange:
    """Messages that are being sent. Their buffers stay referenced until the messages have arrived."""

    def __init__(
        self,
        group: dist.ProcessGroup,
        sends: list[tuple[int, Tensor]],
        receives: list[tuple[int, Tensor]],
    ):
        ops = [dist.P2POp(dist.isend, buffer, group=group, group_peer=peer) for peer, buffer in sends]
        ops += [dist.P2POp(dist.irecv, buffer, group=group, group_peer=peer) for peer, buffer in receives]
        self._held = (sends, receives)
        self._works = dist.batch_isend_irecv(ops) if ops else []

    def wait(self) -> None:
        for work in self._works:
            work.wait()


def _take(x: Tensor, ranges: tuple[Range, ...]) -> Tensor:
    """The rows of ``ranges``, one range after another; a view if there is one range."""
    parts = [x[start:stop] for start, stop in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _add(x: Tensor, ranges: tuple[Range, ...], rows: Tensor) -> None:
    """Adds rows to the rows of ``ranges``: the transpose of :func:`_take`."""
    at = 0
    for start, stop in ranges:
        x[start:stop] += rows[at : at + stop - start]
        at += stop - start


class _Keys:
    """The key/value rows of one step, which are received in the background."""

    def __init__(self, step: Step, k: Tensor, v: Tensor, group: dist.ProcessGroup):
        self.step = step
        sends = [
            (message.peer, torch.stack((_take(k, message.ranges), _take(v, message.ranges)), dim=1))
            for message in step.sends
        ]
        rows = sum(message.rows for message in step.receives)
        self.buffer = k.new_empty((rows, 2, *k.shape[1:]))
        self.exchange = _Exchange(group, sends, _split(self.buffer, step.receives))

    def wait(self) -> tuple[Tensor, Tensor]:
        """k, v [rows, b, m, d] in the order of the step's tiles."""
        self.exchange.wait()
        rows = self.buffer if self.step.order is None else _take(self.buffer, self.step.order)
        return rows[:, 0], rows[:, 1]


class _Gradients:
    """The gradients of one step's received rows, which are sent back to the owners in the background."""

    def __init__(self, step: Step, grad: Tensor, group: dist.ProcessGroup):
        self.step = step
        # The gradients are put back in the order in which the rows arrived.
        if step.order is not None:
            arrived = torch.empty_like(grad)
            at = 0
            for start, stop in step.order:
                arrived[start:stop] = grad[at : at + stop - start]
                at += stop - start
            grad = arrived
        self.buffers = [
            (message.peer, grad.new_empty((message.rows, *grad.shape[1:]))) for message in step.sends
        ]
        self.exchange = _Exchange(group, _split(grad, step.receives), self.buffers)

    def add_to(self, dk: Tensor, dv: Tensor) -> None:
        self.exchange.wait()
        for message, (_, rows) in zip(self.step.sends, self.buffers):
            _add(dk, message.ranges, rows[:, 0])
            _add(dv, message.ranges, rows[:, 1])


def _split(buffer: Tensor, messages: tuple[Message, ...]) -> list[tuple[int, Tensor]]:
    """Views of a buffer of all messages' rows, one for each message."""
    parts, at = [], 0
    for message in messages:
        parts.append((message.peer, buffer[at : at + message.rows]))
        at += message.rows
    return parts


class MoveKeys(torch.autograd.Function):
    """Attention over a Schedule: q, k, v [s, b, heads, d] -> out [s, b, n, d], lse [b, n, s].

    ``sinks`` [n] are those of these query heads (see ``sinks``); None is attention without sinks. A rank's gradient of
    them is that of its own rows, so the gradients add up over the ranks.
    """

    @staticmethod
    def forward(ctx, q, k, v, sinks: Tensor | None, schedule: Schedule, group, kernel: Kernel, scale: float):
        ctx.schedule, ctx.group, ctx.kernel, ctx.scale = schedule, group, kernel, scale
        # Kernels need a last dim with stride 1.
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        if _alone(schedule):
            causal = schedule.steps[0].tiles[0].mask is Mask.CAUSAL
            out, lse = kernel.forward(q, k, v, causal, scale)
        else:
            out, lse = _forward(q, k, v, schedule, group, kernel, scale)
        if sinks is not None:
            out, lse = add_sinks(out, lse, sinks)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, sinks, out, lse)
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx, dout, _):
        q, k, v, sinks, out, lse = ctx.saved_tensors
        dout = dout.contiguous()
        schedule, kernel, scale = ctx.schedule, ctx.kernel, ctx.scale
        if _alone(schedule):
            causal = schedule.steps[0].tiles[0].mask is Mask.CAUSAL
            grads = kernel.backward(dout, q, k, v, out, lse, causal, scale)
        else:
            grads = _backward(dout, q, k, v, out, lse, schedule, ctx.group, kernel, scale)
        needed = sinks is not None and ctx.needs_input_grad[3]
        of_sinks = sink_gradients(sinks, dout, out, lse) if needed else None
        return *grads, of_sinks, None, None, None, None


def _alone(schedule: Schedule) -> bool:
    """Whether there is one tile and no exchange, so that the kernel's result is the final one."""
    return schedule.single_tile and len(schedule.steps) == 1


def _forward(q, k, v, schedule, group, kernel, scale):
    """out and lse, both at least float32."""
    s, b, n, _ = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    make = torch.empty if schedule.covered else torch.zeros
    out = make((s, b, n, v.shape[-1]), dtype=wide, device=q.device)
    lse = torch.full((b, n, s), float("-inf"), dtype=wide, device=q.device)
    keys = k, v
    for step, after in _with_next(schedule.steps):
        # The next step's rows are received while this step computes.
        coming = _Keys(after, k, v, group) if after else None
        forward_step(out, lse, q, *keys, step, kernel, scale)
        if coming:
            keys = coming.wait()
    return out, lse


def forward_step(out, lse, q, k, v, step: Step, kernel: Kernel, scale: float) -> None:
    """Adds a step's tiles to the running out [s, b, n, d] and lse [b, n, s]; k, v are the step's rows."""
    for call in calls_of(step, kernel, q.device):
        part, part_lse = call.forward(kernel, q, k, v, scale)
        if not call.first:
            # These are views if call.q is a slice, and copies if it is row numbers.
            held, held_lse = out[call.q], lse[:, :, call.q]
            merge(held, held_lse, part, part_lse)
            if isinstance(call.q, slice):
                continue
            part, part_lse = held, held_lse
        out[call.q], lse[:, :, call.q] = part, part_lse


def backward_step(dq, dk, dv, dout, q, k, v, out, lse, step: Step, kernel: Kernel, scale: float) -> None:
    """Adds a step's gradients to dq (own rows) and to dk, dv (the step's rows)."""
    fixed_order = getattr(kernel, "deterministic", False)
    for call in calls_of(step, kernel, q.device):
        dq_part, dk_part, dv_part = call.backward(kernel, dout, q, k, v, out, lse, scale)
        if call.first:
            dq[call.q] = dq_part.to(dq.dtype)
        else:
            add_rows(dq, call.q, dq_part, fixed_order)
        add_rows(dk, call.k, dk_part, fixed_order)
        add_rows(dv, call.k, dv_part, fixed_order)


def _backward(dout, q, k, v, out, lse, schedule, group, kernel, scale):
    wide = torch.promote_types(q.dtype, torch.float32)
    make = torch.empty if schedule.covered else torch.zeros
    dq = make(q.shape, dtype=wide, device=q.device)
    dk, dv = (torch.zeros(x.shape, dtype=wide, device=q.device) for x in (k, v))
    keys, going_home = (k, v), None
    for step, after in _with_next(schedule.steps):
        coming = _Keys(after, k, v, group) if after else None
        if step is schedule.steps[0]:
            grad, dk_rows, dv_rows = None, dk, dv
        else:
            grad = torch.zeros((keys[0].shape[0], 2, *k.shape[1:]), dtype=wide, device=q.device)
            dk_rows, dv_rows = grad[:, 0], grad[:, 1]
        backward_step(dq, dk_rows, dv_rows, dout, q, *keys, out, lse, step, kernel, scale)
        if going_home:
            going_home.add_to(dk, dv)
        going_home = _Gradients(step, grad, group) if grad is not None else None
        if coming:
            keys = coming.wait()
    if going_home:
        going_home.add_to(dk, dv)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _with_next(steps: tuple[Step, ...]):
    """Each step with the step after it (None at the end)."""
    return zip(steps, (*steps[1:], None))
