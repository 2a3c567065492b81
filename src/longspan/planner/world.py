"""This one process as any rank of a run's whole world: process groups that send nothing.

The groups are of torch's ``fake`` backend (``torch.testing._internal.distributed.fake_pg``), which returns at once from
every collective and every message and leaves the buffers as they are. It is a C++ backend with the same registration
in torch 2.11 to 2.13, and torch's own tools for memory estimates use it. A backend of our own in Python would have to
follow each new collective and would be slower by a Python call for each message.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch.distributed as dist

from longspan.config.sizes import MeshSizes
from longspan.errors import UserError
from longspan.mesh.mesh import ParallelMesh


@contextlib.contextmanager
def world_of(sizes: MeshSizes, rank: int, device_type: str = "cpu") -> Iterator[ParallelMesh]:
    """A context in which this process is ``rank`` of the world of ``sizes``; gives the mesh of that world.

    Raises:
        UserError: this process has a process group already, or the sizes make no mesh.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise UserError("a plan needs a process of its own: this process has a process group already.")
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=sizes.world_size)
    try:
        yield ParallelMesh.build(sizes, device_type, only_own=True)
    except ValueError as error:
        raise UserError(str(error)) from None
    finally:
        dist.destroy_process_group()
