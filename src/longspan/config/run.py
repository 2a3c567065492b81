"""What is run, complete and frozen: no value is still to be decided, none is "auto". Needs no torch.

There are two states, made from a *complete* config, in which every key that follows from others is set:

    Checked     the rules hold and the arithmetic is done (``config.resolve.resolve``)
    Run         the same, and the data is prepared: tokens, the size of the vocabulary, the tokenizer, the
                checkpoint to resume from (``runs.prepare.prepare``)

``of`` makes either of them from a complete config. It checks no rule, reads no file and uses no network, so a
process that reads a written config makes the same Run as the process that wrote it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Self

from longspan.config.architecture import Architecture
from longspan.config.lora import Lora, lora_of
from longspan.config.model import TransformerConfig, comm_type_of_layer
from longspan.config.parameters import used_parameters
from longspan.config.schema import TrainConfig
from longspan.config.sizes import PIPELINE_FIRST, MeshSizes
from longspan.config.stages import Stage, parse_layout, rank_of_stage, split_by_cost, stages_of_sizes


@dataclass(frozen=True)
class LayerKind:
    """One layer of a model.

    Attributes:
        number: from 1, in the whole model.
        mixer, mlp: as in ``recurrent.LayerParts``.
        window: tokens that a query attends to, itself included; None means no limit.
        comm_type: how keys reach queries, one of ``CP_COMM_TYPES``.
    """

    number: int
    mixer: str | None = "attention"
    mlp: str | None = "dense"
    window: int | None = None
    comm_type: str = "p2p"


@dataclass(frozen=True)
class BatchSizes:
    """The batch of an optimizer step.

    Attributes:
        micro: sequences of a micro-batch of a data parallel rank.
        accumulation: micro-batches of a step.
        global_size: sequences of a step, over all ranks.
        sequence_len: tokens of a sequence.
        most_tokens: most tokens of a micro-batch on a rank with hybrid context parallelism; None without it.
    """

    micro: int
    accumulation: int
    global_size: int
    sequence_len: int
    most_tokens: int | None = None

    @property
    def tokens_a_step(self) -> int:
        return self.global_size * self.sequence_len

    def equation(self, dp: int) -> str:
        """``micro 1 x accumulation 2 x dp 2 = 4 sequences = 200 tokens a step``; ``dp`` counts ranks."""
        return (
            f"micro {self.micro} x accumulation {self.accumulation} x dp {dp} = {self.global_size} sequences = "
            f"{self.tokens_a_step:,} tokens a step"
        )


@dataclass(frozen=True)
class Precision:
    """Names of torch's dtypes.

    Attributes:
        params_dtype: of weights and optimizer.
        compute_dtype: of products and activations.
        tf32: whether float32 products on CUDA are computed in TensorFloat-32.
    """

    params_dtype: str
    compute_dtype: str
    tf32: bool

    @property
    def mixed(self) -> bool:
        """Whether the compute dtype differs from the dtype of the weights."""
        return self.compute_dtype != self.params_dtype


@dataclass(frozen=True)
class Memory:
    """What is kept in memory, and where.

    Attributes:
        recompute: none, selective, full or offload.
        mlp_tiles: tiles of an MLP; 1 computes it as a whole, None takes the number from each call's tokens.
        reshard_after_forward, activation_offloading, offload_params, torch_compile: as the keys of that name.
    """

    recompute: str
    mlp_tiles: int | None
    reshard_after_forward: bool
    activation_offloading: bool
    offload_params: bool
    torch_compile: bool


@dataclass(frozen=True, kw_only=True)
class Checked:
    """A config whose rules hold, with its arithmetic done.

    Attributes:
        config: complete; for printing, and for keys that are read in one place only.
        device: ``cpu`` or ``cuda``.
        sizes: ranks of each axis.
        sequence_parallel: whether activations between tensor parallel layers are cut along the sequence.
        layers: every layer of the model, in order.
        lora: the adapters that are trained beside frozen weights; None if all weights are trained.
        pretrained: the model that the weights come from; None if the initial weights are random.
        stages: the stages of the pipeline, in order; one without a pipeline.
    """

    config: TrainConfig
    device: str
    sizes: MeshSizes
    sequence_parallel: bool
    model: Architecture
    layers: tuple[LayerKind, ...]
    batch: BatchSizes
    precision: Precision
    memory: Memory
    lora: Lora | None
    pretrained: str | None
    stages: tuple[Stage, ...]

    @classmethod
    def of(cls, config: TrainConfig) -> Self:
        """Makes the object from a complete config; equal configs make equal objects."""
        model = Architecture.of(config)
        return cls(
            config=config,
            device=config.device,
            sizes=sizes_of(config),
            sequence_parallel=bool(config.sequence_parallel),
            model=model,
            layers=tuple(
                LayerKind(
                    number,
                    *model.parts_of_layer(number),
                    window=model.window_of_layer(number),
                    comm_type=comm_type_of_layer(config.cp_comm_type, number),
                )
                for number in range(1, model.num_layers + 1)
            ),
            batch=batch_of(config),
            precision=_precision(config),
            memory=_memory(config),
            lora=lora_of(config),
            pretrained=None if config.reinit_weights else config.base_model,
            stages=tuple(stages_of(config, model)),
        )

    @property
    def by_class(self) -> bool:
        """Whether transformers' own class computes the model."""
        return self.config.model_implementation == "transformers"

    def with_keys(self, **keys: Any) -> Self:
        """A copy with other values of some keys. The config must stay complete; no rule is checked."""
        return type(self).of(self.config.model_copy(update=keys))

    def transformer_config(self, params_dtype: Any = None) -> TransformerConfig:
        """The model's architecture and how it is cut over ranks.

        Args:
            params_dtype: a torch.dtype; None means float32.
        """
        return TransformerConfig(
            **{one.name: getattr(self.model, one.name) for one in dataclasses.fields(self.model)},
            params_dtype=params_dtype,
            tensor_model_parallel_size=self.sizes.tp,
            context_parallel_size=self.sizes.cp,
            pipeline_model_parallel_size=self.sizes.pp,
            expert_model_parallel_size=self.sizes.ep,
            expert_tensor_parallel_size=self.sizes.etp,
            moe_token_dispatcher_type=self.config.moe_token_dispatcher_type,
            sequence_parallel=self.sequence_parallel,
            cp_comm_type=self.config.cp_comm_type,
            attention_cp_layout=self.config.attention_cp_layout,
            ssm_cp_type=self.config.ssm_cp_type,
            hierarchical_context_parallel_sizes=self.sizes.hierarchical_cp or None,
            attention_backend=self.config.attention_backend,
            recurrent_backend=self.config.recurrent_backend,
            deterministic_mode=self.config.deterministic_mode,
        )

    def stages_of_rank(self, rank: int) -> list[Stage]:
        """The stages that a pipeline rank holds."""
        schedule = self.config.pipeline_schedule or "1f1b"
        return [s for s in self.stages if rank_of_stage(s.index, self.sizes.pp, schedule) == rank]

    @property
    def attention_layers(self) -> list[LayerKind]:
        """The layers with attention, in order."""
        return [layer for layer in self.layers if layer.mixer == "attention"]

    @property
    def windows(self) -> list[int | None]:
        """The sliding window of each attention layer; one without a window for a model without attention."""
        return self.model.attention_windows

    def head_group(self, layer: LayerKind) -> int:
        """Number of context parallel ranks that exchange heads in a layer; 1 if the layer moves only keys."""
        inner = self.sizes.hierarchical_cp[0] if self.sizes.hierarchical_cp else 1
        return {"a2a": self.sizes.cp, "a2a+p2p": inner}.get(layer.comm_type, 1)

    @property
    def row_multiple(self) -> int:
        """The number of a rank's rows is a multiple of this: sequence parallelism cuts them over tp."""
        return self.sizes.tp if self.sequence_parallel else 1


