"""transformers' models with their sequence cut over ranks against the same models whole: loss and every gradient, in fp64."""

import contextlib
import threading
from dataclasses import dataclass
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import pool
from longspan.context_parallel import SequenceLayout

transformers = pytest.importorskip("transformers")

from longspan.integrations.refusals import check_config  # noqa: E402
from longspan.integrations.transformers import (  # noqa: E402
    Plan,
    Setting,
    all_reduce_gradients,
    longspan_attention,
    longspan_context,
    shard_batch,
    sum_fsdp_gradients,
)

VOCAB = 61
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
WINDOWS = {
    "mistral": {"sliding_window": 7},
    "qwen3": {
        "sliding_window": 5,
        "use_sliding_window": True,
        "layer_types": ["full_attention", "sliding_attention"],
    },
    # Attention sinks; its router and experts compute in the model's type.
    "gpt_oss": {"sliding_window": 6, "num_local_experts": 4, "num_experts_per_tok": 2},
}


#: kind -> transformers' own attention, if it is not sdpa
PLAIN = {"gpt_oss": "eager"}


@contextlib.contextmanager
def exact():
    """transformers computes the loss and the rotary angles in float32 whatever the model's type: here in float64."""
    with mock.patch.object(torch.Tensor, "float", torch.Tensor.double):
        yield


def make_model(kind, attention, seed=0, **changes):
    """A random model in float64, its norms too (transformers' own compute in float32)."""
    config = transformers.AutoConfig.for_model(kind, **SIZES | WINDOWS.get(kind, {}) | changes)
    torch.manual_seed(seed)
    # grouped_mm has no float64.
    experts = {"experts_implementation": "eager"} if hasattr(config, "num_local_experts") else {}
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention, **experts)
    model = model.double()
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child).__name__.endswith("RMSNorm"):
                norm = nn.RMSNorm(child.weight.shape, child.variance_epsilon).double()
                norm.weight = nn.Parameter(torch.rand_like(child.weight) + 0.5)
                setattr(parent, name, norm)
    return model.train()


def documents(lengths, ignored=0.2, seed=0):
    """Tokens and labels of documents, some labels ignored."""
    g = torch.Generator().manual_seed(seed)
    tokens = [torch.randint(1, VOCAB, (n,), generator=g) for n in lengths]
    labels = [t.masked_fill(torch.rand(len(t), generator=g) < ignored, -100) for t in tokens]
    return tokens, labels


def whole(model, docs):
    """(loss, gradients) of documents, each by itself, on one process."""
    count = max(1, sum(int((labels[1:] != -100).sum()) for labels in docs[1]))
    total = 0.0
    with exact():
        for tokens, labels in zip(*docs):
            loss = model(tokens[None], labels=labels[None], num_items_in_batch=count, use_cache=False).loss
            loss.backward()
            total += loss.item()
    return total, {name: p.grad for name, p in model.named_parameters()}


def as_rows(docs):
    """Documents of one length as a batch."""
    return {"input_ids": torch.stack(docs[0]), "labels": torch.stack(docs[1])}


def as_padded(docs):
    """Documents as rows with right padding."""
    pad = nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad(docs[0], batch_first=True),
        "labels": pad(docs[1], batch_first=True, padding_value=-100),
        "attention_mask": pad([torch.ones_like(t) for t in docs[0]], batch_first=True),
    }


def as_pack(docs):
    """Documents in one row, as DataCollatorWithFlattening makes it."""
    return {
        "input_ids": torch.cat(docs[0])[None],
        "labels": torch.cat(docs[1])[None],
        "position_ids": torch.cat([torch.arange(len(t)) for t in docs[0]])[None],
    }


def as_boundaries(docs):
    cu = torch.tensor([0, *(len(t) for t in docs[0])]).cumsum(0)
    batch = as_pack(docs)
    return {"input_ids": batch["input_ids"], "labels": batch["labels"], "cu_seqlens": cu}


@dataclass(frozen=True)
class Case:
    kind: str = "llama"
    form: str = "rows"
    lengths: tuple[int, ...] = (37, 37)
    layout: str = "auto"
    comm: str = "p2p"
    checkpointing: bool | None = None  # use_reentrant
    ignored: float = 0.2


