"""The one default of public constructors: no process groups given -> the installed ones.

This is the only place inside longspan that looks up at ``parallel_state``.
"""

from __future__ import annotations

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from longspan.mesh.mesh import ProcessGroupCollection


def process_groups(pg_collection: ProcessGroupCollection | None = None) -> ProcessGroupCollection:
    """The given groups, or the installed ones (RuntimeError when there are none)."""
    if pg_collection is not None:
        return pg_collection
    from longspan import parallel_state

    groups = parallel_state.get_process_groups()
    assert groups is not None
    return groups


def tensor_parallel_mesh(tp_group: dist.ProcessGroup | DeviceMesh | None) -> DeviceMesh:
    """The 1-D DeviceMesh tensor parallel weights live on.

    Parameters that FSDP2 shards further must lie on a slice of the same root mesh, so the
    models pass ``ProcessGroupCollection.tp_mesh``; a bare group gets a mesh of its own.
    """
    if isinstance(tp_group, DeviceMesh):
        return tp_group
    if tp_group is None:
        mesh = process_groups().tp_mesh
        assert mesh is not None
        return mesh
    # "nccl", or "cpu:gloo,cuda:nccl" as init_distributed starts it
    device_type = "cuda" if "nccl" in str(dist.get_backend(tp_group)) else "cpu"
    return DeviceMesh.from_group(tp_group, device_type)
