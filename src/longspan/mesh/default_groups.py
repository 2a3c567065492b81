"""The default groups of public constructors: without process groups they take the installed mesh's groups.

``parallel_state`` installs the mesh for users. Inside longspan only these defaults read it, because groups
are arguments everywhere else.
"""

from __future__ import annotations

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from longspan.mesh.mesh import ParallelMesh, ProcessGroupCollection


class Installed:
    """Holds the mesh that ``parallel_state`` installs; None before, and after ``destroy_model_parallel``."""

    mesh: ParallelMesh | None = None


installed = Installed()


def installed_mesh() -> ParallelMesh:
    """The installed mesh.

    Raises:
        RuntimeError: no mesh is installed.
    """
    if installed.mesh is None:
        raise RuntimeError(
            "model parallel groups are not initialised: call longspan.parallel_state."
            "initialize_model_parallel(...) on every rank first."
        )
    return installed.mesh


def process_groups(pg_collection: ProcessGroupCollection | None = None) -> ProcessGroupCollection:
    """The given groups, or the installed groups (RuntimeError if no mesh is installed)."""
    return installed_mesh().groups if pg_collection is None else pg_collection


def tensor_parallel_mesh(tp_group: dist.ProcessGroup | DeviceMesh | None) -> DeviceMesh:
    """The 1-D DeviceMesh of tensor parallel weights.

    Parameters that FSDP2 shards further must lie on a slice of the same root mesh, so the
    models pass ``ProcessGroupCollection.tp_mesh``; for a group a new mesh is made.
    """
    if isinstance(tp_group, DeviceMesh):
        return tp_group
    if tp_group is None:
        mesh = process_groups().tp_mesh
        assert mesh is not None
        return mesh
    # The backend is "nccl", or "cpu:gloo,cuda:nccl" if init_distributed has started it.
    device_type = "cuda" if "nccl" in str(dist.get_backend(tp_group)) else "cpu"
    return DeviceMesh.from_group(tp_group, device_type)
