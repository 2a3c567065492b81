"""Hybrid models for tests: their configs, their loss and gradients at a layout of ranks, and a plain reference."""

import torch
import torch.distributed as dist
import torch.nn.functional as F

import delta_recurrence
import oracle
import recurrences
from longspan.context_parallel import SequenceLayout
from longspan.mesh.mesh import ParallelMesh
from longspan.models import GPTModel
from longspan.parallelize import parallelize
from longspan.training.optimizer import gradient_norm
from tiny import transformer_config

VOCAB = 300

TYPES = ["mamba", "gated_delta", "attention"]


def config_of(sizes, **kwargs):
    """A model of one layer of each mixer, or of the layers given."""
    pattern = kwargs.get("hybrid_override_pattern")
    types = None if pattern else kwargs.get("layer_types", TYPES)
    config = {"num_layers": len(pattern or types), "layer_types": types} | kwargs
    mixers = pattern or types
    if "mamba" in mixers or "M" in mixers:
        config |= dict(mamba_num_heads=8, mamba_head_dim=4, mamba_num_groups=4, mamba_state_dim=6) | kwargs
    if "gated_delta" in mixers or "G" in mixers:
        config |= dict(linear_num_key_heads=4, linear_num_value_heads=8) | kwargs
        config |= dict(linear_key_head_dim=6, linear_value_head_dim=4) | kwargs
    return transformer_config(sizes, **config)


def batch(cu, columns=1, masked=True):
    """tokens, labels [columns, t] of documents with these boundaries."""
    g = torch.Generator().manual_seed(1)
    tokens, labels = (torch.randint(VOCAB, (columns, cu[-1]), generator=g) for _ in range(2))
    if masked:
        labels[:, 2:4] = -100
    return tokens, labels


def loss_and_gradients(model, mesh, cu, columns=1):
    """The mean loss of a batch, the gradient's norm and every whole gradient. Collective."""
    sizes = mesh.sizes
    tokens, labels = batch(cu, columns)
    multiple = sizes.tp if model.config.sequence_parallel else 1
    layout = SequenceLayout.contiguous(cu[-1], sizes.cp, cu_seqlens=cu, multiple_of=multiple)
    rank = dist.get_rank(mesh.groups.cp)
    loss = model(
        layout.shard(tokens, rank, dim=1),
        labels=layout.shard(labels, rank, dim=1, pad_value=-100),
        layout=layout,
    ).sum()
    # Every data parallel rank takes the same sample here.
    loss = loss / ((labels != -100).sum() * sizes.dp)
    loss.backward()
    norm = gradient_norm(model)
    total = loss.detach().clone()
    dist.all_reduce(total, group=mesh.groups.dp_cp)
    return total.item(), norm.item(), {name: p.grad.full_tensor() for name, p in model.named_parameters()}


def model_of(sizes, packs, recompute="none", **options):
    """A model with the initial weights of a seed, and its mesh. Collective."""
    mesh = ParallelMesh.build(sizes)
    config = config_of(sizes, **options)
    with torch.device("meta"):
        model = GPTModel(config, VOCAB, max(cu[-1] for cu in packs), pg_collection=mesh.groups)
    parallelize(model, mesh, seed=3, device=torch.device("cpu"), recompute=recompute)
    return model, mesh


def gradients(sizes, packs, options, columns=1, adapt=None):
    """For each pack: loss, gradient norm and every whole gradient at a layout of ranks.

    Args:
        adapt: is called with the model before its first step.
    """
    model, mesh = model_of(sizes, packs, **options)
    if adapt is not None:
        adapt(model)
    found = []
    for cu in packs:
        model.zero_grad()
        found.append(loss_and_gradients(model, mesh, cu, columns))
    return found if dist.get_rank() == 0 else None


def difference(found, expected):
    """The largest relative difference of loss, norm and gradients, and the parameter that has it."""
    (loss, norm, grads), (loss_1, norm_1, grads_1) = found, expected
    assert grads.keys() == grads_1.keys()
    errors = {
        "loss": abs(loss - loss_1) / abs(loss_1),
        "norm": abs(norm - norm_1) / abs(norm_1),
    }
    for name, grad in grads.items():
        errors[name] = ((grad - grads_1[name]).abs().max() / grads_1[name].abs().max()).item()
    worst = max(errors, key=lambda name: errors[name])
    return errors[worst], worst


# --- a plain reference -----------------------------------------------------------------------


def _rms(x, weight, epsilon):
    return x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + epsilon) * weight


def plain_mamba(w, x, starts, config):
    """Mamba-2 on [s, h], token by token; w: the mixer's whole weights by name."""
    n, p, g, d = (
        config.mamba_num_heads,
        config.mamba_head_dim,
        config.mamba_num_groups,
        config.mamba_state_dim,
    )
    each = n // g
    y = (x @ w["in_proj.weight"].T).unflatten(-1, (g, -1))
    z, features, dt = y.split([each * p, each * p + 2 * d, each], -1)
    features = recurrences.convolution(
        features.reshape(len(x), 1, -1), w["conv1d.weight"], w.get("conv1d.bias"), starts
    )
    xs, B, C = F.silu(features).unflatten(-1, (g, -1)).split([each * p, d, d], -1)
    dt = F.softplus(dt.reshape(len(x), 1, n) + w["dt_bias"]).clamp(min=config.mamba_dt_min)
    xs = xs.reshape(len(x), 1, n, p)
    out, _ = recurrences.state_space(xs, dt, -w["A_log"].exp(), B, C, w["D"], starts)
    out = out.reshape(len(x), n * p) * F.silu(z.reshape(len(x), n * p))
    groups = g if config.mamba_grouped_norm else 1
    normed = _rms(out.unflatten(-1, (groups, -1)), 1, config.layernorm_epsilon).flatten(-2)
    return (normed * w["norm.weight"]) @ w["out_proj.weight"].T


