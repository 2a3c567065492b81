"""Megatron's ``parallel_state`` functions, which read one installed ParallelMesh.

The functions are for users: ``initialize_model_parallel`` makes a mesh and installs it, and the getters
return parts of it. Only ``megatron``, which is for users too, imports this file. Public constructors without
process groups take the installed groups (``mesh.default_groups``).

Every getter has the argument ``check_initialized=True``. Without an installed mesh it raises a RuntimeError;
with ``check_initialized=False`` it returns None instead.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from longspan.config.sizes import DEFAULT_ORDER, MeshSizes
from longspan.errors import did_you_mean
from longspan.mesh.default_groups import installed, installed_mesh
from longspan.mesh.mesh import ParallelMesh, ProcessGroupCollection, init_distributed

# Megatron's module has RankGenerator and hierarchical_groups too, so they are exported here.
from longspan.mesh.topology import RankGenerator as RankGenerator
from longspan.mesh.topology import data_parallel_size
from longspan.mesh.topology import hierarchical_groups as hierarchical_groups
from longspan.tensor_parallel import random

_virtual_pipeline_rank: int | None = None
_virtual_pipeline_size: int | None = None


def initialize_model_parallel(
    tensor_model_parallel_size: int = 1,
    pipeline_model_parallel_size: int = 1,
    virtual_pipeline_model_parallel_size: int | None = None,
    context_parallel_size: int = 1,
    hierarchical_context_parallel_sizes: list[int] | None = None,
    expert_model_parallel_size: int = 1,
    expert_tensor_parallel_size: int | None = None,
    order: str = DEFAULT_ORDER,
    *,
    data_parallel_replicate_size: int = 1,
    device_type: str | None = None,
    distributed_timeout_minutes: float = 10.0,
) -> None:
    """Makes the groups of all axes and installs them. All ranks must call it.

    It starts the default process group if there is none: under torchrun from the launcher's
    environment, otherwise as a world of one process (NCCL with CUDA, gloo without).

    Args:
        data_parallel_replicate_size: number of whole copies of the sharded parameters (HSDP); it must
            divide the data parallel size.
        device_type: ``"cpu"`` or ``"cuda"``; None takes CUDA if it is available.
        distributed_timeout_minutes: the time that a collective may take, in minutes.

    Raises:
        RuntimeError: groups are already installed, ``order`` is wrong or lacks an axis, or there are
            virtual stages without pipeline stages.
        ValueError: the product of the sizes does not fit the number of processes.
    """
    global _virtual_pipeline_rank, _virtual_pipeline_size
    if installed.mesh is not None:
        raise RuntimeError(
            "model parallel groups are already initialised; call destroy_model_parallel() first."
        )
    stages, virtual = pipeline_model_parallel_size, virtual_pipeline_model_parallel_size
    if virtual is not None and (stages < 2 or virtual < 1):
        raise RuntimeError(
            f"virtual_pipeline_model_parallel_size {virtual} with pipeline_model_parallel_size {stages}: "
            "virtual stages need at least 2 pipeline stages, and there is at least 1 a rank. "
            "Raise pipeline_model_parallel_size or leave the virtual size out."
        )
    if device_type is None:
        device_type = "cuda" if torch.cuda.is_available() else "cpu"
    init_distributed(device_type, timeout_s=60 * distributed_timeout_minutes)
    dp = data_parallel_size(
        dist.get_world_size(), tensor_model_parallel_size, context_parallel_size, pipeline_model_parallel_size
    )
    if data_parallel_replicate_size < 1 or dp % data_parallel_replicate_size:
        raise ValueError(
            f"data_parallel_replicate_size {data_parallel_replicate_size} does not divide the data parallel size "
            f"{dp}. Choose a divisor of it."
        )
    sizes = MeshSizes(
        tp=tensor_model_parallel_size,
        cp=context_parallel_size,
        pp=pipeline_model_parallel_size,
        dp_shard=dp // data_parallel_replicate_size,
        dp_replicate=data_parallel_replicate_size,
        ep=expert_model_parallel_size,
        etp=expert_tensor_parallel_size,
        hierarchical_cp=tuple(hierarchical_context_parallel_sizes or ()),
        order=order,
    )
    install(ParallelMesh.build(sizes, device_type))
    if virtual is not None:
        _virtual_pipeline_rank, _virtual_pipeline_size = 0, virtual


def install(mesh: ParallelMesh) -> None:
    """Installs a mesh that the caller has made (the trainer makes its own mesh)."""
    installed.mesh = mesh


def model_parallel_is_initialized() -> bool:
    return installed.mesh is not None


is_initialized = model_parallel_is_initialized


def destroy_model_parallel() -> None:
    """Removes the installed groups and the seed of ``model_parallel_seed``; keeps the default group."""
    global _virtual_pipeline_rank, _virtual_pipeline_size
    installed.mesh, _virtual_pipeline_rank, _virtual_pipeline_size = None, None, None
    random.get_rng_tracker().reset()


def get_mesh(check_initialized: bool = True) -> ParallelMesh | None:
    """The installed mesh."""
    return installed_mesh() if check_initialized else installed.mesh


def get_process_groups(check_initialized: bool = True) -> ProcessGroupCollection | None:
    """All groups of the installed mesh, which modules take as ``pg_collection``."""
    mesh = get_mesh(check_initialized)
    return mesh.groups if mesh else None


def _group(name: str, check_initialized: bool) -> dist.ProcessGroup | None:
    groups = get_process_groups(check_initialized)
    return getattr(groups, name) if groups else None


def _size(name: str, check_initialized: bool) -> int | None:
    group = _group(name, check_initialized)
    return dist.get_world_size(group) if group is not None else None


def _rank(name: str, check_initialized: bool) -> int | None:
    group = _group(name, check_initialized)
    return dist.get_rank(group) if group is not None else None


def _global_ranks(name: str, check_initialized: bool) -> list[int] | None:
    group = _group(name, check_initialized)
    return dist.get_process_group_ranks(group) if group is not None else None


def _first(ranks: list[int] | None) -> int | None:
    return ranks[0] if ranks else None


# --- tensor -------------------------------------------------------------------------------


def get_tensor_model_parallel_group(check_initialized: bool = True):
    return _group("tp", check_initialized)


def get_tensor_model_parallel_world_size(check_initialized: bool = True):
    return _size("tp", check_initialized)


def get_tensor_model_parallel_rank(check_initialized: bool = True):
    return _rank("tp", check_initialized)


def get_tensor_model_parallel_global_ranks(check_initialized: bool = True):
    return _global_ranks("tp", check_initialized)


def get_tensor_model_parallel_src_rank(check_initialized: bool = True):
    """The first global rank of this rank's tensor parallel group."""
    return _first(_global_ranks("tp", check_initialized))


