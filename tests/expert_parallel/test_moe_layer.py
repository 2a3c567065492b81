"""MoELayer against plain PyTorch at every mix of ranks: outputs, balancing losses and all gradients. fp64."""

import pytest
import torch
import torch.distributed as dist

import moe_reference as plain
import pool
from longspan import TransformerConfig
from longspan.config.sizes import MeshSizes
from longspan.expert_parallel import MoELayer
from longspan.mesh.mesh import ParallelMesh
from longspan.tensor_parallel import init_weights, model_parallel_seed

ROWS, BATCH, HIDDEN = 12, 2, 16


def config_of(sizes, **changes):
    changes = {name: value for name, value in changes.items() if name not in ("rows", "ties")}
    defaults = dict(
        num_layers=2,
        hidden_size=HIDDEN,
        num_attention_heads=2,
        num_moe_experts=8,
        moe_router_topk=2,
        moe_ffn_hidden_size=24,
        gated_linear_unit=True,
        activation_func="silu",
        add_bias_linear=False,
        params_dtype=torch.float64,
        init_method_std=0.5,
        moe_aux_loss_coeff=0.3,
        moe_z_loss_coeff=0.1,
        tensor_model_parallel_size=sizes.tp,
        expert_model_parallel_size=sizes.ep,
        expert_tensor_parallel_size=sizes.etp,
        sequence_parallel=sizes.tp > 1,
    )
    return TransformerConfig(**defaults | changes)


def data(batch=BATCH, rows=ROWS):
    g = torch.Generator().manual_seed(5)
    return [torch.randn(rows, batch, HIDDEN, generator=g, dtype=torch.float64) for _ in range(2)]


def whole_gradients(layer, groups):
    """Name -> whole gradient, summed over the ranks that saw other rows."""
    found = {}
    for name, p in layer.named_parameters():
        grad = torch.zeros_like(p) if p.grad is None else p.grad
        expert = ".experts." in f".{name}" and "shared" not in name
        held = grad.to_local().clone()
        dist.all_reduce(held, group=groups.edp if expert else groups.dp_cp)
        found[name] = type(grad).from_local(held, grad.device_mesh, grad.placements).full_tensor()
    return found


def made(config, groups, changes):
    """The layer with the weights of seed 3; with ``ties`` all experts have the same score, and the first are chosen."""
    model_parallel_seed(1, 0)
    layer = MoELayer(config, 1, groups)
    init_weights(layer, 3)
    if changes.get("ties"):
        torch.nn.init.zeros_(layer.router.weight.to_local())
    return layer.train()


def at(sizes, changes):
    """Output, loss and gradients of the layer: each data parallel rank has some columns, tensor parallel ones some rows."""
    mesh = ParallelMesh.build(sizes)
    config = config_of(sizes, **changes)
    layer = made(config, mesh.groups, changes)
    x, up = (t.chunk(sizes.dp, 1)[dist.get_rank(mesh.groups.dp)] for t in data(4, changes.get("rows", ROWS)))
    if config.sequence_parallel:
        x, up = (t.chunk(sizes.tp, 0)[dist.get_rank(mesh.groups.tp)] for t in (x, up))
    x = x.clone().requires_grad_()
    out, loss = layer(x)
    (out * up).sum().backward()
    found = [t.detach() for t in (out, x.grad)]
    for i, t in enumerate(found):
        if config.sequence_parallel:
            parts = [torch.empty_like(t) for _ in range(sizes.tp)]
            dist.all_gather(parts, t.contiguous(), group=mesh.groups.tp)
            t = torch.cat(parts, 0)
        parts = [torch.empty_like(t) for _ in range(sizes.dp)]
        dist.all_gather(parts, t.contiguous(), group=mesh.groups.dp)
        found[i] = torch.cat(parts, 1)
    return *found, loss, whole_gradients(layer, mesh.groups), sent_and_counted(layer, mesh.groups, x)


