"""How model and sequences are cut over ranks."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

from longspan.config.keys.declare import key


class ParallelKeys(BaseModel):
    """How model and sequences are cut over ranks."""

    tensor_parallel_size: int = key(
        1,
        "Ranks that share each weight.",
        unit="ranks",
        flag="--tensor-model-parallel-size",
        ge=1,
    )
    context_parallel_size: int = key(
        1, "Ranks that share each sequence.", unit="ranks", aliases=("sequence_parallel_degree",), ge=1
    )
    pipeline_parallel_size: int = key(
        1, "Ranks that share the layers.", unit="ranks", flag="--pipeline-model-parallel-size", ge=1
    )
    virtual_pipeline_parallel_size: int | None = key(
        None,
        "Stages of layers on each pipeline rank; default: 1, or 2 with a schedule for several.",
        unit="stages",
        flag="--num-virtual-stages-per-pipeline-rank",
        ge=1,
    )
    pipeline_schedule: Literal["gpipe", "1f1b", "interleaved", "interleaved_zero_bubble", "zbv"] | None = key(
        None,
        "Order of the micro-batches' forward and backward passes; default: 1f1b (gpipe with fewer micro-batches than stages), interleaved with virtual stages.",
    )
    use_tp_pp_dp_mapping: bool = key(
        False,
        "Number the ranks with the pipeline before data parallelism (tp-cp-ep-pp-dp): the stages on neighbouring machines.",
    )
    pipeline_layout: str | None = key(
        None,
        "Layers of each stage, written out: E embedding, t a layer, L output, | the next stage (Et*3|(tt|)*2|tL).",
        flag="--pipeline-model-parallel-layout",
    )
    decoder_first_pipeline_num_layers: int | None = key(
        None, "Layers of the first stage; the others share the rest.", unit="layers", ge=0
    )
    decoder_last_pipeline_num_layers: int | None = key(
        None, "Layers of the last stage; the others share the rest.", unit="layers", ge=0
    )
    account_for_embedding_in_pipeline_split: bool = key(
        False, "The embedding counts as one layer where layers are divided."
    )
    account_for_loss_in_pipeline_split: bool = key(
        False, "The output layer counts as one layer where layers are divided."
    )
    expert_parallel_size: int = key(
        1,
        "Ranks that share the experts.",
        unit="ranks",
        flag="--expert-model-parallel-size",
        ge=1,
    )
    expert_tensor_parallel_size: int | None = key(
        None, "Ranks that share each expert's weights; default: tensor_parallel_size.", unit="ranks", ge=1
    )
    moe_token_dispatcher_type: Literal["alltoall", "allgather"] = key(
        "alltoall",
        "How tokens reach their experts: alltoall (a token goes once to each rank it needs) or allgather (every token to every "
        "rank).",
    )
    dp_shard_size: int | None = key(
        None,
        "Data parallel ranks that shard the parameters between them (FSDP); default: what is left of the processes.",
        unit="ranks",
        ge=1,
    )
    dp_replicate_size: int = key(1, "Whole copies of the sharded parameters (HSDP).", unit="ranks", ge=1)
    ddp_timeout: float = key(
        600.0, "How long a rank waits for another before the run fails.", unit="seconds", gt=0
    )
    max_restarts: int = key(
        0,
        "How often the processes are started again from the last checkpoint after one was lost; a new checkpoint begins the "
        "count anew.",
        unit="restarts",
        ge=0,
    )
    stop_timeout: float = key(
        1800.0,
        "How long a run that a signal stops may take to finish its step and save.",
        unit="seconds",
        gt=0,
    )
    sequence_parallel: bool | None = key(
        None,
        "Cut activations between tensor parallel layers along the sequence; default: on with tensor parallelism.",
        megatron_default=False,
    )
    cp_comm_type: str | list[str] = key(
        "p2p",
        "How keys reach queries: p2p (keys step by step), all_gather (keys all at once), a2a (heads), a2a+p2p (heads inside "
        "groups, keys across); a list is cycled over the layers.",
    )
    hierarchical_context_parallel_sizes: list[int] | None = key(
        None,
        "For a2a+p2p: [ranks that move heads, ranks that move keys]; their product is context_parallel_size.",
        unit="ranks",
    )
    cp_layout: Literal["auto", "contiguous", "zigzag", "per_document_zigzag", "balanced"] = key(
        "auto",
        "Which tokens a rank holds; auto balances packed documents, and cuts one sequence zigzag.",
    )

    attention_cp_layout: Literal["auto", "contiguous", "zigzag", "per_document_zigzag", "balanced"] = key(
        "auto",
        "Which tokens a rank holds in the attention layers of a hybrid model, whose other layers are contiguous; auto as for "
        "cp_layout.",
    )
    ssm_cp_type: Literal["auto", "state", "a2a"] = key(
        "auto",
        "How recurrent layers work on a cut sequence: state (each rank scans its own tokens, and states travel), a2a (heads "
        "travel), or what sends fewer bytes.",
    )

    hybrid_context_parallel: bool = key(
        False,
        "Cut all documents of a step over all ranks of dp x cp, each over as many ranks as it needs.",
    )
    max_seqlen_per_dp_cp_rank: int | None = key(
        None,
        "With hybrid_context_parallel: the most tokens a rank holds in a micro-batch.",
        unit="tokens",
        ge=1,
    )
