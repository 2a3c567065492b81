"""Megatron's parts (LayerNorm, GELU, biases, learned positions) at every layout against a plain GPT in PyTorch. fp64."""

import dataclasses

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import pool
from longspan import TransformerConfig
from longspan.config.sizes import MeshSizes
from longspan.context_parallel import PackedSeqParams, SequenceLayout
from longspan.mesh.mesh import ParallelMesh
from longspan.models import GPTModel
from longspan.parallelize import parallelize
from longspan.tensor_parallel.random import local_ranges

VOCAB, LENGTH, POSITIONS = 300, 53, 60  # nothing divides by anything
DOCUMENTS = (0, 1, 9, 30, LENGTH)

GPT = dict(
    num_layers=2,
    hidden_size=32,
    num_attention_heads=4,
    ffn_hidden_size=48,
    normalization="LayerNorm",
    gated_linear_unit=False,
    activation_func="gelu",
    add_bias_linear=True,
    position_embedding_type="learned_absolute",
    max_position_embeddings=POSITIONS,
    params_dtype=torch.float64,
    init_method_std=0.2,
)


def transformer_config(sizes, **more):
    cut = dict(tensor_model_parallel_size=sizes.tp, context_parallel_size=sizes.cp)
    return TransformerConfig(**(GPT | cut | more))


def batch():
    g = torch.Generator().manual_seed(1)
    tokens = torch.randint(VOCAB, (1, LENGTH), generator=g)
    labels = torch.randint(VOCAB, (1, LENGTH), generator=g)
    labels[:, 5:8] = -100
    return tokens, labels