@dataclass(frozen=True, kw_only=True)
class Run(Checked):
    """What is run: a Checked whose data is prepared.

    Attributes:
        vocab_size: tokens of the vocabulary, without padding.
    """

    vocab_size: int

    @classmethod
    def of(cls, config: TrainConfig) -> Self:
        """Makes the object from the complete config of prepared data; equal configs make equal objects."""
        checked = Checked.of(config)
        parts = {one.name: getattr(checked, one.name) for one in dataclasses.fields(checked)}
        return cls(**parts, vocab_size=_filled(config.vocab_size))


def sizes_of(config: TrainConfig) -> MeshSizes:
    """The ranks of each axis, from a config in which dp_shard_size is set."""
    mapping = {"order": PIPELINE_FIRST} if config.use_tp_pp_dp_mapping else {}
    return MeshSizes(
        **mapping,
        tp=config.tensor_parallel_size,
        cp=config.context_parallel_size,
        pp=config.pipeline_parallel_size,
        dp_shard=_filled(config.dp_shard_size),
        dp_replicate=config.dp_replicate_size,
        ep=config.expert_parallel_size,
        etp=config.expert_tensor_parallel_size,
        hierarchical_cp=tuple(config.hierarchical_context_parallel_sizes or ()),
    )


def batch_of(config: TrainConfig) -> BatchSizes:
    """The batch of a complete config."""
    return BatchSizes(
        _filled(config.micro_batch_size),
        _filled(config.gradient_accumulation_steps),
        _filled(config.global_batch_size),
        config.sequence_len,
        config.max_seqlen_per_dp_cp_rank if config.hybrid_context_parallel else None,
    )


