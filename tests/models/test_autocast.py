"""Our layers and our attention in somebody's autocast: PyTorch's types, and bfloat16's distance from float32."""

import pytest
import torch
from test_gpt import LENGTH, VOCAB, batch, transformer_config

import pool
from longspan.config.sizes import MeshSizes
from longspan.context_parallel import SequenceLayout, context_parallel_attention
from longspan.mesh.mesh import ParallelMesh
from longspan.models import GPTModel
from longspan.parallelize import parallelize


def losses_and_gradients(autocast, tiles):
    """Of two ranks; float32 weights."""
    sizes = MeshSizes(cp=2)
    mesh = ParallelMesh.build(sizes)
    with torch.device("meta"):
        config = transformer_config(sizes, params_dtype=torch.float32, init_method_std=0.1)
        model = GPTModel(config, VOCAB, LENGTH, pg_collection=mesh.groups)
    parallelize(model, mesh, seed=3, device=torch.device("cpu"), mlp_tiles=tiles)
    tokens, labels, cu = batch("packed")
    layout = SequenceLayout.make("auto", LENGTH, 2, cu_seqlens=cu)
    rank = torch.distributed.get_rank()
    tokens, labels = (layout.shard(x, rank, dim=1) for x in (tokens, labels))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(tokens, labels=labels, layout=layout)
    assert loss.dtype == torch.float32
    loss.sum().backward()
    return loss.detach(), {n: p.grad.full_tensor() for n, p in model.named_parameters()}


@pytest.mark.parametrize("tiles", [1, 3])
def test_a_model_in_autocast(tiles):
    (loss, gradients), *_ = pool.run(2, losses_and_gradients, True, tiles)
    (expected, exact), *_ = pool.run(2, losses_and_gradients, False, tiles)
    difference = (loss - expected).abs().max()
    assert 1e-5 < difference < 0.05  # it did compute in bfloat16
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32
        assert (gradient - exact[name]).norm() < 0.05 * exact[name].norm(), name


def test_attention_takes_autocasts_type():
    """float32 queries and keys beside a bfloat16 value, as autocast leaves them behind rotary embeddings."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(40, heads, 16, generator=g) for heads in (4, 2, 2))
    layout = SequenceLayout.make("auto", 40, 1)
    narrow = [x.bfloat16() for x in (q, k, v)]
    expected, _ = context_parallel_attention(*narrow, group=None, layout=layout)
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = context_parallel_attention(q, k, v.bfloat16(), group=None, layout=layout)
        double, _ = context_parallel_attention(*(x.double() for x in (q, k, v)), group=None, layout=layout)
    assert out.dtype == torch.bfloat16
    assert lse.dtype == torch.float32
    assert torch.equal(out, expected)
    assert double.dtype == torch.float64
