"""A decoder's layer (a mixer, then an MLP, each after a norm and added to its input), and all layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from longspan.config.model import AttnMaskType, TransformerConfig
from longspan.config.stages import Stage
from longspan.context_parallel import PackedSeqParams, SequenceLayout
from longspan.expert_parallel.tokens import Sequences
from longspan.mesh.default_groups import process_groups
from longspan.mesh.mesh import ProcessGroupCollection
from longspan.models.layer import Layer, Rows, make_rows, refuse_mask
from longspan.models.mixers import make_mixer
from longspan.models.norm import Norm
from longspan.models.parts import SelfAttention, make_mlp
from longspan.tensor_parallel.initial import filled_by_name


class DecoderLayer(Layer):
    """``y = x + mixer(norm(x))``, then ``y + mlp(norm(y))``; [s, b, h] -> [s, b, h].

    The mixer is attention (``self_attention``) or recurrent (``mixer``). A layer of a model that is written as
    ``hybrid_override_pattern`` has only one of the two parts. With ``attention_post_norm`` the norms of a layer with
    attention come behind: ``y = x + norm(attention(x))``, then ``y + norm(mlp(y))``.

    Args:
        number: from 1. A layer made alone gets the initial weights of layer ``number`` of a whole model.
        seed: seed of the initial weights, as for :class:`GPTModel`.
        attn_mask_type: no_mask for a layer of an encoder.

    Raises:
        ValueError: the config is not supported.
    """

    input_layernorm: Norm
    post_attention_layernorm: Norm
    pre_mlp_layernorm: Norm
    post_mlp_layernorm: Norm

    def __init__(
        self,
        config: TransformerConfig,
        number: int,
        pg_collection: ProcessGroupCollection,
        *,
        seed: int | None = None,
        attn_mask_type: AttnMaskType = AttnMaskType.causal,
    ):
        super().__init__(number)
        kind, mlp = config.parts_of_layer(number)
        self.mixing = None if kind is None else "self_attention" if kind == "attention" else "mixer"
        mixer_norm, mlp_norm = config.norms_of_layer(number)
        self.norms_behind = config.attention_post_norm and kind == "attention"
        with filled_by_name(self, config, pg_collection.tp.size(), seed, f"decoder.layers.{number - 1}"):
            if kind is not None:
                setattr(self, mixer_norm, Norm(config, pg_collection))
            if kind == "attention":
                self.self_attention = SelfAttention(config, number, pg_collection, attn_mask_type)
            elif kind is not None:
                self.mixer = make_mixer(kind, config, number, pg_collection)
            if mlp is not None:
                setattr(self, mlp_norm, Norm(config, pg_collection))
            self.mlp = make_mlp(config, number, pg_collection)

    @property
    def tiles(self) -> int | None:
        """See ``parts.MLP``; without effect on experts, and on a layer without an MLP."""
        return 1 if self.mlp is None else self.mlp.tiles

    @tiles.setter
    def tiles(self, tiles: int | None) -> None:
        if self.mlp is not None:
            self.mlp.tiles = tiles

    def plan(self, layout: SequenceLayout) -> None:
        if self.mixing is not None:
            getattr(self, self.mixing).plan(layout)

    def compute(self, x: Tensor, rows: Rows, run: Callable[..., Any], memory: dict) -> Tensor:
        if self.mixing is None:
            return run(self._mlp_alone, x, rows, memory)
        mixer = getattr(self, self.mixing)
        entered = run(self._before, x, rows)
        return run(self._after, x, mixer.mix(*entered, rows=rows), rows, memory)

    def _before(self, x: Tensor, rows: Rows) -> tuple[Tensor, ...]:
        assert self.mixing is not None
        return getattr(self, self.mixing).enter(x if self.norms_behind else self.input_layernorm(x), rows)

    def _after(self, x: Tensor, mixed: tuple[Tensor, ...], rows: Rows, memory: dict) -> Tensor:
        assert self.mixing is not None
        y = getattr(self, self.mixing).output(*mixed)
        if self.norms_behind:
            x = x + self.post_attention_layernorm(y)
            return x if self.mlp is None else x + self.post_mlp_layernorm(self.mlp(x, rows, memory))
        if self.mlp is None:
            return x + y
        x, normalised = self.pre_mlp_layernorm.after_adding(x, y)
        return x + self.mlp(normalised, rows, memory)

    def _mlp_alone(self, x: Tensor, rows: Rows, memory: dict) -> Tensor:
        assert self.mlp is not None
        return x + self.mlp(self.pre_mlp_layernorm(x), rows, memory)


class TransformerLayer(DecoderLayer):
    """Megatron's layer: ``forward(hidden_states [s, b, h], ...) -> (hidden_states, context)``.

    context is None in a decoder.

    Args:
        layer_number, seed: as for :class:`DecoderLayer`.
        pg_collection: None takes the installed groups.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int = 1,
        pg_collection: ProcessGroupCollection | None = None,
        *,
        seed: int | None = None,
    ):
        groups = process_groups(pg_collection)
        super().__init__(config, layer_number, groups, seed=seed)
        self.config, self.groups = config, groups

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        layout: SequenceLayout | None = None,
    ) -> tuple[Tensor, None]:
        refuse_mask(attention_mask)
        rows = make_rows(self.config, self.groups, hidden_states, packed_seq_params, layout)
        return super().forward(hidden_states, rows), None


