"""The whole model at every layout against one process, and one process against plain PyTorch. fp64."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import oracle
import pool
from longspan import parallel_state
from longspan.config.sizes import MeshSizes
from longspan.context_parallel import (
    DotProductAttention,
    PackedSeqParams,
    SequenceLayout,
    get_batch_on_this_cp_rank,
)
from longspan.mesh.mesh import ParallelMesh
from longspan.models import GPTModel, TransformerBlock, TransformerLayer
from longspan.models.embedding import _out_of_padding
from longspan.parallelize import parallelize
from longspan.tensor_parallel import init_weights
from longspan.training.optimizer import gradient_norm
from tiny import transformer_config

VOCAB, LENGTH = 300, 53  # the vocabulary is padded to 384, the length divides by nothing


def batch(kind):
    """tokens, labels [1, t], cu_seqlens: packed, unpacked, or with all targets in the first few tokens."""
    g = torch.Generator().manual_seed(1)
    tokens = torch.randint(VOCAB, (1, LENGTH), generator=g)
    labels = torch.randint(VOCAB, (1, LENGTH), generator=g)
    cu = (0, 1, 9, 30, LENGTH) if kind == "packed" else (0, LENGTH)
    labels[:, 5:8] = -100
    if kind == "few targets":  # the ranks that hold the rest have no valid token
        labels[:, 3:] = -100
    return tokens, labels, cu


def loss_and_gradients(model, mesh, kind, layout_kind="zigzag"):
    """The mean loss of a batch, the gradient's norm and every whole gradient. Collective."""
    sizes, config = mesh.sizes, model.config
    tokens, labels, cu = batch(kind)
    layout = SequenceLayout.make(
        layout_kind,
        LENGTH,
        sizes.cp,
        cu_seqlens=cu,
        windows=config.windows,
        multiple_of=sizes.tp if config.sequence_parallel else 1,
    )
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


def gradients(sizes, kinds, options, layout_kind="zigzag"):
    """For each kind of batch: loss, gradient norm and every whole gradient at a layout of ranks."""
    recompute = options.pop("recompute", "none")
    mesh = ParallelMesh.build(sizes)
    config = transformer_config(sizes, **options)
    with torch.device("meta"):
        model = GPTModel(config, VOCAB, LENGTH, pg_collection=mesh.groups)
    parallelize(model, mesh, seed=3, device=torch.device("cpu"), recompute=recompute)
    found = []
    for kind in kinds:
        model.zero_grad()
        found.append(loss_and_gradients(model, mesh, kind, layout_kind))
    return found if dist.get_rank() == 0 else None


LAYOUTS = {
    "tp2": MeshSizes(tp=2),
    "cp2": MeshSizes(cp=2),
    "cp3": MeshSizes(cp=3),
    "cp4": MeshSizes(cp=4),
    "tp2 x cp2": MeshSizes(tp=2, cp=2),
    "dp_shard2 x cp2": MeshSizes(dp_shard=2, cp=2),
    "dp_replicate2 x tp2": MeshSizes(dp_replicate=2, tp=2),
    "dp_replicate2 x dp_shard2": MeshSizes(dp_replicate=2, dp_shard=2),
}

_references = {}


def reference(kind, **options):
    key = kind, repr(sorted(options.items()))
    if key not in _references:
        (_references[key],) = pool.run(1, gradients, MeshSizes(), [kind], dict(options))[0]
    return _references[key]


def compare(got, expected, tolerance=1e-10):
    assert abs(got[0] - expected[0]) <= tolerance * abs(expected[0])
    assert abs(got[1] - expected[1]) <= tolerance * abs(expected[1])
    assert got[2].keys() == expected[2].keys()
    for name, ref in expected[2].items():
        error = ((got[2][name] - ref).abs().max() / ref.abs().max().clamp_min(1e-300)).item()
        assert error <= tolerance, f"{name}: {error:.1e}"


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_computes_the_loss_and_gradients_of_one_process(name):
    sizes, kinds = LAYOUTS[name], ["unpacked", "packed", "few targets"]
    for kind, got in zip(kinds, pool.run(sizes.world_size, gradients, sizes, kinds, {})[0]):
        compare(got, reference(kind))