def get_tensor_and_context_parallel_group(check_initialized: bool = True):
    return _group("tp_cp", check_initialized)


def get_tensor_and_context_parallel_world_size(check_initialized: bool = True):
    return _size("tp_cp", check_initialized)


def get_tensor_and_context_parallel_rank(check_initialized: bool = True):
    return _rank("tp_cp", check_initialized)


def get_model_parallel_group(check_initialized: bool = True):
    """The ranks that hold one copy of the model: the tensor and the pipeline parallel ranks together."""
    return _group("tp_pp", check_initialized)


def get_model_parallel_src_rank(check_initialized: bool = True):
    """The first global rank of this rank's model parallel group."""
    return _first(_global_ranks("tp_pp", check_initialized))


def get_tensor_and_data_parallel_group(check_initialized: bool = True, with_context_parallel: bool = False):
    return _group("tp_dp_cp" if with_context_parallel else "tp_dp", check_initialized)


def get_amax_reduction_group(
    with_context_parallel: bool = False, tp_only_amax_red: bool = False, check_initialized: bool = True
):
    """The ranks with parts of one activation; without ``tp_only_amax_red`` also ranks with other samples."""
    name = "tp" if tp_only_amax_red else "tp_dp"
    return _group(
        {"tp": "tp_cp", "tp_dp": "tp_dp_cp"}[name] if with_context_parallel else name, check_initialized
    )


# --- context ------------------------------------------------------------------------------


