"""The rules of a model's architecture: its sizes, its positions, its cut over ranks, and its export."""

from __future__ import annotations

from collections.abc import Iterator

from longspan.config.architecture import SHAPE_KEYS, Architecture, architecture_problems
from longspan.config.data import keeps_documents_apart
from longspan.config.families.config_json import export_problem
from longspan.config.model import cut_problems
from longspan.config.recurrent import idle_fields, recurrent_backend_problems
from longspan.config.rope import rope_type
from longspan.config.schema import TrainConfig
from longspan.errors import Problem


def position_problems(config: TrainConfig) -> Iterator[Problem]:
    """(keys, message) if a sequence is longer than the number of positions of the model."""
    most, length = config.max_position_embeddings, config.sequence_len
    if most is None or length <= most:
        return
    fields = ("sequence_len", "max_position_embeddings")
    if config.position_embedding_type == "rope" and rope_type(config.rope_scaling) == "dynamic":
        if keeps_documents_apart(config) or config.reset_position_ids or config.hybrid_context_parallel:
            text = (
                f"rope_scaling of type dynamic with sequence_len {length} beyond max_position_embeddings {most}: its frequencies "
                "follow the length of what is computed, and documents that are kept apart or counted by themselves have many. Use "
                "yarn or linear, or set sample_packing: false, so that every sequence has sequence_len tokens."
            )
            yield ("rope_scaling", *fields), text
        return
    what = "has a learned row for" if config.position_embedding_type == "learned_absolute" else "is made for"
    text = (
        f"sequence_len {length} is larger than max_position_embeddings {most}, the positions the model {what}. "
        "Shorten the sequence, or raise max_position_embeddings (of a model that starts from random weights)."
    )
    yield fields, text


def model_problems(config: TrainConfig) -> list[Problem]:
    """(keys, message) for broken rules of the architecture, of its cut over ranks, and of its export."""
    if None in (config.num_layers, config.hidden_size, config.num_attention_heads):
        return []
    model = Architecture.of(config)
    found = [*architecture_problems(model), *idle_fields(config)]
    streams = not keeps_documents_apart(config) and not any(s.type != "completion" for s in config.datasets)
    if "seq_aux_loss" in model.balancing and streams and not config.hybrid_context_parallel:
        text = (
            "moe_router_load_balancing_type seq_aux_loss is of each document, and in a stream (sample_packing: false) documents "
            "are not kept apart. Use aux_loss, or sample_packing: true."
        )
        found.append((("moe_router_load_balancing_type", "sample_packing"), text))
    if model.kv_channels is not None:
        found += cut_problems(
            model,
            tp=config.tensor_parallel_size,
            cp=config.context_parallel_size,
            cp_comm_type=config.cp_comm_type,
            hierarchy=config.hierarchical_context_parallel_sizes,
            ep=config.expert_parallel_size,
            etp=config.expert_tensor_parallel_size,
            dispatcher=config.moe_token_dispatcher_type,
            ssm_cp_type=config.ssm_cp_type,
        )
    found += recurrent_backend_problems(model, config.recurrent_backend)
    if config.export_hf and not found and (problem := export_problem(model)):
        found.append((("export_hf", *SHAPE_KEYS), f"export_hf: {problem} Set export_hf: false."))
    return found
