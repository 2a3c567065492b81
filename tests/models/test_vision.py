"""Images and text in one cut sequence: each layout against one process, that against plain PyTorch. fp64."""

import dataclasses

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.fsdp import FSDPModule, fully_shard

import oracle
import pool
from longspan import TransformerConfig, finalize_model_grads
from longspan.config.sizes import MeshSizes
from longspan.context_parallel import (
    PackedSeqParams,
    SequenceLayout,
    get_batch_on_this_cp_rank,
    get_image_index,
    get_packed_seq_params,
    get_padding,
    get_shifted_labels,
)
from longspan.mesh.mesh import ParallelMesh
from longspan.models import GPTModel, VisionEncoder, VisionLanguageModel

VOCAB, IMAGE, LENGTH = 300, 299, 90
SIZE, PATCH, TOKENS = (6, 10), 2, 15  # an image has 3 x 5 patches
# (text tokens before, images, text tokens after) of each document: 83 tokens in a pack, a prime number
DOCUMENTS = ((2, 1, 5), (0, 1, 3), (4, 0, 4), (0, 2, 4), (0, 0, 1))


def configs(sizes, **options):
    """The configs of the language model (with ``options``) and of the encoder."""
    common = dict(
        params_dtype=torch.float64,
        init_method_std=0.2,
        tensor_model_parallel_size=sizes.tp,
        num_layers=2,
        num_attention_heads=4,
    )
    language = dict(
        hidden_size=32,
        num_query_groups=2,
        ffn_hidden_size=48,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func="silu",
        add_bias_linear=False,
        context_parallel_size=sizes.cp,
    )
    return (
        TransformerConfig(**(common | language | options)),
        TransformerConfig(**common, hidden_size=24, position_embedding_type="learned_absolute"),
    )


def vision_language_model(mesh, image_token_id=IMAGE, **options):
    arguments = (*configs(mesh.sizes, **options), VOCAB, LENGTH, SIZE, PATCH, image_token_id)
    return VisionLanguageModel(*arguments, pg_collection=mesh.groups, seed=3)


def documents(descriptions, image_token_id=IMAGE):
    """The tokens of each document [t] and all images."""
    g = torch.Generator().manual_seed(1)
    made = []
    for before, images, after in descriptions:
        text = torch.randint(VOCAB - 1, (before + after,), generator=g)
        image = torch.full((images * TOKENS,), image_token_id)
        made.append(torch.cat([text[:before], image, text[before:]]))
    count = sum(images for _, images, _ in descriptions)
    return made, torch.randn(count, 3, *SIZE, generator=g)


def batch(kind, image_token_id=IMAGE):
    """images, whole tokens and labels [b, s], cu_seqlens (None for rows that are one document each)."""
    if kind == "rows":
        made, images = documents([(1, 1, 7)] * 3, image_token_id)
        tokens, cu = torch.stack(made), None
    else:
        described = {"pack": DOCUMENTS, "one document": ((0, 2, 6),)}[kind]
        made, images = documents(described, image_token_id)
        tokens = torch.cat(made).unsqueeze(0)
        cu = torch.tensor([0, *(len(one) for one in made)]).cumsum(0)
    labels = get_shifted_labels(tokens, image_token_id, cu)
    if kind == "rows":
        labels[1, -4:] = -100  # padding of a shorter caption
    return images, tokens, labels, cu


def loss_and_gradients(model, mesh, kind, layout_kind):
    """The mean loss of a batch and every whole gradient."""
    sizes, group, total = mesh.sizes, mesh.groups.cp, mesh.groups.dp_cp
    images, tokens, labels, cu = batch(kind, model.image_token_id)
    index = get_image_index(tokens, model.image_token_id, len(images), model.img_seq_len)
    multiple = sizes.tp if model.config.sequence_parallel else 1
    layout = SequenceLayout.make(layout_kind, tokens.shape[1], sizes.cp, cu_seqlens=cu, multiple_of=multiple)
    rank, count = dist.get_rank(group), (labels != -100).sum() * sizes.dp
    own = layout.shard(labels, rank, dim=1, pad_value=-100)
    if kind == "one document" and sizes.cp == 3:
        assert [
            bool((own != -100).any()) for own in (layout.shard(labels, r, 1, -100) for r in range(3))
        ] == [
            False,
            False,
            True,
        ]
    losses = model(
        images,
        layout.shard(tokens, rank, dim=1),
        labels=own,
        layout=layout,
        image_index=layout.shard(index, rank, dim=1, pad_value=-1),
    )
    loss = losses.sum() / count  # all data parallel ranks take the same sample
    loss.backward()
    if not isinstance(model, FSDPModule):
        finalize_model_grads(model, pg_collection=mesh.groups)
    dist.all_reduce(loss := loss.detach(), group=total)
    return loss.item(), {name: p.grad.full_tensor() for name, p in model.named_parameters()}


