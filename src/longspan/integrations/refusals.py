"""Refuses models of transformers that cannot run on parts of a sequence, by their config.

longspan cuts attention only. A layer that mixes tokens in another way (a convolution, a recurrence) would
see one rank's rows only, and give wrong results without an error.
"""

from __future__ import annotations

from typing import Any

from longspan.config.families.any_type import LAYER_TYPES
from longspan.context_parallel import SequenceLayout


def check_config(config: Any, layout: SequenceLayout) -> None:
    """Refuses models that would give wrong results with this layout.

    Raises:
        ValueError: the model has other layers that mix tokens, cross-attention, attention weights as outputs,
            a loss over the routes of all tokens, or rotary angles that depend on a rank's largest position.
    """
    kind = type(config).__name__
    if getattr(config, "is_encoder_decoder", False) or getattr(config, "add_cross_attention", False):
        raise ValueError(f"{kind} has cross-attention, which attn_implementation 'longspan' does not serve.")
    if getattr(config, "output_attentions", False):
        raise ValueError(
            "config.output_attentions is set: attention weights are never built here. Set it to False."
        )
    if layout.ranks == 1 and len(layout.cu_seqlens) == 2:
        return
    others = sorted({*(getattr(config, "layer_types", None) or ())} - LAYER_TYPES)
    if others:
        raise ValueError(
            f"{kind} has layers of type {', '.join(others)}: they mix tokens outside attention, and would see one rank's rows (and the documents of a "
            "pack as one). Only models whose tokens meet in full or sliding-window attention can be cut."
        )
    if layout.ranks == 1:
        return
    if getattr(config, "output_router_logits", False):
        raise ValueError(
            f"{kind} has output_router_logits set: its balancing loss is made of all tokens' routes, and one rank's are not "
            "a share of it. Set it to False while the sequence is cut."
        )
    _check_rotary(config, layout)


def _check_rotary(config: Any, layout: SequenceLayout) -> None:
    """Refuses ``dynamic`` and ``longrope`` angles: they depend on a call's largest position; ranks differ."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    sets: list[dict[str, Any]] = [one for one in rope.values() if isinstance(one, dict)] or [rope]
    # There is one set for each kind of layer, or one for all.
    for one in sets:
        name = str(one.get("rope_type", one.get("type", "default")))
        if "dynamic" in name:
            limit = config.max_position_embeddings
        elif name == "longrope":
            limit = one.get("original_max_position_embeddings") or config.max_position_embeddings
        else:
            continue
        if layout.longest_document > limit:
            raise ValueError(
                f"rope_type {name!r} with a document of {layout.longest_document} tokens, more than {limit}: its angles "
                "follow the largest position a rank holds, so ranks would disagree. Use a fixed type (linear, yarn, "
                f"llama3), or documents of at most {limit} tokens."
            )
