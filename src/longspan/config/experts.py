"""The rules of a mixture of experts: its sizes, its router, what balances it, and what it drops; and one line about it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from longspan.errors import Problem, did_you_mean

if TYPE_CHECKING:
    from longspan.config.architecture import Architecture
    from longspan.config.sizes import MeshSizes

#: the kinds of balancing losses
BALANCING = ("aux_loss", "seq_aux_loss", "global_aux_loss", "none")
SCORE_FUNCTIONS = ("softmax", "sigmoid")
DROP_POLICIES = ("probs", "position")
#: how rows travel to the ranks of their experts
DISPATCHERS = ("alltoall", "allgather")

#: fields that have an effect only with experts -> their value without
ONLY_WITH_EXPERTS: dict[str, Any] = {
    "moe_ffn_hidden_size": None,
    "moe_layer_freq": 1,
    "moe_shared_expert_intermediate_size": None,
    "moe_shared_expert_gate": False,
    "moe_router_bias": False,
    "moe_router_enable_expert_bias": False,
    "moe_router_num_groups": None,
    "moe_router_group_topk": None,
    "moe_router_topk_scaling_factor": None,
    "moe_expert_capacity_factor": None,
    "moe_pad_expert_input_to_capacity": False,
    "moe_z_loss_coeff": None,
    "moe_aux_loss_coeff": 0.0,
    "moe_router_topk": 2,
    "moe_router_score_function": "softmax",
    "moe_router_pre_softmax": False,
    "moe_router_load_balancing_type": "aux_loss",
    "moe_router_bias_update_rate": 1e-3,
    "moe_token_drop_policy": "probs",
}


def expert_problems(model: Architecture) -> list[Problem]:
    """All broken rules of a model's experts, as (fields involved, message)."""
    if model.num_moe_experts is None:
        return [
            ((name, "num_moe_experts"), f"{name} {getattr(model, name)} has no effect without num_moe_experts. Set it, or leave {name} out.")
            for name, off in ONLY_WITH_EXPERTS.items()
            if getattr(model, name) != off
        ]  # fmt: skip
    found = list(_sizes(model))
    return found or [*_router(model), *_balancing(model), *_capacity(model)]


def _sizes(model: Architecture) -> Iterator[Problem]:
    experts, topk = model.num_moe_experts, model.moe_router_topk
    assert experts is not None
    for name in ("num_moe_experts", "moe_ffn_hidden_size", "moe_router_topk"):
        if getattr(model, name) < 1:
            yield (name,), f"{name} {getattr(model, name)}: it is at least 1."
    shared = model.moe_shared_expert_intermediate_size
    if shared is not None and shared < 1:
        yield (
            ("moe_shared_expert_intermediate_size",),
            f"moe_shared_expert_intermediate_size {shared}: a size is at least 1. Leave it out for no shared expert.",
        )
    if model.moe_shared_expert_gate and shared is None:
        yield (
            ("moe_shared_expert_gate", "moe_shared_expert_intermediate_size"),
            "moe_shared_expert_gate has no effect without moe_shared_expert_intermediate_size. Set it, or leave the gate out.",
        )
    if topk > experts:
        yield (
            ("moe_router_topk", "num_moe_experts"),
            f"moe_router_topk {topk} is more than num_moe_experts {experts}: a token chooses different experts. Use {experts} or fewer.",
        )
    pattern = model.moe_layer_freq
    if isinstance(pattern, int):
        if pattern < 1:
            yield (
                ("moe_layer_freq",),
                f"moe_layer_freq {pattern}: experts in every n-th layer, n from 1 on; or a list of 0 and 1.",
            )
    elif not pattern or set(pattern) - {0, 1}:
        yield (
            ("moe_layer_freq",),
            f"moe_layer_freq {pattern}: a list of 1 (experts) and 0 (a dense MLP), cycled over the layers.",
        )
    elif not model.expert_layers:
        yield (
            ("moe_layer_freq", "num_moe_experts"),
            f"moe_layer_freq {pattern}: no layer has experts. Put a 1 in it, or leave num_moe_experts out.",
        )


