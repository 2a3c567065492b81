"""finalize_model_grads: gradients of a plain model at every layout are one process's. fp64."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import longspan
import pool
from longspan import TransformerConfig, finalize_model_grads, parallel_state
from longspan.config.sizes import MeshSizes
from longspan.context_parallel import SequenceLayout
from longspan.mesh.mesh import ParallelMesh
from longspan.models import GPTModel
from longspan.tensor_parallel import ColumnParallelLinear
from longspan.training.optimizer import gradient_norm

VOCAB, LENGTH, SAMPLES = 300, 37, 2


def config(tp, **more):
    return TransformerConfig(
        **dict(
            num_layers=2,
            hidden_size=16,
            num_attention_heads=4,
            num_query_groups=2,
            ffn_hidden_size=24,
            qk_layernorm=True,
            tensor_model_parallel_size=tp,
            params_dtype=torch.float64,
            init_method_std=0.3,
        )
        | more
    )


def samples():
    """tokens, labels [samples, t]; most of the last sample's targets are masked."""
    g = torch.Generator().manual_seed(1)
    tokens = torch.randint(VOCAB, (SAMPLES, LENGTH), generator=g)
    labels = torch.randint(VOCAB, (SAMPLES, LENGTH), generator=g)
    labels[0, 5:8], labels[1, 9:] = -100, -100
    return tokens, labels


def gradients(tp, cp, sequence_parallel, by_count):
    """The gradient norm and whole gradients; each data parallel rank takes its samples one by one."""
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp, context_parallel_size=cp)
    model = GPTModel(
        config(tp, sequence_parallel=sequence_parallel, context_parallel_size=cp), VOCAB, LENGTH, seed=3
    )
    tokens, labels = samples()
    layout = SequenceLayout.zigzag(LENGTH, cp, multiple_of=tp if sequence_parallel else 1)
    dp, cp_rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_context_parallel_rank()
    total, own = (labels != -100).sum(), 0
    for i in range(parallel_state.get_data_parallel_rank(), SAMPLES, dp):
        targets = layout.shard(labels[i : i + 1], cp_rank, dim=1, pad_value=-100)
        loss = model(layout.shard(tokens[i : i + 1], cp_rank, dim=1), labels=targets, layout=layout).sum()
        (loss if by_count else loss / total).backward()
        own += (targets != -100).sum()
    finalize_model_grads(model, num_tokens=own if by_count else None)
    return gradient_norm(model).item(), {n: p.grad.full_tensor() for n, p in model.named_parameters()}


_reference = []


def reference():
    if not _reference:
        _reference.append(pool.run(1, gradients, 1, 1, False, False)[0])
    return _reference[0]


@pytest.mark.parametrize(
    ("world", "tp", "cp", "sequence_parallel", "by_count"),
    [
        (1, 1, 1, False, True),
        (2, 2, 1, False, False),
        (2, 2, 1, True, False),
        (2, 1, 2, False, False),
        (3, 1, 3, False, True),
        (2, 1, 1, False, True),
        (4, 1, 2, False, False),  # dp 2
        (4, 2, 2, True, True),
    ],
)
def test_gradients_are_those_of_one_process(world, tp, cp, sequence_parallel, by_count):
    norm, expected = reference()
    for got_norm, got in pool.run(world, gradients, tp, cp, sequence_parallel, by_count):
        assert got_norm == pytest.approx(norm, rel=1e-10)
        assert got.keys() == expected.keys()
        # a gradient that is zero but for rounding (of a key's bias) is measured against the largest of all
        least = 1e-5 * max(grad.abs().max() for grad in expected.values())
        for name, ref in expected.items():
            error = ((got[name] - ref).abs().max() / ref.abs().max().clamp_min(least)).item()
            assert error <= 1e-10, f"{name}: {error:.1e}"


def norm_of_stages(sizes, sharded):
    """The gradient norm of a pipeline whose stages have weights of different sizes, and what it has to be."""
    mesh = ParallelMesh.build(sizes)
    stage, c = dist.get_rank(mesh.groups.pp), config(sizes.tp, perform_initialization=False)
    layer = ColumnParallelLinear(3, 4 + 2 * stage, c, bias=False, tp_group=mesh.groups.tp_mesh)
    if sharded:
        fully_shard(layer, mesh=mesh.device_mesh["dp_replicate", "fsdp"])
    layer.weight.grad = torch.full_like(layer.weight, 1.0 + stage)
    squares = [12.0, 18.0 * 4][: sizes.pp]
    return gradient_norm(layer, sizes.pp).item(), sum(squares) ** 0.5


@pytest.mark.parametrize("sharded", [True, False])
@pytest.mark.parametrize(
    "sizes",
    [MeshSizes(pp=2, tp=2), MeshSizes(pp=2, dp_shard=2), MeshSizes(pp=2, dp_replicate=2, tp=2)],
    ids=str,
)
def test_each_stage_of_a_pipeline_counts_once_in_the_gradient_norm(sizes, sharded):
    for norm, expected in pool.run(sizes.world_size, norm_of_stages, sizes, sharded):
        assert norm == pytest.approx(expected, rel=1e-6)


def plain_modules():
    """Modules of one's own, bfloat16, shared, frozen and unused parameters, a rank without a backward pass."""
    parallel_state.initialize_model_parallel(context_parallel_size=dist.get_world_size())
    rank = dist.get_rank()
    first, second = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False, dtype=torch.bfloat16)
    unused, frozen = nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False)
    first.weight.grad = torch.full((2, 2), 1.0 + rank)
    if rank == 1:
        second.weight.grad = torch.full((2, 2), 3.0, dtype=torch.bfloat16)
    finalize_model_grads([first, second, unused, frozen, nn.ModuleList([first])], num_tokens=1 + rank)
    assert torch.equal(first.weight.grad, torch.full((2, 2), 1.0))  # (1 + 2) / 3, once
    assert torch.equal(second.weight.grad, torch.full((2, 2), 1.0, dtype=torch.bfloat16))
    assert unused.weight.grad is None
    assert frozen.weight.grad is None
    finalize_model_grads(first, num_tokens=0)  # no token anywhere
    assert torch.equal(first.weight.grad, torch.full((2, 2), 2.0))
    with pytest.raises(
        ValueError, match=r"FSDPLinear reduces gradients in backward already.*count them twice"
    ):
        finalize_model_grads(nn.Sequential(fully_shard(nn.Linear(2, 2))))
    with pytest.raises(ValueError, match="DistributedDataParallel"):
        finalize_model_grads(nn.parallel.DistributedDataParallel(nn.Linear(2, 2)))


def test_modules_of_ones_own():
    pool.run(2, plain_modules)


def without_groups():
    with pytest.raises(RuntimeError, match="initialize_model_parallel"):
        finalize_model_grads(nn.Linear(2, 2))


def test_groups_are_needed():
    pool.run(1, without_groups)
    assert longspan.finalize_model_grads is finalize_model_grads
