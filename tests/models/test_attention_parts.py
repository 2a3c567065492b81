"""Gates and sinks of attention, partly rotated heads, norms over all heads and behind the parts, and squared ReLU, in fp64."""

import pytest
import torch
import torch.nn.functional as F

import hybrids
import oracle
import pool
from longspan import TransformerConfig
from longspan.config.sizes import MeshSizes
from longspan.mesh.mesh import ParallelMesh
from longspan.models import GPTModel
from longspan.parallelize import parallelize

#: documents of a pack; no degree divides them
CU = (0, 5, 6, 23, 41)
DENSE = {"layer_types": ["attention", "attention"], "kv_channels": 12}
PARTS = {
    "gate": {"attention_output_gate": True},
    "gate with biases": {"attention_output_gate": True, "add_qkv_bias": True},
    "partly rotated": {"rotary_percent": 0.5},
    "over heads": {"qk_layernorm": True, "qk_layernorm_over_heads": True},
    "squared": {"activation_func": "squared_relu", "gated_linear_unit": False},
    "squared, gated": {"activation_func": "squared_relu"},
    "sinks": {"softmax_type": "learnable", "sliding_window": [9, None]},
    "off by one": {"softmax_type": "off-by-one"},
    "clamped": {
        "activation_func": "quick_gelu",
        "activation_func_clamp_value": 0.3,
        "glu_linear_offset": 1.0,
    },
    "norms behind": {"attention_post_norm": True},
    "all": {
        "attention_output_gate": True,
        "rotary_percent": 1 / 3,
        "qk_layernorm": True,
        "qk_layernorm_over_heads": True,
        "attention_post_norm": True,
        "layernorm_zero_centered_gamma": True,
        "position_embedding_type": "rope",
        "activation_func": "squared_relu",
        "softmax_type": "learnable",
        "glu_linear_offset": 0.5,
    },
}


def plain_loss(w, config):
    """The mean loss of a pack, with all parts written out; w: whole weights by name."""
    tokens, labels = (x[0] for x in hybrids.batch(CU))
    row = torch.arange(len(tokens))
    positions = row - torch.tensor(CU)[torch.bucketize(row, torch.tensor(CU[1:]), right=True)]
    d, turned = config.kv_channels, round(config.kv_channels * config.rotary_percent)
    angle = positions[:, None, None] * config.rotary_base ** -(torch.arange(0, turned, 2).double() / turned)
    cos, sin = torch.cat([angle.cos()] * 2, -1), torch.cat([angle.sin()] * 2, -1)

    def norm(t, name):
        weight = w[f"{name}.weight"] + (1 if config.layernorm_zero_centered_gamma else 0)
        return t / torch.sqrt(t.pow(2).mean(-1, keepdim=True) + config.layernorm_epsilon) * weight

    def linear(t, name):
        y = t @ w[f"{name}.weight"].T
        return y + w[f"{name}.bias"] if f"{name}.bias" in w else y

    def turn(t):
        t, rest = t[..., :turned], t[..., turned:]
        half = turned // 2
        return torch.cat([t * cos + torch.cat([-t[..., half:], t[..., :half]], -1) * sin, rest], -1)

    act = {
        "silu": F.silu,
        "squared_relu": lambda t: t.clamp(min=0) ** 2,
        "quick_gelu": lambda t: t / (1 + (-1.702 * t).exp()),
    }[config.activation_func]
    limit = config.activation_func_clamp_value or float("inf")
    x = w["embedding.word_embeddings.weight"][tokens]
    behind = config.attention_post_norm
    for i in range(config.num_layers):
        at = f"decoder.layers.{i}"
        y = x if behind else norm(x, f"{at}.input_layernorm")
        q, k, v = (linear(y, f"{at}.self_attention.linear_{name}") for name in "qkv")
        if config.qk_layernorm:
            q, k = (norm(t, f"{at}.self_attention.{name}_layernorm") for t, name in ((q, "q"), (k, "k")))
        q, k, v = (t.unflatten(-1, (-1, d)) for t in (q, k, v))
        sinks = w.get(f"{at}.self_attention.sinks.weight")
        if config.softmax_type == "off-by-one":
            sinks = torch.zeros(q.shape[1]).double()
        window = config.window_of_layer(i + 1)
        out = oracle.dense(turn(q), turn(k), v, CU, window=window, sinks=sinks)[0].flatten(1)
        if config.attention_output_gate:
            out = out * torch.sigmoid(linear(y, f"{at}.self_attention.linear_gate"))
        out = linear(out, f"{at}.self_attention.linear_proj")
        x = x + (norm(out, f"{at}.post_attention_layernorm") if behind else out)
        y = x if behind else norm(x, f"{at}.pre_mlp_layernorm")
        inner = act(linear(y, f"{at}.mlp.linear_up"))
        if config.gated_linear_unit:
            gate, up = linear(y, f"{at}.mlp.linear_gate"), linear(y, f"{at}.mlp.linear_up")
            inner = act(gate.clamp(max=limit)) * (up.clamp(-limit, limit) + config.glu_linear_offset)
        out = linear(inner, f"{at}.mlp.linear_down")
        x = x + (norm(out, f"{at}.post_mlp_layernorm") if behind else out)
    logits = norm(x, "decoder.final_layernorm") @ w["output_layer.weight"].T
    return F.cross_entropy(logits[:, : hybrids.VOCAB], labels, ignore_index=-100)


