"""The interface of a layer, and ``Rows``, which every layer receives beside the activations.

    x [s, b, h], rows -> x [s, b, h]

s is the number of rows that this rank holds; with sequence parallelism, it is this tensor parallel rank's
share of them. A model makes ``Rows`` once in a forward pass and passes them to every layer. Recomputation,
FSDP and the trainer use the attributes and methods of ``Layer`` only, and nothing inside a layer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from longspan.config.model import TransformerConfig
from longspan.context_parallel import PackedSeqParams, SequenceLayout
from longspan.context_parallel.attention import default_layout, place_in_call
from longspan.context_parallel.refusals import check_packed, check_rows
from longspan.context_parallel.runs_of_tokens import runs_of
from longspan.context_parallel.two_layouts import attention_layout
from longspan.expert_parallel.tokens import RoutedTokens, Sequences
from longspan.mesh.mesh import ProcessGroupCollection
from longspan.models.memory.offload import Offload
from longspan.models.rotary import RotaryTable, attention_factor, frequencies, rotary_table
from longspan.tensor_parallel.layers import local


class Rows:
    """The rows of a forward pass on this rank, the same for all layers.

    It is no dataclass: FSDP looks into every field of a dataclass among a layer's arguments, before and after each
    layer, and the layout of a pack has as many pieces as documents.

    Attributes:
        layout: which tokens each context parallel rank holds.
        attention_layout: the same for attention alone; another object than ``layout`` if attention has a layout of
            its own, to which rows are moved.
        rank: this process's number among those ranks.
        rotary: cos and sin of the rows' positions; None without rotary embeddings.
        packed_seq_params: the context parallel group of this call, if it is not the model's group; the
            documents are in ``layout``.
        real: bool [s], one for each row of the activations (with sequence parallelism, for this rank's
            share): False where the row is padding of the layout. None if all rows are tokens.
        routed: the rows as experts see them; None for a model without experts.
    """

    def __init__(
        self,
        layout: SequenceLayout,
        rank: int,
        rotary: RotaryTable | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        real: Tensor | None = None,
        routed: RoutedTokens | None = None,
        attention_layout: SequenceLayout | None = None,
    ):
        self.layout, self.rank = layout, rank
        self.attention_layout = layout if attention_layout is None else attention_layout
        self.rotary, self.packed_seq_params = rotary, packed_seq_params
        self.real, self.routed = real, routed


def make_rows(
    config: TransformerConfig,
    groups: ProcessGroupCollection,
    hidden_states: Tensor,
    packed_seq_params: PackedSeqParams | None = None,
    layout: SequenceLayout | None = None,
    position_ids: Tensor | None = None,
    sequences: Sequences | None = None,
) -> Rows:
    """Rows of activations [s, b, h], for a module that is called in Megatron's way.

    Args:
        layout: None means zigzag, as Megatron's callers expect: of each padded document if
            ``packed_seq_params`` has documents (``thd``), else of the whole sequence.
        position_ids: [s], [1, s] or [b, s]; None takes each row's position in its document from the layout.
        sequences: which sequence each row belongs to, for a model with experts; None takes each column as one.

    Raises:
        ValueError: the activations do not hold this rank's rows of the layout, or the model has recurrent layers
            and the layout is not contiguous.
    """
    count = sequence_rows(config, groups, hidden_states)
    if layout is None:
        batch = hidden_states.shape[1]
        layout, packed_seq_params = layout_of_call(groups.cp, count, batch, packed_seq_params)
    rank, ranks = place_in_call(groups.cp, packed_seq_params)
    check_rows("hidden_states", count, layout, ranks)
    if position_ids is None:
        position_ids = layout.document_positions(rank)
    rotary = _rotary(config, position_ids, hidden_states)
    part, parts = (groups.tp.rank(), groups.tp.size()) if config.sequence_parallel else (0, 1)
    real = _real(layout, rank, part, parts, hidden_states.device)
    routed = None
    if config.num_moe_experts is not None:
        sequences = sequences or sequences_of(layout, rank, hidden_states.shape[1])
        held = hidden_states.shape[0]
        routed = sequences.routed(slice(part * held, (part + 1) * held), hidden_states.device)
    if config.recurrent:
        runs_of(layout)
    of_attention = attention_layout(config, layout)
    return Rows(layout, rank, rotary, packed_seq_params, real, routed, of_attention)


def sequences_of(layout: SequenceLayout, rank: int, batch: int) -> Sequences:
    """The rows of a rank where nothing but the layout is known: each of ``batch`` columns is one sequence."""
    token = layout.positions(rank)
    real = token < layout.total
    bounds = torch.tensor(layout.cu_seqlens)
    documents = len(bounds) - 1
    document = torch.bucketize(token, bounds[1:], right=True)
    column = torch.arange(batch).unsqueeze(1)
    return Sequences(
        torch.where(real, column, -1),
        torch.where(real, column * documents + document, -1),
        token.expand(batch, -1),
        torch.full((batch,), layout.total),
        bounds.diff().repeat(batch),
    )


def sequence_rows(config: TransformerConfig, groups: ProcessGroupCollection, hidden_states: Tensor) -> int:
    """Number of rows in this rank's attention; with sequence parallelism, all tensor parallel ranks' rows."""
    return hidden_states.shape[0] * (groups.tp.size() if config.sequence_parallel else 1)


def layout_of_call(
    cp_group: dist.ProcessGroup, rows: int, batch: int, packed_seq_params: PackedSeqParams | None
) -> tuple[SequenceLayout, PackedSeqParams | None]:
    """The layout of a call without one, and the parameters to pass on beside it, which name the group only.

    Raises:
        ValueError: the parameters do not fit the activations.
    """
    if packed_seq_params is not None and packed_seq_params.qkv_format == "thd" and batch != 1:
        raise ValueError(f"packed documents (thd) come as one row: [t, 1, h], not {rows} rows of {batch}.")
    check_packed(packed_seq_params, batch, None)
    layout = default_layout(cp_group, rows, packed_seq_params)
    return layout, packed_seq_params and packed_seq_params.group_only()


def _rotary(config: TransformerConfig, positions: Tensor, like: Tensor) -> RotaryTable | None:
    if config.position_embedding_type != "rope":
        return None
    freqs = frequencies(config.rotary_channels, config.rotary_base, config.rope_scaling)
    scale = attention_factor(config.rope_scaling)
    return rotary_table(positions, freqs.to(like.device), like.dtype, scale)


def _real(layout: SequenceLayout, rank: int, part: int, parts: int, device: torch.device) -> Tensor | None:
    """bool [rows / parts]: whether each row of part number ``part`` is a token; None if all of them are.

    The layout keeps the result.
    """

    def make() -> Tensor | None:
        count = layout.local_length // parts
        first, last = part * count, (part + 1) * count
        ends = ((s.row, s.row + s.stop - s.start) for s in layout.segments(rank))
        if sum(max(0, min(stop, last) - max(start, first)) for start, stop in ends) == count:
            return None
        real = layout.positions(rank)[first:last] < layout.total
        return real.to(device, non_blocking=True)

    return layout.once(("real", rank, part, parts, device), make)


def refuse_mask(attention_mask: Tensor | None) -> None:
    if attention_mask is not None:
        raise ValueError(
            "attention_mask is not supported: a mask of size s x s is never built. Give packed_seq_params or a "
            "layout with cu_seqlens to keep documents apart."
        )


class Layer(nn.Module):
    """``forward(x [s, b, h], rows) -> x [s, b, h]``. A subclass defines ``compute``, and ``plan`` if needed.

    Attributes:
        number: the layer's number in the whole model, from 1.
        recompute: ``"none"`` keeps everything for backward; ``"full"`` keeps only the layer's input;
            ``"selective"`` keeps the input and the tensors that pass between the layer's parts, so that
            attention and its exchange run once.
        offload: moves the kept tensors to the CPU's memory; None leaves them on the device.
        tiles: the number of runs of tokens that an MLP computes one after another; see ``parts.MLP``.
    """

    tiles: int | None

    def __init__(self, number: int):
        super().__init__()
        self.number, self.recompute = number, "none"
        self.offload: Offload | None = None

    def plan(self, layout: SequenceLayout) -> None:
        """Computes in advance what :meth:`forward` needs of a layout, so that a loader's thread can do it."""

    def compute(self, x: Tensor, rows: Rows, run: Callable[..., Any], memory: dict) -> Tensor:
        """The layer itself.

        Args:
            run: ``run(part, *args)`` returns ``part(*args)``; ``selective`` recomputes this part in backward.
            memory: empty in a first pass; a recomputation of the layer or of a part gets it back. It holds decisions
                that must not be taken a second time.
        """
        raise NotImplementedError

    def forward(self, x: Tensor, rows: Rows) -> Tensor:
        memory: dict = {}
        if not torch.is_grad_enabled():
            return self.compute(x, rows, _run, memory)
        with self._offloading(rows):
            if self.recompute == "full":
                return _recomputed(self.compute, x, rows, _run, memory)
            return self.compute(x, rows, _run if self.recompute == "none" else _recomputed, memory)

    def _offloading(self, rows: Rows) -> contextlib.AbstractContextManager:
        """A context for a forward pass: offloads kept tensors, except weights and the shared rotary table."""
        if self.offload is None:
            return contextlib.nullcontext()
        return self.offload.layer(
            lambda: [*(local(p.detach()) for p in self.parameters()), *(rows.rotary or ())]
        )


def _run(part: Callable[..., Any], *args: Any) -> Any:
    return part(*args)


def _recomputed(part: Callable[..., Any], *args: Any) -> Any:
    # Layers draw no random numbers (there is no dropout), so no state of a generator has to be restored.
    return checkpoint(part, *args, use_reentrant=False, preserve_rng_state=False)
