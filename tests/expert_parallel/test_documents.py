"""The users' own code with experts, with its imports changed; and a loop of one's own against one process."""

import pytest
import torch
import torch.distributed as dist

import pool
from longspan import TransformerConfig, finalize_model_grads, parallel_state
from longspan.config.sizes import MeshSizes
from longspan.expert_parallel import GroupedMLP, MoELayer, MoERouter
from longspan.mesh.mesh import ParallelMesh
from longspan.models import GPTModel
from longspan.tensor_parallel import model_parallel_seed

EXPERTS, HIDDEN = 4, 16


def block():
    """The notes' MoEBlock: a router, experts that take scores and indices, and the balancing loss."""
    tp = 2 if dist.get_world_size() == 4 else 1
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp, expert_model_parallel_size=2, expert_tensor_parallel_size=tp
    )
    model_parallel_seed(7)
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=2,
        ffn_hidden_size=24,
        num_moe_experts=EXPERTS,
        moe_router_topk=2,
        moe_aux_loss_coeff=0.01,
        moe_grouped_gemm=True,
        expert_model_parallel_size=2,
        expert_tensor_parallel_size=tp,
        tensor_model_parallel_size=tp,
        params_dtype=torch.float64,
    )
    router = MoERouter(config)
    experts = GroupedMLP(num_local_experts=EXPERTS // 2, config=config)
    torch.manual_seed(3 + dist.get_rank() // tp)
    x = torch.randn(2, 5, HIDDEN, dtype=torch.float64)
    scores, indices = router(x)
    assert scores.shape == indices.shape == (2, 5, 2)
    out = experts(x, scores, indices)
    assert router.compute_aux_loss(scores, indices) is router.aux_loss
    even = torch.arange(2 * 5 * 2).view(2, 5, 2) % EXPERTS
    torch.testing.assert_close(router.compute_aux_loss(scores, even).item(), 0.01, rtol=1e-12, atol=0)
    layer = MoELayer(config)
    layer.router, layer.experts = router, experts
    whole, loss = layer(x)
    torch.testing.assert_close(whole, out, rtol=1e-12, atol=1e-12)
    assert loss.item() == pytest.approx(router.aux_loss.item())
    # Megatron-LM's way: tokens sorted by expert, and how many each of this rank's has.
    counts = torch.tensor([3, 4])
    rows = torch.randn(7, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    alone = experts(rows, counts)
    parts = [experts(rows, torch.tensor([7, 0]))[:3], experts(rows, torch.tensor([0, 7]))[3:]]
    torch.testing.assert_close(alone, torch.cat(parts), rtol=1e-12, atol=1e-12)
    # Every rank of an expert's group returns the whole gradient of the rows.
    inputs = rows.clone().requires_grad_()
    experts(inputs, counts).square().sum().backward()
    parts = [torch.empty_like(inputs.grad) for _ in range(tp)]
    dist.all_gather(parts, inputs.grad, group=parallel_state.get_expert_tensor_parallel_group())
    step = 1e-6 * torch.randn(7, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    change = experts(rows + step, counts).square().sum() - experts(rows - step, counts).square().sum()
    for grad in parts:
        torch.testing.assert_close((grad * step).sum() * 2, change.detach(), rtol=1e-6, atol=1e-12)
    with pytest.raises(ValueError, match="their sum is the number of rows"):
        experts(rows, torch.tensor([3, 3]))
    parallel_state.destroy_model_parallel()


@pytest.mark.parametrize("world", [2, 4])
def test_the_notes_own_code(world):
    pool.run(world, block)


def own_loop(sizes):
    """Loss and whole gradients of a GPTModel with experts without FSDP2; each rank has its own sequences."""
    mesh = ParallelMesh.build(sizes)
    config = TransformerConfig(
        num_layers=2,
        hidden_size=HIDDEN,
        num_attention_heads=2,
        num_moe_experts=EXPERTS,
        moe_ffn_hidden_size=12,
        moe_layer_freq=[0, 1],
        params_dtype=torch.float64,
        expert_model_parallel_size=sizes.ep,
        expert_tensor_parallel_size=sizes.etp,
        tensor_model_parallel_size=sizes.tp,
        sequence_parallel=sizes.tp > 1,
    )
    model = GPTModel(config, 50, 8, pg_collection=mesh.groups, seed=2)
    g = torch.Generator().manual_seed(4)
    tokens = torch.randint(50, (4, 8), generator=g)
    mine = tokens.chunk(sizes.dp)[dist.get_rank(mesh.groups.dp)]
    loss = model(mine, labels=mine).sum() / tokens.numel()
    loss.backward()
    finalize_model_grads(model, pg_collection=mesh.groups)
    dist.all_reduce(loss, group=mesh.groups.dp)
    return loss.item(), {name: p.grad.full_tensor() for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    "sizes", [MeshSizes(dp_shard=2, ep=2), MeshSizes(tp=2, dp_shard=2, ep=2, etp=2)], ids=str
)
def test_a_loop_of_ones_own_sums_gradients_of_experts(sizes):
    loss, expected = pool.run(1, own_loop, MeshSizes())[0]
    got_loss, got = pool.run(sizes.world_size, own_loop, sizes)[0]
    assert got_loss == pytest.approx(loss, rel=1e-12)
    for name, whole in expected.items():
        torch.testing.assert_close(
            got[name], whole, rtol=1e-10, atol=1e-13, msg=lambda m, n=name: f"{n}: {m}"
        )


def divided_losses():
    """num_tokens would divide the balancing losses too."""
    parallel_state.initialize_model_parallel()
    config = TransformerConfig(
        num_layers=1, hidden_size=16, num_attention_heads=2, num_moe_experts=4, moe_aux_loss_coeff=0.1
    )
    model = GPTModel(config, 50, 8, seed=2)
    with pytest.raises(
        ValueError, match="divides all gradients, and with them those of the balancing losses"
    ):
        finalize_model_grads(model, num_tokens=8)
    with torch.autocast("cpu", torch.bfloat16):
        tokens = torch.arange(8).unsqueeze(0)
        model(tokens, labels=tokens).sum().backward()
    parallel_state.destroy_model_parallel()


def test_gradients_that_would_be_divided_twice_are_refused():
    pool.run(1, divided_losses)


def test_bad_input_has_one_message():
    base = dict(num_layers=2, hidden_size=16, num_attention_heads=2, num_moe_experts=4)
    for changes, words in (
        ({"moe_router_topk": 5}, "moe_router_topk 5 is more than num_moe_experts 4"),
        ({"moe_router_topk": 1}, "the score is always 1, so the router learns nothing"),
        ({"moe_expert_capacity_factor": 0.0}, "moe_expert_capacity_factor 0.0: a number above 0"),
        ({"moe_router_load_balancing_type": "sinkhorn"}, "'sinkhorn': one of aux_loss"),
        (
            {"moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss"], "moe_aux_loss_coeff": [0.1]},
            "2 kinds and moe_aux_loss_coeff 1",
        ),
        (
            {"moe_router_num_groups": 2, "moe_router_group_topk": 1, "moe_router_topk": 3},
            "more than the 2 experts of the 1 chosen groups",
        ),
        ({"expert_model_parallel_size": 3}, "num_moe_experts 4 is not divisible by expert_parallel_size 3"),
        (
            {"moe_ffn_hidden_size": 10, "expert_tensor_parallel_size": 4},
            "is not divisible by expert_tensor_parallel_size 4",
        ),
        ({"moe_router_enable_expert_bias": True}, "needs moe_router_score_function: sigmoid"),
        ({"moe_layer_freq": [0, 0]}, "no layer has experts"),
        ({"moe_token_dispatcher_type": "flex"}, "'flex': one of alltoall, allgather"),
        (
            {"num_moe_experts": None, "moe_aux_loss_coeff": 0.1},
            "moe_aux_loss_coeff 0.1 has no effect without",
        ),
        ({"moe_router_load_balancing_type": "seq_aux_loss"}, "no effect with moe_aux_loss_coeff 0"),
        ({"moe_token_drop_policy": "position"}, "no effect without moe_expert_capacity_factor"),
        (
            {"moe_shared_expert_intermediate_size": 9, "tensor_model_parallel_size": 2},
            "9 is not divisible by tensor",
        ),
        ({"num_moe_experts": None, "moe_shared_expert_gate": True}, "has no effect without num_moe_experts"),
    ):
        with pytest.raises(ValueError, match=words):
            TransformerConfig(**base | changes)
