"""The memory of a training step on one rank, from the ledger of its second step."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from longspan.config.run import Run
from longspan.mesh.mesh import ParallelMesh
from longspan.planner.components import COMPONENTS
from longspan.planner.ledger import Ledger
from longspan.planner.trace import tracing
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


def memory_of_rank(run: Run, rank: int, make: MakeTrainer, unit: int = 1) -> RankMemory:
    """Runs two training steps of one rank without data; the second step counts, in which all state exists.

    Args:
        make: a trainer with ``model``, ``optimizer``, ``micro_batches(step)`` and ``train_step(batches)``.
        unit: as for :class:`Ledger`.
    """
    ledger = Ledger(run.device, unit)
    with world_of(run.sizes, rank, run.device) as mesh, tracing(ledger):
        trainer = make(run, torch.device(run.device), mesh)
        trainer.train_step(trainer.micro_batches(0))
        begin = len(ledger.events)
        trainer.train_step(trainer.micro_batches(1))
        ledger.settle()
        held = _name_state(ledger, trainer.model, trainer.optimizer)
        peak, components, _ = ledger.peak(begin)
        del trainer
    ordered = {name: components[name] for name in COMPONENTS if components.get(name)}
    return RankMemory(rank, peak, ordered, held)


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
