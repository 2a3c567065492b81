"""What the trainer does for layers with experts: counts of a step, the bias of experts, and records.

Experts are chosen in every micro-batch of every rank; ``end_step`` adds the counts up over all of them, in one message.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn

from longspan.config.architecture import Architecture
from longspan.expert_parallel import MoELayer
from longspan.expert_parallel.balancing import updated_bias
from longspan.mesh.mesh import ProcessGroupCollection
from longspan.tensor_parallel.layers import local
from longspan.training.sharding import LocalBatch
from longspan.values import known_number, known_numbers


def num_tokens(batches: Sequence[LocalBatch]) -> int:
    """Tokens of this rank's rows, without padding; 0 for a model without experts, which does not count them."""
    return sum(batch.sequences.num_tokens for batch in batches if batch.sequences is not None)


def of_step(batches: list[LocalBatch], step_tokens: int) -> list[LocalBatch]:
    """The same micro-batches, with the tokens of the global batch, by which balancing losses are divided."""
    return [
        batch
        if batch.sequences is None
        else batch._replace(sequences=batch.sequences.with_step_tokens(step_tokens))
        for batch in batches
    ]


#: steps in a row without a choice after which an expert is said to have collapsed
IDLE_STEPS = 20


class Experts:
    """The layers with experts of this rank's model (none is fine), and what all layers of the whole model counted.

    Args:
        groups: of the model.
        whole: the architecture of the whole model.
    """

    def __init__(self, model: nn.Module, groups: ProcessGroupCollection, whole: Architecture):
        self.layers = [module for module in model.modules() if isinstance(module, MoELayer)]
        self.groups = groups
        #: numbers of the whole model's layers with experts, from 1
        self.numbers = whole.expert_layers
        self.experts, self.z_loss = whole.num_moe_experts or 0, bool(whole.moe_z_loss_coeff)
        #: int64 [layers, E], steps in a row in which nobody chose an expert
        self.idle: torch.Tensor | None = None
        #: float64 [layers, E + 3], the sums of the last step; see ``Load.flat``
        self.sums: torch.Tensor | None = None

    def forget_counts(self) -> None:
        """Begins without the counts of the last step, which belong to other data than what comes."""
        for layer in self.layers:
            local(layer.router.last_counts).zero_()

    def start_step(self) -> None:
        for layer in self.layers:
            layer.start_step()

    @torch.no_grad()
    def end_step(self) -> None:
        """Adds the counts up over all ranks, and updates the bias of experts. Collective."""
        if not self.numbers:
            return
        held = [layer.load for layer in self.layers]
        assert all(load is not None for load in held), "a layer with experts ran no forward pass in this step"
        at = [self.numbers.index(layer.number) for layer in self.layers]
        self.sums = self._summed([load.flat() for load in held if load is not None], at)
        self.count_idle((self.sums[:, :-3] == 0).cpu())
        for layer, index in zip(self.layers, at):
            sums = self.sums[index]
            counts = sums[: layer.router.num_experts]
            local(layer.router.last_counts).copy_(counts)
            # A frozen router keeps its bias: adapters are saved without it.
            if layer.router.expert_bias is not None and layer.router.weight.requires_grad:
                bias = local(layer.router.expert_bias)
                bias.copy_(updated_bias(bias, counts, layer.config.moe_router_bias_update_rate))

    def _summed(self, held: list[torch.Tensor], at: list[int]) -> torch.Tensor:
        """The sums of all layers over all ranks, float64 [layers, E + 3], from those of this rank's layers."""
        if dist.get_world_size(self.groups.pp) == 1:
            sums = torch.stack(held)
            dist.all_reduce(sums, group=self.groups.tp_dp_cp)
            return sums
        # A stage may have none of the layers, and then no device to agree with the others on.
        sums = torch.zeros(len(self.numbers), self.experts + 3, dtype=torch.float64)
        for index, values in zip(at, held):
            sums[index] = values.cpu()
        dist.all_reduce(sums, group=self.groups.tp_dp_cp)
        dist.all_reduce(sums, group=self.groups.pp)
        return sums

    def count_idle(self, unchosen: torch.Tensor) -> None:
        """Counts the steps in a row in which nobody chose an expert; ``unchosen`` is bool [layers, E]."""
        self.idle = unchosen.long() if self.idle is None else (self.idle + 1) * unchosen

    def idle_counts(self) -> list[list[int]] | None:
        """The counts of steps without a choice, for a checkpoint."""
        return None if self.idle is None else self.idle.tolist()

    def restart_idle(self, counts: list[list[int]] | None) -> None:
        """Takes the counts that a checkpoint has."""
        self.idle = None if counts is None else torch.tensor(counts)

    def collapsed(self) -> list[str]:
        """The experts that nobody has chosen for exactly ``IDLE_STEPS`` steps, by name; so each is named once."""
        if self.idle is None:
            return []
        places = (self.idle == IDLE_STEPS).nonzero().tolist()
        return [f"expert {expert} of layer {self.numbers[at]}" for at, expert in places]

    def record(self) -> dict:
        """The fields of a step's record: losses (means over the layers), dropped choices, and the load of each layer."""
        if self.sums is None:
            return {}
        counts, losses, dropped = self.sums[:, :-3], self.sums[:, -3:-1].mean(0), self.sums[:, -1].sum()
        shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
        aux_loss, z_loss = known_numbers(losses, [0.0, 0.0])
        found = {"moe_aux_loss": aux_loss}
        if self.z_loss:
            found["moe_z_loss"] = z_loss
        return found | {
            "moe_dropped_tokens": int(known_number(dropped, 0.0)),
            **({} if self.numbers[-1] == len(self.numbers) else {"moe_layers": self.numbers}),
            "moe_load": [
                [round(share, 6) for share in known_numbers(row, [1 / self.experts] * self.experts)]
                for row in shares
            ],
        }