def get_context_parallel_group(check_initialized: bool = True):
    return _group("cp", check_initialized)


def get_context_parallel_world_size(check_initialized: bool = True):
    return _size("cp", check_initialized)


def get_context_parallel_rank(check_initialized: bool = True):
    return _rank("cp", check_initialized)


def get_context_parallel_global_ranks(check_initialized: bool = True):
    """Global ranks of this rank's context parallel group, in the order of its ranks."""
    return _global_ranks("cp", check_initialized)


def get_hierarchical_context_parallel_groups(check_initialized: bool = True):
    """This rank's group of each level, the innermost first.

    Raises:
        RuntimeError: there are no levels. With ``check_initialized=False`` the result is None instead.
    """
    groups = get_process_groups(check_initialized)
    if groups is None:
        return None
    if not groups.hcp and check_initialized:
        raise RuntimeError(
            "there are no hierarchical context parallel groups: pass hierarchical_context_parallel_sizes "
            "to initialize_model_parallel()."
        )
    return list(groups.hcp) or None


# --- data ---------------------------------------------------------------------------------


def get_data_parallel_group(with_context_parallel: bool = False, check_initialized: bool = True):
    """The ranks with the same part of the model and different samples.

    With ``with_context_parallel`` they are all ranks with different tokens.
    """
    return _group("dp_cp" if with_context_parallel else "dp", check_initialized)


def get_data_parallel_world_size(with_context_parallel: bool = False, check_initialized: bool = True):
    return _size("dp_cp" if with_context_parallel else "dp", check_initialized)


def get_data_parallel_rank(with_context_parallel: bool = False, check_initialized: bool = True):
    return _rank("dp_cp" if with_context_parallel else "dp", check_initialized)


def get_data_parallel_global_ranks(with_context_parallel: bool = False, check_initialized: bool = True):
    return _global_ranks("dp_cp" if with_context_parallel else "dp", check_initialized)


def get_data_parallel_src_rank(with_context_parallel: bool = False, check_initialized: bool = True):
    """The first global rank of this rank's data parallel group."""
    return _first(get_data_parallel_global_ranks(with_context_parallel, check_initialized))


# --- pipeline -----------------------------------------------------------------------------


def get_pipeline_model_parallel_group(check_initialized: bool = True):
    return _group("pp", check_initialized)


def get_pipeline_model_parallel_world_size(check_initialized: bool = True):
    return _size("pp", check_initialized)


def get_pipeline_model_parallel_rank(check_initialized: bool = True):
    return _rank("pp", check_initialized)


def get_pipeline_model_parallel_global_ranks(check_initialized: bool = True):
    return _global_ranks("pp", check_initialized)


def get_pipeline_model_parallel_first_rank(check_initialized: bool = True):
    return _first(_global_ranks("pp", check_initialized))


def get_pipeline_model_parallel_last_rank(check_initialized: bool = True):
    ranks = _global_ranks("pp", check_initialized)
    return ranks[-1] if ranks else None


def _pipeline_neighbour(step: int, check_initialized: bool) -> int | None:
    ranks = _global_ranks("pp", check_initialized)
    return ranks[(ranks.index(dist.get_rank()) + step) % len(ranks)] if ranks else None


def get_pipeline_model_parallel_next_rank(check_initialized: bool = True):
    """Global rank of the stage after this one (the first after the last)."""
    return _pipeline_neighbour(+1, check_initialized)


def get_pipeline_model_parallel_prev_rank(check_initialized: bool = True):
    """Global rank of the stage before this one (the last before the first)."""
    return _pipeline_neighbour(-1, check_initialized)


def get_virtual_pipeline_model_parallel_world_size(check_initialized: bool = True):
    return _virtual_pipeline_size


def get_virtual_pipeline_model_parallel_rank(check_initialized: bool = True):
    return _virtual_pipeline_rank


def set_virtual_pipeline_model_parallel_rank(rank: int) -> None:
    global _virtual_pipeline_rank
    _virtual_pipeline_rank = rank


def is_pipeline_first_stage(ignore_virtual: bool = True, check_initialized: bool = True) -> bool:
    if not ignore_virtual and _virtual_pipeline_rank not in (None, 0):
        return False
    return _rank("pp", check_initialized) in (0, None)


