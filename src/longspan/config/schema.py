"""TrainConfig: every key once, with its type, unit, default and Megatron flag.

Key names are axolotl's where axolotl has the key, and TransformerConfig's for the
architecture. Everything else that needs to know the keys reads them here: the YAML loader,
the command line, the Megatron flags, ``longspan config --schema`` and the documentation.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

_UNSET: Any = object()

GROUPS = (
    "model",
    "data",
    "parallelism",
    "batch and schedule",
    "optimizer",
    "precision and memory",
    "logging, evaluation, saving",
)


def key(
    default: Any,
    text: str,
    *,
    group: str,
    unit: str | None = None,
    flag: str | None = None,
    flag_value: Any = _UNSET,
    aliases: tuple[str, ...] = (),
    megatron_default: Any = _UNSET,
    **constraints: Any,
) -> Any:
    """Declares one key.

    Args:
        unit: what a number counts (tokens, ranks, steps, sequences).
        flag: Megatron's flag, when it is not the key with dashes.
        flag_value: the value Megatron's flag stands for, when it takes none.
        aliases: other key names.
        megatron_default: the default at the Megatron door, where it differs.
        constraints: pydantic's, such as ``gt=0``.
    """
    extra: dict[str, Any] = {"group": group}
    if unit:
        extra["unit"] = unit
    if flag:
        extra["megatron_flag"] = flag
    if flag_value is not _UNSET:
        extra["megatron_flag_value"] = flag_value
    if aliases:
        extra["aliases"] = list(aliases)
    if megatron_default is not _UNSET:
        extra["megatron_default"] = megatron_default
    return Field(default, description=text, json_schema_extra=extra, **constraints)


class DatasetConfig(BaseModel):
    """One source of documents."""

    model_config = ConfigDict(extra="forbid")

    path: str = Field(
        description="A text or .jsonl file, a folder of text and code, a .bin/.idx prefix (Megatron's), or "
        "python-stdlib (the source of the running Python's standard library)."
    )
    type: Literal["completion"] = Field("completion", description="completion: whole documents, no prompt.")
    field: str = Field("text", description="The field of a .jsonl line that holds the text.")

    @field_validator("path")
    @classmethod
    def _path(cls, value: str) -> str:
        return os.path.expanduser(value)

    prepared: str | None = Field(
        None, description="The .bin/.idx prefix this source was tokenised to; filled in by longspan."
    )


class TrainConfig(BaseModel):
    """What ``longspan train`` is told."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_bool_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        annotation = cls.model_fields[info.field_name or ""].annotation
        kinds = (annotation, *get_args(annotation))
        if isinstance(value, bool) and bool not in kinds and (int in kinds or float in kinds):
            raise ValueError("must be a number, not true or false")
        return value

    @field_validator("base_model", "tokenizer_config", "dataset_prepared_path", "output_dir", "resume")
    @classmethod
    def _path(cls, value: str | None) -> str | None:
        if value == "":
            raise ValueError("must not be empty")
        return None if value is None else os.path.expanduser(value)

    # --- model ----------------------------------------------------------------------------
    base_model: str | None = key(
        None,
        "Hugging Face model to start from: a local folder, or a hub id when the hub can be reached (Llama).",
        group="model",
        flag="--base-model",
    )
    reinit_weights: bool = key(
        False, "Take only the architecture of base_model and start from random weights.", group="model"
    )
    num_layers: int | None = key(None, "Transformer layers.", group="model", unit="layers", gt=0)
    hidden_size: int | None = key(None, "Size of the residual stream.", group="model", unit="features", gt=0)
    num_attention_heads: int | None = key(None, "Query heads.", group="model", unit="heads", gt=0)
    num_query_groups: int | None = key(
        None, "Key/value heads (GQA); default: as many as query heads.", group="model", unit="heads", gt=0
    )
    kv_channels: int | None = key(
        None,
        "Size of a head; default: hidden_size / num_attention_heads.",
        group="model",
        unit="features",
        gt=0,
    )
    ffn_hidden_size: int | None = key(
        None, "Size of the MLP; default: 4 x hidden_size.", group="model", unit="features", gt=0
    )
    vocab_size: int | None = key(
        None,
        "Tokens of the vocabulary, before padding to a multiple of 128; default: the tokenizer's.",
        group="model",
        unit="tokens",
        gt=0,
    )
    layernorm_epsilon: float = key(
        1e-5, "Added to the variance in norms.", group="model", flag="--norm-epsilon", gt=0
    )
    rotary_base: float = key(10000.0, "Base of the rotary frequencies (rope_theta).", group="model", gt=0)
    rope_scaling: dict[str, Any] | None = key(
        None, "Hugging Face's rope_scaling: {rope_type: linear | llama3, factor: ...}.", group="model"
    )
    sliding_window: int | list[int | None] | None = key(
        None,
        "Tokens a query sees, itself included; null for all before it; a list is cycled over the layers.",
        group="model",
        unit="tokens",
    )
    tie_word_embeddings: bool = key(
        False,
        "Embedding and output layer share their weight.",
        group="model",
        flag="--untie-embeddings-and-output-weights",
        flag_value=False,
        megatron_default=True,
    )
    init_method_std: float = key(0.02, "Standard deviation of initial weights.", group="model", gt=0)

    # --- data -----------------------------------------------------------------------------
    datasets: list[DatasetConfig] = key([], "What to train on: a list of {path: ...}.", group="data")
    dataset_prepared_path: str = key(
        "./last_run_prepared", "Folder that keeps tokenised data for the next run.", group="data"
    )
    tokenizer_config: str | None = key(
        None,
        "tokenizer.json or the folder that holds it; default: base_model's.",
        group="data",
        flag="--tokenizer-model",
    )
    tokenizer_train_vocab_size: int | None = key(
        None,
        "Train a byte-level BPE tokenizer of this size on the data, instead of loading one.",
        group="data",
        unit="tokens",
        ge=257,
    )
    sequence_len: int = key(
        4096, "Length of a training sequence.", group="data", unit="tokens", flag="--seq-length", gt=0
    )
    sample_packing: bool = key(
        True,
        "Pack whole documents into sequences and keep them apart in attention; false: one stream, cut every "
        "sequence_len tokens, in which documents see each other.",
        group="data",
        megatron_default=False,
    )
    val_set_size: float = key(
        0.0,
        "Documents held out for evaluation: a share below 1, a number from 1 on, 0 for none.",
        group="data",
        unit="share or documents",
        ge=0,
    )

    # --- parallelism ----------------------------------------------------------------------
    tensor_parallel_size: int = key(
        1,
        "Ranks that share each weight.",
        group="parallelism",
        unit="ranks",
        flag="--tensor-model-parallel-size",
        ge=1,
    )
    context_parallel_size: int = key(
        1, "Ranks that share each sequence.", group="parallelism", unit="ranks", ge=1
    )
    pipeline_parallel_size: int = key(
        1, "Stages of layers.", group="parallelism", unit="ranks", flag="--pipeline-model-parallel-size", ge=1
    )
    expert_parallel_size: int = key(
        1,
        "Ranks that share the experts.",
        group="parallelism",
        unit="ranks",
        flag="--expert-model-parallel-size",
        ge=1,
    )
    dp_shard_size: int | None = key(
        None,
        "Data parallel ranks that shard the parameters between them (FSDP); default: what is left of the processes.",
        group="parallelism",
        unit="ranks",
        ge=1,
    )
    dp_replicate_size: int = key(
        1, "Whole copies of the sharded parameters (HSDP).", group="parallelism", unit="ranks", ge=1
    )
    sequence_parallel: bool | None = key(
        None,
        "Cut activations between tensor parallel layers along the sequence; default: on with tensor parallelism.",
        group="parallelism",
        megatron_default=False,
    )
    cp_comm_type: str | list[str] = key(
        "p2p",
        "How keys reach queries: p2p (keys step by step), all_gather (keys all at once), a2a (heads), a2a+p2p (heads inside "
        "groups, keys across); a list is cycled over the layers.",
        group="parallelism",
    )
    hierarchical_context_parallel_sizes: list[int] | None = key(
        None,
        "For a2a+p2p: [ranks that move heads, ranks that move keys]; their product is context_parallel_size.",
        group="parallelism",
        unit="ranks",
    )
    cp_layout: Literal["auto", "contiguous", "zigzag", "per_document_zigzag", "balanced"] = key(
        "auto",
        "Which tokens a rank holds; auto balances packed documents, and cuts one sequence zigzag.",
        group="parallelism",
    )

    hybrid_context_parallel: bool = key(
        False,
        "Cut all documents of a step over all ranks of dp x cp, each over as many ranks as it needs.",
        group="parallelism",
    )
    max_seqlen_per_dp_cp_rank: int | None = key(
        None,
        "With hybrid_context_parallel: the most tokens a rank holds in a micro-batch.",
        group="parallelism",
        unit="tokens",
        ge=1,
    )

    # --- batch and schedule ---------------------------------------------------------------
    micro_batch_size: int | None = key(
        None,
        "Sequences a data parallel rank takes at a time; default 1.",
        group="batch and schedule",
        unit="sequences",
        ge=1,
    )
    gradient_accumulation_steps: int | None = key(
        None,
        "Micro-batches a rank takes a step; default 1.",
        group="batch and schedule",
        unit="micro-batches",
        ge=1,
    )
    global_batch_size: int | None = key(
        None,
        "Sequences of a step over all ranks = micro_batch_size x gradient_accumulation_steps x dp. Any two give the third.",
        group="batch and schedule",
        unit="sequences",
        aliases=("batch_size",),
        ge=1,
    )
    num_epochs: float = key(
        1.0, "Passes over the data, unless max_steps is set.", group="batch and schedule", unit="epochs", gt=0
    )
    max_steps: int | None = key(
        None,
        "Optimizer steps; wins over num_epochs.",
        group="batch and schedule",
        unit="steps",
        flag="--train-iters",
        gt=0,
    )
    lr_scheduler: Literal["cosine", "linear", "constant"] = key(
        "cosine",
        "Shape of the learning rate after warm-up.",
        group="batch and schedule",
        flag="--lr-decay-style",
        megatron_default="linear",
    )
    warmup_steps: int | None = key(
        None,
        "Steps of linear warm-up; default: 3 % of the steps, at most 100.",
        group="batch and schedule",
        unit="steps",
        flag="--lr-warmup-iters",
        ge=0,
    )
    warmup_ratio: float | None = key(
        None,
        "Warm-up as a share of the steps.",
        group="batch and schedule",
        unit="share",
        flag="--lr-warmup-fraction",
        ge=0,
        le=1,
    )
    cosine_min_lr_ratio: float = key(
        0.0,
        "Learning rate at the end as a share of its peak (cosine and linear).",
        group="batch and schedule",
        unit="share",
        ge=0,
        le=1,
    )
    seed: int = key(
        42, "Of initial weights and data order.", group="batch and schedule", megatron_default=1234, ge=0
    )

    # --- optimizer ------------------------------------------------------------------------
    optimizer: Literal["adamw_torch_fused", "adamw_torch"] = key(
        "adamw_torch_fused", "AdamW, fused or not.", group="optimizer"
    )
    learning_rate: float | None = key(None, "Peak learning rate.", group="optimizer", flag="--lr", ge=0)
    weight_decay: float = key(
        0.0, "AdamW's, on matrices only.", group="optimizer", megatron_default=0.01, ge=0
    )
    adam_beta1: float = key(0.9, "AdamW's beta 1.", group="optimizer", ge=0, lt=1)
    adam_beta2: float = key(0.999, "AdamW's beta 2.", group="optimizer", ge=0, lt=1)
    adam_epsilon: float = key(1e-8, "AdamW's epsilon.", group="optimizer", flag="--adam-eps", ge=0)
    max_grad_norm: float = key(
        1.0,
        "Gradients are scaled down to this norm; 0 switches clipping off.",
        group="optimizer",
        flag="--clip-grad",
        ge=0,
    )

    # --- precision and memory -------------------------------------------------------------
    device: Literal["auto", "cpu", "cuda"] = key(
        "auto",
        "auto takes CUDA where there are as many GPUs as local processes.",
        group="precision and memory",
    )
    bf16: Literal["auto"] | bool = key(
        "auto",
        "Compute in bfloat16; weights, optimizer and reductions stay float32. auto: on CUDA.",
        group="precision and memory",
        megatron_default=False,
    )
    params_dtype: Literal["float32", "float64"] = key(
        "float32", "Of weights and optimizer; float64 is for checking.", group="precision and memory"
    )
    gradient_checkpointing: bool | Literal["full", "selective"] = key(
        False,
        "Recompute activations in backward: full (true) keeps a layer's input, selective also what attention needs.",
        group="precision and memory",
        flag="--recompute-granularity",
    )
    reshard_after_forward: bool = key(
        True, "Free a layer's gathered weights after its forward pass.", group="precision and memory"
    )
    attention_backend: Literal[
        "auto", "flash-attn-3", "flash-attn-2", "cuda-flash", "cudnn", "cpu-blocks", "cpu-flash", "math"
    ] = key("auto", "Kernel of one tile of attention.", group="precision and memory")
    deterministic_mode: bool = key(
        False,
        "Two runs give equal bits on CUDA too (on CPU they always do).",
        group="precision and memory",
    )

    # --- logging, evaluation, saving ------------------------------------------------------
    output_dir: str = key(
        "./model-out", "Where a run writes.", group="logging, evaluation, saving", flag="--save"
    )
    logging_steps: int | None = key(
        None,
        "Print a line every so many steps; default: 0.5 % of the steps, from 1 to 10.",
        group="logging, evaluation, saving",
        unit="steps",
        flag="--log-interval",
        ge=1,
    )
    eval_steps: int | None = key(
        None,
        "Evaluate every so many steps, and at the end; default: at the end, if documents are held out.",
        group="logging, evaluation, saving",
        unit="steps",
        flag="--eval-interval",
        ge=1,
    )
    eval_max_samples: int | None = key(
        None,
        "Sequences of an evaluation at most; default: all.",
        group="logging, evaluation, saving",
        unit="sequences",
        ge=1,
    )
    save_steps: int | None = key(
        None,
        "Save a checkpoint every so many steps, and at the end; default: at the end.",
        group="logging, evaluation, saving",
        unit="steps",
        flag="--save-interval",
        ge=1,
    )
    save_last: bool = key(True, "Save a checkpoint at the end.", group="logging, evaluation, saving")
    save_total_limit: int | None = key(
        None,
        "How many of the newest checkpoints to keep; default: all.",
        group="logging, evaluation, saving",
        unit="checkpoints",
        ge=1,
    )
    async_save: bool = key(
        True, "Write checkpoints in a thread while training goes on.", group="logging, evaluation, saving"
    )
    resume: str | None = key(
        None,
        "Go on from a checkpoint: a path, or auto for the newest in output_dir, if there is one.",
        group="logging, evaluation, saving",
        flag="--load",
        aliases=("resume_from_checkpoint",),
    )
    no_load_optim: bool = key(
        False,
        "Take only the weights of the checkpoint and start at step 0.",
        group="logging, evaluation, saving",
    )
    no_load_rng: bool = key(
        False, "Do not take the checkpoint's random number states.", group="logging, evaluation, saving"
    )
    export_hf: bool = key(
        True,
        "Write the trained model for Hugging Face into output_dir/hf at the end.",
        group="logging, evaluation, saving",
    )
    export_dtype: Literal["auto", "float32", "bfloat16"] = key(
        "auto",
        "Of the exported weights; auto: base_model's, else bfloat16 when trained in it, else float32.",
        group="logging, evaluation, saving",
    )
    use_wandb: bool = key(
        False, "Log to Weights & Biases (pip install 'longspan[wandb]').", group="logging, evaluation, saving"
    )
    wandb_project: str | None = key(None, "Project of the run.", group="logging, evaluation, saving")
    wandb_name: str | None = key(
        None, "Name of the run.", group="logging, evaluation, saving", flag="--wandb-exp-name"
    )
    wandb_mode: Literal["online", "offline", "disabled"] = key(
        "online", "offline keeps the run on this machine.", group="logging, evaluation, saving"
    )
    use_tensorboard: bool = key(True, "Write TensorBoard files.", group="logging, evaluation, saving")


