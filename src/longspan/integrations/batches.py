"""From a collator's batch to this rank's part, for transformers' models.

    input_ids, labels [b, s]  ->  targets shifted by one to the left, while the sequence is whole
                              ->  padding removed and documents put one after another, if there are any
                              ->  this rank's rows by a layout

Every rank passes the same whole batch. Each rank's loss is its sum over the global number of targets, so the
shares add up to the mean that one process would compute, even if a rank has no target (its share is 0 then).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from longspan.config.model import IGNORE_INDEX
from longspan.context_parallel import SequenceLayout
from longspan.errors import did_you_mean
from longspan.integrations.refusals import check_config

#: the entries that a batch may have; those of the second line repeat the boundaries or the positions
KEYS = (
    "input_ids",
    "labels",
    "shift_labels",
    "position_ids",
    "attention_mask",
    "cu_seqlens",
    "cu_seq_lens_q",
)
SAME = ("cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


@dataclass(frozen=True)
class ShardedBatch:
    """One rank's part of a batch.

    Attributes:
        inputs: for ``model(**inputs)``: input_ids and position_ids [b, rows] (a pack is [1, rows]),
            ``use_cache`` False, and with labels: ``shift_labels`` [b, rows], ``num_items_in_batch``, and
            ``labels`` [b, 0]. The empty ``labels`` only request a loss: transformers' loss reads
            ``shift_labels``, and a loss that would shift ``labels`` once more fails.
        layout: for ``longspan_context``. ``layout.unshard(logits, group, dim=1)`` joins the ranks' logits.
        num_targets: number of targets of the whole batch that are not ignored.
    """

    inputs: dict[str, Any]
    layout: SequenceLayout
    num_targets: int


def shard_batch(
    batch: Mapping[str, Any],
    *,
    group: dist.ProcessGroup | None = None,
    config: Any = None,
    layout: str = "auto",
    num_items_in_batch: int | Tensor | None = None,
) -> ShardedBatch:
    """This rank's rows of a batch.

    Args:
        batch: ``input_ids`` [b, s] and, each optional: ``labels`` [b, s], not shifted, as for transformers
            (or ``shift_labels``, shifted); ``attention_mask`` [b, s] of right padding; ``position_ids`` [b,
            s] or [1, s], which restart with each document; ``cu_seqlens`` (or ``cu_seq_lens_q``), the
            boundaries of the documents in all rows one after another. The last token of a document has no
            target.
        group: the ranks over which to cut; None is this rank alone.
        config: the model's config. The layout uses its sliding windows to balance the work, and a model that
            cannot be cut is refused.
        layout: ``auto`` (zigzag, or balanced for packs), or a name of ``SequenceLayout.make``.
        num_items_in_batch: the divisor of the loss; None is this batch's own number of targets. Pass the
            total if a step has several batches (gradient accumulation, data parallelism).

    Raises:
        ValueError: a key, a shape, padding or boundaries that are not supported.
    """
    _check_keys(batch)
    tokens: Tensor = batch["input_ids"]
    if tokens.dim() != 2 or not tokens.numel():
        raise ValueError(f"input_ids has shape {tuple(tokens.shape)}: a batch is [b, s], and not empty.")
    for name in ("labels", "shift_labels", "attention_mask"):
        given = batch.get(name)
        if given is not None and given.shape != tokens.shape:
            raise ValueError(
                f"{name} has shape {tuple(given.shape)}, input_ids {tuple(tokens.shape)}: they must be alike. A mask of "
                "size s x s is never built; right padding is what attention_mask can say."
            )
    positions = _positions(batch, tokens)
    keep = _real_tokens(batch)
    starts = _document_starts(batch, tokens, positions, keep)
    targets = _targets(batch, starts, keep)
    cu_seqlens = None
    # The rows become one pack, because its documents are kept apart.
    if keep is not None or bool(starts[:, 1:].any()):
        real = torch.ones_like(starts) if keep is None else keep
        tokens = tokens[real].unsqueeze(0)
        targets = None if targets is None else targets[real].unsqueeze(0)
        positions = None if positions is None else positions[real].unsqueeze(0)
        cu_seqlens = (*starts[real].nonzero().flatten().tolist(), tokens.shape[1])
    ranks = 1 if group is None else dist.get_world_size(group)
    rank = 0 if group is None else dist.get_rank(group)
    made = _make_layout(layout, tokens.shape[1], ranks, cu_seqlens, _windows(config))
    if config is not None:
        check_config(config, made)
    if positions is None:
        rows = made.document_positions(rank).to(tokens.device).expand(tokens.shape[0], -1)
    else:
        rows = made.shard(positions, rank, dim=1)
    inputs: dict[str, Any] = {
        "input_ids": made.shard(tokens, rank, dim=1),
        "position_ids": rows,
        "use_cache": False,
    }
    if targets is None:
        return ShardedBatch(inputs, made, 0)
    num_targets = int((targets != IGNORE_INDEX).sum())
    total = num_targets if num_items_in_batch is None else num_items_in_batch
    inputs["shift_labels"] = made.shard(targets, rank, dim=1, pad_value=IGNORE_INDEX)
    inputs["labels"] = inputs["shift_labels"][:, :0]
    inputs["num_items_in_batch"] = torch.as_tensor(total, device=tokens.device).clamp(min=1)
    return ShardedBatch(inputs, made, num_targets)


def _check_keys(batch: Mapping[str, Any]) -> None:
    if batch.get("input_ids") is None:
        raise ValueError("shard_batch: the batch has no input_ids. Embeddings cannot be cut here.")
    for name, value in batch.items():
        if value is not None and name not in KEYS + SAME:
            raise ValueError(
                f"shard_batch: the batch holds {name!r}, which is not known: it takes {', '.join(KEYS)}.{did_you_mean(name, KEYS)} "
                "Take it out, or cut it yourself with layout.shard(tensor, rank, dim)."
            )
    for pair in (("labels", "shift_labels"), ("cu_seqlens", "cu_seq_lens_q")):
        if all(batch.get(name) is not None for name in pair):
            raise ValueError(f"shard_batch: the batch holds both {pair[0]} and {pair[1]}. Give one of them.")


def _positions(batch: Mapping[str, Any], tokens: Tensor) -> Tensor | None:
    """The caller's position_ids as [b, s]."""
    given = batch.get("position_ids")
    if given is None:
        return None
    if given.dim() != 2 or given.shape[1] != tokens.shape[1] or given.shape[0] not in (1, tokens.shape[0]):
        raise ValueError(
            f"position_ids has shape {tuple(given.shape)}, input_ids {tuple(tokens.shape)}: it is [b, s] or [1, s]. Positions "
            "of several axes (images) are not supported."
        )
    return given.expand(tokens.shape)