FORMS = {"rows": as_rows, "padded": as_padded, "pack": as_pack, "boundaries": as_boundaries}
PACK = (1, 20, 5, 11)
CASES = [
    Case(layout="zigzag"),
    Case(layout="contiguous", comm="a2a"),
    Case(comm="all_gather", checkpointing=False),
    Case(form="pack", lengths=PACK, layout="balanced", checkpointing=True),
    Case(form="boundaries", lengths=PACK, comm="a2a"),
    Case(form="padded", lengths=(17, 1, 9)),
    Case("qwen3", layout="zigzag", checkpointing=False),
    Case("qwen3", form="pack", lengths=PACK, comm="all_gather"),
    Case("mistral", layout="zigzag", comm="a2a"),
    Case("gpt_oss", layout="zigzag", comm="a2a"),
    Case("gpt_oss", form="pack", lengths=PACK, checkpointing=False),
    Case("gpt_oss", form="padded", lengths=(17, 1, 9), layout="balanced", comm="all_gather"),
    Case("mistral", checkpointing=True),
    Case("mistral", form="padded", lengths=PACK, layout="balanced"),
    Case(layout="contiguous", lengths=(7,), ignored=1.0),  # no target at all
    Case(form="rows", lengths=(2,)),  # a rank with padding only, or without a target
]


def cut(model, case, docs):
    """(loss, gradients), both summed over the ranks."""
    group = dist.group.WORLD
    shard = shard_batch(FORMS[case.form](docs), group=group, config=model.config, layout=case.layout)
    if case.checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": case.checkpointing})
    with exact():
        with longspan_context(shard.layout, group=group, cp_comm_type=case.comm):
            loss = model(**shard.inputs).loss
        loss.backward()  # outside: layers that run again must still find the layout
    all_reduce_gradients(model, group)
    loss = loss.detach()
    dist.all_reduce(loss)
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}


def compare(got, expected, what):
    assert abs(got[0] - expected[0]) <= 1e-10 * abs(expected[0]), f"loss of {what}: {got[0]} {expected[0]}"
    scale = max(ref.abs().max() for ref in expected[1].values())
    for name, ref in expected[1].items():
        size = max(ref.abs().max(), 1e-5 * scale)  # a gradient that is zero but for rounding
        error = (got[1][name] - ref).abs().max() / size.clamp_min(1e-300)
        assert error <= 1e-10, f"gradient of {name}, {what}: {error:.1e}"


def against_one_process(cases):
    for case in cases:
        docs = documents(case.lengths, case.ignored)
        expected = whole(make_model(case.kind, PLAIN.get(case.kind, "sdpa")), docs)
        compare(cut(make_model(case.kind, "longspan"), case, docs), expected, case)


@pytest.mark.parametrize("world", [2, 3])
def test_loss_and_gradients_are_those_of_one_process(world):
    pool.run(world, against_one_process, CASES)


def alternating():
    """Two models, two layouts, two batches under way at once, checkpointed: one backward after all forwards."""
    group = dist.group.WORLD
    docs = [documents((37,)), documents(PACK, seed=1)]
    expected = [[whole(make_model("llama", "sdpa", seed), d) for d in docs] for seed in (0, 1)]
    models = [make_model("llama", "longspan", seed) for seed in (0, 1)]
    losses = []
    with exact():
        for model in models:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            for d, layout in zip(docs, ("zigzag", "balanced")):
                shard = shard_batch(as_pack(d), group=group, layout=layout)
                with (
                    longspan_context(None),  # nested: the inner one counts
                    longspan_context(shard.layout, group=group, cp_comm_type="all_gather"),
                ):
                    losses.append(model(**shard.inputs).loss)
        with longspan_context(None):  # another context does not disturb layers that run again
            thread = threading.Thread(target=sum(losses).backward)
            thread.start()
            thread.join()
    for number, model in enumerate(models):
        all_reduce_gradients(model, group)
        loss = sum(losses[2 * number : 2 * number + 2]).detach()
        dist.all_reduce(loss)
        one, two = expected[number]
        summed = {name: grad + two[1][name] for name, grad in one[1].items()}
        got = {name: p.grad for name, p in model.named_parameters()}
        compare((loss.item(), got), (one[0] + two[0], summed), f"model {number}")


def test_models_and_layouts_under_way_at_once():
    pool.run(2, alternating)


def with_fsdp():
    docs = documents((37, 37))
    expected = whole(make_model("llama", "sdpa"), docs)
    model = make_model("llama", "longspan")
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    sum_fsdp_gradients(model)
    group = dist.group.WORLD
    shard = shard_batch(as_rows(docs), group=group)
    with exact():
        with longspan_context(shard.layout, group=group):
            loss = model(**shard.inputs).loss
        loss.backward()
    with pytest.raises(ValueError, match="sharded"):
        all_reduce_gradients(model, group)
    loss = loss.detach()
    dist.all_reduce(loss)
    compare(
        (loss.item(), {name: p.grad.full_tensor() for name, p in model.named_parameters()}), expected, "fsdp"
    )


