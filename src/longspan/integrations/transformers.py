"""transformers' models with their sequence cut over ranks: ``attn_implementation="longspan"``.

Importing this module registers the name. A step of training:

    batch (whole, the same on every rank)
      -> shard_batch       this rank's tokens, targets and positions, and the layout
      -> longspan_context  gives the layout and the group to the models called inside
      -> model(**inputs)   this rank's share of the mean loss; the shares add up to the loss
      -> backward          gradients are summed over the group, never averaged

**How the layout reaches attention.** At the start of forward a model gets a mask from its attention
implementation and passes it to every layer. Here it gets a ``Plan`` instead of a matrix: the layout,
which gives each rank's tokens. So the layout is an argument of the call and not a global. Two
models, two layouts with later backwards, threads, and layers that gradient checkpointing runs again
outside the context each have the right one. And no mask of size s x s is ever built.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from longspan.config.model import comm_type_of_layer
from longspan.context_parallel import SequenceLayout, context_parallel_attention
from longspan.context_parallel.refusals import check_comm_type
from longspan.errors import UserError
from longspan.gradients import sum_gradients
from longspan.integrations.batches import ShardedBatch, shard_batch
from longspan.integrations.refusals import check_config

try:
    from transformers import AttentionInterface, AttentionMaskInterface
except ImportError as error:
    raise UserError(
        "longspan.integrations.transformers needs transformers with AttentionInterface and AttentionMaskInterface "
        "(tested with 5.23): pip install 'longspan[hf]'."
    ) from error

__all__ = [
    "ShardedBatch",
    "all_reduce_gradients",
    "longspan_context",
    "shard_batch",
    "sum_fsdp_gradients",
]

NAME = "longspan"


@dataclass(eq=False)
class Setting:
    """The values of a context. ``layout`` None: whole sequences on this rank alone; ``used``: by a model."""

    layout: SequenceLayout | None
    group: dist.ProcessGroup | None = None
    cp_comm_type: str | Sequence[str] = "p2p"
    hierarchical_groups: tuple[dist.ProcessGroup, ...] | None = None
    deterministic: bool = False
    backend: str = "auto"
    used: bool = False


@dataclass(frozen=True, eq=False)
class Plan:
    """Takes the place of the mask, which a model's forward passes to each layer's attention."""

    layout: SequenceLayout
    setting: Setting
    causal: bool
    window: int | None


_current: ContextVar[Setting | None] = ContextVar("longspan_context", default=None)


@contextlib.contextmanager
def longspan_context(
    layout: SequenceLayout | None,
    *,
    group: dist.ProcessGroup | None = None,
    cp_comm_type: str | Sequence[str] = "p2p",
    hierarchical_groups: Sequence[dist.ProcessGroup] | None = None,
    deterministic: bool = False,
    backend: str = "auto",
) -> Iterator[None]:
    """Models called inside, on this thread, take their inputs as this rank's rows of ``layout``.

    Only the forward call has to be inside. Contexts nest: the innermost one counts. Outside of them a
    single process computes whole causal sequences; with several processes a call is refused,
    because cut sequences cannot be distinguished from whole ones.

    Args:
        layout: as returned by ``shard_batch``; None for whole sequences, different ones on each rank.
        group: the ranks over which the sequence is cut; None is this rank alone.
        cp_comm_type: as for ``context_parallel_attention``, or a list that is cycled over the layers.
        hierarchical_groups, deterministic, backend: as for ``context_parallel_attention``.

    Raises:
        ValueError: layout, group and type do not fit each other, or (at the end) no model used the layout.
    """
    ranks = 1 if group is None else dist.get_world_size(group)
    if layout is not None and layout.ranks != ranks:
        raise ValueError(
            f"longspan_context: the layout is made for {layout.ranks} ranks, the group has {ranks}. Give the group that "
            "shard_batch had."
        )
    if layout is None and ranks > 1:
        raise ValueError(
            f"longspan_context: a group of {ranks} ranks without a layout. Give shard_batch's layout, or leave the group "
            "out: then every rank computes whole sequences of its own."
        )
    levels = [dist.get_world_size(g) for g in hierarchical_groups] if hierarchical_groups else None
    for name in [cp_comm_type] if isinstance(cp_comm_type, str) else cp_comm_type:
        check_comm_type(name, ranks, levels)
    groups = tuple(hierarchical_groups) if hierarchical_groups else None
    setting = Setting(layout, group, cp_comm_type, groups, deterministic, backend)
    token = _current.set(setting)
    try:
        yield
    finally:
        _current.reset(token)
    if layout is not None and not setting.used:
        raise ValueError(
            "longspan_context: no model called inside asked for the layout, so attention saw one rank's rows only. Make the "
            "model with attn_implementation='longspan' (or call model.set_attn_implementation('longspan')), and call it inside."
        )


# --- in place of the mask -----------------------------------------------------------------


def plan_instead_of_mask(
    *,
    q_length: int,
    kv_length: int,
    mask_function: Callable,
    config: Any,
    q_offset: int = 0,
    attention_mask: Tensor | None = None,
    # the device, the dtype and others, for a mask that is not built
    **_: Any,
) -> Plan:
    """transformers' mask interface, called once a forward (and kind of layer) with the parts of the mask."""
    setting = _current.get()
    if setting is None:
        if dist.is_initialized() and dist.get_world_size() > 1:
            raise ValueError(
                f"attn_implementation 'longspan' among {dist.get_world_size()} processes and outside a context: are these "
                "whole sequences or parts of one? Call the model inside `with longspan_context(layout, group=group):`, or "
                "inside `with longspan_context(None):` where every rank has whole sequences."
            )
        setting = Setting(None)
    setting.used = True
    if kv_length != q_length or int(q_offset) != 0:
        raise ValueError(
            f"{q_length} tokens with a key/value cache for {kv_length}: attn_implementation 'longspan' is for training and "
            "keeps no cache. To generate, call model.set_attn_implementation('sdpa') first, and pass use_cache=False to train."
        )
    if attention_mask is not None and not bool(attention_mask.all()):
        raise ValueError(
            f"attention_mask hides {int((~attention_mask.bool()).sum())} tokens: attention here takes no mask. Give the whole "
            "batch, mask included, to shard_batch, which turns right padding into documents, and its inputs to the model."
        )
    kinds = mask_kinds(mask_function)
    layout = setting.layout
    if layout is None:
        layout = _whole(q_length)
    elif layout.local_length != q_length:
        raise ValueError(
            f"the model got {q_length} tokens a row, the layout of the context holds {layout.local_length} a rank "
            f"({layout.total} tokens over {layout.ranks}). Give the model the inputs that shard_batch returned with it."
        )
    if "packed" in kinds and layout.ranks == 1 and len(layout.cu_seqlens) == 2:
        raise ValueError(
            "position_ids start anew inside a row, as packed documents' do, and nothing else says where documents end. Call "
            "shard_batch (it reads them) and the model inside its layout's context."
        )
    check_config(config, layout)
    causal, window = "causal" in kinds, kinds.get("window")
    return Plan(layout, setting, causal, window)


