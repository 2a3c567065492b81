"""The axis that each process group of a mesh belongs to."""

from __future__ import annotations

import torch.distributed as dist

from longspan.mesh.mesh import ParallelMesh, ProcessGroupCollection


def groups_of_axes(mesh: ParallelMesh, groups: ProcessGroupCollection) -> dict[str, dist.ProcessGroup]:
    """Axis -> its process group. Where a group serves several axes, it has the name of the first one in this list.

    Args:
        groups: those of the run's model, which differ from the mesh's in a hybrid run.
    """
    levels = ("cp inner", "cp outer") if len(groups.hcp) == 2 else [f"cp level {i}" for i in range(9)]
    named: list[tuple[str, dist.ProcessGroup | None]] = [
        ("tp", groups.tp),
        ("cp", groups.cp),
        *zip(levels, groups.hcp),
        ("ep", groups.ep),
        ("etp", groups.etp),
        *((axis, mesh.device_mesh.get_group(axis)) for axis in ("fsdp", "dp_replicate")),
        *((axis, mesh.expert_mesh.get_group(axis)) for axis in ("edp", "edp_replicate")),
        ("pp", groups.pp),
        ("ends", groups.ends),
        ("tp_ep", groups.tp_ep),
        ("dp", groups.dp),
        ("dp_cp", groups.dp_cp),
        ("tp_cp", groups.tp_cp),
        ("tp_pp", groups.tp_pp),
        ("tp_dp", groups.tp_dp),
        ("tp_dp_cp", groups.tp_dp_cp),
        ("world", dist.group.WORLD),
    ]
    found: dict[str, dist.ProcessGroup] = {}
    seen: set[str] = set()
    for axis, group in named:
        if group is not None and group.group_name not in seen:
            seen.add(group.group_name)
            found[axis] = group
    return found


def axes_of_groups(mesh: ParallelMesh, groups: ProcessGroupCollection) -> dict[str, str]:
    """The name of each process group -> its axis; groups of this rank alone are called ``alone``."""
    # The ends of a pipeline are a part of it.
    return {
        group.group_name: ("pp" if axis == "ends" else axis) if dist.get_world_size(group) > 1 else "alone"
        for axis, group in groups_of_axes(mesh, groups).items()
    }