def stages_of(config: TrainConfig, model: Architecture) -> list[Stage]:
    """The layers of each stage: as written out, or with the ends as given, or by cost."""
    pp, layers = config.pipeline_parallel_size, model.num_layers
    count = pp * (config.virtual_pipeline_parallel_size or 1)
    if count == 1:
        return stages_of_sizes([layers])
    if config.pipeline_layout is not None:
        return stages_of_sizes(parse_layout(config.pipeline_layout, layers, pp))
    first, last = config.decoder_first_pipeline_num_layers, config.decoder_last_pipeline_num_layers
    costs, output = used_parameters(model, config.vocab_size)
    between = costs[first or 0 : layers - (last or 0)]
    middle = count - (first is not None) - (last is not None)
    layer = sum(costs) / layers
    # Megatron-LM counts both ends as layers on request; here the output counts by its size, and a lookup is free.
    before = layer if config.account_for_embedding_in_pipeline_split else 0.0
    after = layer if config.account_for_loss_in_pipeline_split else output
    sizes = split_by_cost(between, middle, before * (first is None), after * (last is None)) if middle else []
    return stages_of_sizes([*([] if first is None else [first]), *sizes, *([] if last is None else [last])])


def _precision(config: TrainConfig) -> Precision:
    assert "auto" not in (config.bf16, config.tf32), "the config is not complete"
    return Precision(
        config.params_dtype, "bfloat16" if config.bf16 else config.params_dtype, bool(config.tf32)
    )


def _memory(config: TrainConfig) -> Memory:
    assert config.torch_compile != "auto", "the config is not complete"
    given = config.gradient_checkpointing
    return Memory(
        recompute=given if isinstance(given, str) else "full" if given else "none",
        mlp_tiles=config.tiled_mlp_num_shards if config.tiled_mlp else 1,
        reshard_after_forward=config.reshard_after_forward,
        activation_offloading=config.activation_offloading,
        offload_params=config.offload_params,
        torch_compile=bool(config.torch_compile),
    )


def _filled(value: int | None) -> int:
    assert value is not None, "the config is not complete"
    return value
