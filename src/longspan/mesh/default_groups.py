"""The one default of public constructors: no process groups given -> those of the installed mesh.

``parallel_state`` installs it for users. Inside longspan nothing but this default reads it: groups are arguments.
"""

from __future__ import annotations

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from longspan.mesh.mesh import ParallelMesh, ProcessGroupCollection


class Installed:
    """The mesh that ``parallel_state`` has installed; None before, and after ``destroy_model_parallel``."""

    mesh: ParallelMesh | None = None


installed = Installed()


def installed_mesh() -> ParallelMesh:
    """The installed mesh.

    Raises:
        RuntimeError: there is none.
    """
    if installed.mesh is None:
        raise RuntimeError(
            "model parallel groups are not initialised: call longspan.parallel_state."
            "initialize_model_parallel(...) on every rank first."
        )
    return installed.mesh


def process_groups(pg_collection: ProcessGroupCollection | None = None) -> ProcessGroupCollection:
    """The given groups, or the installed ones (RuntimeError when there are none)."""
    return installed_mesh().groups if pg_collection is None else pg_collection


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