def _real_tokens(batch: Mapping[str, Any]) -> Tensor | None:
    """Whether attention_mask is 1, bool [b, s]; None if it hides nothing."""
    mask = batch.get("attention_mask")
    if mask is None or bool((mask == 1).all()):
        return None
    if bool(((mask != 0) & (mask != 1)).any()) or bool((mask[:, 1:] > mask[:, :-1]).any()):
        raise ValueError(
            "attention_mask is more than right padding (ones, then zeros). Pad on the right (tokenizer.padding_side = "
            "'right'); say where documents end with position_ids or cu_seqlens."
        )
    keep = mask == 1
    if not bool(keep.any()):
        raise ValueError("attention_mask hides every token of the batch. Drop such a batch on all ranks.")
    return keep


def _document_starts(
    batch: Mapping[str, Any], tokens: Tensor, positions: Tensor | None, keep: Tensor | None
) -> Tensor:
    """Whether a token is the first of its document, bool [b, s]: by rows, positions and boundaries."""
    starts = torch.zeros_like(tokens, dtype=torch.bool)
    starts[:, 0] = True
    jumps = starts.clone()
    if positions is not None:
        jumps[:, 1:] = positions[:, 1:] != positions[:, :-1] + 1
        if keep is not None:
            jumps &= keep
    cu = batch.get("cu_seqlens")
    cu = batch.get("cu_seq_lens_q") if cu is None else cu
    if cu is None:
        return jumps
    if keep is not None:
        raise ValueError(
            "cu_seqlens beside an attention_mask with padding: both say where documents end. Give one of them."
        )
    edges = [int(x) for x in (cu.flatten().tolist() if isinstance(cu, Tensor) else cu)]
    if len(edges) < 2 or edges[0] != 0 or edges[-1] != tokens.numel() or sorted(edges) != edges:
        raise ValueError(
            f"cu_seqlens {edges[:8]} for a batch of {tokens.numel()} tokens: it starts with 0, does not fall and ends with "
            "the number of tokens of all rows put one after another."
        )
    named = torch.zeros_like(starts).flatten()
    named[[edge for edge in edges[:-1] if edge < tokens.numel()]] = True
    named = named.view_as(starts)
    if not bool(named[:, 0].all()) or bool((jumps & ~named).any()):
        raise ValueError(
            "cu_seqlens misses a place where a row begins or where position_ids start anew. Name every document's first token."
        )
    return named


def _targets(batch: Mapping[str, Any], starts: Tensor, keep: Tensor | None) -> Tensor | None:
    """The token that each token must predict, [b, s]; IGNORE_INDEX for none."""
    labels = batch.get("labels")
    source = batch.get("shift_labels") if labels is None else labels
    if source is None:
        return None
    if keep is not None and bool((source.masked_fill(keep, IGNORE_INDEX) != IGNORE_INDEX).any()):
        raise ValueError(
            f"labels are set on tokens that attention_mask hides. Set labels of padding to {IGNORE_INDEX}."
        )
    if labels is None:
        return source
    # The first token of a document is never a target.
    own = labels.masked_fill(starts, IGNORE_INDEX)
    return torch.nn.functional.pad(own[:, 1:], (0, 1), value=IGNORE_INDEX)


def _windows(config: Any) -> tuple[int | None, ...]:
    """The sliding window of each layer, as layouts take it."""
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if window is None or not kinds:
        return (window,)
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _make_layout(
    name: str, total: int, ranks: int, cu_seqlens: tuple[int, ...] | None, windows: tuple[int | None, ...]
) -> SequenceLayout:
    if cu_seqlens is None:
        return _plain(name, total, ranks, windows)
    return SequenceLayout.make(name, total, ranks, cu_seqlens=cu_seqlens, windows=windows)


@lru_cache(maxsize=16)
def _plain(name: str, total: int, ranks: int, windows: tuple[int | None, ...]) -> SequenceLayout:
    """The layout of batches without documents, cached by size, so that all steps share one schedule."""
    return SequenceLayout.make(name, total, ranks, windows=windows)
