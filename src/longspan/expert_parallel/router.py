"""The router: which experts a token goes to, and with what weight. It holds no collective.

    x [.., h] -> logits [.., E] = x W^T (+ b with moe_router_bias), in float32 at least -> (scores [.., k], indices [.., k])

    softmax                     the k largest logits; softmax over those k
    softmax, pre_softmax        softmax over all experts; the k largest probabilities, as they are
    sigmoid                     the k largest of sigmoid + bias; their sigmoids, divided by their sum where k > 1

With groups only the experts of the best groups can be chosen; a group's score is the sum of its k / groups best ones
(DeepSeek-V3, arXiv 2412.19437). Equal scores go to the expert with the smaller number.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from longspan import autocast
from longspan.config.model import TransformerConfig
from longspan.expert_parallel.balancing import balancing_loss, count_choices
from longspan.expert_parallel.tokens import RoutedTokens
from longspan.mesh.default_groups import process_groups
from longspan.mesh.mesh import ProcessGroupCollection
from longspan.tensor_parallel.layers import TensorParallelModule, local
from longspan.tensor_parallel.random import Constant, Normal
from longspan.values import known_choices


class Routing(NamedTuple):
    """The result for rows [t, h].

    Attributes:
        scores: [t, k], the weight of each choice.
        indices: int64 [t, k], the experts.
        logits: [t, E].
    """

    scores: Tensor
    indices: Tensor
    logits: Tensor


class _WideProduct(torch.autograd.Function):
    """x [t, h] -> x w^T [t, E] in the dtype of w; what is kept of x for backward is x itself, and no wide copy."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x.to(weight.dtype) @ weight.t()

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return (grad @ weight).to(x.dtype), grad.t() @ x.to(weight.dtype)


class MoERouter(TensorParallelModule):
    """``x [s, b, h] -> (scores [s, b, k], indices [s, b, k])``.

    The weight [E, h], and the bias [E] if there is one, are copied over tensor parallel ranks, each of which has other rows (sequence parallelism).

    Attributes:
        expert_bias: float32 [E], added to the scores for choosing only; with ``moe_router_enable_expert_bias``.
        last_counts: int64 [E], choices of the last trained step, for ``global_aux_loss``.
        aux_loss: the balancing loss of the last call (see :meth:`compute_aux_loss`).
    """

    last_counts: Tensor
    expert_bias: Tensor | None

    def __init__(self, config: TransformerConfig, pg_collection: ProcessGroupCollection | None = None):
        groups = process_groups(pg_collection)
        super().__init__(config, groups.tp_mesh)
        self.config, experts = config, config.num_moe_experts
        if experts is None:
            raise ValueError("MoERouter: num_moe_experts is not set. Give the number of experts.")
        self.num_experts, self.topk = experts, config.moe_router_topk
        self.weight = self._parameter(
            "weight", (experts, config.hidden_size), None, Normal(config.init_method_std)
        )
        self.bias = (
            self._parameter("bias", (experts,), None, Constant(0.0)) if config.moe_router_bias else None
        )
        self._buffer("last_counts", (experts,), None, Constant(0.0), torch.int64)
        if config.moe_router_enable_expert_bias:
            self._buffer("expert_bias", (experts,), None, Constant(0.0), torch.float32)
        else:
            self.expert_bias = None
        self.aux_loss: Tensor | None = None
        self._routed: Tensor | None = None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        routing = self.route(x.flatten(0, -2))
        scores, indices = (part.view(*x.shape[:-1], -1) for part in routing[:2])
        self._routed = indices
        probabilities = self.probabilities(routing.logits)
        self.aux_loss = self._loss(probabilities, routing.indices, x.shape[1] if x.dim() == 3 else 1)
        return scores, indices

    def route(self, x: Tensor, indices: Tensor | None = None, cut: bool | None = None) -> Routing:
        """Rows [t, h] -> their routing.

        Args:
            indices: [t, k], the choices of an earlier pass over the same rows: a tie is not decided again.
            cut: tensor parallel ranks have different rows; None is so under sequence parallelism.
        """
        wide = torch.promote_types(x.dtype, torch.float32)
        cut = self.sequence_parallel if cut is None else cut
        held = self.summed if cut else local
        with autocast.off(x):
            logits = _WideProduct.apply(x, held(self.weight).to(wide))
            if self.bias is not None:
                logits = logits + held(self.bias).to(wide)
        return Routing(*self._choose(logits, indices), logits)

    def _choose(self, logits: Tensor, indices: Tensor | None) -> tuple[Tensor, Tensor]:
        config = self.config
        scores = logits
        if config.moe_router_score_function == "sigmoid":
            scores = logits.sigmoid()
        elif config.moe_router_pre_softmax:
            scores = logits.softmax(1)
        if indices is None:
            indices = known_choices(self._largest(scores.detach()), self.num_experts)
        chosen = scores.gather(1, indices)
        if config.moe_router_score_function == "sigmoid":
            if self.topk > 1:
                chosen = chosen / (chosen.sum(1, keepdim=True) + 1e-20)
        elif not config.moe_router_pre_softmax:
            chosen = chosen.softmax(1)
        if config.moe_router_topk_scaling_factor is not None:
            chosen = chosen * config.moe_router_topk_scaling_factor
        return chosen, indices

    def _largest(self, scores: Tensor) -> Tensor:
        """The experts with the k largest scores [t, E], in the order of their scores."""
        if self.expert_bias is not None:
            scores = scores + local(self.expert_bias).to(scores)
        groups, best = self.config.moe_router_num_groups, self.config.moe_router_group_topk
        if groups is not None and best is not None:
            grouped = scores.unflatten(1, (groups, -1))
            of_group = grouped.sort(dim=2, descending=True)[0][..., : self.topk // best].sum(2)
            chosen = of_group.sort(dim=1, descending=True, stable=True)[1][:, :best]
            allowed = torch.zeros_like(of_group, dtype=torch.bool).scatter_(1, chosen, True)
            scores = grouped.masked_fill(~allowed.unsqueeze(2), float("-inf")).flatten(1)
        return scores.sort(dim=1, descending=True, stable=True)[1][:, : self.topk]

    def probabilities(self, logits: Tensor) -> Tensor:
        """[t, E] -> what the balancing losses take for P: those of a row add up to 1."""
        if self.config.moe_router_score_function == "sigmoid":
            scores = logits.sigmoid()
            return scores / (scores.sum(1, keepdim=True) + 1e-20)
        return logits.softmax(1)

    def compute_aux_loss(self, scores: Tensor, indices: Tensor) -> Tensor:
        """The balancing loss of a routing [.., k]: the coefficient when it is even.

        Of the last call's choices it is ``aux_loss``. Of any others the probabilities are not known: they are taken
        as even over the choices of a token. Each column of [s, b, k] is one sequence.
        """
        if indices is self._routed and self.aux_loss is not None:
            return self.aux_loss
        flat = indices.reshape(-1, self.topk)
        even = scores.new_full(flat.shape, 1.0 / self.topk)
        probabilities = scores.new_zeros(len(flat), self.num_experts).scatter_add(1, flat, even)
        return self._loss(probabilities, flat, indices.shape[1] if indices.dim() == 3 else 1)

    def _loss(self, probabilities: Tensor, indices: Tensor, columns: int) -> Tensor:
        tokens = RoutedTokens.alone(len(indices) // columns, columns, indices.device)
        counts = count_choices(indices, None, tokens.sequences, self.num_experts)
        loss = balancing_loss(probabilities, None, tokens.sequences, counts, self.topk)
        return sum(self.config.balancing.values()) * loss