@lru_cache(maxsize=64)
def _whole(total: int) -> SequenceLayout:
    """The layout of whole sequences, cached by length, so that all layers and steps share one schedule."""
    return SequenceLayout.contiguous(total, 1)


def mask_kinds(function: Callable) -> dict[str, int | None]:
    """The parts of transformers' mask function: ``causal`` or ``full``, ``window`` with its size, ``packed``.

    transformers composes masks from closures, which are recognised by their names.

    Raises:
        ValueError: a part is none of these (chunks, images, a function of the caller).
    """
    name = getattr(function, "__qualname__", repr(function)).replace(".<locals>", "")
    inside = inspect.getclosurevars(function).nonlocals if inspect.isfunction(function) else {}
    if name == "causal_mask_function":
        return {"causal": None}
    if name == "bidirectional_mask_function":
        return {"full": None}
    if name == "sliding_window_overlay.inner_mask":
        return {"window": int(inside["sliding_window"])}
    if name == "packed_sequence_mask_function.inner_mask":
        return {"packed": None}
    if name == "remap_positions_for_packed_sequence.inner_mask":
        return mask_kinds(inside["mask_function"])
    if name == "and_masks.and_mask":
        parts = [mask_kinds(part) for part in inside["mask_functions"]]
        return {kind: value for part in parts for kind, value in part.items()}
    raise ValueError(
        f"this model masks attention by {name.split('.')[0]}, which attn_implementation 'longspan' does not know: it serves "
        "causal, full and causal sliding-window attention, documents kept apart. Use attn_implementation='sdpa' without "
        "cutting the sequence."
    )


# --- attention ----------------------------------------------------------------------------

