"""The start of a world."""

import socket

import pytest

import pool
from longspan.config.sizes import MeshSizes
from longspan.errors import UserError
from longspan.mesh.mesh import ParallelMesh, init_distributed


def groups_apart(sizes):
    """What travels in a layer has other groups than FSDP, whose messages it need not wait for."""
    mesh = ParallelMesh.build(sizes)
    of_fsdp = [mesh.device_mesh.get_group("fsdp"), mesh.expert_mesh.get_group("edp")]
    for group in (mesh.groups.cp, mesh.groups.dp_cp, mesh.groups.tp_ep):
        assert all(group is not other for other in of_fsdp)


@pytest.mark.parametrize(
    "sizes", [MeshSizes(dp_shard=2, ep=2), MeshSizes(cp=2, ep=2), MeshSizes(cp=2), MeshSizes(dp_shard=2)]
)
def test_layers_do_not_share_groups_with_fsdp(sizes):
    pool.run(2, groups_apart, sizes)


def test_a_machine_that_cannot_be_reached_is_told_of(monkeypatch):
    with socket.socket() as taken:  # bound, and nobody listens
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        about = {
            "RANK": 1,
            "WORLD_SIZE": 2,
            "LOCAL_WORLD_SIZE": 1,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        for name, value in about.items():
            monkeypatch.setenv(name, str(value))
        with pytest.raises(UserError, match=f"rank 1 found nobody at 127.0.0.1:{port} within 1 s .*firewall"):
            init_distributed("cpu", 1.0, start_s=1.0)