def shard(model, mesh):
    """FSDP2, as docs/multimodal.md has it."""
    axis = mesh.device_mesh["fsdp"]
    blocks = (model.vision_model.encoder, model.language_model.decoder)
    for layer in (layer for block in blocks for layer in block.layers.values()):
        fully_shard(layer, mesh=axis)
    fully_shard(model, mesh=axis)
    for module in (module for module in model.modules() if isinstance(module, FSDPModule)):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def gradients(sizes, cases, options):
    """For each case (kind of batch, layout): loss and every whole gradient at these sizes."""
    mesh = ParallelMesh.build(sizes)
    fsdp = options.pop("fsdp", False)
    model = vision_language_model(mesh, **options)
    if fsdp:
        shard(model, mesh)
    found = []
    for kind, layout_kind in cases:
        model.zero_grad()
        found.append(loss_and_gradients(model, mesh, kind, layout_kind))
    return found if dist.get_rank() == 0 else None


CASES = [
    ("pack", "balanced"),
    ("pack", "zigzag"),
    ("rows", "zigzag"),
    ("one document", "contiguous"),
]
_references = {}


def reference(kind):
    if not _references:
        kinds = ["pack", "rows", "one document"]
        found = pool.run(1, gradients, MeshSizes(), [(one, "contiguous") for one in kinds], {})[0]
        _references.update(zip(kinds, found))
    return _references[kind]


def compare(got, expected, tolerance=1e-10):
    assert abs(got[0] - expected[0]) <= tolerance * abs(expected[0])
    assert got[1].keys() == expected[1].keys()
    for name, whole in expected[1].items():
        # A key's bias adds the same to all scores of a query: its gradient is 0, and only rounding is left.
        size = whole.abs().max() if not name.endswith("linear_k.bias") else torch.tensor(1.0)
        error = ((got[1][name] - whole).abs().max() / size).item()
        assert error <= tolerance, f"{name}: {error:.1e}"


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        (MeshSizes(cp=2), {}),
        (MeshSizes(cp=3), {}),
        (MeshSizes(tp=2), {"sequence_parallel": True}),
        (MeshSizes(tp=2, cp=2), {}),
        (MeshSizes(tp=2, cp=2), {"sequence_parallel": True}),
        (MeshSizes(tp=2, cp=2), {"sequence_parallel": True, "cp_comm_type": "a2a"}),
        (MeshSizes(dp_replicate=2, cp=2), {"cp_comm_type": "all_gather"}),
        (MeshSizes(dp_shard=2, cp=2), {"fsdp": True}),
        (MeshSizes(cp=2), {"image_token_id": -200}),  # Megatron-LM's, outside the vocabulary
    ],
    ids=lambda value: (
        " ".join(f"{k}={v}" for k, v in value.items())
        if isinstance(value, dict)
        else f"tp{value.tp} cp{value.cp} dp{value.dp}"
    ),
)
def test_every_layout_computes_the_loss_and_gradients_of_one_process(sizes, options):
    found = pool.run(sizes.world_size, gradients, sizes, CASES, dict(options))[0]
    for (kind, _), got in zip(CASES, found):
        compare(got, reference(kind))


def images_on_the_first_rank(sizes):
    """Gradients where one batch of two has images: that of the first data parallel rank."""
    mesh = ParallelMesh.build(sizes)
    model = vision_language_model(mesh)
    if sizes.dp > 1:
        shard(model, mesh)
    images, tokens, labels, _ = batch("rows")
    text = torch.randint(VOCAB - 1, (1, 9), generator=torch.Generator().manual_seed(2))
    rows = [(images, tokens, labels), (None, text, get_shifted_labels(text, IMAGE))]
    count = sum((labels != -100).sum() for *_, labels in rows)
    for images, tokens, labels in rows if sizes.dp == 1 else [rows[dist.get_rank()]]:
        (model(images, tokens, labels=labels).sum() / count).backward()
    return {name: p.grad.full_tensor() for name, p in model.named_parameters()}


