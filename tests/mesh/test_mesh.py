"""The start of a world."""

import socket

import pytest

from longspan.errors import UserError
from longspan.mesh.mesh import init_distributed


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
