"""The rules between the keys of parallelism. ``config.resolve`` checks the product of the sizes."""

from __future__ import annotations

from longspan.config.model import normal_comm_type
from longspan.config.schema import TrainConfig
from longspan.errors import Problem


def parallel_problems(config: TrainConfig) -> list[Problem]:
    """(keys, message) for keys that are not supported yet, contradict each other or have no effect."""
    found: list[Problem] = []
    _experts(config, found)
    _hybrid(config, found)
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