def _router(model: Architecture) -> Iterator[Problem]:
    experts, topk, function = model.num_moe_experts, model.moe_router_topk, model.moe_router_score_function
    assert experts is not None
    if function not in SCORE_FUNCTIONS:
        yield (
            ("moe_router_score_function",),
            f"moe_router_score_function {function!r}: one of {', '.join(SCORE_FUNCTIONS)}.{did_you_mean(str(function), SCORE_FUNCTIONS)}",
        )
    if function == "sigmoid" and model.moe_router_pre_softmax:
        yield (
            ("moe_router_pre_softmax", "moe_router_score_function"),
            "moe_router_pre_softmax has no effect with moe_router_score_function sigmoid. Leave one of them out.",
        )
    if function == "softmax" and topk == 1 and not model.moe_router_pre_softmax:
        yield (
            ("moe_router_topk", "moe_router_pre_softmax"),
            "moe_router_topk 1 with softmax over the chosen experts: the score is always 1, so the router learns nothing. Set moe_router_pre_softmax: true, or use moe_router_score_function: sigmoid.",
        )
    if model.moe_router_enable_expert_bias and function != "sigmoid":
        yield (
            ("moe_router_enable_expert_bias", "moe_router_score_function"),
            "moe_router_enable_expert_bias needs moe_router_score_function: sigmoid: a bias on logits would act by their scale. Set it, or balance with moe_aux_loss_coeff.",
        )
    groups, best = model.moe_router_num_groups, model.moe_router_group_topk
    fields = ("moe_router_num_groups", "moe_router_group_topk", "moe_router_topk", "num_moe_experts")
    if (groups is None) != (best is None):
        yield (
            fields[:2],
            f"moe_router_num_groups {groups} and moe_router_group_topk {best} go together: experts are in groups, and a token chooses in the best of them. Give both, or none.",
        )
    elif groups is not None and best is not None:
        if groups < 1 or experts % groups:
            yield (
                (fields[0], fields[3]),
                f"num_moe_experts {experts} is not divisible by moe_router_num_groups {groups}: groups have equally many experts.",
            )
        elif not 1 <= best <= groups:
            yield fields[:2], f"moe_router_group_topk {best}: from 1 to moe_router_num_groups {groups}."
        elif topk > best * (experts // groups):
            yield (
                fields,
                f"moe_router_topk {topk} is more than the {best * (experts // groups)} experts of the {best} chosen groups. Choose more groups (moe_router_group_topk), or fewer experts.",
            )
        elif topk % best:
            yield (
                fields[1:3],
                f"moe_router_topk {topk} is not divisible by moe_router_group_topk {best}: a group's score is the sum of its topk / group_topk best experts.",
            )
    scale = model.moe_router_topk_scaling_factor
    if scale is not None and not (math.isfinite(scale) and scale > 0):
        yield (
            ("moe_router_topk_scaling_factor",),
            f"moe_router_topk_scaling_factor {scale}: a number above 0.",
        )


def _balancing(model: Architecture) -> Iterator[Problem]:
    kinds, coefficients = model.moe_router_load_balancing_type, model.moe_aux_loss_coeff
    names = [kinds] if isinstance(kinds, str) else list(kinds)
    fields = ("moe_router_load_balancing_type", "moe_aux_loss_coeff")
    for name in names:
        if name not in BALANCING:
            yield (
                fields[:1],
                f"moe_router_load_balancing_type {name!r}: one of {', '.join(BALANCING)}, or a list of them.{did_you_mean(str(name), BALANCING)}",
            )
    if len(set(names)) < len(names) or ("none" in names and len(names) > 1) or not names:
        yield fields[:1], f"moe_router_load_balancing_type {names}: each kind once, and none alone."
    values = coefficients if isinstance(coefficients, list | tuple) else [coefficients]
    if isinstance(coefficients, list | tuple) and len(values) != len(names):
        yield (
            fields,
            f"moe_router_load_balancing_type has {len(names)} kinds and moe_aux_loss_coeff {len(values)} numbers. Give one for each, in the same order.",
        )
    if (
        not isinstance(kinds, str)
        and len(names) > 1
        and not isinstance(coefficients, list | tuple)
        and coefficients
    ):
        yield (
            fields,
            f"moe_aux_loss_coeff {coefficients} with {len(names)} kinds of moe_router_load_balancing_type: give a list with a number for each.",
        )
    for field, each in (
        *(("moe_aux_loss_coeff", v) for v in values),
        ("moe_z_loss_coeff", model.moe_z_loss_coeff or 0.0),
    ):
        if not (math.isfinite(each) and each >= 0):
            yield (field,), f"{field} {each}: a number from 0 on."
    if names == ["none"] and any(values):
        yield (
            fields,
            f"moe_aux_loss_coeff {coefficients} has no effect with moe_router_load_balancing_type none. Set moe_aux_loss_coeff: 0, or leave the type out.",
        )
    for name, value in zip(names, values if len(values) == len(names) else values * len(names)):
        if name in ("seq_aux_loss", "global_aux_loss") and not value:
            yield (
                fields,
                f"moe_router_load_balancing_type {name} has no effect with moe_aux_loss_coeff 0. Give a coefficient such as 0.01, or leave the type out.",
            )
    rate = model.moe_router_bias_update_rate
    if rate != 1e-3 and not model.moe_router_enable_expert_bias:
        yield (
            ("moe_router_bias_update_rate", "moe_router_enable_expert_bias"),
            f"moe_router_bias_update_rate {rate} has no effect without moe_router_enable_expert_bias. Set it, or leave the rate out.",
        )
    if not (math.isfinite(rate) and rate >= 0):
        yield ("moe_router_bias_update_rate",), f"moe_router_bias_update_rate {rate}: a number from 0 on."


def _capacity(model: Architecture) -> Iterator[Problem]:
    factor, policy = model.moe_expert_capacity_factor, model.moe_token_drop_policy
    if factor is not None and not (math.isfinite(factor) and factor > 0):
        yield (
            ("moe_expert_capacity_factor",),
            f"moe_expert_capacity_factor {factor}: a number above 0, 1.0 for an even load. Leave it out, and no token is dropped.",
        )
    if model.moe_pad_expert_input_to_capacity and factor is None:
        yield (
            ("moe_pad_expert_input_to_capacity", "moe_expert_capacity_factor"),
            "moe_pad_expert_input_to_capacity needs moe_expert_capacity_factor, which says how far to pad. Give it, or leave the padding out.",
        )
    if policy != "probs" and factor is None:
        yield (
            ("moe_token_drop_policy", "moe_expert_capacity_factor"),
            f"moe_token_drop_policy {policy} has no effect without moe_expert_capacity_factor: nothing is dropped. Give it, or leave the policy out.",
        )
    if policy not in DROP_POLICIES:
        yield (
            ("moe_token_drop_policy",),
            f"moe_token_drop_policy {policy!r}: one of {', '.join(DROP_POLICIES)}.{did_you_mean(str(policy), DROP_POLICIES)}",
        )


def expert_grid_problems(world: int, etp: int, ep: int, pp: int, dp_replicate: int) -> list[Problem]:
    """Broken rules of the grid of experts, which lies over the same ``world`` processes as the dense one."""
    grid = f"etp {etp} x ep {ep} x pp {pp}"
    keys = ("expert_parallel_size", "expert_tensor_parallel_size")
    if world % (etp * ep * pp):
        text = (
            f"the grid of experts: {grid} = {etp * ep * pp} does not divide the {world} processes (etp is tensor_parallel_size where "
            "expert_tensor_parallel_size is not given). Choose smaller sizes, or more processes (dp_shard_size, context_parallel_size)."
        )
        return [(keys, text)]
    edp = world // (etp * ep * pp)
    if edp % dp_replicate:
        text = (
            f"the grid of experts: {grid} leaves {edp} of {world} processes with the same experts, which do not divide by "
            f"dp_replicate_size {dp_replicate}: each copy of the model has all experts. Choose a smaller expert_parallel_size or "
            "dp_replicate_size."
        )
        return [((*keys, "dp_replicate_size"), text)]
    return []


def expert_cut_problems(model: Architecture, tp: int, ep: int, etp: int, dispatcher: str) -> list[Problem]:
    """Broken rules of how experts are cut over ``ep`` expert parallel and ``etp`` expert tensor parallel ranks."""
    experts = model.num_moe_experts
    found: list[Problem] = []
    if dispatcher not in DISPATCHERS:
        text = f"moe_token_dispatcher_type {dispatcher!r}: one of {', '.join(DISPATCHERS)}.{did_you_mean(str(dispatcher), DISPATCHERS)}"
        found.append((("moe_token_dispatcher_type",), text))
    if experts is None:
        return found
    if experts % ep:
        text = f"num_moe_experts {experts} is not divisible by expert_parallel_size {ep}: every rank holds the same number of experts."
        found.append((("num_moe_experts", "expert_parallel_size"), text))
    shared = model.moe_shared_expert_intermediate_size
    if shared is not None and shared % tp:
        text = f"moe_shared_expert_intermediate_size {shared} is not divisible by tensor_parallel_size {tp}: choose a multiple."
        found.append((("moe_shared_expert_intermediate_size", "tensor_parallel_size"), text))
    if model.moe_ffn_hidden_size % etp:
        text = (
            f"moe_ffn_hidden_size {model.moe_ffn_hidden_size} is not divisible by expert_tensor_parallel_size {etp}: choose a "
            "multiple, or expert_tensor_parallel_size 1."
        )
        found.append((("moe_ffn_hidden_size", "expert_tensor_parallel_size"), text))
    return found


def experts_line(model: Architecture, sizes: MeshSizes, imported: bool) -> str:
    """The experts, the grid they lie on, and what keeps their load even, for the banner.

    Args:
        imported: the model is a Hugging Face one, whose coefficient has another meaning.
    """
    etp = sizes.etp or sizes.tp
    edp = sizes.world_size // (etp * sizes.ep * sizes.pp)
    layers = len(model.expert_layers)
    where = "all layers" if layers == model.num_layers else f"{layers} of {model.num_layers} layers"
    line = (
        f"{model.num_moe_experts} in {where}, {model.moe_router_topk} a token; on the same {sizes.world_size} processes as a "
        f"grid of their own: etp {etp} x ep {sizes.ep} x edp {edp} x pp {sizes.pp} = {sizes.world_size}"
    )
    losses = [f"{kind} {value:g}" for kind, value in model.balancing.items()]
    if imported and losses:
        pooled = sum(model.balancing.values()) * layers / model.moe_router_topk
        losses[-1] += f" a layer (router_aux_loss_coef {pooled:g} in Hugging Face's sum over layers)"
    losses += [f"z-loss {model.moe_z_loss_coeff:g}"] if model.moe_z_loss_coeff else []
    losses += ["expert bias"] if model.moe_router_enable_expert_bias else []
    factor = model.moe_expert_capacity_factor
    return f"{line}; balanced by {', '.join(losses) or 'nothing'}; " + (
        "no token is dropped" if factor is None else f"capacity factor {factor:g}"
    )