#: keyword arguments that models pass on from their call, without a meaning for attention
TRAVELLERS = {
    "position_ids",
    "position_embeddings",
    "cache_position",
    "num_items_in_batch",
    "shift_labels",
    "output_hidden_states",
    "return_dict",
}


def longspan_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Plan | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """transformers' attention: query [b, n, s, d], key and value [b, m, s, d] -> out [b, s, n, d], None.

    ``s_aux`` [n] are attention sinks.
    """
    plan = attention_mask
    if not isinstance(plan, Plan):
        found = "no mask" if plan is None else f"a mask of shape {tuple(plan.shape)}"
        raise ValueError(
            f"{type(module).__name__} calls attention with {found} where the layout belongs: attn_implementation 'longspan' "
            "needs a model that makes its mask with transformers' create_causal_mask, and no mask from the caller. Leave "
            "attention_mask to shard_batch, or use another attn_implementation for this module."
        )
    is_causal = getattr(module, "is_causal", None) if is_causal is None else is_causal
    _check_call(plan, dropout, sliding_window, is_causal, others)
    out, _ = context_parallel_attention(
        *(x.permute(2, 0, 1, 3) for x in (query, key, value)),
        group=plan.setting.group,
        layout=plan.layout,
        causal=plan.causal,
        window=plan.window,
        softmax_scale=scaling,
        sinks=s_aux,
        cp_comm_type=comm_type_of_layer(plan.setting.cp_comm_type, getattr(module, "layer_idx", 0) + 1),
        deterministic=plan.setting.deterministic,
        hierarchical_groups=plan.setting.hierarchical_groups,
        backend=plan.setting.backend,
    )
    return out.transpose(0, 1), None


def _check_call(
    plan: Plan, dropout: float, sliding_window: int | None, is_causal: bool | None, others: dict[str, Any]
) -> None:
    """Refuses arguments that would be ignored."""
    if dropout:
        raise ValueError(
            f"attention dropout {dropout} is not supported: its pattern would depend on the layout. Set attention_dropout "
            "to 0 in the model's config."
        )
    if sliding_window is not None and sliding_window != plan.window:
        raise ValueError(
            f"a layer asks for sliding_window={sliding_window}, its mask for {plan.window}: this model makes its masks in a "
            "way that attn_implementation 'longspan' does not know."
        )
    if is_causal is not None and is_causal != plan.causal:
        raise ValueError(
            f"a layer asks for is_causal={is_causal}, its mask is {'causal' if plan.causal else 'full'}: this model makes "
            "its masks in a way that attn_implementation 'longspan' does not know."
        )
    if others.pop("use_cache", False) and plan.layout.ranks > 1:
        raise ValueError(
            "use_cache=True while the sequence is cut over ranks: each rank would keep a part. Pass use_cache=False, as "
            "shard_batch's inputs do."
        )
    for name, value in others.items():
        if name not in TRAVELLERS and value is not None and value is not False:
            raise ValueError(
                f"attention was called with {name}, which attn_implementation 'longspan' does not serve (no soft cap, "
                "no biases, no head masks, no attention weights to return). Leave it out, or use another "
                "attn_implementation."
            )


# --- gradients ----------------------------------------------------------------------------


def all_reduce_gradients(model: nn.Module, group: dist.ProcessGroup) -> None:
    """Sums the gradients over the ranks, in at least float32; call it after backward without FSDP and DDP.

    A parameter with a gradient on some ranks only (an expert without tokens) counts as zero on the others.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    if any(isinstance(p, DTensor) for p in parameters):
        raise ValueError(
            "all_reduce_gradients: the parameters are sharded, and FSDP has reduced their gradients already. Call "
            "sum_fsdp_gradients(model) once after fully_shard instead."
        )
    sum_gradients(parameters, group)


def sum_fsdp_gradients(model: nn.Module) -> None:
    """Makes FSDP2 sum gradients instead of averaging them: call once, after ``fully_shard``.

    Each rank's loss is already its share of the mean, which an average would divide once more.
    """
    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    if not sharded:
        raise ValueError(
            "sum_fsdp_gradients: no module of this model is under fully_shard. Call fully_shard first."
        )
    for module in sharded:
        module.set_gradient_divide_factor(1.0)
        # Otherwise FSDP2 requests an average, which gloo does not have.
        module.set_force_sum_reduction_for_comms(True)


AttentionInterface.register(NAME, longspan_attention)
AttentionMaskInterface.register(NAME, plan_instead_of_mask)