def test_a_rank_with_text_alone_takes_part_in_fsdp():
    found, expected = (pool.run(n, images_on_the_first_rank, MeshSizes(dp_shard=n))[0] for n in (2, 1))
    compare((0.0, found), (0.0, expected))


# --- Megatron's way: padded rows of text and image tokens, as thd --------------------------------


def by_padded_rows():
    """Loss of rows that are padded for tp 2, cp 2 and sequence parallelism, as get_packed_seq_params has them."""
    mesh = ParallelMesh.build(MeshSizes(tp=2, cp=2))
    model = vision_language_model(mesh, sequence_parallel=True)
    images, tokens, labels, _ = batch("rows")
    rows, length = tokens.shape
    padding = get_padding(length, 2, 2, True)
    assert padding == 1
    text = F.pad(tokens[:, TOKENS:], (0, padding))  # get_packed_seq_params counts image tokens by themselves
    params = get_packed_seq_params(text, TOKENS, padding, 2)
    assert params.cu_seqlens_q_padded.tolist() == [0, 24, 48, 72]
    layout = SequenceLayout.per_document_zigzag(
        params.cu_seqlens_q, 2, cu_seqlens_padded=params.cu_seqlens_q_padded
    )
    index = get_image_index(tokens, IMAGE, rows, TOKENS)
    own = [
        layout.shard(whole.view(1, -1), dist.get_rank(mesh.groups.cp), dim=1, pad_value=value)
        for whole, value in ((tokens, 0), (labels, -100), (index, -1))
    ]
    losses = model(images, own[0], labels=own[1], image_index=own[2], packed_seq_params=params)
    total = losses.detach().sum()
    dist.all_reduce(total, group=mesh.groups.cp)
    return (total / (labels != -100).sum()).item()


def test_padded_rows_described_by_megatrons_functions():
    expected = reference("rows")[0]
    for found in pool.run(4, by_padded_rows):
        assert abs(found - expected) <= 1e-10 * expected


# --- one process against an independent, plain model ---------------------------------------------


