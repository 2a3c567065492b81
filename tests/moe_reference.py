"""A mixture of experts in plain PyTorch on one process: every token through every expert, one expert after another."""

import math

import torch
import torch.nn.functional as F


def route(x, weight, config, bias=None):
    """[t, h] -> scores of all experts [t, E] (0 where not chosen), indices [t, k], probabilities [t, E], logits."""
    logits = x @ weight.T
    k, experts = config.moe_router_topk, config.num_moe_experts
    sigmoid = config.moe_router_score_function == "sigmoid"
    scores = logits.sigmoid() if sigmoid else logits.softmax(1) if config.moe_router_pre_softmax else logits
    select = scores.detach() + (0 if bias is None else bias)
    if config.moe_router_num_groups:
        size = experts // config.moe_router_num_groups
        for row in select:
            best = [
                sum(sorted(row[g * size : (g + 1) * size].tolist())[-(k // config.moe_router_group_topk) :])
                for g in range(config.moe_router_num_groups)
            ]
            good = sorted(range(len(best)), key=lambda g: (-best[g], g))[: config.moe_router_group_topk]
            for g in set(range(len(best))) - set(good):
                row[g * size : (g + 1) * size] = -math.inf
    indices = torch.stack(
        [torch.tensor(sorted(range(experts), key=lambda e: (-row[e].item(), e))[:k]) for row in select]
    )
    chosen = scores.gather(1, indices)
    if sigmoid and k > 1:
        chosen = chosen / chosen.sum(1, keepdim=True)
    elif not sigmoid and not config.moe_router_pre_softmax:
        chosen = chosen.softmax(1)
    chosen = chosen * (config.moe_router_topk_scaling_factor or 1)
    probabilities = scores / scores.sum(1, keepdim=True) if sigmoid else logits.softmax(1)
    return torch.zeros_like(logits).scatter(1, indices, chosen), indices, probabilities, logits


def balance(probabilities, indices, sets, total, kinds, config, last=None):
    """The balancing losses of sets of rows: ``sets`` kind -> list of index tensors; total: tokens of the global batch."""
    k, experts = config.moe_router_topk, config.num_moe_experts
    loss = probabilities.new_zeros(())
    for kind, coefficient in kinds.items():
        for rows in sets[kind]:
            if not len(rows):
                continue
            n = torch.bincount(indices[rows].flatten(), minlength=experts).to(probabilities)
            f = n / (k * len(rows))
            if kind == "global_aux_loss" and last is not None:
                f = last / last.sum()
            loss = loss + coefficient * len(rows) / total * experts * (f * probabilities[rows].mean(0)).sum()
    return loss


def kept(scores, indices, sets, config):
    """Which choices stay under a capacity: bool [t, k], one sequence of rows after another."""
    keep = torch.zeros_like(indices, dtype=torch.bool)
    k, experts = config.moe_router_topk, config.num_moe_experts
    for rows in sets:
        limit = math.ceil(round(len(rows) * k / experts * config.moe_expert_capacity_factor, 9))
        for e in range(experts):
            choices = [(t.item(), j) for t in rows for j in range(k) if indices[t, j] == e]
            if config.moe_token_drop_policy == "probs":
                choices.sort(key=lambda c: -scores[c[0], e].item())
            for t, j in choices[:limit]:
                keep[t, j] = True
    return keep


def experts(x, scores, weights, config):
    """[t, h], scores [t, E] -> [t, h]; weights: gate, up [E, f, h], down [E, h, f] (gate None: no gated unit)."""
    act = getattr(F, config.activation_func)
    out = torch.zeros_like(x)
    for e in range(config.num_moe_experts):
        up = x @ weights["up"][e].T + weights.get("up_bias", torch.zeros(config.num_moe_experts, 1).to(x))[e]
        if weights.get("gate") is not None:
            up = (
                act(
                    x @ weights["gate"][e].T
                    + weights.get("gate_bias", torch.zeros(config.num_moe_experts, 1).to(x))[e]
                )
                * up
            )
        else:
            up = act(up)
        y = (
            up @ weights["down"][e].T
            + weights.get("down_bias", torch.zeros(config.num_moe_experts, 1).to(x))[e]
        )
        out = out + scores[:, e : e + 1] * y
    return out