def is_pipeline_last_stage(ignore_virtual: bool = True, check_initialized: bool = True) -> bool:
    last = (_virtual_pipeline_size or 1) - 1
    if not ignore_virtual and _virtual_pipeline_rank not in (None, last):
        return False
    size = _size("pp", check_initialized)
    return size is None or _rank("pp", check_initialized) == size - 1


# --- experts ------------------------------------------------------------------------------


def get_expert_model_parallel_group(check_initialized: bool = True):
    return _group("ep", check_initialized)


def get_expert_model_parallel_world_size(check_initialized: bool = True):
    return _size("ep", check_initialized)


def get_expert_model_parallel_rank(check_initialized: bool = True):
    return _rank("ep", check_initialized)


def get_expert_model_parallel_src_rank(check_initialized: bool = True):
    """The first global rank of this rank's expert parallel group."""
    return _first(_global_ranks("ep", check_initialized))


def get_expert_tensor_parallel_group(check_initialized: bool = True):
    return _group("etp", check_initialized)


def get_expert_tensor_parallel_world_size(check_initialized: bool = True):
    return _size("etp", check_initialized)


def get_expert_tensor_parallel_rank(check_initialized: bool = True):
    return _rank("etp", check_initialized)


def get_expert_data_parallel_group(check_initialized: bool = True):
    return _group("edp", check_initialized)


def get_expert_data_parallel_world_size(check_initialized: bool = True):
    return _size("edp", check_initialized)


def get_expert_data_parallel_rank(check_initialized: bool = True):
    return _rank("edp", check_initialized)


def get_expert_tensor_and_model_parallel_group(check_initialized: bool = True):
    return _group("tp_ep", check_initialized)


def get_expert_tensor_and_model_parallel_world_size(check_initialized: bool = True):
    return _size("tp_ep", check_initialized)


def get_expert_tensor_and_model_parallel_rank(check_initialized: bool = True):
    return _rank("tp_ep", check_initialized)


# --- world --------------------------------------------------------------------------------


def is_rank_0() -> bool:
    """Whether this is global rank 0; True without torch.distributed, where there is only one process."""
    return not dist.is_initialized() or dist.get_rank() == 0


def get_all_ranks(check_initialized: bool = True):
    """This rank's numbers on the axes tp, dp, cp, pp and ep, joined by underscores, for a file name."""
    ranks = [_rank(name, check_initialized) for name in ("tp", "dp", "cp", "pp", "ep")]
    return None if None in ranks else "_".join(map(str, ranks))


# --- Megatron's names that this module does not have ---------------------------------------

_FIXED = "sizes and ranks are those of the groups; call destroy_model_parallel() and initialize_model_parallel(...) for others"
_GLOO = "there are no second groups over gloo. The default process group serves both kinds of tensors (backend cpu:gloo,cuda:nccl): {}"
_ENDS = "the first and the last stage of a pipeline share a tied embedding through get_mesh().groups.ends, which longspan.pipeline uses"
_PARTIAL = "there is no distributed optimizer in parts. FSDP2 shards over dp_shard x cp and copies over dp_replicate: get_mesh().device_mesh"
_BUFFER = "PyTorch's allocator keeps memory for reuse; leave the call out"