@pytest.mark.parametrize(
    "options",
    [
        {"sequence_parallel": True},
        {"sequence_parallel": True, "share_embeddings_and_output_weights": True},
        {"cp_comm_type": "all_gather"},
        {"cp_comm_type": ["p2p", "all_gather"]},
        {"cp_comm_type": "a2a"},
        {"cp_comm_type": ["a2a", "p2p"], "sliding_window": [5, None], "sequence_parallel": True},
        {"sliding_window": 11},
        {
            "normalization": "LayerNorm",
            "add_bias_linear": True,
            "gated_linear_unit": False,
            "sequence_parallel": True,
        },
        {"layernorm_zero_centered_gamma": True, "activation_func": "gelu"},
        {"recompute": "full", "sequence_parallel": True},
        {"recompute": "selective"},
    ],
    ids=lambda options: " ".join(f"{k}={v}" for k, v in options.items()),
)
def test_options_at_tp2_cp2(options):
    sizes = LAYOUTS["tp2 x cp2"]
    plain = {k: v for k, v in options.items() if k not in ("sequence_parallel", "cp_comm_type", "recompute")}
    (got,) = pool.run(4, gradients, sizes, ["packed"], dict(options))[0]
    compare(got, reference("packed", **plain))


@pytest.mark.parametrize("kind", ["contiguous", "per_document_zigzag", "balanced"])
def test_other_layouts_of_the_sequence(kind):
    (got,) = pool.run(3, gradients, LAYOUTS["cp3"], ["packed"], {}, kind)[0]
    compare(got, reference("packed"))


def test_heads_inside_and_keys_across():
    sizes = MeshSizes(cp=4, hierarchical_cp=(2, 2))
    options = {"cp_comm_type": ["a2a+p2p", "p2p"], "sliding_window": [None, 6]}
    (got,) = pool.run(4, gradients, sizes, ["packed"], dict(options), "balanced")[0]
    compare(got, reference("packed", sliding_window=[None, 6]))


# --- Megatron's way of calling: packed_seq_params instead of a layout -------------------------


def by_packed_seq_params(cu, padded):
    """Loss of a thd batch at cp 2, with the group switched for one call and switched off for another."""
    mesh = ParallelMesh.build(MeshSizes(cp=2))
    with torch.device("meta"):
        model = GPTModel(transformer_config(mesh.sizes), VOCAB, LENGTH, pg_collection=mesh.groups)
    model.to_empty(device="cpu")
    init_weights(model, 3)
    tokens, labels, _ = batch("packed")
    rank = dist.get_rank(mesh.groups.cp)

    def loss(ranks, rank, group, **dynamic):
        layout = SequenceLayout.per_document_zigzag(cu, ranks, cu_seqlens_padded=padded)
        cu_t, padded_t = torch.tensor(cu), torch.tensor(padded)
        params = PackedSeqParams("thd", cu_t, cu_t, padded_t, padded_t, **dynamic)
        out = model(
            layout.shard(tokens, rank, dim=1),
            labels=layout.shard(labels, rank, dim=1, pad_value=-100),
            packed_seq_params=params,
        )
        total = out.detach().sum()
        if group is not None:
            dist.all_reduce(total, group=group)
        return total.item()

    pair = dist.new_group([1, 0], use_local_synchronization=False, sort_ranks=False)
    return [
        loss(2, rank, mesh.groups.cp),
        loss(1, 0, None, local_cp_size=1),
        loss(2, dist.get_rank(pair), pair, cp_group=pair, local_cp_size=2),
    ]


def test_the_context_parallel_group_changes_from_call_to_call():
    """An encoder without context parallelism and a decoder with it, rotary positions included."""
    cu, padded = (0, 1, 9, 30, LENGTH), (0, 4, 12, 36, 60)
    kept = [pool.run(2, by_packed_seq_params, cu, padded)[r] for r in range(2)]
    loss, _, _ = reference("packed")
    _, labels, _ = batch("packed")
    expected = loss * (labels != -100).sum().item()
    for found in kept:
        for value in found:
            assert abs(value - expected) <= 1e-10 * expected


def wrong_groups():
    mesh = ParallelMesh.build(MeshSizes(cp=2))
    attention = DotProductAttention(transformer_config(mesh.sizes), 1, pg_collection=mesh.groups)
    alone = [dist.new_group([r]) for r in range(2)]
    x = torch.zeros(4, 1, 4, 8)
    for message, params in (
        (
            "local_cp_size is 4, cp_group has 2 ranks. The two",
            PackedSeqParams(local_cp_size=4, cp_group=mesh.groups.cp),
        ),
        ("local_cp_size is 2, cp_group has 1 rank. Give the group", PackedSeqParams(local_cp_size=2)),
        ("this rank is not in it", PackedSeqParams(cp_group=alone[1 - dist.get_rank()])),
    ):
        with pytest.raises(ValueError, match=message):
            attention(x, x, x, packed_seq_params=params)


