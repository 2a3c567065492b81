"""TransformerConfig: an Architecture and how it is cut over ranks, as one frozen dataclass.

Field names and defaults are Megatron-LM's. All rules between the fields are checked when
an object is made; a ValueError names what was found, the rule and the remedy.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from longspan.config.architecture import (
    Architecture,
    InitialValues,
    architecture_problems,
    common_divisors,
    divisors,
)
from longspan.config.experts import expert_cut_problems
from longspan.config.recurrent import recurrent_backend_problems, recurrent_cut_problems
from longspan.errors import Problem, did_you_mean

VOCAB_MULTIPLE = 128

#: the label of a token that has no target
IGNORE_INDEX = -100

CP_COMM_TYPES = ("p2p", "all_gather", "a2a", "a2a+p2p")


class AttnMaskType(enum.Enum):
    """Which keys a query attends to. ``PackedSeqParams`` describes a padding mask, never a tensor."""

    causal = "causal"
    no_mask = "no_mask"
    padding = "padding"
    padding_causal = "padding_causal"

    @property
    def is_causal(self) -> bool:
        return self in (AttnMaskType.causal, AttnMaskType.padding_causal)


def padded_vocab_size(vocab_size: int) -> int:
    """The next multiple of 128, for every tensor parallel size, so that checkpoints fit every layout."""
    return -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


#: what is not supported yet -> the beginnings of the names of Megatron-LM's config fields for it
NOT_YET = {
    "other options of experts": ("moe_", "expert_"),
    "other options of pipelines": (
        *(
            "pipeline_",
            "num_layers_in_first_pipeline_stage",
            "num_layers_in_last_pipeline_stage",
            "account_for_",
        ),
        *(
            "microbatch_group_size_per_vp_stage",
            "overlap_p2p_comm",
            "batch_p2p_",
            "deallocate_pipeline_outputs",
        ),
        *("variable_seq_lengths", "first_pipeline_num_layers", "last_pipeline_num_layers"),
    ),
    "several predicted tokens (MTP)": ("mtp_",),
    "compressed keys and values (MLA)": (
        "q_lora_rank",
        "kv_lora_rank",
        "qk_head_dim",
        "qk_pos_emb_head_dim",
        "v_head_dim",
    ),
    "other options of recurrent layers": (
        *("mamba_", "linear_", "is_hybrid_model", "experimental_attention_variant"),
    ),
    "8-bit and 4-bit numbers": ("fp8", "fp4"),
    "layers that differ in size": ("heterogeneous_",),
}


@dataclass(frozen=True, kw_only=True)
class ModelParallelConfig(InitialValues):
    """How a model is cut over ranks. Sizes are numbers of ranks.

    Raises:
        ValueError: a field of Megatron-LM is for something that is not supported yet, or values break a rule.
        TypeError: a field is unknown.
    """

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int | None = None
    context_parallel_size: int = 1
    hierarchical_context_parallel_sizes: tuple[int, ...] | None = None
    expert_model_parallel_size: int = 1
    expert_tensor_parallel_size: int | None = None
    moe_token_dispatcher_type: str = "alltoall"
    moe_grouped_gemm: bool = True
    sequence_parallel: bool = False
    perform_initialization: bool = True
    # A torch.dtype; None means float32.
    params_dtype: Any = None
    bf16: bool = False

    def __new__(cls, *args: Any, **fields: Any) -> ModelParallelConfig:
        for name in fields.keys() - cls.__dataclass_fields__.keys():
            for part, beginnings in NOT_YET.items():
                if name.startswith(beginnings):
                    raise ValueError(f"{name}: {part} are not supported yet. Leave it out.")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for name in (
            "tensor_model_parallel_size",
            "pipeline_model_parallel_size",
            "virtual_pipeline_model_parallel_size",
            "context_parallel_size",
            "expert_model_parallel_size",
            "expert_tensor_parallel_size",
        ):
            size = getattr(self, name)
            if size is not None and size < 1:
                raise ValueError(f"{name}={size}: a parallel size is at least 1.")
        sizes = self.hierarchical_context_parallel_sizes
        if sizes is not None:
            object.__setattr__(self, "hierarchical_context_parallel_sizes", tuple(sizes))
            if problem := hierarchy_problem(sizes, self.context_parallel_size):
                raise ValueError(problem)


@dataclass(frozen=True, kw_only=True)
class TransformerConfig(Architecture, ModelParallelConfig):
    """The architecture of a decoder and how it is cut over ranks.

    ``cp_comm_type`` is one name for all layers, or a list that is cycled over the layers.

    Raises:
        ValueError, TypeError: as :class:`ModelParallelConfig`, and for the rules of the architecture.
    """

    cp_comm_type: str | list[str] | None = None
    attention_cp_layout: str = "auto"
    ssm_cp_type: str = "auto"
    attn_logit_softcapping: float | None = None
    multi_latent_attention: bool = False
    attention_backend: str = "auto"
    recurrent_backend: str = "auto"
    deterministic_mode: bool = False

    def __post_init__(self) -> None:
        ModelParallelConfig.__post_init__(self)
        Architecture.__post_init__(self)
        for _, message in architecture_problems(self):
            raise ValueError(message)
        problems = cut_problems(
            self,
            tp=self.tensor_model_parallel_size,
            cp=self.context_parallel_size,
            cp_comm_type=self.cp_comm_type,
            hierarchy=self.hierarchical_context_parallel_sizes,
            ep=self.expert_model_parallel_size,
            etp=self.expert_tensor_parallel_size,
            dispatcher=self.moe_token_dispatcher_type,
            ssm_cp_type=self.ssm_cp_type,
        )
        for _, message in problems + recurrent_backend_problems(self, self.recurrent_backend):
            raise ValueError(message)
        for name, off, what in (
            ("attn_logit_softcapping", None, "soft-capping of attention logits is"),
            ("multi_latent_attention", False, "multi-latent attention (MLA) is"),
        ):
            if getattr(self, name) != off:
                raise ValueError(
                    f"{name}={getattr(self, name)!r}: {what} not supported yet. Leave it {off!r}."
                )

    def comm_type_of_layer(self, layer_number: int) -> str:
        """The communication type of layer ``layer_number`` (from 1)."""
        return comm_type_of_layer(self.cp_comm_type, layer_number)


def cut_problems(
    model: Architecture,
    *,
    tp: int,
    cp: int,
    cp_comm_type: str | Sequence[str] | None,
    hierarchy: Sequence[int] | None,
    ep: int = 1,
    etp: int | None = None,
    dispatcher: str = "alltoall",
    ssm_cp_type: str = "auto",
) -> list[Problem]:
    """All rules that the cut of an architecture over ranks breaks, as (config keys involved, message).

    Args:
        tp, cp, ep, etp: ranks of these axes; etp None is tp.
        hierarchy: hierarchical_context_parallel_sizes.
        dispatcher, ssm_cp_type: moe_token_dispatcher_type, and the key of that name.
    """
    heads, groups, ffn = model.num_attention_heads, model.num_query_groups, model.ffn_hidden_size
    tp_key = "tensor_parallel_size"
    found: list[Problem] = []

    def rule(holds: bool, keys: tuple[str, ...], message: str) -> None:
        if not holds:
            found.append((keys, message))

    attends = "attention" in model.mixers
    rule(
        heads % tp == 0 or not attends,
        ("num_attention_heads", tp_key),
        f"num_attention_heads {heads} is not divisible by tensor_parallel_size {tp}: every tensor parallel "
        f"rank holds the same number of heads. Use one of {divisors(heads)}.",
    )
    rule(
        groups % tp == 0 or not attends,
        ("num_query_groups", tp_key),
        f"num_query_groups {groups} (key/value heads) is not divisible by tensor_parallel_size {tp}. "
        f"Use one of {common_divisors(heads, groups)}, and context_parallel_size for the other ranks.",
    )
    rule(
        ffn % tp == 0,
        ("ffn_hidden_size", tp_key),
        f"ffn_hidden_size {ffn} is not divisible by tensor_parallel_size {tp}: choose a multiple.",
    )
    rule(
        VOCAB_MULTIPLE % tp == 0,
        (tp_key,),
        f"tensor_parallel_size {tp} does not divide {VOCAB_MULTIPLE}, the unit the vocabulary is padded to. "
        f"Use one of {divisors(VOCAB_MULTIPLE)}.",
    )
    types = [cp_comm_type] if isinstance(cp_comm_type, str) else cp_comm_type or []
    for given in types:
        rule(
            normal_comm_type(given) in CP_COMM_TYPES,
            ("cp_comm_type",),
            f"cp_comm_type {given!r}: one of {', '.join(CP_COMM_TYPES)}.{did_you_mean(given, CP_COMM_TYPES)}",
        )
    rule(
        cp_comm_type != [],
        ("cp_comm_type",),
        f"cp_comm_type is an empty list: name one of {', '.join(CP_COMM_TYPES)}.",
    )
    if hierarchy and (problem := hierarchy_problem(hierarchy, cp)):
        found.append((("hierarchical_context_parallel_sizes", "context_parallel_size"), problem))
    elif cp > 1 and heads % tp == 0 and attends:
        found += _head_move_problems(heads // tp, cp, {normal_comm_type(name) for name in types}, hierarchy)
    found += recurrent_cut_problems(model, tp, cp, ssm_cp_type)
    return found + expert_cut_problems(model, tp, ep, tp if etp is None else etp, dispatcher)


def _head_move_problems(heads: int, cp: int, types: set[str], sizes: Sequence[int] | None) -> list[Problem]:
    """The broken rules of communication types that move heads, as (config keys involved, message).

    Args:
        heads: query heads of a tensor parallel rank.
        types: the communication types of all layers.
        sizes: hierarchical_context_parallel_sizes.
    """
    found: list[Problem] = []
    hierarchy = "hierarchical_context_parallel_sizes"
    if "a2a+p2p" in types and (not sizes or len(sizes) != 2):
        found.append(
            (
                (hierarchy,),
                f"cp_comm_type 'a2a+p2p' needs {hierarchy} [inner a2a, outer p2p], two sizes whose product is "
                f"context_parallel_size {cp}; found {list(sizes) if sizes else 'none'}. For example {hierarchy_proposal(cp, heads)}.",
            )
        )
        return found
    for name, degree in (("a2a", cp), ("a2a+p2p", sizes[0] if sizes else 1)):
        if name in types and heads % degree:
            found.append(
                (
                    ("cp_comm_type", "num_attention_heads"),
                    f"cp_comm_type {name!r} moves heads over {degree} ranks, but each tensor parallel rank has {heads} query "
                    f"heads, which do not divide by {degree}. Use p2p or all_gather, or a2a+p2p with {hierarchy} "
                    f"{hierarchy_proposal(cp, heads)}.",
                )
            )
    return found


def hierarchy_problem(sizes: Any, cp: int) -> str | None:
    """What is wrong with hierarchical_context_parallel_sizes; None if nothing is wrong."""
    sizes = list(sizes)
    if any(size < 1 for size in sizes):
        return f"hierarchical_context_parallel_sizes {sizes}: the size of a level is at least 1."
    if math.prod(sizes) != cp:
        return (
            f"hierarchical_context_parallel_sizes {sizes}: their product is {math.prod(sizes)}, "
            f"context_parallel_size is {cp}. The two must be equal."
        )
    return None


def hierarchy_proposal(cp: int, heads: int | None = None) -> list[int]:
    """Sizes [inner, outer] for ``cp`` ranks: inner divides the heads and is near the square root of cp."""
    good = [d for d in range(1, cp + 1) if cp % d == 0 and (heads is None or heads % d == 0)]
    inner = min(good, key=lambda d: (abs(math.log(d * d / cp)), d))
    return [inner, cp // inner]


def comm_type_of_layer(types: str | Sequence[str] | None, layer_number: int) -> str:
    """The communication type of layer ``layer_number`` (from 1); a list is cycled over the layers."""
    types = types or "p2p"
    return normal_comm_type(types if isinstance(types, str) else types[(layer_number - 1) % len(types)])


def normal_comm_type(name: str) -> str:
    """The name that ``CP_COMM_TYPES`` holds: ``allgather`` is accepted for ``all_gather``."""
    return "all_gather" if name == "allgather" else name
