"""Capacity: at most so many tokens of a sequence to one expert.

The capacity is ceil(T x k / E x factor) for each sequence of T tokens and each expert. Which choices are dropped depends
on the whole sequence and never on how it is cut over ranks: the scores of all its rows are gathered (t x k numbers a
rank), and every rank computes the same.

    probs       an expert keeps the largest scores; of equal ones, those of earlier tokens
    position    an expert keeps the first tokens of the sequence
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from longspan.expert_parallel.tokens import TokenSet


def capacities(token_set: TokenSet, topk: int, num_experts: int, factor: float) -> Tensor:
    """int64 [P], for each sequence the most tokens of an expert."""
    # Rounded before the ceiling, so that 1.1 x 10 is 11 and not 11.000000000000002.
    values = [math.ceil(round(float(t) * topk / num_experts * factor, 9)) for t in token_set.tokens.tolist()]
    return torch.tensor(values, dtype=torch.int64)


def kept_choices(
    indices: Tensor,
    scores: Tensor,
    kept: Tensor,
    sequence: Tensor,
    place: Tensor,
    capacity: Tensor,
    num_experts: int,
    policy: str,
) -> Tensor:
    """Which choices an expert keeps, bool [T, k], of all rows of some sequences.

    Args:
        indices, scores, kept: [T, k]; ``kept`` is False for padding.
        sequence, place: int64 [T], of each row its sequence and its place there.
        capacity: int64 [P].
        policy: ``probs`` or ``position``.
    """
    topk = indices.shape[1]
    group = (sequence.unsqueeze(1) * num_experts + indices).flatten()
    groups = len(capacity) * num_experts
    group = torch.where(kept.flatten(), group, groups)
    order = place.repeat_interleave(topk).argsort(stable=True)
    if policy == "probs":
        order = order[scores.detach().flatten()[order].argsort(descending=True, stable=True)]
    order = order[group[order].argsort(stable=True)]
    sizes = torch.bincount(group, minlength=groups + 1)
    begins = sizes.cumsum(0) - sizes
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device) - begins[group[order]]
    limit = torch.cat(
        [capacity.to(order.device).repeat_interleave(num_experts), capacity.new_zeros(1).to(order.device)]
    )
    return (rank < limit[group]).view_as(indices) & kept
