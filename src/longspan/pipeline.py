"""Pipeline parallelism: each rank holds some stages of the model, and micro-batches pass through all of them.

    stage i -> stage i + 1   activations [s, b, h] of a micro-batch (with sequence parallelism [s/tp, b, h])
    stage i + 1 -> stage i   their gradients

The order of forward and backward passes is one of torch.distributed.pipelining's schedules. A rank's stages are parts
of one GPTModel, so that parameters have the names of the whole model. What a stage needs beside activations (tokens,
labels, the layout of the micro-batch) is on every rank already and does not travel.

    gpipe                     all forward passes, then all backward passes         (arXiv 1811.06965)
    1f1b                      one forward, one backward in turns                   (PipeDream, arXiv 1806.03377)
    interleaved               the same with several stages a rank                  (arXiv 2104.04473)
    interleaved_zero_bubble   weights' gradients later, where a rank would wait    (arXiv 2401.10241)
    zbv                       the same with stages 0 .. p-1 and back again
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)

from longspan.config.stages import SCHEDULES, SPLIT_BACKWARD, Stage, rank_of_stage
from longspan.models import GPTModel
from longspan.tensor_parallel.layers import local

_CLASSES: dict[str, Any] = {
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
    "interleaved": ScheduleInterleaved1F1B,
    "interleaved_zero_bubble": ScheduleInterleavedZeroBubble,
    "zbv": ScheduleZBVZeroBubble,
}

#: what the model computes of a micro-batch in a stage: (micro-batch, activations or None, stage) -> activations or losses
Compute = Callable[[Any, Tensor | None, Stage], Tensor]


class _StagePart(nn.Module):
    """A stage as torch's schedules call it: one call for each micro-batch, in their order.

    Args:
        model: this rank's model, of which the stage is a part.
        compute: what the stage computes.
    """

    def __init__(self, model: GPTModel, stage: Stage, compute: Compute):
        super().__init__()
        # Schedules read the parameters of a stage, so its parts are registered, and the model is not.
        if stage.first or stage.last:
            self.ends = nn.ModuleList(
                part
                for part, here in (
                    (model.embedding, stage.first),
                    (model.decoder.final_layernorm, stage.last),
                    (model.output_layer, stage.last),
                )
                if here and part is not None
            )
        self.layers = nn.ModuleList(model.decoder.layers[str(number - 1)] for number in stage.layers)
        self.stage, self._compute = stage, compute
        self._batches: list[Any] = []

    def begin(self, batches: Sequence[Any], scale: float) -> None:
        """The micro-batches of the next step, and what losses are multiplied by."""
        self._batches, self._scale = list(batches), scale

    def forward(self, x: Tensor) -> Tensor:
        """Activations of the stage before -> activations, or the loss [1] of the micro-batch; the first stage reads none."""
        out = self._compute(self._batches.pop(0), None if self.stage.first else x, self.stage)
        if self.stage.last:
            return (out.sum() * self._scale).view(1)
        # A stage without a trained parameter, such as one with adapters only behind it, would pass no gradient's place on,
        # and split backward passes would lose the gradients of the stages after it.
        if torch.is_grad_enabled() and not out.requires_grad:
            out = out.detach().requires_grad_()
        return out


class Pipeline:
    """Runs steps and evaluations over the stages of a model.

    Args:
        model: this rank's model.
        stages: all stages of the pipeline, in order.
        group: the pipeline ranks that hold them.
        schedule: one of ``config.stages.SCHEDULES``.
        compute: what the model computes of a micro-batch in a stage.
        shape_of: the shape of a micro-batch's activations between stages.
        dtype: of activations.
    """

    def __init__(
        self,
        model: GPTModel,
        stages: Sequence[Stage],
        group: dist.ProcessGroup,
        schedule: str,
        compute: Compute,
        shape_of: Callable[[Any], tuple[int, ...]],
        dtype: torch.dtype,
        device: torch.device,
    ):
        self.model, self.stages, self.group, self.schedule = model, list(stages), group, schedule
        self.compute, self.shape_of, self.dtype, self.device = compute, shape_of, dtype, device
        #: Losses are computed in float32 at least.
        self.loss_dtype = torch.promote_types(dtype, torch.float32)
        self.ranks, self.rank = dist.get_world_size(group), dist.get_rank(group)
        self.own = [s for s in self.stages if self.holder(s.index) == self.rank]
        self.parts = [_StagePart(model, stage, compute) for stage in self.own]
        #: one schedule for each shape of activations and number of micro-batches
        self._schedules: dict[tuple, Any] = {}

    def holder(self, index: int) -> int:
        """The rank of the group that holds a stage."""
        return rank_of_stage(index, self.ranks, self.schedule)

    def step(self, batches: Sequence[Any], count: int) -> Tensor:
        """Forward and backward of the micro-batches of a step; collective.

        Args:
            count: tokens that count in the loss, over all ranks; gradients are those of the mean over them.

        Returns:
            The sum of this rank's losses divided by ``count``; 0 on ranks without the last stage.
        """
        shapes = {self.shape_of(batch) for batch in batches}
        assert len(shapes) == 1, f"micro-batches of one step with different shapes: {shapes}"
        for part in self.parts:
            part.begin(batches, 1.0 / count)
        split = self.schedule in SPLIT_BACKWARD
        if split:
            self._reduce_later()
        losses: list[Tensor] = []
        # Of its input a schedule makes micro-batches: their numbers. What they hold is on every rank already.
        numbers = torch.arange(len(batches), device=self.device)
        schedule = self._schedule(len(batches), shapes.pop())
        arguments = (numbers,) if any(s.first for s in self.own) else ()
        target = numbers if any(s.last for s in self.own) else None
        schedule.step(*arguments, target=target, losses=losses)
        if split:
            # FSDP's reduction, by the method that torch's stages have for it; the stage is all of this rank's model.
            whole = PipelineStage(
                self.model, self.own[0].index, len(self.stages), self.device, group=self.group
            )
            whole.perform_reduce_grad(1)
        self._sum_tied_gradients()
        return torch.stack(losses).sum().detach() if losses else torch.zeros((), device=self.device)

    def _reduce_later(self) -> None:
        """Where backward is taken apart, FSDP's hooks run before the gradients of weights are there: they only add up."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.set_is_last_backward(False)
                module.set_reshard_after_backward(False)
                module.set_requires_gradient_sync(False)

    def _sum_tied_gradients(self) -> None:
        """Adds the gradients of the two copies of a tied embedding, which the first and the last stage have."""
        model, ends = self.model, self.model.groups.ends
        first, last = any(stage.first for stage in self.own), any(stage.last for stage in self.own)
        if first == last or not model.config.share_embeddings_and_output_weights:
            return
        assert model.embedding is not None
        gradient = model.embedding.word_embeddings.weight.grad
        if gradient is not None:
            dist.all_reduce(local(gradient), group=ends)

    def _schedule(self, micro_batches: int, shape: tuple[int, ...]) -> Any:
        key = micro_batches, shape
        if key not in self._schedules:
            made = [self._made(part, shape) for part in self.parts]
            several = SCHEDULES[self.schedule]
            self._schedules[key] = _CLASSES[self.schedule](
                made if several else made[0], micro_batches, loss_fn=_loss, scale_grads=False
            )
        return self._schedules[key]

    def _made(self, part: _StagePart, shape: tuple[int, ...]) -> PipelineStage:
        def activations() -> Tensor:
            return torch.empty(shape, dtype=self.dtype, device="meta", requires_grad=True)

        stage = part.stage
        first = torch.empty(1, dtype=torch.int64, device="meta")
        last = torch.empty(1, dtype=self.loss_dtype, device="meta", requires_grad=True)
        return PipelineStage(
            part,
            stage.index,
            len(self.stages),
            self.device,
            input_args=(first if stage.first else activations(),),
            output_args=(last if stage.last else activations(),),
            group=self.group,
        )

    @torch.no_grad()
    def losses(self, batch: Any, shape: tuple[int, ...]) -> Tensor:
        """What the last stage computes of a micro-batch without labels' gradients: losses [b, rows], on every rank. Collective.

        The stages follow one another, which no schedule can deadlock.

        Args:
            shape: of the losses.
        """
        losses = self._forward(batch)
        if losses is None:
            losses = torch.empty(shape, dtype=self.loss_dtype, device=self.device)
        dist.broadcast(losses, group=self.group, group_src=self.holder(len(self.stages) - 1))
        return losses

    def _forward(self, batch: Any) -> Tensor | None:
        """The losses on the rank with the last stage, None elsewhere."""
        x = None
        for stage in self.stages:
            if self.holder(stage.index) != self.rank:
                continue
            before, after = self.holder(stage.index - 1), self.holder(stage.index + 1)
            if not stage.first and before != self.rank:
                x = torch.empty(self.shape_of(batch), dtype=self.dtype, device=self.device)
                dist.recv(x, group=self.group, group_src=before)
            x = self.compute(batch, x, stage)
            if stage.last:
                return x.contiguous()
            if after != self.rank:
                dist.send(x.contiguous(), group=self.group, group_dst=after)
        return None


def _loss(loss: Tensor, _: Tensor) -> Tensor:
    """The last stage gives the loss itself, [1]."""
    return loss.sum()