def disturb(model):
    """Biases and norms begin as zeros and ones, which would hide what they do: other values, the same at every layout."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            whole = torch.sin(torch.arange(parameter.numel(), dtype=torch.float64) * 0.7 + len(name))
            ((start, stop),) = local_ranges(parameter)
            parameter.data.to_local().add_(0.3 * whole[start:stop])


def build(mesh, options):
    sizes = mesh.sizes
    config = transformer_config(sizes, **options)
    with torch.device("meta"):
        model = GPTModel(config, VOCAB, LENGTH, pg_collection=mesh.groups)
    parallelize(model, mesh, seed=3, device=torch.device("cpu"))
    disturb(model)
    return config, model


def gradients(sizes, variants, layout_kind="zigzag", by_hand=False):
    """For each variant, the options of a model: loss, whole gradients and whole weights of a packed batch."""
    mesh = ParallelMesh.build(sizes)
    return [gradients_of(mesh, options, layout_kind, by_hand) for options in variants]


def gradients_of(mesh, options, layout_kind, by_hand):
    config, model = build(mesh, options)
    sizes = mesh.sizes
    tokens, labels = batch()
    multiple = sizes.tp if config.sequence_parallel else 1
    layout = SequenceLayout.make(
        layout_kind, LENGTH, sizes.cp, cu_seqlens=DOCUMENTS, windows=config.windows, multiple_of=multiple
    )
    rank = dist.get_rank(mesh.groups.cp)
    places = layout.document_positions(rank)[None] if by_hand else None
    out = model(
        layout.shard(tokens, rank, dim=1),
        position_ids=places,
        labels=layout.shard(labels, rank, dim=1, pad_value=-100),
        layout=layout,
    )
    loss = out.sum() / ((labels != -100).sum() * sizes.dp)
    loss.backward()
    total = loss.detach().clone()
    dist.all_reduce(total, group=mesh.groups.dp_cp)
    grads = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
    weights = {name: p.detach().full_tensor() for name, p in model.named_parameters()}
    return total.item(), grads, weights


def norm(x, w, name, config):
    weight, bias = w[f"{name}.weight"], w.get(f"{name}.bias")
    if config.layernorm_zero_centered_gamma:
        weight = weight + 1
    if bias is None:
        return x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + config.layernorm_epsilon) * weight
    x = x - x.mean(-1, keepdim=True)
    return x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + config.layernorm_epsilon) * weight + bias


def linear(x, w, name):
    y = x @ w[f"{name}.weight"].T
    return y + w[f"{name}.bias"] if f"{name}.bias" in w else y


def plain_gpt(w, tokens, config):
    """One document at a time, dense softmax, nothing cut and nothing of longspan."""
    outputs = []
    for start, stop in zip(DOCUMENTS, DOCUMENTS[1:]):
        x = w["embedding.word_embeddings.weight"][tokens[0, start:stop]]
        if config.position_embedding_type == "learned_absolute":
            x = x + w["embedding.position_embeddings.weight"][: stop - start]
        for i in range(config.num_layers):
            at = f"decoder.layers.{i}."
            y = norm(x, w, at + "input_layernorm", config)
            q, k, v = (
                linear(y, w, f"{at}self_attention.linear_{n}").view(len(y), -1, config.kv_channels)
                for n in "qkv"
            )
            if config.qk_layernorm:
                q = norm(q, w, f"{at}self_attention.q_layernorm", config)
                k = norm(k, w, f"{at}self_attention.k_layernorm", config)
            q, k, v = (z.transpose(0, 1) for z in (q, k, v))
            k, v = (z.repeat_interleave(q.shape[0] // z.shape[0], 0) for z in (k, v))
            scores = q @ k.transpose(1, 2) / config.kv_channels**0.5
            scores = scores.masked_fill(torch.ones(len(y), len(y)).triu(1).bool(), float("-inf"))
            o = (scores.softmax(-1) @ v).transpose(0, 1).reshape(len(y), -1)
            x = x + linear(o, w, at + "self_attention.linear_proj")
            y = norm(x, w, at + "pre_mlp_layernorm", config)
            up = linear(y, w, at + "mlp.linear_up")
            x = x + linear(up * 0.5 * (1 + torch.erf(up / 2**0.5)), w, at + "mlp.linear_down")
        outputs.append(norm(x, w, "decoder.final_layernorm", config))
    head = w.get("output_layer.weight", w["embedding.word_embeddings.weight"])
    return torch.cat(outputs) @ head.T[:, :VOCAB]


_references = {}


def reference(options):
    key = repr(sorted(options.items()))
    if key not in _references:
        ((_, _, weights),) = pool.run(1, gradients, MeshSizes(), [options])[0]
        weights = {name: w.clone().requires_grad_() for name, w in weights.items()}
        tokens, labels = batch()
        loss = F.cross_entropy(
            plain_gpt(weights, tokens, transformer_config(MeshSizes(), **options)), labels[0]
        )
        loss.backward()
        _references[key] = loss.item(), {name: w.grad for name, w in weights.items()}
    return _references[key]


def compare(got, options):
    loss, expected = reference(options)
    assert got[0] == pytest.approx(loss, rel=1e-10)
    assert got[1].keys() == expected.keys()
    # a gradient that is zero but for rounding (of a key's bias) is measured against the largest of all
    least = 1e-5 * max(grad.abs().max() for grad in expected.values())
    for name, ref in expected.items():
        error = ((got[1][name] - ref).abs().max() / ref.abs().max().clamp_min(least)).item()
        assert error <= 1e-10, f"{name}: {error:.1e}"


LAYOUTS = {
    "1": MeshSizes(),
    "tp2": MeshSizes(tp=2),
    "cp2": MeshSizes(cp=2),
    "cp3": MeshSizes(cp=3),
    "tp2 x cp2": MeshSizes(tp=2, cp=2),
    "dp_shard2 x tp2": MeshSizes(dp_shard=2, tp=2),
}


#: without sequence parallelism and with it
BOTH = ({"sequence_parallel": False}, {"sequence_parallel": True})


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_gpt_at_every_layout(name):
    sizes = LAYOUTS[name]
    for got in pool.run(sizes.world_size, gradients, sizes, BOTH if sizes.tp > 1 else BOTH[:1])[0]:
        compare(got, {})


@pytest.mark.parametrize(
    "options",
    [
        {"share_embeddings_and_output_weights": True},
        {"layernorm_zero_centered_gamma": True},
        {"qk_layernorm": True, "num_query_groups": 2},
        {"qk_layernorm": True, "normalization": "RMSNorm", "layernorm_zero_centered_gamma": True},
        {"add_bias_linear": False, "add_qkv_bias": True},
        {"position_embedding_type": "none", "max_position_embeddings": None},
    ],
    ids=lambda options: " ".join(f"{k}={v}" for k, v in options.items()),
)
def test_other_parts_at_tp2_cp2(options):
    for got in pool.run(4, gradients, LAYOUTS["tp2 x cp2"], [options | cut for cut in BOTH])[0]:
        compare(got, options)


@pytest.mark.parametrize("kind", ["contiguous", "per_document_zigzag", "balanced"])
def test_other_layouts_of_the_sequence(kind):
    (got,) = pool.run(3, gradients, LAYOUTS["cp3"], [{}], kind)[0]
    compare(got, {})


def test_position_ids_by_hand():
    (got,) = pool.run(4, gradients, LAYOUTS["tp2 x cp2"], BOTH[1:], "zigzag", True)[0]
    compare(got, {})


def by_megatrons_way():
    """Without a layout: zigzag of each padded document, as packed_seq_params says it."""
    _, model = build(ParallelMesh.build(MeshSizes(cp=2)), {})
    tokens, labels = batch()
    padded = (0, 4, 12, 36, 60)
    layout = SequenceLayout.per_document_zigzag(DOCUMENTS, 2, cu_seqlens_padded=padded)
    cu, cu_padded = torch.tensor(DOCUMENTS), torch.tensor(padded)
    rank = dist.get_rank()
    out = model(
        layout.shard(tokens, rank, dim=1),
        labels=layout.shard(labels, rank, dim=1, pad_value=-100),
        packed_seq_params=PackedSeqParams("thd", cu, cu, cu_padded, cu_padded),
    )
    total = out.detach().sum()
    dist.all_reduce(total)
    return total.item() / (labels != -100).sum().item()


def test_positions_from_packed_seq_params():
    assert pool.run(2, by_megatrons_way)[0] == pytest.approx(reference({})[0], rel=1e-10)


def beyond_the_table(tp):
    mesh = ParallelMesh.build(MeshSizes(tp=tp))
    config, model = build(mesh, {})
    tokens = torch.zeros(1, 8, dtype=torch.int64)
    small = GPTModel(
        dataclasses.replace(config, max_position_embeddings=7), VOCAB, 64, pg_collection=mesh.groups
    )
    with pytest.raises(ValueError, match=r"8 tokens: the table of learned positions has 7 rows"):
        small(tokens)
    assert small.positions == 7
    with pytest.raises(ValueError, match="position_ids holds 60: the table of learned positions has 60"):
        model(tokens, position_ids=torch.full((1, 8), POSITIONS))
    assert (
        GPTModel(
            dataclasses.replace(config, max_position_embeddings=None), VOCAB, 9, pg_collection=mesh.groups
        ).positions
        == 9
    )


@pytest.mark.parametrize("tp", [1, 2])
def test_positions_beyond_the_table_are_refused(tp):
    pool.run(tp, beyond_the_table, tp)