def test_groups_that_do_not_fit_are_refused():
    pool.run(2, wrong_groups)


def ignored_packing():
    mesh = ParallelMesh.build(MeshSizes())
    model = GPTModel(transformer_config(mesh.sizes), VOCAB, LENGTH, pg_collection=mesh.groups)
    tokens, cu = torch.zeros(1, 16, dtype=torch.int64), torch.tensor([0, 8, 16])
    for message, params in (
        ("qkv_format None", PackedSeqParams(cu_seqlens_q=cu)),
        ("2 documents in a batch of 1", PackedSeqParams("sbhd", cu)),
        ("differ", PackedSeqParams("thd", cu, torch.tensor([0, 4, 16]))),
    ):
        with pytest.raises(ValueError, match=message):
            model(tokens, packed_seq_params=params)


def test_packing_that_the_model_would_ignore_is_refused():
    pool.run(1, ignored_packing)


# --- one process against an independent, plain model ----------------------------------------


def against_plain(options):
    mesh = ParallelMesh.build(MeshSizes())
    config = transformer_config(MeshSizes(), **options)
    with torch.device("meta"):
        model = GPTModel(config, VOCAB, LENGTH, pg_collection=mesh.groups)
    model.to_empty(device="cpu")
    init_weights(model, 3)
    tokens, labels, cu = batch("packed")
    layout = SequenceLayout.zigzag(LENGTH, 1, cu_seqlens=cu)
    loss = model(tokens, labels=labels, layout=layout)
    logits = model(tokens, layout=layout)
    weights = {n: p.detach().to_local().clone().requires_grad_() for n, p in model.named_parameters()}
    document = torch.bucketize(torch.arange(LENGTH), torch.tensor(cu[1:]), right=True)
    seen = (document[:, None] == document[None, :]).tril()
    positions = torch.arange(LENGTH) - torch.tensor(cu)[document]
    expected = oracle.plain_llama(weights, tokens[0], seen, positions, config)[:, :VOCAB]
    torch.testing.assert_close(logits[0], expected, rtol=0, atol=1e-12)
    per_token = F.cross_entropy(expected, labels[0], reduction="none", ignore_index=-100)
    torch.testing.assert_close(loss[0], per_token, rtol=0, atol=1e-12)
    loss.sum().backward()
    per_token.sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad.to_local(), weights[name].grad, rtol=1e-10, atol=1e-11)
    masked = model(tokens, labels=labels, loss_mask=torch.zeros(1, LENGTH), layout=layout)
    assert (masked == 0).all()


@pytest.mark.parametrize("options", [{}, {"softmax_scale": 0.7}], ids=str)
def test_one_process_equals_a_plain_model(options):
    pool.run(1, against_plain, options)


# --- input that nobody has cut, and what is not there yet ---------------------------------------


