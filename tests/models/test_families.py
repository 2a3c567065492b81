"""Qwen2, Qwen3, Llama with biases and GPT-2 in and out, against transformers itself."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import llamas
import pool
import tiny
from llamas import ROWS, row_of_tokens
from longspan.config.families.hub import architecture_of
from longspan.context_parallel import SequenceLayout
from longspan.errors import UserError
from longspan.models import hf_weights
from longspan.training.trainer import Trainer

CPU = torch.device("cpu")
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 16,
    "beta_slow": 2,
}
SHAPE = llamas.SHAPE | dict(num_hidden_layers=3, bos_token_id=None, eos_token_id=None)
SLIDING = dict(use_sliding_window=True, sliding_window=9, max_window_layers=1)

#: name -> (class of transformers, fields beside SHAPE)
FAMILIES = {
    "qwen2": ("Qwen2", {}),
    "qwen2 tied, windows": ("Qwen2", dict(tie_word_embeddings=True, **SLIDING)),
    "qwen2 yarn": ("Qwen2", dict(rope_parameters=YARN | {"rope_theta": 1e4})),
    "qwen2 unused window": ("Qwen2", dict(use_sliding_window=False, sliding_window=9, max_window_layers=1)),
    "qwen3": ("Qwen3", dict(head_dim=16)),
    "qwen3 tied, windows": ("Qwen3", dict(head_dim=8, tie_word_embeddings=True, **SLIDING)),
    "llama with biases": ("Llama", dict(attention_bias=True, mlp_bias=True, hidden_act="gelu")),
    "llama linear": (
        "Llama",
        dict(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}),
    ),
    "gpt2": ("GPT2", {}),
    "gpt2 untied": ("GPT2", dict(tie_word_embeddings=False)),
}


def make(folder, name, dtype=torch.float32, **more):
    """A random model as transformers saves it; biases and norms are other than zeros and ones."""
    import transformers

    kind, fields = FAMILIES[name]
    torch.manual_seed(1)
    if kind == "GPT2":
        config = transformers.GPT2Config(
            vocab_size=tiny.VOCAB,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_inner=48,
            n_positions=60,
            activation_function="gelu",
            initializer_range=0.2,
            bos_token_id=None,
            eos_token_id=None,
            **dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
            **fields,
        )
        model = transformers.GPT2LMHeadModel(config)
    else:
        config = getattr(transformers, f"{kind}Config")(**(SHAPE | fields | more))
        model = getattr(transformers, f"{kind}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model.to(dtype).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_transformers_and_the_round_trip_is_bit_equal(prefix, tmp_path, name):
    from transformers import AutoModelForCausalLM

    base = make(tmp_path / "base", name)
    layout = {"tensor_parallel_size": 2, "context_parallel_size": 2, "params_dtype": "float32"}
    logits = pool.run(4, llamas.imported, prefix, base, str(tmp_path / "hf"), layout)[0]
    before = AutoModelForCausalLM.from_pretrained(base)
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    with torch.no_grad():
        expected = before(row_of_tokens()).logits
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
        assert torch.equal(after(row_of_tokens()).logits, expected)
    assert before.config.model_type == after.config.model_type
    files = [load_file(tmp_path / folder / "model.safetensors") for folder in ("base", "hf")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][n], files[1][n]) for n in files[0])


# --- loss and gradients of one process, fp64 -------------------------------------------------


def exactly(model):
    """transformers' model in fp64 all through: its norms, angles and softmax are float32 otherwise."""

    def norm(module):
        def forward(x):
            scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + module.variance_epsilon)
            return module.weight * (x * scale)

        return forward

    def rotary(module):
        from longspan.models.rotary import frequencies

        c = model.config
        rope = dict(c.rope_parameters)
        base = rope.pop("rope_theta")
        head = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        freqs = frequencies(head, base, rope)

        def forward(x, position_ids):
            angles = position_ids[..., None].double() * freqs
            angles = torch.cat((angles, angles), -1)
            return angles.cos() * module.attention_scaling, angles.sin() * module.attention_scaling

        return forward

    model.double()
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = norm(module)
        if type(module).__name__.endswith("RotaryEmbedding"):
            module.forward = rotary(module)
    return model


def gradients(prefix, base, more):
    """Loss and gradients by our names of the imported model, in fp64."""
    trainer = Trainer(llamas.base_run(prefix, base, **more), CPU)
    layout = SequenceLayout.zigzag(ROWS, trainer.run.sizes.cp, multiple_of=trainer.run.sizes.tp)
    rank = trainer.shard.cp_rank
    labels = row_of_tokens().roll(-1, 1)
    out = trainer.model(
        layout.shard(row_of_tokens(), rank, dim=1),
        labels=layout.shard(labels, rank, dim=1, pad_value=-100),
        layout=layout,
    )
    loss = out.sum() / ROWS
    loss.backward()
    total = loss.detach().clone()
    dist.all_reduce(total, group=trainer.groups.dp_cp)
    places = hf_weights.Names(trainer.model.config, tiny.VOCAB)
    found = {}
    for name, parameter in trainer.model.named_parameters():
        (place,), grad = places.places(name), parameter.grad.full_tensor()[: places.rows(name)]
        key = (place.name, place.first, place.transposed)
        found.setdefault(key, grad.t() if place.transposed else grad)
    return total.item(), found


