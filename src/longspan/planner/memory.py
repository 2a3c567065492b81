"""The memory and the work of a training step on one rank, from the ledger of its second step."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from longspan.config.run import Run
from longspan.mesh.axes import groups_of_axes
from longspan.mesh.mesh import ParallelMesh
from longspan.planner.components import COMPONENTS
from longspan.planner.ledger import Ledger
from longspan.planner.trace import tracing
from longspan.planner.work import Work
from longspan.planner.world import world_of

#: bytes to which CUDA's caching allocator rounds small requests up
CUDA_UNIT = 512


@dataclass(frozen=True)
class RankMemory:
    """The memory of one rank, in bytes.

    Attributes:
        peak: the most bytes of live tensors in the second step.
        components: the bytes of each component at that moment; they sum to ``peak``.
        held: the bytes of parameters, gradients and optimizer state on this rank, each as a whole.
    """

    rank: int
    peak: int
    components: dict[str, int]
    held: dict[str, int]


#: makes the trainer of a rank from the run, its device and its mesh
MakeTrainer = Callable[[Run, torch.device, ParallelMesh], Any]


@dataclass(frozen=True)
class Traced:
    """A step of one rank.

    Attributes:
        parts: part of the step -> the bytes of each component at its peak.
        held: the bytes of parameters, gradients and optimizer state, each as a whole.
        work: what the step computes and sends.
        groups: axis -> the ranks of this rank's group.
    """

    parts: dict[Hashable, dict[str, int]]
    held: dict[str, int]
    work: Work
    groups: dict[str, list[int]]


def trace_rank(
    run: Run, rank: int, make: MakeTrainer, unit: int = 1, from_bottom: int | None = None
) -> Traced:
    """Runs two training steps of one rank without data; the second step counts, in which all state exists.

    Args:
        make: a trainer with ``model``, ``optimizer``, ``groups``, ``micro_batches(step)`` and ``train_step(batches)``.
        unit: as for :class:`Ledger`.
        from_bottom: take the step apart by layers, of which so many are named by their place from the bottom and the
            others by their place from the top; None takes the step as a whole.
    """
    ledger = Ledger(run.device, unit)
    work = Work()
    with world_of(run.sizes, rank, run.device) as mesh, tracing(ledger, work):
        trainer = make(run, torch.device(run.device), mesh)
        if from_bottom is not None:
            _mark_layers(ledger, list(trainer.model.decoder.layers.values()), from_bottom)
        first = trainer.micro_batches(0)
        # The first step makes the optimizer's state. A pipeline's schedule takes all micro-batches.
        trainer.train_step(first if run.sizes.pp > 1 else first[:1])
        del first
        axes = groups_of_axes(mesh, trainer.groups)
        work.begin({group.group_name: axis for axis, group in axes.items()})
        begin = len(ledger.events)
        batches = trainer.micro_batches(1)
        ledger.mark("beginning")
        trainer.train_step(batches)
        ledger.settle()
        held = _name_state(ledger, trainer.model, trainer.optimizer)
        parts = ledger.peaks(begin)
        groups = {axis: dist.get_process_group_ranks(group) for axis, group in axes.items()}
        del trainer, batches, axes
    return Traced(parts, held, work, groups)


def memory_of_rank(run: Run, rank: int, make: MakeTrainer, unit: int = 1) -> RankMemory:
    """The memory of one rank, from a step of the whole run; arguments as for :func:`trace_rank`."""
    traced = trace_rank(run, rank, make, unit)
    return rank_memory(rank, traced.parts.values(), traced.held)


def rank_memory(rank: int, parts: Iterable[Mapping[str, float]], held: Mapping[str, float]) -> RankMemory:
    """The memory of a rank whose step has these parts."""
    highest = max(parts, key=lambda part: sum(part.values()))
    components = {name: round(highest[name]) for name in COMPONENTS if round(highest.get(name, 0))}
    return RankMemory(
        rank, sum(components.values()), components, {name: round(size) for name, size in held.items()}
    )


def _mark_layers(ledger: Ledger, layers: list[nn.Module], from_bottom: int) -> None:
    """Marks where the passes of each layer begin, and where those of the last one end."""

    def before(name: Hashable, first: bool) -> Callable:
        def mark(module: nn.Module, args: tuple) -> None:
            # A layer whose forward pass autograd runs again stays a part of the backward pass.
            if torch._C._current_graph_task_id() != -1:
                return
            ledger.mark(("forward", name))
            # Between two layers the output of the one, which is the input of the other, has the mark.
            if first and args[0].requires_grad:
                args[0].register_hook(lambda gradient: ledger.mark("before the layers"))

        return mark

    def after(name: Hashable, last: bool) -> Callable:
        def mark(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
            if torch._C._current_graph_task_id() != -1:
                return
            if last:
                ledger.mark("after the layers")
            if output.requires_grad:
                output.register_hook(lambda gradient: ledger.mark(("backward", name)))

        return mark

    for number, layer in enumerate(layers):
        name = (
            f"layer {number} from the bottom"
            if number < from_bottom
            else f"layer {len(layers) - number} from the top"
        )
        last = number == len(layers) - 1
        layer.register_forward_pre_hook(before(name, number == 0), prepend=True)
        layer.register_forward_hook(after(name, last))


def _name_state(ledger: Ledger, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Names the blocks of parameters, gradients and optimizer state as such; gives the bytes of each."""
    parameters = list(model.parameters())
    state = [t for held in optimizer.state.values() for t in held.values() if isinstance(t, torch.Tensor)]
    tensors: dict[str, Iterable[torch.Tensor]] = {
        "parameters": [*parameters, *model.buffers()],
        "gradients": [p.grad for p in parameters if p.grad is not None],
        "optimizer": state,
    }
    held = {}
    for component, of_component in tensors.items():
        blocks = {block for t in of_component if (block := ledger.block_of(t)) is not None}
        for block in blocks:
            block.component = component
        held[component] = sum(block.size for block in blocks)
    return held
