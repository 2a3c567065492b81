"""Steps whose loss or gradients are infinite or NaN: all ranks find them at once, before the weights change.

stop        the run ends, and no checkpoint holds the bad state (default)
skip        weights and optimizer stay as they are, and the next step comes; not ten times in a row
roll_back   back to the last whole checkpoint, and the batch is left out; not twice before the next checkpoint
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from longspan.data import TokenDataset
from longspan.tensor_parallel.layers import local

#: steps in a row that ``skip`` takes; the one that makes them so many ends the run
MOST_IN_A_ROW = 10
#: names that a message has; a record has all of them
SHOWN = 3


class NotFinite(RuntimeError):
    """The loss or the gradient is infinite or NaN.

    Attributes:
        finding: where it was found; None before it was looked for.
    """

    finding: Finding | None = None

    def __str__(self) -> str:
        return f"{super().__str__()}{'' if self.finding is None else f' {self.finding}'}"


@dataclass(frozen=True)
class Finding:
    """Where a loss or gradients are not finite.

    Attributes:
        ranks: those whose own part of the loss is not.
        parameters: names of those with such gradients, over all ranks.
        documents: of the step's global batch, as ``PATH:NUMBER``.
    """

    ranks: list[int]
    parameters: list[str]
    documents: list[str]

    def record(self) -> dict[str, Any]:
        """For metrics.jsonl."""
        return {"ranks": self.ranks, "parameters": self.parameters, "documents": self.documents}

    def __str__(self) -> str:
        parts = [f"the loss of rank {some(self.ranks)}"] if self.ranks else []
        parts += [f"gradients of {some(self.parameters)}"] if self.parameters else []
        found = f"Not finite: {' and '.join(parts)}. " if parts else ""
        return f"{found}The step's documents: {some(self.documents)}."


def some(names: Sequence[object]) -> str:
    more = len(names) - SHOWN
    return ", ".join(map(str, names[:SHOWN])) + (f" and {more} more" if more > 0 else "")


def find(model: nn.Module, own_loss: Tensor, data: TokenDataset, samples: Sequence[int]) -> Finding:
    """Looks at this rank's loss and gradients, and gathers what all ranks found. Collective.

    Args:
        own_loss: this rank's part of the loss.
        samples: of the global batch.
    """
    names = [
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and not torch.isfinite(local(parameter.grad)).all()
    ]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, (bool(torch.isfinite(own_loss)), names))
    return Finding(
        [rank for rank, (finite, _) in enumerate(found) if not finite],
        list(dict.fromkeys(name for _, here in found for name in here)),
        documents_of(data, samples),
    )


def documents_of(data: TokenDataset, samples: Sequence[int]) -> list[str]:
    """The documents of some samples, as ``PATH:NUMBER``."""
    names = [f"{path}:{number}" for sample in samples for path, number, *_ in data.sources(sample)]
    return list(dict.fromkeys(names))