def plain_gated_delta(w, x, starts, config):
    """The gated delta rule on [s, h], token by token."""
    m, n = config.linear_num_key_heads, config.linear_num_value_heads
    d_k, d_v, each = config.linear_key_head_dim, config.linear_value_head_dim, n // m
    y = (x @ w["in_proj.weight"].T).unflatten(-1, (m, -1))
    features, z, b, a = y.split([2 * d_k + each * d_v, each * d_v, each, each], -1)
    features = recurrences.convolution(
        features.reshape(len(x), 1, -1), w["conv1d.weight"], w.get("conv1d.bias"), starts
    )
    q, k, v = F.silu(features).unflatten(-1, (m, -1)).split([d_k, d_k, each * d_v], -1)
    q, k = (t / torch.sqrt(t.pow(2).sum(-1, keepdim=True) + 1e-6) for t in (q, k))
    beta = b.reshape(len(x), 1, n).sigmoid() * (2 if config.linear_allow_neg_eigval else 1)
    g = -w["A_log"].exp() * F.softplus(a.reshape(len(x), 1, n) + w["dt_bias"])
    v = v.reshape(len(x), 1, n, d_v)
    out, _ = delta_recurrence.delta_recurrence(q, k, v, g, beta, starts)
    epsilon = config.linear_norm_epsilon or config.layernorm_epsilon
    out = _rms(out[:, 0], w["norm.weight"], epsilon) * F.silu(z.reshape(len(x), n, d_v))
    return out.flatten(1) @ w["out_proj.weight"].T


def plain_attention(w, x, positions, cu, config):
    d = config.kv_channels
    freqs = config.rotary_base ** -(torch.arange(0, d, 2, dtype=torch.float64) / d)
    angle = positions[:, None, None] * freqs
    cos, sin = torch.cat([angle.cos()] * 2, -1), torch.cat([angle.sin()] * 2, -1)

    def turn(t):
        return t * cos + torch.cat([-t[..., d // 2 :], t[..., : d // 2]], -1) * sin

    q, k, v = ((x @ w[f"linear_{name}.weight"].T).unflatten(-1, (-1, d)) for name in "qkv")
    out, _ = oracle.dense(turn(q), turn(k), v, cu)
    return out.flatten(1) @ w["linear_proj.weight"].T


def plain_loss(weights, cu, config):
    """The mean loss of a pack, with every mixer written out."""
    tokens, labels = batch(cu)
    tokens, labels = tokens[0], labels[0]
    starts = torch.zeros(len(tokens), 1, dtype=torch.bool)
    starts[list(cu[:-1])] = True
    row = torch.arange(len(tokens))
    positions = row - torch.tensor(cu)[torch.bucketize(row, torch.tensor(cu[1:]), right=True)]
    x = weights["embedding.word_embeddings.weight"][tokens]
    epsilon = config.layernorm_epsilon
    for i in range(config.num_layers):
        w = {k.split(f"layers.{i}.")[1]: v for k, v in weights.items() if f"layers.{i}." in k}
        mixer, mlp = config.parts_of_layer(i + 1)
        inner = {k.split(".", 1)[1]: v for k, v in w.items()}
        if mixer is not None:
            y = _rms(x, w["input_layernorm.weight"], epsilon)
            if mixer == "attention":
                x = x + plain_attention(inner, y, positions, cu, config)
            else:
                plain = {"mamba": plain_mamba, "gated_delta": plain_gated_delta}[mixer]
                own = {k.removeprefix("mixer."): v for k, v in w.items() if k.startswith("mixer.")}
                x = x + plain(own, y, starts, config)
        if mlp is not None:
            y = _rms(x, w["pre_mlp_layernorm.weight"], epsilon)
            gate, up = y @ w["mlp.linear_gate.weight"].T, y @ w["mlp.linear_up.weight"].T
            x = x + (F.silu(gate) * up) @ w["mlp.linear_down.weight"].T
    logits = _rms(x, weights["decoder.final_layernorm.weight"], epsilon) @ weights["output_layer.weight"].T
    return F.cross_entropy(logits[:, :VOCAB], labels, ignore_index=-100)


def against_plain(cu, options):
    """The largest relative error of loss and gradients of one process against the plain reference, and where."""
    from longspan.config.sizes import MeshSizes

    model, mesh = model_of(MeshSizes(), [cu], **options)
    config = model.config
    weights = {n: p.full_tensor().detach().clone().requires_grad_() for n, p in model.named_parameters()}
    loss = plain_loss(weights, cu, config)
    loss.backward()
    expected = {name: w.grad for name, w in weights.items()}
    norm = torch.stack([g.norm() for g in expected.values()]).norm().item()
    return difference(loss_and_gradients(model, mesh, cu), (loss.item(), norm, expected))
