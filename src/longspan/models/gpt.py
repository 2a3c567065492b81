"""A decoder-only transformer: attention, MLP, layer, block, model.

    input_ids [b, s] -> embedding [s, b, h] -> layers -> norm -> logits [b, s, v] or loss [b, s]

s is this rank's rows of the sequence, which ``layout`` says the places of; with sequence
parallelism activations between the layers are [s/tp, b, h]. The model asks tensors for
their sizes and contains no collective: linear layers bring their mappings, attention its
exchange. What travels beside the activations: the layout (or Megatron's packed_seq_params),
and the rotary table made from it once a forward pass.

Pre-norm, RMSNorm or LayerNorm, rotary or learned positions or none, gated or plain MLP, grouped
key/value heads, normalised heads, biases of all linear layers or of query, key and value, tied or
untied embeddings: Llama, Mistral, Qwen2 and 3, and GPT-2, with Megatron's names.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from longspan.compiled import Compilable
from longspan.config.model import AttnMaskType, TransformerConfig, unsupported
from longspan.context_parallel import DotProductAttention, PackedSeqParams, SequenceLayout
from longspan.context_parallel.refusals import check_packed
from longspan.mesh.default_groups import process_groups
from longspan.mesh.mesh import ProcessGroupCollection
from longspan.models.embedding import Embedding, OutputLayer
from longspan.models.memory.offload import Offload
from longspan.models.memory.recomputed import gated_linear
from longspan.models.memory.tiled import tiled
from longspan.models.norm import Norm, normalised
from longspan.models.rotary import apply_rotary, at_length, attention_factor, frequencies, rotary_table
from longspan.tensor_parallel.initial import filled_by_name
from longspan.tensor_parallel.layers import (
    ColumnParallelLinear,
    Operands,
    RowParallelLinear,
    local,
    projected,
)

RotaryTable = tuple[Tensor, Tensor]


def _residual_std(config: TransformerConfig) -> float:
    """Layers that add to the residual stream start smaller, by the number of additions (GPT-2)."""
    return config.init_method_std / (2 * config.num_layers) ** 0.5


def projected_heads(
    x: Tensor, linears: tuple[Operands, ...], norms: tuple | None, rotary: RotaryTable | None, head_dim: int
) -> list[Tensor]:
    """[s, b, h] -> query [s, b, n, d], key and value [s, b, m, d]; norms of query and key where there are any."""
    q, k, v = (projected(x, linear).unflatten(-1, (-1, head_dim)) for linear in linears)
    if norms is not None:
        q, k = normalised(q, *norms[0]), normalised(k, *norms[1])
    if rotary is not None:
        q, k = apply_rotary(q, rotary), apply_rotary(k, rotary)
    return [q, k, v]


def mlp_product(
    x: Tensor, gate: Operands | None, up: Operands, down: Operands, activation: Callable[[Tensor], Tensor]
) -> Tensor:
    """[.., h] as every rank has it -> this rank's part of the sum [.., h]; each token by itself."""
    if gate is None:
        return projected(activation(projected(x, up)), down)
    gates, ups = projected(x, gate), projected(x, up)
    y = gated_linear(gates, ups, down.weight, activation)
    if down.lora is not None:
        y = y + down.lora.expand(gated_linear(gates, ups, down.lora.a, activation))
    return y