@pytest.mark.parametrize(
    ("name", "world", "cut"),
    [
        *((name, 1, {}) for name in FAMILIES),
        ("qwen2 tied, windows", 4, {"tensor_parallel_size": 2, "context_parallel_size": 2}),
        ("qwen3", 4, {"tensor_parallel_size": 2, "context_parallel_size": 2}),
        ("gpt2", 4, {"tensor_parallel_size": 2, "context_parallel_size": 2}),
        ("qwen3", 3, {"context_parallel_size": 3}),
    ],
)
def test_loss_and_gradients_are_transformers(prefix, tmp_path, name, world, cut):
    from transformers import AutoModelForCausalLM

    base = make(tmp_path / "base", name, torch.float64)
    loss, grads = pool.run(world, gradients, prefix, base, cut)[0]
    model = exactly(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64))
    logits = model(row_of_tokens()).logits
    expected = F.cross_entropy(logits[0], row_of_tokens().roll(-1, 1)[0])
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-10)
    theirs = {name: p.grad for name, p in model.named_parameters()}
    least = 1e-5 * max(grad.abs().max() for grad in theirs.values())
    seen = set()
    for (where, first, transposed), grad in grads.items():
        ref = theirs[where].narrow(-1 if transposed else 0, first, grad.shape[-1 if transposed else 0])
        error = ((grad - ref).abs().max() / ref.abs().max().clamp_min(least)).item()
        assert error <= 1e-10, f"{where} from {first}: {error:.1e}"
        seen.add(where)
    assert seen == theirs.keys()


# --- YaRN on a loaded model ------------------------------------------------------------------


def test_context_extension_by_a_key(prefix, tmp_path):
    """A model made for 32 tokens, loaded with a rope_scaling key: as transformers computes it, and exported so."""
    from transformers import AutoModelForCausalLM

    base = make(tmp_path / "base", "qwen2", max_position_embeddings=32)
    scaling = {"rope_type": "yarn", "factor": 2.0}
    more = {"rope_scaling": scaling, "params_dtype": "float32", "context_parallel_size": 2}
    logits = pool.run(2, llamas.imported, prefix, base, str(tmp_path / "hf"), more)[0]
    said = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert said["rope_scaling"] == scaling | {"original_max_position_embeddings": 32}
    assert said["max_position_embeddings"] == 64
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")(row_of_tokens()).logits
        plain = AutoModelForCausalLM.from_pretrained(base)(row_of_tokens()).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    assert (expected - plain).abs().max() > 1e-2
    # as transformers does it from the same words
    by_hand = json.loads((Path(base) / "config.json").read_text())
    by_hand["rope_parameters"] |= scaling
    (Path(base) / "config.json").write_text(json.dumps(by_hand))
    with torch.no_grad():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(base)(row_of_tokens()).logits, expected)


def dynamic(prefix, base, more):
    return llamas.whole_logits(Trainer(llamas.base_run(prefix, base, **more), CPU), row_of_tokens(50))


def test_dynamic_scaling_follows_the_whole_sequence(prefix, tmp_path):
    """A sequence of sequence_len tokens over two ranks, each of which holds fewer than max_position_embeddings."""
    from transformers import AutoModelForCausalLM

    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    base = make(tmp_path / "base", "qwen2", max_position_embeddings=32, rope_parameters=rope)
    more = {"params_dtype": "float32", "context_parallel_size": 2, "sample_packing": False}
    logits = pool.run(2, dynamic, prefix, base, more)[0]
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(base)(row_of_tokens(50)).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    with pytest.raises(UserError, match="Use yarn or linear"):
        tiny.tiny_run(prefix, 2, **llamas.from_base(base, context_parallel_size=2))


# --- norms that keep their weight minus 1 ----------------------------------------------------


def test_zero_centered_norms_come_and_go(prefix, tmp_path):
    base = make(tmp_path / "base", "qwen3")
    more = {"params_dtype": "float32", "layernorm_zero_centered_gamma": True, "tensor_parallel_size": 2}
    pool.run(2, llamas.imported, prefix, base, str(tmp_path / "hf"), more)
    files = [load_file(tmp_path / folder / "model.safetensors") for folder in ("base", "hf")]
    for name, tensor in files[0].items():
        torch.testing.assert_close(files[1][name], tensor, rtol=0, atol=1e-6)


# --- what is refused -------------------------------------------------------------------------


def weights_problem(base, edit):
    """What check_tensors says of a folder whose tensors were edited."""
    from longspan.config.load import architecture_config
    from longspan.config.resolve import resolve

    file = Path(base) / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    run = resolve(architecture_config(architecture_of(base)), 1)
    source = hf_weights.SafetensorsFolder(base)
    with pytest.raises(UserError) as caught:
        hf_weights.check_tensors(source, hf_weights.Names(run.transformer_config(), tiny.VOCAB))
    return str(caught.value)


def test_other_tensors_than_the_models_are_refused(tmp_path):
    base = make(tmp_path / "base", "qwen3")
    layer = "model.layers.0.self_attn."

    def fuse(t):
        t[layer + "qkv_proj.weight"] = torch.cat([t.pop(layer + f"{x}_proj.weight") for x in "qkv"])

    assert "qkv_proj.weight holds fused weights" in weights_problem(base, fuse)

    def quantise(t):
        t.pop(layer + "qkv_proj.weight")
        t[layer + "q_proj.qweight"] = torch.zeros(2)

    assert "qweight holds quantised weights" in weights_problem(base, quantise)

    def strange(t):
        t.pop(layer + "q_proj.qweight")
        t["model.layers.0.strange.weight"] = torch.zeros(2)

    found = weights_problem(base, strange)
    assert "k_proj.weight, model.layers.0.self_attn.q_proj.weight" in found
    assert "model.layers.0.strange.weight, for which the config has no place" in found


def test_a_tied_model_with_another_head_is_refused(tmp_path):
    base = make(tmp_path / "base", "qwen2 tied, windows")

    def untie(t):
        t["lm_head.weight"] = t["model.embed_tokens.weight"] + 1

    assert "differ, but tie_word_embeddings is true" in weights_problem(base, untie)
