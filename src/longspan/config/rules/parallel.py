"""The rules between the keys of parallelism. ``config.resolve`` checks the product of the sizes."""

from __future__ import annotations

from longspan.config.model import normal_comm_type
from longspan.config.recurrent import is_recurrent, mixers_of
from longspan.config.schema import TrainConfig
from longspan.errors import Problem


def parallel_problems(config: TrainConfig) -> list[Problem]:
    """(keys, message) for keys that are not supported yet, contradict each other or have no effect."""
    found: list[Problem] = []
    _experts(config, found)
    _hybrid(config, found)
    _recurrent(config, found)
    sizes = config.hierarchical_context_parallel_sizes
    if sizes and "a2a+p2p" not in _types(config):
        text = (
            f"hierarchical_context_parallel_sizes {list(sizes)} has no effect without cp_comm_type: a2a+p2p. Set it, or leave "
            "the sizes out."
        )
        found.append((("hierarchical_context_parallel_sizes", "cp_comm_type"), text))
    if config.sequence_parallel and config.tensor_parallel_size == 1:
        found.append(
            (
                ("sequence_parallel", "tensor_parallel_size"),
                "sequence_parallel: true with tensor_parallel_size 1 has no effect. Leave it out, or cut over more ranks.",
            )
        )
    return found


def _types(config: TrainConfig) -> list[str]:
    given = [config.cp_comm_type] if isinstance(config.cp_comm_type, str) else config.cp_comm_type
    return [normal_comm_type(name) for name in given]


def _experts(config: TrainConfig, found: list[Problem]) -> None:
    if config.num_moe_experts is not None:
        return
    for name, off in (
        ("expert_parallel_size", 1),
        ("expert_tensor_parallel_size", None),
        ("moe_token_dispatcher_type", "alltoall"),
    ):
        value = getattr(config, name)
        if value != off:
            text = f"{name} {value} has no effect without num_moe_experts. Set it, or leave {name} out."
            found.append(((name, "num_moe_experts"), text))


def _hybrid(config: TrainConfig, found: list[Problem]) -> None:
    key, most = "hybrid_context_parallel", config.max_seqlen_per_dp_cp_rank
    if not config.hybrid_context_parallel:
        if most is not None:
            text = f"max_seqlen_per_dp_cp_rank {most} has no effect without {key}: true. Set it, or leave it out."
            found.append((("max_seqlen_per_dp_cp_rank", key), text))
        return
    if most is None:
        text = f"{key}: true needs max_seqlen_per_dp_cp_rank, the most tokens a rank holds in a micro-batch."
        found.append((("max_seqlen_per_dp_cp_rank",), text))
    heads = [name for name in _types(config) if name.startswith("a2a")]
    if heads:
        found.append(
            (
                ("cp_comm_type", key),
                f"cp_comm_type {heads[0]!r} with {key}: moving heads takes every token to every rank, which is what short "
                "samples are spared. Use p2p or all_gather.",
            )
        )
    if config.cp_layout != "auto":
        text = f"cp_layout {config.cp_layout!r} with {key}: each step gets layouts of its own. Leave cp_layout out."
        found.append((("cp_layout", key), text))


def _recurrent(config: TrainConfig, found: list[Problem]) -> None:
    layers = "layer_types" if config.layer_types is not None else "hybrid_override_pattern"
    if not is_recurrent(config.layer_types, config.hybrid_override_pattern):
        if (name := config.attention_cp_layout) != "auto":
            text = (
                f"attention_cp_layout {name!r} has no effect without recurrent layers (layer_types), because all layers then have "
                "one layout. Use cp_layout, or leave it out."
            )
            found.append((("attention_cp_layout", "layer_types"), text))
        return
    if "attention" not in (mixers_of(config.layer_types, config.hybrid_override_pattern) or ()):
        for key, off, remedy in (
            ("attention_cp_layout", "auto", "Leave it out"),
            ("cp_comm_type", "p2p", "Leave it out; ssm_cp_type is the key of recurrent layers"),
        ):
            if (value := getattr(config, key)) != off:
                text = f"{key} {value!r} has no effect without layers of attention ({layers}). {remedy}."
                found.append(((key, layers), text))
    if config.cp_layout not in ("auto", "contiguous"):
        text = (
            f"cp_layout {config.cp_layout!r} with recurrent layers ({layers}): they hand a state from token to token, so a rank "
            "holds one run of tokens (contiguous). Leave cp_layout out; attention_cp_layout is the layout of attention layers."
        )
        found.append((("cp_layout", layers), text))
    if config.hybrid_context_parallel:
        text = (
            f"hybrid_context_parallel with recurrent layers ({layers}): it cuts each document over ranks of its own, and a state "
            "is handed on from rank to rank of one order. Leave it out: context_parallel_size cuts whole packs."
        )
        found.append((("hybrid_context_parallel", layers), text))