class TransformerBlock(nn.Module):
    """All layers (and the final norm with ``post_process``).

    ``forward(hidden_states [s, b, h], ...) -> (hidden_states, context)``; context is None in a decoder.

    Args:
        pre_process, post_process: whether this part follows the embedding, and whether it has the final norm.
        seed: seed of the initial weights, as for :class:`GPTModel`; the weights are those of a whole model.
        numbers: of the layers in the whole model, from 1. None takes all layers, or in a pipeline this rank's
            equal share of them, as :func:`even_share` computes it.
        attn_mask_type: no_mask for an encoder, in which every token attends to all tokens of its document.

    Attributes:
        layers: ModuleDict; a key is the layer's index in the whole model, from 0, as a string.

    Raises:
        ValueError: the config is not supported, or without ``numbers`` the pipeline has no equal shares.
    """

    def __init__(
        self,
        config: TransformerConfig,
        pre_process: bool = True,
        post_process: bool = True,
        pg_collection: ProcessGroupCollection | None = None,
        *,
        seed: int | None = None,
        numbers: Iterable[int] | None = None,
        attn_mask_type: AttnMaskType = AttnMaskType.causal,
    ):
        super().__init__()
        self.groups = groups = process_groups(pg_collection)
        self.config, self.pre_process = config, pre_process
        if numbers is None:
            numbers = even_share(config, groups.pp.rank(), groups.pp.size(), pre_process, post_process)
        with filled_by_name(self, config, groups.tp.size(), seed, "decoder"):
            layers = [DecoderLayer(config, n, groups, attn_mask_type=attn_mask_type) for n in numbers]
            self.layers = nn.ModuleDict({str(layer.number - 1): layer for layer in layers})
            self.final_layernorm = Norm(config, groups) if post_process else None

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        layout: SequenceLayout | None = None,
        position_ids: Tensor | None = None,
        sequences: Sequences | None = None,
        stage: Stage | None = None,
    ) -> tuple[Tensor, None]:
        refuse_mask(attention_mask)
        rows = make_rows(
            self.config, self.groups, hidden_states, packed_seq_params, layout, position_ids, sequences
        )
        layers = self.layers.values() if stage is None else [self.layers[str(n - 1)] for n in stage.layers]
        for layer in layers:
            hidden_states = layer(hidden_states, rows)
        if self.final_layernorm is not None and (stage is None or stage.last):
            hidden_states = self.final_layernorm(hidden_states)
        return hidden_states, None


def even_share(
    config: TransformerConfig, rank: int, ranks: int, pre_process: bool, post_process: bool
) -> range:
    """Numbers of the layers, from 1, that a pipeline rank holds where every rank holds equally many.

    This is Megatron-LM's split for a model that is made with pre_process and post_process alone; ``longspan
    train`` splits by cost (``config.run.stages_of``). Without a pipeline all layers are returned.

    Args:
        rank, ranks: this rank's number in its pipeline group, and the size of the group.

    Raises:
        ValueError: the config's pipeline is not that of the group, there are virtual stages, the layers do
            not divide, or pre_process and post_process are not those of this rank.
    """
    pp, virtual = config.pipeline_model_parallel_size, config.virtual_pipeline_model_parallel_size or 1
    if pp == 1:
        return range(1, config.num_layers + 1)
    given = f"pipeline_model_parallel_size={pp}"
    otherwise = "give this rank's layers (TransformerBlock(numbers=...), GPTModel(stages=...))"
    if ranks != pp:
        raise ValueError(
            f"{given}, but the installed pipeline group has {ranks} ranks. Use the same number in "
            f"initialize_model_parallel(...), or {otherwise}."
        )
    if virtual > 1:
        raise ValueError(
            f"virtual_pipeline_model_parallel_size={virtual}: a model that is made with pre_process and post_process is one "
            f"stage. Leave the virtual size out, or {otherwise}."
        )
    if config.num_layers % pp:
        raise ValueError(
            f"num_layers={config.num_layers} does not divide by {given}: equal shares need a multiple. Choose one, or "
            f"{otherwise}."
        )
    if (pre_process, post_process) != (rank == 0, rank == pp - 1):
        raise ValueError(
            f"pre_process={pre_process}, post_process={post_process} on pipeline rank {rank} of {pp}: the first rank has the "
            "embedding, and the last rank has the final norm and the output layer. Give "
            "pre_process=parallel_state.is_pipeline_first_stage() and "
            "post_process=parallel_state.is_pipeline_last_stage()."
        )
    share = config.num_layers // pp
    return range(rank * share + 1, (rank + 1) * share + 1)
