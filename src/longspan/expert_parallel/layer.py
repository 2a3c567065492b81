"""MoELayer: router, balancing, dispatch, experts and the shared expert of one layer.

    x [s, b, h] -> rows [t, h] -> scores, indices [t, k] -> experts -> [t, h] (+ shared expert) -> [s, b, h]

The collectives of a layer stand here and in the dispatcher: counts are summed over the ranks that hold rows of the same
sequence (context parallel ones, and tensor parallel ones, which always hold different rows here: without sequence
parallelism each takes its part of them).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from longspan.config.model import TransformerConfig
from longspan.expert_parallel.balancing import balancing_loss, count_choices, with_loss, z_loss
from longspan.expert_parallel.capacity import capacities, kept_choices
from longspan.expert_parallel.experts import GroupedMLP, cut_rows, join_rows
from longspan.expert_parallel.router import MoERouter, Routing
from longspan.expert_parallel.tokens import RoutedTokens, TokenSet
from longspan.mesh import collectives
from longspan.mesh.default_groups import process_groups
from longspan.mesh.mesh import ProcessGroupCollection
from longspan.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    TensorParallelModule,
    local,
)
from longspan.tensor_parallel.mlp import mlp_activation, mlp_product
from longspan.tensor_parallel.random import Normal
from longspan.values import known_number


@dataclass
class Load:
    """What a layer saw in a training step on this rank, until the trainer sums it over ranks.

    Attributes:
        counts: float64 [E], choices of each expert, dropped ones included.
        losses: float64 [2], this rank's part of the balancing losses and of the z-loss.
        dropped: choices that were dropped, float64.
    """

    counts: Tensor
    losses: Tensor
    dropped: Tensor

    @classmethod
    def empty(cls, num_experts: int, device: torch.device) -> Load:
        zeros = torch.zeros(num_experts + 3, dtype=torch.float64, device=device)
        return cls(zeros[:num_experts], zeros[num_experts : num_experts + 2], zeros[num_experts + 2])

    def flat(self) -> Tensor:
        """float64 [E + 3], to be summed over ranks."""
        return torch.cat([self.counts, self.losses, self.dropped.view(1)])


class SharedExperts(nn.Module):
    """An MLP that every token goes through, with a gate where ``moe_shared_expert_gate``: sigmoid(x w) y."""

    def __init__(self, config: TransformerConfig, groups: ProcessGroupCollection):
        super().__init__()
        h, ffn = config.hidden_size, config.moe_shared_expert_intermediate_size
        assert ffn is not None
        kwargs: dict[str, Any] = {"bias": config.add_bias_linear, "tp_group": groups.tp_mesh}
        self.activation = mlp_activation(config)
        gated = config.gated_linear_unit
        self.linear_gate = ColumnParallelLinear(h, ffn, config, **kwargs) if gated else None
        self.linear_up = ColumnParallelLinear(h, ffn, config, **kwargs)
        small = config.init_method_std / (2 * config.num_layers) ** 0.5
        self.linear_down = RowParallelLinear(ffn, h, config, init_std=small, **kwargs)
        self.gate = SharedGate(config, groups) if config.moe_shared_expert_gate else None

    def forward(self, x: Tensor) -> Tensor:
        """[s, b, h] -> [s, b, h]"""
        gate = None if self.linear_gate is None else self.linear_gate.operands()
        up, down = self.linear_up.operands(), self.linear_down.operands()
        y = self.linear_down.leave(mlp_product(self.linear_up.enter(x), gate, up, down, self.activation))
        return y if self.gate is None else y * self.gate(x)


class SharedGate(TensorParallelModule):
    """[s, b, h] -> [s, b, 1]: how much of the shared expert a token takes."""

    def __init__(self, config: TransformerConfig, groups: ProcessGroupCollection):
        super().__init__(config, groups.tp_mesh)
        self.weight = self._parameter("weight", (1, config.hidden_size), None, Normal(config.init_method_std))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.replicated(self.weight)).sigmoid()


class MoELayer(nn.Module):
    """``hidden_states [s, b, h] -> (output [s, b, h], aux_loss)``.

    The balancing losses reach the gradients by themselves, once; ``aux_loss`` is their value, for a record. It is the
    coefficient where the load is even. Used alone, each column of [s, b, h] is a sequence, and the losses are means over
    the tokens of the call. A model gives ``tokens``, by which they are parts of the global batch's.

    Attributes:
        load: what this rank counted since :meth:`start_step`; None before.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int = 1,
        pg_collection: ProcessGroupCollection | None = None,
    ):
        super().__init__()
        self.groups = groups = process_groups(pg_collection)
        self.config, self.number = config, layer_number
        experts, ep = config.num_moe_experts, dist.get_world_size(groups.ep)
        if experts is None:
            raise ValueError("MoELayer: num_moe_experts is not set. Give the number of experts.")
        if experts % ep:
            raise ValueError(
                f"num_moe_experts {experts} is not divisible by the expert parallel size {ep}: every rank holds the same "
                "number of experts."
            )
        self.router = MoERouter(config, groups)
        self.experts = GroupedMLP(experts // ep, config, groups)
        shared = config.moe_shared_expert_intermediate_size
        self.shared_experts = None if shared is None else SharedExperts(config, groups)
        self.load: Load | None = None

    @property
    def adds_loss(self) -> bool:
        """Whether backward adds a balancing loss or a z-loss, as a mean over tokens."""
        return bool(self.config.balancing or self.config.moe_z_loss_coeff)

    def start_step(self) -> None:
        """Counts begin at 0."""
        self.load = None

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        s, b = hidden_states.shape[:2]
        if self.config.moe_expert_capacity_factor is not None and dist.get_world_size(self.groups.cp) > 1:
            raise ValueError(
                "MoELayer alone with moe_expert_capacity_factor under context parallelism: which tokens are dropped depends on "
                "their places in the sequence, which a layer alone does not have. Use GPTModel, or no capacity."
            )
        cp = dist.get_world_size(self.groups.cp)
        tokens = RoutedTokens.alone(s, b, hidden_states.device)
        if self.config.sequence_parallel:
            cp *= dist.get_world_size(self.groups.tp)
        sequences = replace(tokens.sequences, tokens=tokens.sequences.tokens * cp)
        place = tokens.place
        if self.config.sequence_parallel:
            place = place + s * dist.get_rank(self.groups.tp)
        tokens = RoutedTokens(None, sequences, sequences, place)
        out, loss = self.compute(hidden_states, tokens, {}, self.groups.cp)
        return out, self._summed(loss.detach())

    def compute(
        self,
        x: Tensor,
        tokens: RoutedTokens,
        memory: dict,
        cp_group: dist.ProcessGroup | None,
        balance: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """[s, b, h] -> [s, b, h], and this rank's part of the balancing losses.

        Args:
            tokens: of the rows of ``x`` taken as [s b, h].
            memory: empty in a first pass; a recomputation gets it back, and takes the choices from it.
            cp_group: the ranks that share the sequences of this call; None is this rank alone.
            balance: False leaves the losses out; an evaluation needs none.
        """
        tp = None if self.config.sequence_parallel else self.groups.tp
        rows = x.flatten(0, 1)
        count = len(rows)
        rows = cut_rows(rows, tp)
        tokens = _cut(tokens, tp, count)
        recomputed = "indices" in memory
        routing = self.router.route(rows, memory.get("indices"), cut=True)
        memory["indices"] = routing.indices
        if not recomputed:
            memory["kept"], memory["pairs_each"] = self._kept(routing, tokens, cp_group)
            memory["exchange"] = self.experts.dispatcher.exchange(routing.indices, memory["kept"])
        kept = memory["kept"]
        scores = routing.scores
        loss = routing.logits.new_zeros(())
        if balance:
            if "counts" not in memory:
                memory["counts"] = self._counts(routing, tokens, cp_group)
            loss, z = self._losses(routing, tokens, memory["counts"])
            if not recomputed and self.training and torch.is_grad_enabled():
                self._record(routing.indices, kept, tokens.real, loss, z)
            scores = with_loss(scores, loss + z)
        y = self.experts(rows, scores, routing.indices, kept, memory["exchange"], memory["pairs_each"])
        y = join_rows(y, tp, count).view_as(x)
        if self.shared_experts is not None:
            y = y + self.shared_experts(x)
        return y, loss

    def _kept(
        self, routing: Routing, tokens: RoutedTokens, cp_group: dist.ProcessGroup | None
    ) -> tuple[Tensor, int | None]:
        """Which choices count: those of padding do not, nor those beyond an expert's capacity.

        The second result is the number of rows that each expert is filled up to, None without such filling.
        """
        config, indices = self.config, routing.indices
        kept = torch.ones_like(indices, dtype=torch.bool)
        if tokens.real is not None:
            kept = kept & tokens.real.unsqueeze(1)
        if config.moe_expert_capacity_factor is None:
            return kept, None
        capacity = capacities(
            tokens.sequences,
            config.moe_router_topk,
            self.router.num_experts,
            config.moe_expert_capacity_factor,
        )
        groups = self._holders(cp_group)
        parts = [indices, routing.scores.detach(), kept.to(torch.uint8), tokens.sequences.index, tokens.place]
        rows, first = len(indices), 0
        for group in groups:
            first += dist.get_rank(group) * len(parts[0])
            parts = [collectives.all_gather_dim(part, group, 0) for part in parts]
        every, scores, real, sequence, place = parts
        chosen = kept_choices(
            every,
            scores,
            real.bool(),
            sequence,
            place,
            capacity,
            self.router.num_experts,
            config.moe_token_drop_policy,
        )
        pairs_each = self._largest_run(capacity, groups) if config.moe_pad_expert_input_to_capacity else None
        return chosen[first : first + rows], pairs_each

    def _largest_run(self, capacity: Tensor, holders: list[dist.ProcessGroup]) -> int:
        """The most rows that an expert of this rank can be sent: the capacities of all sequences with rows on the
        ranks that exchange them."""
        members = dist.get_process_group_ranks(self.groups.tp_ep)
        own = {dist.get_rank()}
        for group in holders:
            # The ranks that hold rows of a sequence are a grid: tensor parallel x context parallel ranks.
            shift = [rank - dist.get_rank() for rank in dist.get_process_group_ranks(group)]
            own = {rank + by for rank in own for by in shift}
        # Each of these ranks adds its part of the sequences they share.
        part = capacity.sum().double() / len(own & set(members))
        total = collectives.all_reduce_sum(part.to(self.router.weight.device), self.groups.tp_ep)
        return round(float(total))

    def _holders(self, cp_group: dist.ProcessGroup | None) -> list[dist.ProcessGroup]:
        """The groups over which the rows of a sequence are cut."""
        groups = [self.groups.tp] if cp_group is None else [self.groups.tp, cp_group]
        return [group for group in groups if dist.get_world_size(group) > 1]

    def _counts(
        self, routing: Routing, tokens: RoutedTokens, cp_group: dist.ProcessGroup | None
    ) -> dict[str, Tensor]:
        """n_e for each kind of balancing loss that is on."""
        found: dict[str, Tensor] = {}
        for kind in self.config.balancing:
            last = local(self.router.last_counts).to(routing.logits.device)
            if kind == "global_aux_loss" and known_number(last.any(), True):
                found[kind] = last.double()
                continue
            token_set = _set_of(kind, tokens)
            counts = count_choices(routing.indices, tokens.real, token_set, self.router.num_experts)
            for group in self._holders(cp_group):
                counts = collectives.all_reduce_sum(counts, group)
            found[kind] = counts
        return found

    def _losses(
        self, routing: Routing, tokens: RoutedTokens, counts: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """This rank's part of the balancing losses and of the z-loss, with their coefficients."""
        loss = z = routing.logits.new_zeros(())
        if counts:
            probabilities = self.router.probabilities(routing.logits)
            for kind, coefficient in self.config.balancing.items():
                token_set = _set_of(kind, tokens)
                part = balancing_loss(probabilities, tokens.real, token_set, counts[kind], self.router.topk)
                loss = loss + coefficient * part
        if self.config.moe_z_loss_coeff:
            z = self.config.moe_z_loss_coeff * z_loss(routing.logits, tokens.real, tokens.sequences)
        return loss, z

    @torch.no_grad()
    def _record(self, indices: Tensor, kept: Tensor, real: Tensor | None, loss: Tensor, z: Tensor) -> None:
        if self.load is None:
            self.load = Load.empty(self.router.num_experts, indices.device)
        chosen = indices if real is None else indices[real]
        self.load.counts += torch.bincount(chosen.flatten(), minlength=self.router.num_experts)
        self.load.losses += torch.stack([loss.detach(), z.detach()])
        self.load.dropped += chosen.numel() - kept.sum()

    def _summed(self, loss: Tensor) -> Tensor:
        """A detached loss, summed over the ranks that hold parts of it."""
        for group in self._holders(self.groups.cp):
            loss = collectives.all_reduce_sum(loss, group)
        return loss


def _set_of(kind: str, tokens: RoutedTokens) -> TokenSet:
    return tokens.documents if kind == "seq_aux_loss" else tokens.sequences


def _cut(tokens: RoutedTokens, group: dist.ProcessGroup | None, rows: int) -> RoutedTokens:
    """The part of a tensor parallel rank, where the rows are cut without sequence parallelism."""
    if group is None or dist.get_world_size(group) == 1:
        return tokens
    real = tokens.real
    if real is None:
        real = torch.ones(rows, dtype=torch.bool, device=tokens.place.device)
    index = [cut_rows(part, group) for part in (tokens.sequences.index, tokens.documents.index, tokens.place)]
    return RoutedTokens(
        cut_rows(real, group),
        replace(tokens.sequences, index=index[0]),
        replace(tokens.documents, index=index[1]),
        index[2],
    )