def test_fsdp2_sums_gradients():
    pool.run(2, with_fsdp)


def autocast_and_full_attention():
    """Under autocast query and key are float32 and value is not; a model may be told to attend fully."""
    group = dist.group.WORLD
    docs = documents((37, 37))
    shard = shard_batch(as_rows(docs), group=group)
    model = make_model("llama", "longspan").float()
    with (
        torch.autocast("cpu", torch.bfloat16),
        longspan_context(shard.layout, group=group),
    ):
        loss = model(**shard.inputs).loss
    loss.backward()
    loss = loss.detach()
    dist.all_reduce(loss)
    with torch.autocast("cpu", torch.bfloat16):
        expected = make_model("llama", "sdpa").float()(**as_rows(docs)).loss
    assert abs(loss - expected) < 0.05 * expected
    docs = documents(PACK)
    shard = shard_batch(as_pack(docs), group=group)
    with exact(), torch.no_grad():
        with longspan_context(shard.layout, group=group):
            out = make_model("llama", "longspan", is_causal=False)(**shard.inputs).logits
        model = make_model("llama", "sdpa", is_causal=False)
        expected = torch.cat([model(t[None]).logits for t in docs[0]], dim=1)
    torch.testing.assert_close(shard.layout.unshard(out, group, dim=1), expected, rtol=0, atol=1e-10)


def test_autocast_and_full_attention():
    pool.run(2, autocast_and_full_attention)


def refusals_of_ranks():
    group, tokens = dist.group.WORLD, torch.ones(1, 8, dtype=torch.int64)
    model = make_model("llama", "longspan")
    with pytest.raises(ValueError, match="outside a context"):
        model(tokens)
    layout = SequenceLayout.zigzag(8, 2)
    with pytest.raises(ValueError, match="made for 2 ranks, the group has 1"), longspan_context(layout):
        pass
    with pytest.raises(ValueError, match="without a layout"), longspan_context(None, group=group):
        pass
    with longspan_context(layout, group=group):
        with pytest.raises(ValueError, match="use_cache=True"):
            model(tokens[:, :4], use_cache=True)
        with pytest.raises(ValueError, match="8 tokens a row, the layout of the context holds 4"):
            model(tokens, use_cache=False)
    with longspan_context(None):  # whole sequences on each rank
        model(tokens)


def test_refuses_what_would_be_wrong_among_ranks():
    pool.run(2, refusals_of_ranks)


def test_one_process_needs_no_context():
    docs = documents((9, 9))
    with exact():
        batch = as_rows(docs)
        losses = [make_model("mistral", name)(**batch).loss.item() for name in ("longspan", "sdpa")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)


@pytest.mark.parametrize(
    ("message", "changes", "inputs"),
    [
        ("dropout 0.1", {"attention_dropout": 0.1}, {}),
        ("output_attentions", {}, {"output_attentions": True}),
        ("softcap", {}, {"softcap": 30.0}),
        ("head_mask", {}, {"head_mask": torch.ones(6)}),
        ("hides 1 tokens", {}, {"attention_mask": torch.tensor([[1, 1, 1, 0]])}),
        (r"a mask of shape \(1, 1, 4, 4\)", {}, {"attention_mask": torch.ones(1, 1, 4, 4)}),
        ("start anew", {}, {"position_ids": torch.tensor([[0, 1, 0, 1]]), "use_cache": False}),
        ("output_attentions is set", {"output_attentions": True}, {}),
    ],
)
def test_refuses_what_it_cannot_do(message, changes, inputs):
    model = make_model("llama", "longspan", **changes)
    with pytest.raises(ValueError, match=message):
        model(torch.ones(1, 4, dtype=torch.int64), **inputs)


def test_refuses_layers_that_disagree_with_their_mask():
    plan = Plan(SequenceLayout.contiguous(4, 1), Setting(None), causal=True, window=3)
    x = torch.ones(1, 1, 4, 8)
    for message, arguments in (
        ("sliding_window=2, its mask for 3", {"sliding_window": 2}),
        ("is_causal=False, its mask is causal", {"is_causal": False}),
    ):
        with pytest.raises(ValueError, match=message):
            longspan_attention(nn.Module(), x, x, x, plan, **arguments)
    with pytest.raises(ValueError, match="with no mask where"):
        longspan_attention(nn.Module(), x, x, x, None)


def test_a_context_that_no_model_asked_is_refused():
    shard = shard_batch({"input_ids": torch.ones(1, 4, dtype=torch.int64)})
    with pytest.raises(ValueError, match="attn_implementation='longspan'"), longspan_context(shard.layout):
        make_model("llama", "sdpa")(**shard.inputs)


