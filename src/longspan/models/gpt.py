"""A decoder-only language model.

    input_ids [b, s] -> embedding [s, b, h] -> layers -> norm -> logits [b, s, v] or loss [b, s]

s is the number of rows of the sequence that this rank holds, and ``layout`` gives their positions. With
sequence parallelism, activations between the layers are [s/tp, b, h]. This module calls no collective: the
linear layers and core attention contain their communication. Beside the activations every layer receives
``Rows`` (``layer``), made once in a forward pass from the layout or from Megatron's packed_seq_params.

The model has norms before attention and MLP (RMSNorm or LayerNorm), rotary, learned or no positions, a gated
or plain MLP, grouped key/value heads, normalised heads on request, biases of all linear layers or only of
query, key and value, and tied or untied embeddings. These make up Llama, Mistral, Qwen2, Qwen3 and GPT-2. The
names are Megatron's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

from torch import Tensor, nn

from longspan.config.model import TransformerConfig
from longspan.config.stages import Stage
from longspan.context_parallel import PackedSeqParams, SequenceLayout
from longspan.context_parallel.attention import place_in_call
from longspan.context_parallel.refusals import check_rows
from longspan.expert_parallel.tokens import Sequences
from longspan.mesh.default_groups import process_groups
from longspan.mesh.mesh import ProcessGroupCollection
from longspan.models.decoder import TransformerBlock
from longspan.models.embedding import Embedding, OutputLayer
from longspan.models.layer import layout_of_call, sequence_rows
from longspan.models.rotary import at_length
from longspan.tensor_parallel.initial import filled_by_name


def _check_beside(name: str, tensor: Tensor | None, batch: int, rows: int, broadcast: bool = False) -> None:
    """Refuses a tensor that is not [batch, rows]; ``broadcast`` also allows [1, rows] and [rows]."""
    fits = [(batch, rows), *([(1, rows), (rows,)] if broadcast else [])]
    if tensor is not None and tuple(tensor.shape) not in fits:
        cut = tensor.dim() > 0 and tensor.shape[-1] > rows
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)} beside {rows} rows of a batch of {batch}: it is [b, s] as input_ids is. "
            + ("Cut it as the tokens were cut (get_batch_on_this_cp_rank, or layout.shard)." if cut else "")
        )


class GPTModel(nn.Module):
    """The language model.

    Args:
        vocab_size: number of real tokens; the tables are padded to a multiple of 128.
        max_sequence_length: tokens of the longest whole sequence. ``dynamic`` scaling of rotary embeddings is
            computed for this length. If the config has no max_position_embeddings, it is also the number of
            rows of the table of learned positions.
        pre_process, post_process: whether this part has the embedding and the output layer. In a pipeline the
            part has this rank's equal share of the layers (``decoder.even_share``), as in Megatron-LM.
        parallel_output: logits stay cut over the tensor parallel ranks.
        pg_collection: None takes the installed groups.
        seed: seed of the initial weights, the same on every rank. The weights depend on (seed, name, shape)
            only, so they equal the trainer's at every layout. None takes the seed of
            ``tensor_parallel.model_parallel_seed``, or without one a number of torch's default generator
            (``torch.manual_seed``); such a number is refused where other ranks hold copies of the weights.
            With ``config.perform_initialization=False`` or on the meta device, the caller fills the weights.
        stages: the stages of a pipeline that this model holds; they give pre_process, post_process and the layers.

    Raises:
        ValueError: the config is not supported, or tied embeddings without both pre_process and post_process.

    Every rank's loss covers its own tokens, so gradients must be summed over the ranks that hold copies of
    the weights: call ``longspan.finalize_model_grads(model)`` after backward.
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
        stages: Collection[Stage] | None = None,
    ):
        super().__init__()
        self.groups = groups = process_groups(pg_collection)
        if stages is not None:
            pre_process, post_process = (
                any(stage.first for stage in stages),
                any(stage.last for stage in stages),
            )
        learned = config.position_embedding_type == "learned_absolute"
        if learned and config.max_position_embeddings is None:
            config = dataclasses.replace(config, max_position_embeddings=max_sequence_length)
        self.config, self.vocab_size, self.max_sequence_length = config, vocab_size, max_sequence_length
        #: Number of rows of the table of learned positions; None without such a table.
        self.positions = config.max_position_embeddings if learned else None
        config = at_length(config, max_sequence_length)
        self.parallel_output = parallel_output
        tied = config.share_embeddings_and_output_weights
        if tied and stages is None and not (pre_process and post_process):
            raise ValueError(
                "tied embeddings need the embedding and the output layer in one part of the model. Untie them "
                "(share_embeddings_and_output_weights=False), or give stages=."
            )
        #: Whether the table of tokens is a copy of the first stage's, which serves the output layer of the last stage.
        self.copies_embedding = tied and post_process and not pre_process
        numbers = None if stages is None else [n for stage in stages for n in stage.layers]
        with filled_by_name(self, config, groups.tp.size(), seed):
            positions = self.positions if pre_process else None
            has_table = pre_process or self.copies_embedding
            self.embedding = Embedding(config, vocab_size, groups, positions) if has_table else None
            self.decoder = TransformerBlock(config, pre_process, post_process, groups, numbers=numbers)
            self.output_layer = OutputLayer(config, vocab_size, groups) if post_process else None
            if tied and self.output_layer is not None:
                self.output_layer.weight = self.embedding.word_embeddings.weight

    def forward(
        self,
        input_ids: Tensor | None,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        loss_mask: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        layout: SequenceLayout | None = None,
        sequences: Sequences | None = None,
        stage: Stage | None = None,
        decoder_input: Tensor | None = None,
    ) -> Tensor:
        """Logits, or with labels the loss of each token.

        Args:
            input_ids: [b, s], this rank's rows (for a part without embedding: hidden states [s, b, h]).
            position_ids: [b, s], [1, s] or [s]; None takes the rows' positions in their documents from the
                layout.
            labels: [b, s], this rank's rows, already shifted; -100 where there is no target.
            loss_mask: [b, s], [1, s] or [s], a factor of the loss: 0 leaves a token out.
            layout: which tokens each rank holds; None means zigzag, as Megatron's callers expect.
            sequences: which sequence of the data each row belongs to, for a model with experts; None takes each row
                of the batch as one.
            stage: computes only this stage of a pipeline; ``input_ids`` are hidden states unless it is the first.
            decoder_input: [s, b, h] (with sequence parallelism [s/tp, b, h]), this rank's rows, embedded
                already and with learned positions if the model has these. ``input_ids`` is then not embedded
                and may be None.

        Returns:
            Logits [b, s, v/tp] (whole vocabulary with parallel_output=False), loss [b, s] in
            nats, or hidden states [s, b, h] without post_process.

        Raises:
            ValueError: a tensor does not hold this rank's rows (for example, the sequence was not cut), a
                document is too long, or an id is no token. Ids on a GPU are not checked, because reading them
                would wait for the GPU: there the kernel fails.
        """
        if loss_mask is not None and labels is None:
            raise ValueError("loss_mask without labels has no effect. Give labels too, or leave it out.")
        given = layout is not None
        hidden = self._first_input(input_ids, decoder_input, stage)
        embedding = self.embedding if hidden is input_ids and (stage is None or stage.first) else None
        output_layer = self.output_layer if stage is None or stage.last else None
        if embedding is not None:
            batch, rows = hidden.shape
        else:
            batch, rows = hidden.shape[1], sequence_rows(self.config, self.groups, hidden)
        if layout is None:
            layout, packed_seq_params = layout_of_call(self.groups.cp, rows, batch, packed_seq_params)
        rank, ranks = place_in_call(self.groups.cp, packed_seq_params)
        check_rows("input_ids" if hidden is input_ids else "decoder_input", rows, layout, ranks)
        _check_beside("input_ids", None if hidden is input_ids else input_ids, batch, rows)
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
        if embedding is not None:
            places = position_ids
            if self.positions is not None and places is None:
                self._check_positions(layout)
                places = layout.document_positions(rank)
            hidden = embedding(hidden, places)
        hidden, _ = self.decoder(
            hidden, attention_mask, packed_seq_params, layout, position_ids, sequences, stage
        )
        if output_layer is None:
            # FSDP registers hooks on the tensors that a model returns, so that they must not be views.
            return hidden if stage is None or stage.layers else hidden.clone()
        out = output_layer(hidden, labels, self.parallel_output)
        return out if loss_mask is None else out * loss_mask.to(out.dtype)

    def _first_input(
        self, input_ids: Tensor | None, decoder_input: Tensor | None, stage: Stage | None
    ) -> Tensor:
        """What the first layer of this call is made of: token ids, or rows that are embedded already.

        Raises:
            ValueError: neither is given, or the embedded rows have no place or another shape.
        """
        if decoder_input is None:
            if input_ids is None:
                raise ValueError("neither input_ids nor decoder_input is given. Give one of them.")
            return input_ids
        if self.embedding is None or self.copies_embedding or not (stage is None or stage.first):
            raise ValueError(
                "decoder_input for a part of the model that does not begin with the embedding: its input is the hidden states "
                "of the part before it. Give them as input_ids, and decoder_input to the first part."
            )
        if decoder_input.dim() != 3 or decoder_input.shape[2] != self.config.hidden_size:
            raise ValueError(
                f"decoder_input has shape {tuple(decoder_input.shape)}: it is [s, b, {self.config.hidden_size}], rows that "
                "are embedded already."
            )
        return decoder_input

    def plan(self, layout: SequenceLayout) -> None:
        """Computes in advance what the layers need of a layout, so that a loader's thread can do it."""
        for layer in self.decoder.layers.values():
            layer.plan(layout)

    def own_parameters(self) -> list[nn.Parameter]:
        """The parameters without a last stage's copy of the table of tokens, which the first stage has."""
        copy = self.output_layer.weight if self.copies_embedding and self.output_layer is not None else None
        return [p for p in self.parameters() if p is not copy]

    def _check_positions(self, layout: SequenceLayout) -> None:
        if self.positions is not None and layout.longest_document > self.positions:
            raise ValueError(
                f"a document of {layout.longest_document} tokens: the table of learned positions has {self.positions} rows "
                "(max_position_embeddings). Make the model with a larger one, or cut the document."
            )