class SelfAttention(nn.Module, Compilable):
    """Projections to heads, norms of heads, rotary embedding, core attention, projection back."""

    def __init__(self, config: TransformerConfig, layer_number: int, pg_collection: ProcessGroupCollection):
        super().__init__()
        self.head_dim = d = config.kv_channels
        heads, groups, h = config.num_attention_heads, config.num_query_groups, config.hidden_size
        bias, tp = config.add_bias_linear, pg_collection.tp_mesh
        kwargs = {"bias": bias or config.add_qkv_bias, "tp_group": tp}
        self.linear_q = ColumnParallelLinear(h, heads * d, config, **kwargs)
        self.linear_k = ColumnParallelLinear(h, groups * d, config, **kwargs)
        self.linear_v = ColumnParallelLinear(h, groups * d, config, **kwargs)
        self.q_layernorm = Norm(config, pg_collection, heads=True) if config.qk_layernorm else None
        self.k_layernorm = Norm(config, pg_collection, heads=True) if config.qk_layernorm else None
        self.core_attention = DotProductAttention(
            config, layer_number, AttnMaskType.causal, pg_collection=pg_collection
        )
        self.linear_proj = RowParallelLinear(
            heads * d, h, config, bias=bias, init_std=_residual_std(config), tp_group=tp
        )

    def heads(self, x: Tensor, rotary: RotaryTable | None) -> tuple[Tensor, Tensor, Tensor]:
        """[s, b, h] -> query [s, b, n, d], key and value [s, b, m, d] of this rank's heads; the input is gathered once."""
        entered = self.linear_q.enter(x)
        linears = tuple(layer.operands() for layer in (self.linear_q, self.linear_k, self.linear_v))
        norms = None
        if self.q_layernorm is not None and self.k_layernorm is not None:
            norms = self.q_layernorm.operands(), self.k_layernorm.operands()
        q, k, v = self.part(projected_heads)(entered, linears, norms, rotary, self.head_dim)
        return q, k, v

    def output(self, context: Tensor) -> Tensor:
        """[s, b, n, d] -> [s, b, h]"""
        return self.linear_proj(context.flatten(2))