def against_plain(parts):
    """For each of ``parts``: the largest error of loss and gradients of one process, and where."""
    found = {}
    for name, options in parts.items():
        mesh = ParallelMesh.build(MeshSizes())
        config = hybrids.config_of(mesh.sizes, **DENSE | options)
        with torch.device("meta"):
            model = GPTModel(config, hybrids.VOCAB, CU[-1], pg_collection=mesh.groups)
        parallelize(model, mesh, seed=3, device=torch.device("cpu"))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    local = parameter.to_local()
                    local.add_(torch.arange(len(local)).sin() * 0.3)
        weights = {n: p.full_tensor().detach().clone().requires_grad_() for n, p in model.named_parameters()}
        loss = plain_loss(weights, config)
        loss.backward()
        grads = {name: w.grad for name, w in weights.items()}
        norm = torch.stack([g.norm() for g in grads.values()]).norm().item()
        found[name] = hybrids.difference(
            hybrids.loss_and_gradients(model, mesh, CU), (loss.item(), norm, grads)
        )
    return found


def test_loss_and_gradients_are_those_of_plain_formulas():
    for name, (error, where) in pool.run(1, against_plain, PARTS)[0].items():
        assert error <= 1e-10, f"{name}: {where} {error:.1e}"


@pytest.mark.parametrize(
    ("world", "sizes", "more"),
    [
        (2, {"tp": 2}, {}),
        (2, {"tp": 2}, {"sequence_parallel": True}),
        (4, {"tp": 2, "cp": 2}, {"recompute": "selective"}),
        (3, {"cp": 3}, {"recompute": "full"}),
    ],
    ids=str,
)
def test_every_layout_computes_the_same(world, sizes, more):
    options = DENSE | PARTS["all"] | {"num_attention_heads": 4, "num_query_groups": 2}
    expected = pool.run(1, hybrids.gradients, MeshSizes(), [CU], options)[0][0]
    found = pool.run(world, hybrids.gradients, MeshSizes(**sizes), [CU], options | more)[0][0]
    error, where = hybrids.difference(found, expected)
    assert error <= 1e-10, f"{where} {error:.1e}"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"qk_layernorm_over_heads": True}, "no effect without qk_layernorm"),
        (
            {"qk_layernorm": True, "qk_layernorm_over_heads": True, "normalization": "LayerNorm"},
            "only RMSNorm",
        ),
        ({"rotary_percent": 0.5, "position_embedding_type": "none"}, "rotary_percent has no effect"),
        ({"rotary_percent": 0.1}, "an even number of them"),
        ({"softmax_type": "learnt"}, "softmax_type 'learnt': one of vanilla, learnable, off-by-one"),
        ({"glu_linear_offset": 1.0}, "glu_linear_offset 1.0 has no effect without gated_linear_unit"),
        ({"activation_func_clamp_value": -1.0, "gated_linear_unit": True}, "a number above 0"),
        ({"moe_router_bias": True}, "moe_router_bias True has no effect without num_moe_experts"),
    ],
)
def test_rules(changes, words):
    with pytest.raises(ValueError, match=words):
        TransformerConfig(
            **dict(num_layers=1, hidden_size=32, num_attention_heads=4, normalization="RMSNorm") | changes
        )
