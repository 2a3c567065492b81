"""The experts of this rank: MLPs whose weights lie in one tensor a matrix, computed by grouped products."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from longspan import autocast
from longspan.config.model import TransformerConfig
from longspan.expert_parallel.dispatcher import make_dispatcher
from longspan.expert_parallel.grouped import Choices, Weights, expert_mlps
from longspan.mesh import collectives
from longspan.mesh.default_groups import process_groups
from longspan.mesh.mesh import ProcessGroupCollection
from longspan.tensor_parallel.layers import ParallelModule, local
from longspan.tensor_parallel.mlp import mlp_activation
from longspan.tensor_parallel.random import Constant, Normal


class GroupedMLP(ParallelModule):
    """``num_local_experts`` MLPs: ``down(act(gate x) * up x)``, or ``down(act(up x))`` without a gated linear unit.

    Called in one of two ways:

        (permuted [t, h], tokens_per_expert [local experts]) -> [t, h]
            rows in the order of the experts, as Megatron's; each through its own expert. With a third argument [t] of
            Megatron's (permuted_probs) each result is multiplied by its number
        (x [.., h], scores [.., k], indices [.., k]) -> [.., h]
            rows are sent to the ranks of the experts they chose (``indices`` are numbers of all experts), and
            come back as one sum weighted by ``scores``

    Weights are [experts, output, input], cut over expert parallel ranks along dim 0 and over expert tensor parallel
    ranks along the inner size.

    Args:
        num_local_experts: experts of this rank, ``num_moe_experts / expert parallel size``.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection | None = None,
    ):
        groups = process_groups(pg_collection)
        super().__init__(config, dist.get_world_size(groups.tp_ep))
        self.config, self.groups = config, groups
        assert groups.expert_mesh is not None
        self.mesh = groups.expert_mesh
        ep, etp = dist.get_world_size(groups.ep), dist.get_world_size(groups.etp)
        experts = config.num_moe_experts or num_local_experts * ep
        if num_local_experts * ep != experts:
            raise ValueError(
                f"GroupedMLP: num_local_experts {num_local_experts} x {ep} expert parallel ranks is not num_moe_experts "
                f"{experts}. Give num_moe_experts / expert parallel size."
            )
        self.num_experts, self.num_local_experts = experts, num_local_experts
        h, ffn = config.hidden_size, config.moe_ffn_hidden_size or config.ffn_hidden_size
        if ffn % etp:
            raise ValueError(
                f"GroupedMLP: the size of an expert {ffn} is not divisible by the expert tensor parallel size {etp}. "
                "Choose a multiple (moe_ffn_hidden_size)."
            )
        self.activation = mlp_activation(config)
        std = config.init_method_std
        small = std / (2 * config.num_layers) ** 0.5
        biases = config.add_bias_linear

        def weight(name: str, out: int, size: int, dim: int, std: float) -> nn.Parameter:
            return self._expert_parameter(name, (experts, out, size), (0, dim), Normal(std))

        def bias(name: str, size: int, dim: int | None) -> nn.Parameter | None:
            return self._expert_parameter(name, (experts, size), (0, dim), Constant(0.0)) if biases else None

        gated = config.gated_linear_unit
        self.gate_weight = weight("gate_weight", ffn, h, 1, std) if gated else None
        self.up_weight = weight("up_weight", ffn, h, 1, std)
        self.down_weight = weight("down_weight", h, ffn, 2, small)
        self.gate_bias = bias("gate_bias", ffn, 1) if gated else None
        self.up_bias = bias("up_bias", ffn, 1)
        self.down_bias = bias("down_bias", h, None)
        self.dispatcher = make_dispatcher(
            config.moe_token_dispatcher_type, groups, experts, config.deterministic_mode
        )

    def _expert_parameter(
        self, name: str, shape: Sequence[int], dims: Sequence[int | None], initial: Normal | Constant
    ) -> nn.Parameter:
        return nn.Parameter(self._place(name, shape, self.mesh, dims, initial, self.dtype))

    def weights(self) -> Weights:
        """The tensors of this rank's experts."""
        down_bias = None if self.down_bias is None else local(self.down_bias)
        if down_bias is not None and dist.get_world_size(self.groups.etp) > 1:
            # The partial sums of an expert add up, and its bias must come once.
            first = dist.get_rank(self.groups.etp) == 0
            down_bias = collectives.copy(down_bias, self.groups.etp) * float(first)
        up, down = local(self.up_weight), local(self.down_weight)
        gate, gate_bias, up_bias = (
            None if p is None else local(p) for p in (self.gate_weight, self.gate_bias, self.up_bias)
        )
        return Weights(gate, up, down, gate_bias, up_bias, down_bias)

    def compute(self, rows: Tensor, scores: Tensor, choices: Choices) -> Tensor:
        """[n, h] -> [n, h]: the weighted sum over the experts of this rank that each row chose."""
        weights = self.weights()
        (x,) = autocast.cast(rows)
        weights = Weights._make(None if w is None else autocast.cast(w)[0] for w in weights)
        with autocast.off(rows):
            return expert_mlps(x, scores, choices, weights, self.activation)

    def forward(
        self,
        x: Tensor,
        scores: Tensor,
        indices: Tensor | None = None,
        kept: Tensor | None = None,
        exchange: Any = None,
        pairs_each: int | None = None,
    ) -> Tensor:
        """See the class.

        Args:
            kept, exchange, pairs_each: of ``MoELayer``, whose rows [t, h] are different ones on every rank; see
                :meth:`dispatched`.
        """
        if indices is None or indices.is_floating_point():
            return self._sorted(x, scores, indices)
        if kept is not None:
            return self.dispatched(x, scores, indices, kept, exchange, pairs_each)
        if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < self.num_experts:
            raise ValueError(
                f"GroupedMLP: indices from {int(indices.min())} to {int(indices.max())}: they are numbers of all "
                f"{self.num_experts} experts, from 0."
            )
        shape = x.shape
        x, scores, indices = (part.reshape(-1, part.shape[-1]) for part in (x, scores, indices))
        # Without sequence parallelism all tensor parallel ranks have these rows: each sends its part of them.
        tp = self.groups.tp if not self.config.sequence_parallel else None
        rows = len(x)
        x, scores, indices = (cut_rows(part, tp) for part in (x, scores, indices))
        kept = torch.ones_like(indices, dtype=torch.bool)
        y = self.dispatched(x, scores, indices, kept, self.dispatcher.exchange(indices, kept))
        return join_rows(y, tp, rows).view(shape)

    def dispatched(
        self,
        x: Tensor,
        scores: Tensor,
        indices: Tensor,
        kept: Tensor,
        exchange: Any,
        pairs_each: int | None = None,
    ) -> Tensor:
        """[t, h] -> [t, h], through the ranks of the experts.

        Args:
            kept: bool [t, k], the choices that count.
            exchange: of the dispatcher, for these choices.
            pairs_each: fills the rows of each expert up to so many.
        """
        received = self.dispatcher.send(x, scores, indices, kept, exchange)
        choices = Choices.of(
            received.experts,
            received.kept,
            self.num_local_experts,
            self.config.moe_grouped_gemm,
            self.config.deterministic_mode,
            pairs_each,
        )
        y = self.compute(received.rows, received.scores, choices)
        return self.dispatcher.combine(y, x, exchange)

    def _sorted(self, x: Tensor, counts: Tensor, factors: Tensor | None) -> Tensor:
        counts = torch.as_tensor(counts, device=x.device).to(torch.int64)
        if counts.shape != (self.num_local_experts,) or int(counts.sum()) != len(x):
            raise ValueError(
                f"GroupedMLP: {len(x)} rows and tokens_per_expert {counts.tolist()}: one number for each of the "
                f"{self.num_local_experts} experts of this rank, and their sum is the number of rows."
            )
        # Each rank of an expert tensor parallel group has a part of the gradient of the rows.
        x = collectives.copy(x, self.groups.etp)
        at = torch.arange(len(x), device=x.device)
        ends = counts.cumsum(0).to(torch.int32)
        choices = Choices(at, at, counts, ends, self.config.moe_grouped_gemm, self.config.deterministic_mode)
        scores = x.new_ones(len(x), 1) if factors is None else factors.view(len(x), 1)
        y = self.compute(x, scores, choices)
        return collectives.reduce(y, self.groups.etp)


def cut_rows(x: Tensor, group: dist.ProcessGroup | None, padding: int = 0) -> Tensor:
    """[t, ..], the same on all ranks -> this rank's part of the rows, padded to divide; None leaves them."""
    if group is None or dist.get_world_size(group) == 1:
        return x
    short = -len(x) % dist.get_world_size(group)
    if short:
        x = torch.cat([x, x.new_full((short, *x.shape[1:]), padding)])
    return collectives.scatter(x, group, 0)


def join_rows(x: Tensor, group: dist.ProcessGroup | None, rows: int) -> Tensor:
    """The reverse of :func:`cut_rows`."""
    return x if group is None else collectives.gather(x, group, 0)[:rows]