def test_refuses_decoding_and_other_masks():
    tokens = torch.ones(1, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="To generate.*sdpa"):
        make_model("llama", "longspan").eval().generate(tokens, max_new_tokens=2, pad_token_id=0)
    chunked = transformers.Llama4TextConfig(
        vocab_size=VOCAB, hidden_size=24, num_hidden_layers=1, num_attention_heads=6, num_key_value_heads=2, head_dim=4,
        intermediate_size=32, intermediate_size_mlp=32, num_local_experts=2, attention_chunk_size=2,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(chunked, attn_implementation="longspan")
    with pytest.raises(ValueError, match="masks attention by chunked_overlay"):
        model(tokens)
    with pytest.raises(ValueError, match="masks attention by sliding_window_bidirectional_overlay"):
        make_model("mistral", "longspan", is_causal=False)(tokens)


@pytest.mark.parametrize(
    ("message", "kind", "changes"),
    [
        ("linear_attention", "qwen3_next", {}),
        ("cross-attention", "t5", {}),
        ("output_router_logits", "mixtral", {"output_router_logits": True}),
        (
            "largest position",
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
        ),
    ],
)
def test_refuses_models_that_mix_tokens_elsewhere(message, kind, changes):
    config = transformers.AutoConfig.for_model(kind, **{"max_position_embeddings": 64} | changes)
    if kind != "t5":
        check_config(config, SequenceLayout.contiguous(64, 1))
    with pytest.raises(ValueError, match=message):
        check_config(config, SequenceLayout.zigzag(65, 2))


def row(*numbers):
    return torch.tensor([numbers])


@pytest.mark.parametrize(
    ("message", "batch"),
    [
        ("no input_ids", {"labels": row(1, 2)}),
        ("Did you mean labels", {"input_ids": row(1, 2), "label": row(1, 2)}),
        ("both labels and shift_labels", {"input_ids": row(1, 2), "labels": row(1, 2), "shift_labels": row(1, 2)}),
        ("must be alike", {"input_ids": row(1, 2), "labels": row(1)}),
        ("must be alike", {"input_ids": row(1, 2), "attention_mask": torch.ones(1, 1, 2, 2)}),
        ("more than right padding", {"input_ids": row(1, 2), "attention_mask": row(0, 1)}),
        ("more than right padding", {"input_ids": row(1, 2), "attention_mask": row(2, 1)}),
        ("hides every token", {"input_ids": row(1, 2), "attention_mask": row(0, 0)}),
        ("labels are set on", {"input_ids": row(1, 2), "attention_mask": row(1, 0), "labels": row(1, 2)}),
        ("several axes", {"input_ids": row(1, 2), "position_ids": torch.zeros(3, 1, 2)}),
        ("ends with", {"input_ids": row(1, 2), "cu_seqlens": [0, 1]}),
        ("a row begins", {"input_ids": torch.ones(2, 2, dtype=torch.int64), "cu_seqlens": [0, 4]}),
        ("start anew", {"input_ids": row(1, 2, 3), "cu_seqlens": [0, 1, 3], "position_ids": row(0, 1, 0)}),
        ("both say", {"input_ids": row(1, 2), "cu_seqlens": [0, 2], "attention_mask": row(1, 0)}),
    ],
)  # fmt: skip
def test_batches_that_would_be_wrong_are_refused(message, batch):
    with pytest.raises(ValueError, match=message):
        shard_batch(batch)


def test_a_batch_on_one_rank():
    tokens = torch.tensor([[5, 6, 7, 0], [8, 9, 0, 0]])
    batch = {
        "input_ids": tokens,
        "attention_mask": (tokens > 0).long(),
        "labels": tokens.where(tokens > 0, -100),
    }
    shard = shard_batch(batch, num_items_in_batch=9)
    assert shard.inputs["input_ids"].tolist() == [[5, 6, 7, 8, 9]]
    assert shard.inputs["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert shard.inputs["shift_labels"].tolist() == [[6, 7, -100, 9, -100]]
    assert shard.inputs["labels"].shape == (1, 0)
    assert (shard.num_targets, int(shard.inputs["num_items_in_batch"])) == (3, 9)
    assert shard.layout.cu_seqlens == (0, 3, 5)
    plain = shard_batch({"input_ids": tokens, "position_ids": torch.arange(3, 7)[None]})
    assert plain.inputs["position_ids"].tolist() == [[3, 4, 5, 6]] * 2
    assert "labels" not in plain.inputs