#: Megatron's name -> its replacement.
_INSTEAD = {
    "get_data_parallel_group_gloo": _GLOO.format("get_data_parallel_group()"),
    "get_expert_data_parallel_group_gloo": _GLOO.format("get_expert_data_parallel_group()"),
    "get_data_modulo_expert_parallel_group": "get_expert_data_parallel_group()",
    "get_expert_tensor_model_pipeline_parallel_group": "get_expert_tensor_and_model_parallel_group() and "
    "get_pipeline_model_parallel_group(): no group holds both",
    "get_hybrid_data_context_parallel_groups": "no groups are made for hybrid context parallelism: a sample's layout spans "
    "get_data_parallel_group(with_context_parallel=True). See longspan.context_parallel.hybrid",
    "get_embedding_group": _ENDS,
    "get_position_embedding_group": _ENDS,
    "is_rank_in_embedding_group": _ENDS,
    "is_rank_in_position_embedding_group": _ENDS,
    "get_pipeline_model_parallel_split_rank": _ENDS,
    "get_intra_distributed_optimizer_instance_group": _PARTIAL,
    "get_inter_distributed_optimizer_instance_group": _PARTIAL,
    "has_separate_all_gather_group": _PARTIAL,
    "get_global_memory_buffer": _BUFFER,
    "get_global_symmetric_memory_buffer": _BUFFER,
    "destroy_global_memory_buffer": _BUFFER,
    "destroy_global_symmetric_memory_buffer": _BUFFER,
    "is_unitialized": "not model_parallel_is_initialized()",
    "get_nccl_options": "NCCL reads its settings from the environment and NCCL_CONF_FILE",
    "overwrite_nccl_comm_cfgs": "NCCL reads its settings from the environment and NCCL_CONF_FILE",
    "update_pg_timeout": "initialize_model_parallel(distributed_timeout_minutes=...)",
    "create_group": "torch.distributed.new_group(ranks)",
    "create_hierarchical_groups": "hierarchical_groups(ranks, sizes), which gives the ranks of each level",
    "generate_masked_orthogonal_rank_groups": "RankGenerator(...).get_ranks(token)",
    "default_embedding_ranks": _ENDS,
    "default_position_embedding_ranks": _ENDS,
    "set_virtual_pipeline_model_parallel_world_size": _FIXED,
    **{
        f"set_{axis}_{what}": _FIXED
        for axis in (
            *("tensor_model_parallel", "pipeline_model_parallel", "data_parallel"),
            *("expert_model_parallel", "expert_tensor_parallel"),
        )
        for what in ("world_size", "rank")
    },
    "_CONTEXT_PARALLEL_GROUP": "get_context_parallel_group()",
    "_CONTEXT_PARALLEL_GLOBAL_RANKS": "get_context_parallel_global_ranks()",
    "_HIERARCHICAL_CONTEXT_PARALLEL_GROUPS": "get_hierarchical_context_parallel_groups()",
    "_DATA_PARALLEL_GROUP": "get_data_parallel_group()",
    "_DATA_PARALLEL_GROUP_WITH_CP": "get_data_parallel_group(with_context_parallel=True)",
    "_DATA_PARALLEL_GLOBAL_RANKS": "get_data_parallel_global_ranks()",
    "_DATA_PARALLEL_GLOBAL_RANKS_WITH_CP": "get_data_parallel_global_ranks(with_context_parallel=True)",
    "_MODEL_PARALLEL_GROUP": "get_model_parallel_group()",
    "_TENSOR_MODEL_PARALLEL_GROUP": "get_tensor_model_parallel_group()",
    "_TENSOR_AND_CONTEXT_PARALLEL_GROUP": "get_tensor_and_context_parallel_group()",
    "_TENSOR_AND_DATA_PARALLEL_GROUP": "get_tensor_and_data_parallel_group()",
    "_TENSOR_AND_DATA_PARALLEL_GROUP_WITH_CP": "get_tensor_and_data_parallel_group(with_context_parallel=True)",
    "_PIPELINE_MODEL_PARALLEL_GROUP": "get_pipeline_model_parallel_group()",
    "_EXPERT_MODEL_PARALLEL_GROUP": "get_expert_model_parallel_group()",
    "_EXPERT_DATA_PARALLEL_GROUP": "get_expert_data_parallel_group()",
    "_EXPERT_TENSOR_PARALLEL_GROUP": "get_expert_tensor_parallel_group()",
    "_EXPERT_TENSOR_AND_MODEL_PARALLEL_GROUP": "get_expert_tensor_and_model_parallel_group()",
}


def __getattr__(name: str):
    """Raises an AttributeError; for a name of Megatron, the message names the replacement."""
    if name in _INSTEAD:
        raise AttributeError(f"longspan.parallel_state has no {name}. Instead: {_INSTEAD[name]}.")
    known = [known for known in globals() if not known.startswith("_")]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}.{did_you_mean(name, known)}")