def plain_encoder(w, images, config):
    """[n, c, H, W] -> [n, p, h]: layers with LayerNorm, biases and GELU, in dense attention."""
    h, heads = config.hidden_size, config.num_attention_heads
    kernel = w["patch_embedding.weight"].view(h, 3, PATCH, PATCH)
    x = F.conv2d(images, kernel, w["patch_embedding.bias"], stride=PATCH).flatten(2).transpose(1, 2)
    x = x + w["patch_embedding.positions"]

    def norm(name, x):
        return F.layer_norm(x, (h,), w[f"{name}.weight"], w[f"{name}.bias"], config.layernorm_epsilon)

    def linear(name, x):
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    for i in range(config.num_layers):
        at = f"encoder.layers.{i}"
        y = norm(f"{at}.input_layernorm", x)
        q, k, v = (
            linear(f"{at}.self_attention.linear_{name}", y).unflatten(-1, (heads, -1)).transpose(1, 2)
            for name in "qkv"
        )
        out = ((q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + linear(f"{at}.self_attention.linear_proj", out)
        y = norm(f"{at}.pre_mlp_layernorm", x)
        x = x + linear(f"{at}.mlp.linear_down", F.gelu(linear(f"{at}.mlp.linear_up", y)))
    return norm("encoder.final_layernorm", x)


def against_plain():
    mesh = ParallelMesh.build(MeshSizes())
    model = vision_language_model(mesh)
    images, tokens, labels, cu = batch("pack")
    length = tokens.shape[1]
    layout = SequenceLayout.zigzag(length, 1, cu_seqlens=cu)
    loss = model(images, tokens, labels=labels, layout=layout)
    weights = {n: p.detach().to_local().clone().requires_grad_() for n, p in model.named_parameters()}

    def part(name):
        return {n.removeprefix(name): w for n, w in weights.items() if n.startswith(name)}

    encoded = plain_encoder(part("vision_model."), images.double(), model.vision_model.config)
    w = part("vision_projection.")
    up = F.gelu(F.linear(encoded, w["linear_up.weight"], w["linear_up.bias"]))
    embeddings = F.linear(up, w["linear_down.weight"], w["linear_down.bias"]).flatten(0, 1)
    language = part("language_model.")
    joined = language["embedding.word_embeddings.weight"][tokens[0]]
    joined = joined.index_put((tokens[0] == IMAGE,), embeddings)
    document = torch.bucketize(torch.arange(length), cu[1:], right=True)
    seen = (document[:, None] == document[None, :]).tril()
    positions = torch.arange(length) - cu[document]
    # The plain model looks up row i of "its table" for token i: the joined rows.
    logits = oracle.plain_llama(
        language | {"embedding.word_embeddings.weight": joined},
        torch.arange(length),
        seen,
        positions,
        model.config,
    )
    expected = F.cross_entropy(logits[:, :VOCAB], labels[0], reduction="none", ignore_index=-100)
    torch.testing.assert_close(loss[0], expected, rtol=0, atol=1e-12)
    loss.sum().backward()
    expected.sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad.to_local(), weights[name].grad, rtol=1e-9, atol=1e-10)


def test_one_process_equals_a_plain_model():
    pool.run(1, against_plain)


# --- text alone, rows that are embedded already, Megatron's default cut ----------------------------


def other_calls():
    mesh = ParallelMesh.build(MeshSizes(tp=2, cp=2))
    model = vision_language_model(mesh, sequence_parallel=True)
    images, tokens, labels, _ = batch("rows")
    whole = {
        "tokens": F.pad(tokens, (0, 1)),
        "labels": F.pad(labels, (0, 1), value=-100),
        "index": F.pad(get_image_index(tokens, IMAGE, 3, TOKENS), (0, 1), value=-1),
    }
    own = get_batch_on_this_cp_rank(whole, 2, dist.get_rank(mesh.groups.cp))
    losses = model(images, own["tokens"], labels=own["labels"], image_index=own["index"])
    total = losses.detach().sum()
    dist.all_reduce(total, group=mesh.groups.cp)
    text = torch.arange(8).view(1, 8)
    language = model.language_model
    expected = language(text)
    no_image = torch.full_like(text, -1)
    assert torch.equal(model(None, text, image_index=no_image), expected)
    assert torch.equal(model(images[:0], text, image_index=no_image), expected)
    embedded = language.embedding(text)
    assert torch.equal(language(None, decoder_input=embedded), expected)
    assert torch.equal(language(text, decoder_input=embedded), expected)
    for message, ids, rows in (
        ("neither input_ids nor decoder_input", None, None),
        (r"input_ids has shape \(1, 7\) beside 8 rows", text[:, :7], embedded),
        (r"decoder_input has shape .* it is \[s, b, 32\]", None, embedded[..., :5]),
    ):
        with pytest.raises(ValueError, match=message):
            language(ids, decoder_input=rows)
    return (total / (labels != -100).sum()).item()


def test_rows_cut_without_a_layout_and_text_alone():
    expected = reference("rows")[0]
    for found in pool.run(4, other_calls):
        assert abs(found - expected) <= 1e-10 * expected


def decoder_input_of_a_later_part():
    mesh = ParallelMesh.build(MeshSizes())
    config = configs(MeshSizes())[0]
    model = GPTModel(config, VOCAB, LENGTH, pre_process=False, pg_collection=mesh.groups, seed=1)
    with pytest.raises(ValueError, match=r"does not begin with the embedding.*Give them as input_ids"):
        model(None, decoder_input=torch.zeros(8, 1, 32, dtype=torch.float64))


def test_only_the_first_part_of_a_model_takes_embedded_rows():
    pool.run(1, decoder_input_of_a_later_part)


def same_weights_alone():
    mesh = ParallelMesh.build(MeshSizes())
    whole = vision_language_model(mesh).vision_model
    alone = VisionEncoder(configs(MeshSizes())[1], SIZE, PATCH, pg_collection=mesh.groups, seed=3)
    for (name, p), q in zip(whole.named_parameters(), alone.parameters(), strict=True):
        assert torch.equal(p.to_local(), q.to_local()), name
    assert whole.img_seq_len == alone.img_seq_len == TOKENS


def test_an_encoder_made_alone_has_the_weights_of_a_whole_model():
    pool.run(1, same_weights_alone)


# --- what does not fit ----------------------------------------------------------------------------


def wrong_input():
    mesh = ParallelMesh.build(MeshSizes(cp=2))
    model = vision_language_model(mesh)
    images, tokens, labels, cu = batch("pack")
    layout = SequenceLayout.balanced(cu, 2)
    index = get_image_index(tokens, IMAGE, len(images), TOKENS)
    rank = dist.get_rank()
    own = {
        "input_ids": layout.shard(tokens, rank, dim=1),
        "image_index": layout.shard(index, rank, dim=1, pad_value=-1),
        "labels": layout.shard(labels, rank, dim=1, pad_value=-100),
        "layout": layout,
    }
    contiguous = SequenceLayout.contiguous(layout.padded_total, 2)
    moved = contiguous.shard(F.pad(index, (0, layout.padded_total - layout.total), value=-1), rank, 1)
    for message, pictures, changes in (
        (r"image_index is missing.* over 2 .*get_image_index", images, {"image_index": None}),
        (r"image_index has shape \(1, 83\) beside.*cut", images, {"image_index": index}),
        ("image_index does not fit input_ids", images, {"image_index": moved}),
        (r"images have 0 embeddings.*Give all images", None, {}),
        (r"images have 15 embeddings, from 0", images[:1], {}),
        (r"labels hold the image token 299.*Its label is -100", images, {"labels": own["input_ids"]}),
        (r"images have shape \(4, 3, 10, 6\).*\[images, 3, 6, 10\]", images.transpose(2, 3), {}),
        (r"images are torch.uint8.*Divide", (images * 10).to(torch.uint8), {}),
        ("attention_mask is not supported", images, {"attention_mask": torch.ones(1, 1)}),
        (
            r"decoder_input has \d+ rows; the zigzag layout of 99 tokens",
            images,
            {"layout": SequenceLayout.zigzag(99, 2)},
        ),
    ):
        with pytest.raises(ValueError, match=message):
            model(pictures, **(own | changes))
    alone = PackedSeqParams(local_cp_size=1)  # this call is not cut, so that placeholders can be counted
    assert model(images, tokens, packed_seq_params=alone).shape == (1, 83, VOCAB)
    with pytest.raises(ValueError, match="tokens hold 60 image tokens"):
        model(images[:1], tokens, packed_seq_params=alone)


def test_images_and_tokens_that_do_not_fit_are_refused():
    pool.run(2, wrong_input)


def wrong_configs():
    mesh = ParallelMesh.build(MeshSizes())
    language, vision = configs(MeshSizes())

    def encoder(size=SIZE, patch=PATCH, **options):
        fields = dict(num_layers=1, hidden_size=24, num_attention_heads=4, position_embedding_type="none")
        VisionEncoder(TransformerConfig(**(fields | options)), size, patch, 3, mesh.groups, seed=1)

    def model(image_token_id=IMAGE, **options):
        wrong = configs(MeshSizes(), **options)[0]
        VisionLanguageModel(
            wrong, vision, VOCAB, LENGTH, SIZE, PATCH, image_token_id, pg_collection=mesh.groups, seed=1
        )

    for message, call in (
        ("patch_size 4 does not divide an image of 6 x 10 pixels", lambda: encoder(patch=4)),
        ("patch_size 0 does not", lambda: encoder(patch=0)),
        ("patch_size 5 does not divide an image of 8 x 8", lambda: encoder(8, 5)),
        ("position_embedding_type='rope' of the vision", lambda: encoder(position_embedding_type="rope")),
        ("sequence_parallel=True of the vision", lambda: encoder(sequence_parallel=True)),
        ("num_moe_experts=2 of the vision", lambda: encoder(num_moe_experts=2)),
        ("pipeline_model_parallel_size=2 of the", lambda: encoder(pipeline_model_parallel_size=2)),
        (
            "hybrid_override_pattern='G' of the vision",
            lambda: encoder(hybrid_override_pattern="G", linear_num_value_heads=16),
        ),
        ("window=3 with full attention", lambda: encoder(sliding_window=3)),
        ("image rows would have no position", lambda: model(position_embedding_type="learned_absolute")),
        ("over a pipeline is not supported", lambda: model(pipeline_model_parallel_size=2)),
        ("image_token_id=-100: a label of this number", lambda: model(-100)),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    encoder()
    squared = dataclasses.replace(vision, activation_func="squared_relu")
    seeing = VisionLanguageModel(
        language, squared, VOCAB, LENGTH, SIZE, PATCH, IMAGE, pg_collection=mesh.groups, seed=1
    )
    assert seeing.embed_images(torch.ones(1, 3, *SIZE, dtype=torch.float64)).shape == (TOKENS, 32)


def test_configs_that_are_not_supported_are_refused():
    pool.run(1, wrong_configs)