def sent_and_counted(layer, groups, x):
    """Rows that left this rank, and the distinct pairs of a row and another rank that holds an expert it chose."""
    _, indices = layer.router(x)
    own, tensor = dist.get_rank(), dist.get_process_group_ranks(groups.etp)
    expert = dist.get_process_group_ranks(groups.ep)
    per_rank, pairs = layer.experts.num_local_experts, 0
    for row in indices.reshape(-1, indices.shape[-1]).tolist():
        ranks = {expert[e // per_rank] + other - own for e in row for other in tensor}
        pairs += len(ranks - {own})
    return layer.experts.dispatcher.sent, pairs


def reference(changes, columns):
    """The same on one process; each of ``columns`` groups of columns is a call with its own mean losses."""
    mesh = ParallelMesh.build(MeshSizes())
    config = config_of(MeshSizes(), **changes)
    layer = made(config, mesh.groups, changes)
    weights = {n: p.detach().to_local().clone().requires_grad_() for n, p in layer.named_parameters()}
    x, up = data(4, changes.get("rows", ROWS))
    x.requires_grad_()
    outs, losses = [], []
    for part in x.chunk(columns, 1):
        s, b = part.shape[:2]
        flat = part.reshape(-1, HIDDEN)
        scores, indices, probabilities, logits = plain.route(flat, weights["router.weight"], config)
        sets = [torch.arange(s) * b + j for j in range(b)]
        loss = plain.balance(
            probabilities, indices, {k: sets for k in config.balancing}, s * b, config.balancing, config
        )
        losses.append(loss)
        z = config.moe_z_loss_coeff * logits.logsumexp(1).square().mean()
        if config.moe_expert_capacity_factor:
            keep = plain.kept(scores, indices, sets, config)
            scores = scores * torch.zeros_like(scores).scatter(1, indices, keep.to(scores))
        of = {n: weights.get(f"experts.{n}_weight") for n in ("gate", "up", "down")}
        of |= {
            f"{n}_bias": weights[f"experts.{n}_bias"]
            for n in ("gate", "up", "down")
            if f"experts.{n}_bias" in weights
        }
        y = plain.experts(flat, scores, of, config)
        if "shared_experts.linear_up.weight" in weights:
            w = {n: weights[f"shared_experts.linear_{n}.weight"] for n in ("gate", "up", "down")}
            shared = (torch.nn.functional.silu(flat @ w["gate"].T) * (flat @ w["up"].T)) @ w["down"].T
            if config.moe_shared_expert_gate:
                shared = shared * (flat @ weights["shared_experts.gate.weight"].T).sigmoid()
            y = y + shared
        outs.append((y.view(s, b, HIDDEN), loss + z))
    out = torch.cat([y for y, _ in outs], 1)
    ((out * up).sum() + sum(extra for _, extra in outs)).backward()
    return out.detach(), x.grad, [loss.detach() for loss in losses], {n: w.grad for n, w in weights.items()}


LAYOUTS = {
    "one": MeshSizes(etp=1),
    "ep2": MeshSizes(dp_shard=2, ep=2),
    "ep4": MeshSizes(dp_shard=4, ep=4),
    "ep2 x edp2": MeshSizes(dp_shard=4, ep=2),
    "tp2": MeshSizes(tp=2),
    "tp2 etp1": MeshSizes(tp=2, etp=1),
    "tp2 x ep2 folded": MeshSizes(tp=2, ep=2, etp=1),
    "ep2 x etp2": MeshSizes(dp_shard=4, ep=2, etp=2),
    "tp2 x ep2 x etp2": MeshSizes(tp=2, dp_shard=2, ep=2, etp=2),
}
OPTIONS = {
    "plain": {},
    "allgather": {"moe_token_dispatcher_type": "allgather"},
    "no sequence parallelism": {"sequence_parallel": False},
    "biases": {"add_bias_linear": True, "gated_linear_unit": False, "activation_func": "gelu"},
    "shared": {"moe_shared_expert_intermediate_size": 8, "moe_shared_expert_gate": True},
    "capacity": {"moe_expert_capacity_factor": 0.8},
    "capacity, filled up": {"moe_expert_capacity_factor": 0.8, "moe_pad_expert_input_to_capacity": True},
    "filled up beyond what is chosen": {
        "moe_expert_capacity_factor": 3.0,
        "moe_pad_expert_input_to_capacity": True,
        "add_bias_linear": True,
    },
    "fixed order": {"deterministic_mode": True, "add_bias_linear": True},
    "capacity by position": {"moe_expert_capacity_factor": 0.6, "moe_token_drop_policy": "position"},
    "groups": {
        "moe_router_num_groups": 4,
        "moe_router_group_topk": 2,
        "moe_router_score_function": "sigmoid",
    },
    "all tokens to the first experts": {"ties": True},
    "one token a sequence": {"rows": 1, "sequence_parallel": False},
    "more experts than tokens": {
        "rows": 1,
        "num_moe_experts": 32,
        "moe_router_topk": 3,
        "sequence_parallel": False,
    },
    "expert by expert": {"moe_grouped_gemm": False},
    "top 1": {"moe_router_topk": 1, "moe_router_pre_softmax": True, "moe_router_topk_scaling_factor": 2.5},
}

_references = {}


def check(layout, option):
    sizes, changes = LAYOUTS[layout], OPTIONS[option]
    key = option, sizes.dp
    if key not in _references:
        _references[key] = pool.run(1, reference, changes, sizes.dp)[0]
    out, x_grad, losses, grads = _references[key]
    found = pool.run(sizes.world_size, at, sizes, changes)
    for rank, (y, dx, _, whole, _) in enumerate(found):
        torch.testing.assert_close(y, out, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(dx, x_grad, rtol=1e-10, atol=1e-10)
        for name, grad in grads.items():
            torch.testing.assert_close(
                whole[name],
                grad,
                rtol=1e-10,
                atol=1e-10,
                msg=lambda m, n=name, r=rank: f"{n} on rank {r}: {m}",
            )
    if option == "plain" and layout != "tp2 x ep2 folded":
        assert all(sent == counted for *_, (sent, counted) in found)
    assert {f"{float(f[2]):.9f}" for f in found} == {f"{float(loss):.9f}" for loss in losses}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    check(layout, "plain")


@pytest.mark.parametrize("option", list(OPTIONS)[1:])
def test_options(option):
    for layout in ("one", "tp2 x ep2 x etp2", "ep2 x etp2"):
        if option == "capacity by position" and layout != "one":
            continue  # alone, a layer does not know the places of its rows in a sequence that is cut
        check(layout, option)


def pairs_of_each_expert(sizes, factor):
    """Rows that the products of each expert of this rank take, dropped ones and fillings included."""
    mesh = ParallelMesh.build(sizes)
    changes = {"moe_expert_capacity_factor": factor, "moe_pad_expert_input_to_capacity": True}
    layer, found = made(config_of(sizes, **changes), mesh.groups, {}), []
    compute = layer.experts.compute
    layer.experts.compute = lambda x, scores, choices: (
        found.append(choices.counts.tolist()) or compute(x, scores, choices)
    )
    x, _ = (t.chunk(sizes.dp, 1)[dist.get_rank(mesh.groups.dp)] for t in data(4, ROWS))
    layer(x.chunk(sizes.tp, 0)[dist.get_rank(mesh.groups.tp)])
    return found


#: layout -> how many of the four sequences have rows in an expert parallel group
SEQUENCES = {"one": 4, "ep2": 4, "ep4": 4, "ep2 x edp2": 2, "tp2": 4, "tp2 etp1": 4, "tp2 x ep2 x etp2": 4}


@pytest.mark.parametrize("layout", SEQUENCES)
def test_each_expert_is_filled_up_to_the_capacities_of_all_sequences(layout):
    """The capacity is ceil(12 tokens x 2 / 8 experts x factor) for each sequence."""
    sizes, sequences = LAYOUTS[layout], SEQUENCES[layout]
    for factor, capacity in ((1.0, 3), (0.5, 2), (2.1, 7)):
        found = pool.run(sizes.world_size, pairs_of_each_expert, sizes, factor)
        assert found == [[[capacity * sequences] * (8 // sizes.ep)]] * sizes.world_size


@pytest.mark.parametrize("indices", [[[0, 8]], [[-1, 2]]])
def test_an_expert_that_is_not_there_is_refused(indices):
    pool.run(2, refuses, indices)


def refuses(indices):
    mesh = ParallelMesh.build(MeshSizes(dp_shard=2, ep=2))
    layer = made(config_of(MeshSizes(dp_shard=2, ep=2)), mesh.groups, {})
    x = torch.zeros(1, HIDDEN, dtype=torch.float64)
    with pytest.raises(ValueError, match="numbers of all 8 experts, from 0"):
        layer.experts(x, torch.ones(1, 2), torch.tensor(indices))


def bias_gradients(rows, fixed_order):
    """In bfloat16 the largest relative error of each bias's gradient, whose sums have ``rows`` terms an expert."""
    mesh = ParallelMesh.build(MeshSizes())
    changes = {
        "add_bias_linear": True,
        "num_moe_experts": 2,
        "moe_router_topk": 1,
        "moe_router_pre_softmax": True,
    }
    found = []
    for dtype in (torch.float64, torch.bfloat16):
        config = config_of(MeshSizes(), params_dtype=dtype, deterministic_mode=fixed_order, **changes)
        layer = made(config, mesh.groups, {})
        g = torch.Generator().manual_seed(3)
        x = torch.randn(2 * rows, HIDDEN, generator=g, dtype=torch.float64).to(dtype)
        layer.experts(x, torch.tensor([rows, rows])).float().mean(1).sum().backward()
        biases = [p for name, p in layer.experts.named_parameters() if name.endswith("bias")]
        found.append([p.grad.to_local().double() for p in biases])
    return [((b - a).abs().max() / a.abs().max()).item() for a, b in zip(*found)]


@pytest.mark.parametrize("fixed_order", [False, True])
def test_sums_of_many_bfloat16_rows_do_not_stop_growing(fixed_order):
    (errors,) = pool.run(1, bias_gradients, 4096, fixed_order)
    assert len(errors) == 3
    assert max(errors) < 0.02


def megatrons_call():
    mesh = ParallelMesh.build(MeshSizes())
    layer = made(config_of(MeshSizes()), mesh.groups, {})
    x, factors = torch.randn(8, HIDDEN, dtype=torch.float64), torch.rand(8, dtype=torch.float64)
    counts = torch.tensor([2, 0, 1, 0, 3, 0, 0, 2])
    torch.testing.assert_close(
        layer.experts(x, counts, factors), layer.experts(x, counts) * factors.unsqueeze(1)
    )


def test_megatrons_third_argument_weights_the_results():
    pool.run(1, megatrons_call)
