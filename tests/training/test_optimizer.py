"""The optimizer against torch's own on the same parameters whole: the same bits, whatever the ranks hold."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import pool
import tiny
from longspan.config.sizes import MeshSizes
from longspan.mesh.mesh import ParallelMesh
from longspan.training.optimizer import make_optimizer

SHAPES = {"weight": (5, 3), "norm": (4,), "one": (1, 2), "expert": (3, 2, 2), "unused": (2, 2)}


def module(mesh=None):
    """Parameters and gradients by name; on a mesh over two ranks, of which one holds nothing of ``one``."""
    g = torch.Generator().manual_seed(0)
    made = torch.nn.Module()
    for name, shape in SHAPES.items():
        value, gradient = (torch.randn(shape, generator=g) for _ in range(2))
        if mesh is not None:
            axes = mesh.groups.expert_mesh if name == "expert" else mesh.device_mesh["fsdp"]
            cut = [Shard(0), Replicate()][: axes.ndim]
            value, gradient = (distribute_tensor(x, axes, cut) for x in (value, gradient))
        parameter = torch.nn.Parameter(value)
        parameter.grad = None if name == "unused" else gradient
        made.register_parameter(name, parameter)
    return made


def three_steps(kind):
    """Parameters and moments of three steps on cut parameters, made whole, and those of torch's AdamW without a cut."""
    keys = {"optimizer": kind, "weight_decay": 0.1, "adam_beta2": 0.95, "adam_epsilon": 1e-6}
    config = tiny.tiny_run("data", dist.get_world_size(), **keys).config
    cut = module(ParallelMesh.build(MeshSizes(dp_shard=dist.get_world_size())))
    optimizer = make_optimizer(cut, config)
    whole = module()
    matrices = [whole.weight, whole.one, whole.expert, whole.unused]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": [whole.norm], "weight_decay": 0.0}]
    plain = torch.optim.AdamW(
        groups, lr=config.learning_rate, betas=(0.9, 0.95), eps=1e-6, fused=kind.endswith("fused")
    )
    for _ in range(3):
        optimizer.step()
        plain.step()
    for (name, a), (_, b) in zip(cut.named_parameters(), whole.named_parameters()):
        assert torch.equal(a.full_tensor(), b), name
        assert optimizer.state.get(a, {}).keys() == plain.state.get(b, {}).keys(), name
        for key, moment in plain.state.get(b, {}).items():
            held = optimizer.state[a][key]
            # A checkpoint cuts the moments as it cuts the parameters.
            assert isinstance(held, DTensor) == (key != "step")
            assert torch.equal(held.full_tensor() if key != "step" else held, moment), (name, key)


@pytest.mark.parametrize("kind", ["adamw_torch_fused", "adamw_torch"])
def test_each_rank_updates_what_it_holds(kind):
    pool.run(2, three_steps, kind)