@dataclass(frozen=True)
class Key:
    """What is known of one key, for parsers and documentation."""

    name: str
    group: str
    text: str
    annotation: Any
    default: Any
    unit: str | None
    flag: str
    flag_value: Any
    aliases: tuple[str, ...]
    megatron_default: Any

    @property
    def takes_value(self) -> bool:
        """False for a Megatron flag that stands for a value by itself."""
        return self.flag_value is _UNSET

    @property
    def default_at_megatron_door(self) -> Any:
        return self.default if self.megatron_default is _UNSET else self.megatron_default


def keys() -> Iterator[Key]:
    """All keys, in the order of the schema."""
    for name, info in TrainConfig.model_fields.items():
        extra = info.json_schema_extra
        assert isinstance(extra, dict)
        yield Key(
            name=name,
            group=str(extra["group"]),
            text=info.description or "",
            annotation=info.annotation,
            default=info.get_default(call_default_factory=True),
            unit=extra.get("unit"),  # type: ignore[arg-type]
            flag=str(extra.get("megatron_flag", "--" + name.replace("_", "-"))),
            flag_value=extra.get("megatron_flag_value", _UNSET),
            aliases=tuple(extra.get("aliases", ())),  # type: ignore[arg-type]
            megatron_default=extra.get("megatron_default", _UNSET),
        )


def names() -> dict[str, str]:
    """Every accepted spelling of a key in YAML -> the key: itself, aliases and Megatron's name."""
    table: dict[str, str] = {}
    for k in keys():
        for spelling in (k.name, *k.aliases, *([k.flag[2:].replace("-", "_")] if k.takes_value else [])):
            assert table.setdefault(spelling, k.name) == k.name, f"{spelling} names two keys"
    return table