def uncut():
    """Every rank hands in whole sequences, or some whole tensors: refused before anything is sent."""
    parallel_state.initialize_model_parallel(context_parallel_size=2)
    config = transformer_config(MeshSizes(cp=2), num_layers=1)
    model = GPTModel(config, VOCAB, 16, seed=1)
    tokens = torch.arange(16).view(1, 16)
    whole = {"input_ids": tokens, "labels": tokens, "position_ids": tokens, "loss_mask": torch.ones(1, 16)}
    own = get_batch_on_this_cp_rank(whole)
    rank = dist.get_rank()
    cu = torch.tensor([0, 8, 16])
    thd = PackedSeqParams("thd", cu, cu)
    sbhd = PackedSeqParams("sbhd", torch.tensor([0, 16]), max_seqlen_q=16)
    zigzag = SequenceLayout.zigzag(16, 2)
    hidden = torch.zeros(16, 1, 32, dtype=torch.float64)
    decoder, layer = model.decoder, TransformerLayer(config, seed=1)
    attention = layer.self_attention
    heads = torch.zeros(16, 4, 8, dtype=torch.float64)
    for message, call in (
        (
            r"16 rows on each of 2 .*sequence of 32 tokens.*max_sequence_length 16.*get_batch_on_this_cp_rank",
            lambda: model(**whole),
        ),
        (r"input_ids has 16 rows.*holds 8 a rank.*not cut yet", lambda: model(tokens, packed_seq_params=thd)),
        (r"2 .*ranks has 16 rows.*at most 16.*was not cut", lambda: model(tokens, packed_seq_params=sbhd)),
        (r"input_ids has 16 rows.*holds 8 a rank.*not cut yet", lambda: model(tokens, layout=zigzag)),
        ("made for 3 ranks", lambda: model(tokens, layout=SequenceLayout.zigzag(48, 3))),
        (r"input_ids has 9 rows.*holds 8 a rank\. Cut", lambda: model(tokens[:, :9], layout=zigzag)),
        (r"hidden_states has 16 rows.*not cut yet", lambda: decoder(hidden, layout=zigzag)),
        (r"hidden_states has 16 rows.*not cut yet", lambda: layer(hidden, packed_seq_params=thd)),
        (
            r"query has 16 rows.*not cut yet",
            lambda: attention.core_attention(heads, heads[:, :2], heads[:, :2], packed_seq_params=thd),
        ),
        *(
            (
                rf"{name} has shape \(1, 16\) beside 8 rows.*Cut it as the tokens",
                lambda name=name: model(**(own | {name: whole[name]})),
            )
            for name in ("labels", "position_ids", "loss_mask")
        ),
        (r"labels has shape \(1, 7\) beside 8 rows", lambda: model(**(own | {"labels": tokens[:, :7]}))),
        (r"input_ids holds 300: the vocabulary has 300", lambda: model(own["input_ids"] * 0 + VOCAB)),
        (r"input_ids holds -1", lambda: model(own["input_ids"] * 0 - 1)),
        (r"labels holds 383", lambda: model(own["input_ids"], labels=own["labels"] * 0 + 383)),
        (r"labels holds -1", lambda: model(own["input_ids"], labels=own["labels"] * 0 - 1)),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    # what was cut is served, one row of positions for all included
    expected = model(own["input_ids"], labels=own["labels"])
    assert torch.equal(model(**own), expected)
    assert torch.equal(model(**(own | {"position_ids": own["position_ids"][0]})), expected)
    assert torch.equal(model(own["input_ids"], labels=own["labels"], layout=zigzag), expected)
    assert torch.equal(model(own["input_ids"], labels=own["labels"], packed_seq_params=sbhd), expected)
    per_document = SequenceLayout.per_document_zigzag((0, 8, 16), 2)
    assert model(per_document.shard(tokens, rank, dim=1), packed_seq_params=thd).isfinite().all()
    alone = PackedSeqParams(local_cp_size=1)  # this call is not cut
    assert model(tokens, packed_seq_params=alone).shape[1] == 16


def test_input_that_nobody_has_cut_is_refused():
    pool.run(2, uncut)


def beyond_one_process():
    parallel_state.initialize_model_parallel()
    model = GPTModel(transformer_config(MeshSizes(), num_layers=1), VOCAB, 8, seed=1)
    with pytest.raises(ValueError, match=r"9 tokens: the model is made for max_sequence_length 8\. Make"):
        model(torch.zeros(1, 9, dtype=torch.int64))
    assert model(torch.full((2, 8), VOCAB - 1)).shape == (2, 8, VOCAB)


def test_a_sequence_beyond_the_model_is_refused():
    pool.run(1, beyond_one_process)


def padding_ids_at_tp2():
    """An id of the vocabulary's padding lies in the last rank's rows: all ranks refuse it."""
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    model = GPTModel(transformer_config(MeshSizes(tp=2), num_layers=1), VOCAB, 8, seed=1)
    with pytest.raises(ValueError, match="input_ids holds 383"):
        model(torch.full((1, 8), 383))
    words = model.embedding.word_embeddings
    ids = torch.tensor([[0, VOCAB - 1, VOCAB, 383]])
    # what a GPU's kernel is given: no row for ids of the padding
    assert _out_of_padding(ids, VOCAB, words).tolist() == [[0, VOCAB - 1, 384, 384]]


def test_ids_of_the_vocabularys_padding_are_refused():
    pool.run(2, padding_ids_at_tp2)


def some_layers():
    parallel_state.initialize_model_parallel()
    config = transformer_config(MeshSizes(), pipeline_model_parallel_size=2)
    block = TransformerBlock(config, post_process=False, numbers=[2])
    assert list(block.layers) == ["1"]
    TransformerLayer(config, layer_number=2)


def test_a_block_of_a_pipeline_has_the_layers_it_is_given():
    pool.run(1, some_layers)


def what_forward_returns():
    parallel_state.initialize_model_parallel()
    config = transformer_config(MeshSizes())
    x = torch.zeros(4, 1, 32, dtype=torch.float64)
    for module in (TransformerLayer(config), TransformerBlock(config)):
        out, context = module(x)
        assert out.shape == x.shape
        assert context is None


def test_a_block_returns_hidden_states_and_context():
    pool.run(1, what_forward_returns)