class MLP(nn.Module, Compilable):
    """h -> ffn -> h; gated: down(act(gate(x)) * up(x)).

    Attributes:
        tiles: runs of tokens that go through one after another, in forward and backward, so that activations
            [t, ffn] exist for one of them only (``models/memory/tiled.py``); None: tokens / hidden size, rounded up.
            The input is gathered and the output summed over tensor parallel ranks once, around all tiles: as
            much travels as without them.
    """

    def __init__(self, config: TransformerConfig, pg_collection: ProcessGroupCollection):
        super().__init__()
        h, ffn = config.hidden_size, config.ffn_hidden_size
        kwargs = {"bias": config.add_bias_linear, "tp_group": pg_collection.tp_mesh}
        func = config.activation_func
        self.activation = getattr(F, func) if isinstance(func, str) else func
        self.linear_gate = (
            ColumnParallelLinear(h, ffn, config, **kwargs) if config.gated_linear_unit else None
        )
        self.linear_up = ColumnParallelLinear(h, ffn, config, **kwargs)
        self.linear_down = RowParallelLinear(ffn, h, config, init_std=_residual_std(config), **kwargs)
        self.tiles: int | None = 1

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear_up.enter(x)
        tiles = self.tiles or -(-x.shape[0] * x.shape[1] // x.shape[2])
        if tiles == 1:
            return self.linear_down.leave(self._product(x))
        y = tiled(self._product, x.flatten(0, 1), list(self.parameters()), tiles)
        return self.linear_down.leave(y.view(*x.shape[:2], -1))

    def _product(self, x: Tensor) -> Tensor:
        gate = None if self.linear_gate is None else self.linear_gate.operands()
        up, down = self.linear_up.operands(), self.linear_down.operands()
        return self.part(mlp_product)(x, gate, up, down, self.activation)


class TransformerLayer(nn.Module):
    """``forward(hidden_states [s, b, h], ...) -> (hidden_states, context)``; context is None in a decoder.

    Args:
        layer_number: from 1; made by itself, the layer has the initial weights of that layer of a whole model.
        seed: of the initial weights, as for :class:`GPTModel`.

    Attributes:
        recompute: ``"none"``; ``"full"`` keeps only the layer's input; ``"selective"`` keeps that
            and what attention needs (q, k, v, out), so attention and its exchange run once.
        offload: where what is kept goes to the CPU's memory; None keeps it on the device.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int = 1,
        pg_collection: ProcessGroupCollection | None = None,
        *,
        seed: int | None = None,
    ):
        super().__init__()
        groups = process_groups(pg_collection)
        for message in unsupported(config):
            raise ValueError(message)
        self.config, self.recompute = config, "none"
        self.offload: Offload | None = None
        with filled_by_name(self, config, groups.tp.size(), seed, f"decoder.layers.{layer_number - 1}"):
            self.input_layernorm = Norm(config, groups)
            self.self_attention = SelfAttention(config, layer_number, groups)
            self.pre_mlp_layernorm = Norm(config, groups)
            self.mlp = MLP(config, groups)

    def _before(self, x: Tensor, rotary: RotaryTable | None) -> tuple[Tensor, Tensor, Tensor]:
        return self.self_attention.heads(self.input_layernorm(x), rotary)

    def _after(self, x: Tensor, context: Tensor) -> Tensor:
        x, normalised = self.pre_mlp_layernorm.after_adding(x, self.self_attention.output(context))
        return x + self.mlp(normalised)

    def _whole(
        self, x: Tensor, rotary, packed_seq_params, layout, around=lambda part, *args: part(*args)
    ) -> Tensor:
        q, k, v = around(self._before, x, rotary)
        context, _ = self.self_attention.core_attention(
            q, k, v, packed_seq_params=packed_seq_params, layout=layout
        )
        return around(self._after, x, context)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        layout: SequenceLayout | None = None,
        rotary: RotaryTable | None = None,
    ) -> tuple[Tensor, None]:
        _refuse_mask(attention_mask)
        if layout is None:
            layout, packed_seq_params = layout_of(self, *_rows(self, hidden_states), packed_seq_params)
        rows, _ = _rows(self, hidden_states)
        self.self_attention.core_attention.check_rows("hidden_states", rows, layout, packed_seq_params)
        if rotary is None:
            rotary = rotary_of(self, layout, hidden_states, packed_seq_params)
        args = (hidden_states, rotary, packed_seq_params, layout)
        if not torch.is_grad_enabled():
            return self._whole(*args), None
        with self._offloading(rotary):
            if self.recompute == "none":
                return self._whole(*args), None
            if self.recompute == "full":
                return _recomputed(self._whole, *args), None
            return self._whole(*args, around=_recomputed), None

    def _offloading(self, rotary: RotaryTable | None) -> contextlib.AbstractContextManager:
        """Around a forward pass: moves what is kept, but for weights and what all layers share."""
        if self.offload is None:
            return contextlib.nullcontext()
        return self.offload.layer([*(local(p.detach()) for p in self.parameters()), *(rotary or ())])


def _recomputed(part: Callable, *args):
    return checkpoint(part, *args, use_reentrant=False, preserve_rng_state=False)  # there is no dropout


def _refuse_mask(attention_mask: Tensor | None) -> None:
    if attention_mask is not None:
        raise ValueError(
            "attention_mask is not supported: a mask of size s x s is never built. Give packed_seq_params or a "
            "layout with cu_seqlens to keep documents apart."
        )


def _check_beside(name: str, tensor: Tensor | None, batch: int, rows: int, broadcast: bool = False) -> None:
    """Refuses a tensor that is not [batch, rows] (or one row for all, where it may be broadcast)."""
    fits = [(batch, rows), *([(1, rows), (rows,)] if broadcast else [])]
    if tensor is not None and tuple(tensor.shape) not in fits:
        cut = tensor.dim() > 0 and tensor.shape[-1] > rows
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)} beside {rows} rows of a batch of {batch}: it is [b, s] as input_ids is. "
            + ("Cut it as the tokens were cut (get_batch_on_this_cp_rank, or layout.shard)." if cut else "")
        )


def _rows(layer: TransformerLayer, hidden: Tensor) -> tuple[int, int]:
    """This rank's rows of the sequence and the batch of [s, b, h]; sequence parallelism has cut the rows."""
    linear = layer.self_attention.linear_q
    return hidden.shape[0] * (linear.tp_size if layer.config.sequence_parallel else 1), hidden.shape[1]


def layout_of(
    layer: TransformerLayer, rows: int, batch: int, packed_seq_params: PackedSeqParams | None
) -> tuple[SequenceLayout, PackedSeqParams | None]:
    """The layout Megatron-style callers mean when they give none, and what it leaves of the parameters."""
    if packed_seq_params is not None and packed_seq_params.qkv_format == "thd" and batch != 1:
        raise ValueError(f"packed documents (thd) come as one row: [t, 1, h], not {rows} rows of {batch}.")
    check_packed(packed_seq_params, batch, None)
    layout = layer.self_attention.core_attention.default_layout(rows, packed_seq_params)
    return layout, packed_seq_params and packed_seq_params.group_only()


def positions_of(
    layer: TransformerLayer, layout: SequenceLayout, packed_seq_params: PackedSeqParams | None
) -> Tensor:
    """The places of this rank's rows in their documents [s]."""
    return layout.document_positions(layer.self_attention.core_attention.rank_of_call(packed_seq_params))


def rotary_of(
    layer: TransformerLayer,
    layout: SequenceLayout,
    like: Tensor,
    packed_seq_params: PackedSeqParams | None,
    position_ids: Tensor | None = None,
) -> RotaryTable | None:
    """cos and sin for this rank's rows: positions within their documents, or ``position_ids`` [b, s]."""
    config = layer.config
    if config.position_embedding_type != "rope":
        return None
    if position_ids is None:
        position_ids = positions_of(layer, layout, packed_seq_params)
    freqs = frequencies(config.kv_channels, config.rotary_base, config.rope_scaling)
    scale = attention_factor(config.rope_scaling)
    return rotary_table(position_ids, freqs.to(like.device), like.dtype, scale)


class TransformerBlock(nn.Module):
    """All layers (and the final norm with ``post_process``).

    ``forward(hidden_states [s, b, h], ...) -> (hidden_states, context)``; context is None in a decoder.

    Args:
        seed: of the initial weights, as for :class:`GPTModel`; the names are those of a whole model.
    """

    def __init__(
        self,
        config: TransformerConfig,
        pre_process: bool = True,
        post_process: bool = True,
        pg_collection: ProcessGroupCollection | None = None,
        *,
        seed: int | None = None,
    ):
        super().__init__()
        groups = process_groups(pg_collection)
        self.pre_process = pre_process
        with filled_by_name(self, config, groups.tp.size(), seed, "decoder"):
            self.layers = nn.ModuleList(
                TransformerLayer(config, number, groups) for number in range(1, config.num_layers + 1)
            )
            self.final_layernorm = Norm(config, groups) if post_process else None

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        layout: SequenceLayout | None = None,
        position_ids: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        _refuse_mask(attention_mask)
        first = self.layers[0]
        if layout is None:
            layout, packed_seq_params = layout_of(first, *_rows(first, hidden_states), packed_seq_params)
        rotary = rotary_of(first, layout, hidden_states, packed_seq_params, position_ids)
        for layer in self.layers:
            hidden_states, _ = layer(
                hidden_states, packed_seq_params=packed_seq_params, layout=layout, rotary=rotary
            )
        if self.final_layernorm is not None:
            hidden_states = self.final_layernorm(hidden_states)
        return hidden_states, None


class GPTModel(nn.Module):
    """The language model.

    Args:
        vocab_size: real tokens; the tables are padded to a multiple of 128.
        max_sequence_length: tokens of the whole sequence the model is meant for; what ``dynamic`` scaling of
            rotary embeddings is worked out for, and the rows of a learned table of positions where the config
            names no max_position_embeddings.
        pre_process, post_process: whether this part has the embedding and the output layer.
        parallel_output: logits stay cut over the tensor parallel ranks.
        pg_collection: None takes the installed groups.
        seed: of the initial weights, the same on every rank: they follow (seed, name, shape), at every layout those of
            the trainer. None takes ``tensor_parallel.model_parallel_seed``'s; without that a number of torch's default
            generator (``torch.manual_seed``), which is refused where other ranks hold copies of the weights.
            ``config.perform_initialization=False`` and the meta device leave the weights to the caller.

    Every rank's loss is of its own tokens, so gradients are summed over the ranks that hold copies:
    ``longspan.finalize_model_grads(model)`` after backward.
    """

    def __init__(
        self,
        config: TransformerConfig,
        vocab_size: int,
        max_sequence_length: int,
        pre_process: bool = True,
        post_process: bool = True,
        parallel_output: bool = True,
        pg_collection: ProcessGroupCollection | None = None,
        *,
        seed: int | None = None,
    ):
        super().__init__()
        groups = process_groups(pg_collection)
        learned = config.position_embedding_type == "learned_absolute"
        if learned and config.max_position_embeddings is None:
            config = dataclasses.replace(config, max_position_embeddings=max_sequence_length)
        self.config, self.vocab_size, self.max_sequence_length = config, vocab_size, max_sequence_length
        #: rows of the table of learned positions
        self.positions = config.max_position_embeddings if learned else None
        config = at_length(config, max_sequence_length)
        self.parallel_output = parallel_output
        if config.share_embeddings_and_output_weights and not (pre_process and post_process):
            raise ValueError(
                "tied embeddings need the embedding and the output layer in one part of the model."
            )
        with filled_by_name(self, config, groups.tp.size(), seed):
            self.embedding = Embedding(config, vocab_size, groups, self.positions) if pre_process else None
            self.decoder = TransformerBlock(config, pre_process, post_process, groups)
            self.output_layer = OutputLayer(config, vocab_size, groups) if post_process else None
            if config.share_embeddings_and_output_weights:
                self.output_layer.weight = self.embedding.word_embeddings.weight

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        loss_mask: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        layout: SequenceLayout | None = None,
    ) -> Tensor:
        """Logits, or with labels the loss of each token.

        Args:
            input_ids: [b, s], this rank's rows (for a part without embedding: hidden states [s, b, h]).
            position_ids: [b, s]; None takes the places in their documents from the layout.
            labels: [b, s], this rank's rows, already shifted; -100 where there is no target.
            loss_mask: [b, s]; the loss is 0 where it is 0.
            layout: who holds which tokens; None means zigzag, as Megatron's callers do.

        Returns:
            Logits [b, s, v/tp] (whole vocabulary with parallel_output=False), loss [b, s] in
            nats, or hidden states [s, b, h] without post_process.

        Raises:
            ValueError: tensors that are not this rank's rows (a sequence that nobody has cut), documents that are too long,
                or ids that are no tokens. (On a GPU the kernel fails on such ids: looking at them would wait for it.)
        """
        if loss_mask is not None and labels is None:
            raise ValueError("loss_mask without labels has no effect. Give labels too, or leave it out.")
        first, given = self.decoder.layers[0], layout is not None
        batch, rows = input_ids.shape if self.embedding is not None else _rows(first, input_ids)[::-1]
        if layout is None:
            layout, packed_seq_params = layout_of(first, rows, batch, packed_seq_params)
        first.self_attention.core_attention.check_rows("input_ids", rows, layout, packed_seq_params)
        _check_beside("position_ids", position_ids, batch, rows, broadcast=True)
        _check_beside("labels", labels, batch, rows)
        _check_beside("loss_mask", loss_mask, batch, rows, broadcast=True)
        if not given and layout.longest_document == rows * layout.ranks > self.max_sequence_length:
            cut = " Cut it first (get_batch_on_this_cp_rank), or make" if layout.ranks > 1 else " Make"
            raise ValueError(
                f"input_ids has {rows} rows on each of {layout.ranks} context parallel ranks, a sequence of "
                f"{layout.total} tokens: the model is made for max_sequence_length {self.max_sequence_length}."
                f"{cut} the model with a larger one."
            )
        if layout.longest_document > self.max_sequence_length:
            raise ValueError(
                f"a document of {layout.longest_document} tokens: the model is made for max_sequence_length "
                f"{self.max_sequence_length}. Make it with a larger one, or cut the document."
            )
        hidden = input_ids
        if self.embedding is not None:
            places = position_ids
            if self.positions is not None and places is None:
                self._check_positions(layout)
                places = positions_of(first, layout, packed_seq_params)
            hidden = self.embedding(input_ids, places)
        hidden, _ = self.decoder(hidden, attention_mask, packed_seq_params, layout, position_ids)
        if self.output_layer is None:
            return hidden
        out = self.output_layer(hidden, labels, self.parallel_output)
        return out if loss_mask is None else out * loss_mask.to(out.dtype)

    def _check_positions(self, layout: SequenceLayout) -> None:
        if self.positions is not None and layout.longest_document > self.positions:
            raise ValueError(
                f"a document of {layout.longest_document} tokens: the table of learned positions has {self.positions} rows "
                "(max_position_embeddings). Make the model with a larger one, or cut the document."
            )
