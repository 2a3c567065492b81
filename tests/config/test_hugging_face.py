"""config.json as keys, keys as config.json, and the table of known architectures; no torch, no network."""

import json
import math

import pytest

from longspan.config.architecture import Architecture
from longspan.config.families.config_json import export_problem, hugging_face_config, keys_of
from longspan.config.families.family import windows_of
from longspan.config.families.hub import architecture_of, model_folder, unused_fields
from longspan.config.families.known import KNOWN_MODELS
from longspan.config.load import architecture_config, make_config
from longspan.config.model import padded_vocab_size
from longspan.config.parameters import VOCABULARY, parameter_shapes
from longspan.config.resolve import resolve
from longspan.errors import UserError

SHAPE = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 100,
}


def read(kind, **fields):
    return keys_of({"model_type": kind, **SHAPE, **fields}, "config.json")


def test_what_transformers_takes_where_a_field_is_missing():
    assert read("llama")["layernorm_epsilon"] == 1e-6
    assert read("llama")["rotary_base"] == 10000.0
    assert read("qwen3")["kv_channels"] == 128
    assert read("mistral")["sliding_window"] == 4096
    assert "sliding_window" not in read("qwen2", sliding_window=16)
    bare = {k: v for k, v in SHAPE.items() if k != "num_key_value_heads"}
    assert "num_query_groups" not in keys_of({"model_type": "llama", **bare}, "x")
    assert keys_of({"model_type": "mistral", **bare}, "x")["num_query_groups"] == 8


@pytest.mark.parametrize(
    ("fields", "windows"),
    [
        ({"max_window_layers": 3}, [None, None, None, 16]),
        ({"max_window_layers": 0}, 16),
        ({"max_window_layers": 28}, None),
        ({}, None),  # transformers takes 28
        ({"layer_types": ["sliding_attention", "full_attention"] * 2}, [16, None, 16, None]),
        ({"use_sliding_window": False, "max_window_layers": 0}, None),
        ({"sliding_window": None, "max_window_layers": 0}, None),
    ],
)
def test_windows_of_qwen(fields, windows):
    found = read("qwen2", **({"use_sliding_window": True, "sliding_window": 16} | fields))
    assert found.get("sliding_window") == windows


def test_rotary_fields_in_both_places():
    assert read("llama", rope_theta=5e5)["rotary_base"] == 5e5
    nested = read("llama", rope_parameters={"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0})
    assert nested["rotary_base"] == 5e5
    assert nested["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    assert "rope_scaling" not in read("llama", rope_scaling={"type": "default"})


@pytest.mark.parametrize(
    ("kind", "fields", "words"),
    [
        ("phi3", {}, "model_type 'phi3'; supported: llama, mistral"),
        ("llama", {"attention_bias": True}, "sets attention_bias: biases of query, key, value and output"),
        ("llama", {"mlp_bias": True}, "sets mlp_bias: biases of the MLP alone"),
        ("qwen3", {"attention_bias": True}, "sets attention_bias"),
        ("llama", {"hidden_act": "gelu_new"}, "hidden_act 'gelu_new'.*gelu is the exact one"),
        ("gpt2", {}, "activation_function 'gelu_new'"),
        ("gpt2", {"activation_function": "gelu", "scale_attn_weights": False}, "scales attention"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config: its weights are quantised"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ("qwen3", {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "hold for all layers"),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 4, "layer_types": ["linear_attention"] * 4},
            "layers of type linear_attention",
        ),
    ],
)
def test_refusals(kind, fields, words):
    with pytest.raises(UserError, match=words):
        read(kind, **fields)


def model(**changes):
    """A model, as an export reads it."""
    keys = read("llama", head_dim=16)
    read_ = make_config(
        keys | {"learning_rate": 0, "datasets": [{"path": "x"}], "sequence_len": 64} | changes
    )
    assert not read_.problems, read_.problems
    return Architecture.of(read_.config)


def keys(model):
    """All config keys of a model."""
    return model.keys("shapes") | model.keys("numbers") | model.keys("training")


#: what a config.json names beside the architecture
BESIDE = {"vocab_size": 128, "sequence_len": 64}


GPT = {
    "position_embedding_type": "learned_absolute",
    "max_position_embeddings": 64,
    "normalization": "LayerNorm",
    "gated_linear_unit": False,
    "activation_func": "gelu",
    "add_bias_linear": True,
    "num_query_groups": 4,
}


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({}, "llama"),
        ({"add_bias_linear": True}, "llama"),
        ({"sliding_window": 8}, "mistral"),
        ({"sliding_window": [8, None]}, "ministral"),
        ({"add_qkv_bias": True}, "qwen2"),
        ({"add_qkv_bias": True, "sliding_window": [None, 8]}, "qwen2"),
        ({"qk_layernorm": True}, "qwen3"),
        ({"qk_layernorm": True, "sliding_window": 8}, "qwen3"),
        (GPT, "gpt2"),
        (GPT | {"activation_func": "relu"}, "gpt2"),
    ],
)
def test_what_is_written_reads_back_the_same(changes, kind):
    ours = model(**changes)
    assert export_problem(ours) is None
    written = json.loads(json.dumps(hugging_face_config(ours, **BESIDE, dtype="float32")))
    assert written["model_type"] == kind
    read_back = architecture_config(keys_of(written, "x"), BESIDE["sequence_len"])
    assert read_back.vocab_size == BESIDE["vocab_size"]
    back = Architecture.of(read_back)
    assert windows_of(back) == windows_of(ours)
    assert back.max_position_embeddings >= 64
    others = {"sliding_window", "max_position_embeddings"} | ({"rotary_base"} if kind == "gpt2" else set())
    assert {k: v for k, v in keys(back).items() if k not in others} == {
        k: v for k, v in keys(ours).items() if k not in others
    }


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"normalization": "LayerNorm"}, r"has normalization LayerNorm \(needs RMSNorm\)"),
        ({"gated_linear_unit": False}, r"gated_linear_unit false \(needs true\)"),
        ({"position_embedding_type": "none"}, "position_embedding_type none"),
        ({"softmax_scale": 0.1}, r"softmax_scale 0.1 \(needs null\)"),
        (GPT | {"softmax_scale": 0.1}, "GPT-2, which has no place for softmax_scale 0.1"),
        ({"sliding_window": [3, 5]}, "windows of different sizes"),
        ({"qk_layernorm": True, "add_qkv_bias": True}, "add_qkv_bias with qk_layernorm has no"),
        ({"add_bias_linear": True, "sliding_window": 8}, "Mistral has no biases"),
        (GPT | {"num_query_groups": 2}, r"GPT-2, which has no place for num_query_groups 2 \(needs 4\)"),
        (GPT | {"normalization": "RMSNorm"}, "no place for normalization RMSNorm"),
    ],
)
def test_models_without_an_architecture(changes, words):
    import re

    problem = export_problem(model(**changes))
    assert re.search(words, problem), problem
    values = read("llama") | {"learning_rate": 0, "datasets": [{"path": "x"}], "sequence_len": 64} | changes
    with pytest.raises(UserError, match="Set export_hf: false"):
        resolve(make_config(values).config, 1)
    resolve(make_config(values | {"export_hf": False}).config, 1)


# --- the table -------------------------------------------------------------------------------


def test_every_known_model_is_one():
    wrong = []
    for name in KNOWN_MODELS:
        config = architecture_config(architecture_of(name))
        model = Architecture.of(resolve(config, 1).config)
        if model.hidden_size % 64 or config.vocab_size < 32000 or export_problem(model) is not None:
            wrong.append(name)
    assert not wrong


#: parameters in billions, as the models' own pages give them
SIZES = {
    "meta-llama/Llama-2-7b-hf": 6.74,
    "meta-llama/Llama-2-13b-hf": 13.02,
    "meta-llama/Llama-2-70b-hf": 68.98,
    "meta-llama/Meta-Llama-3-8B": 8.03,
    "meta-llama/Llama-3.1-8B-Instruct": 8.03,
    "meta-llama/Llama-3.1-70B": 70.55,
    "meta-llama/Llama-3.1-405B": 405.85,
    "meta-llama/Llama-3.2-1B": 1.24,
    "meta-llama/Llama-3.2-3B": 3.21,
    "mistralai/Mistral-7B-v0.1": 7.24,
    "mistralai/Mistral-7B-v0.3": 7.25,
    "Qwen/Qwen2.5-0.5B": 0.49,
    "Qwen/Qwen2.5-1.5B": 1.54,
    "Qwen/Qwen2.5-3B": 3.09,
    "Qwen/Qwen2.5-7B": 7.62,
    "Qwen/Qwen2.5-14B": 14.77,
    "Qwen/Qwen2.5-32B": 32.76,
    "Qwen/Qwen2.5-72B-Instruct": 72.71,
    "Qwen/Qwen3-0.6B": 0.60,
    "Qwen/Qwen3-1.7B": 1.72,
    "Qwen/Qwen3-4B": 4.02,
    "Qwen/Qwen3-8B": 8.19,
    "Qwen/Qwen3-14B": 14.77,
    "Qwen/Qwen3-32B": 32.76,
    "mistralai/Mixtral-8x7B-v0.1": 46.70,
    "mistralai/Mixtral-8x22B-v0.1": 140.62,
    "Qwen/Qwen3-30B-A3B": 30.53,
    "Qwen/Qwen3-235B-A22B": 235.09,
    "HuggingFaceTB/SmolLM2-135M": 0.135,
    "HuggingFaceTB/SmolLM2-1.7B": 1.71,
}


def billions_of_parameters(name):
    config = architecture_config(architecture_of(name))
    shapes = parameter_shapes(Architecture.of(config), config.vocab_size)
    total = sum(map(math.prod, shapes.values()))
    padding = padded_vocab_size(config.vocab_size) - config.vocab_size
    return (total - padding * config.hidden_size * sum(name in VOCABULARY for name in shapes)) / 1e9


def test_the_figures_give_the_published_number_of_parameters():
    found = {name: billions_of_parameters(name) for name in SIZES}
    assert not {
        name: found[name]
        for name, size in SIZES.items()
        if found[name] != pytest.approx(size, abs=0.006 if size < 100 else 0.01)
    }


def test_a_folder_of_that_name_comes_before_the_table(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "meta-llama" / "Llama-3.1-8B"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **SHAPE}))
    assert architecture_of("meta-llama/Llama-3.1-8B")["hidden_size"] == 64


def test_weights_that_cannot_be_had(monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")

    def offline(*_, **__):
        raise ConnectionError

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(
        UserError, match=r"hf download Qwen/Qwen3-8B --local-dir Qwen3-8B.*reinit_weights: true"
    ):
        model_folder("Qwen/Qwen3-8B")
    with pytest.raises(UserError, match="hf download some/model"):
        architecture_of("some/model")


# --- positions -------------------------------------------------------------------------------


def resolved(**changes):
    values = read("llama") | {
        "learning_rate": 0,
        "datasets": [{"path": "x"}],
        "max_position_embeddings": None,
    }
    made = make_config(values | changes)
    assert not made.problems, made.problems
    return resolve(made.config, 1)


def test_a_sequence_beyond_the_positions_is_refused():
    for kind, what in (("rope", "is made for"), ("learned_absolute", "has a learned row for")):
        with pytest.raises(
            UserError, match=rf"sequence_len 64 is larger than max_position_embeddings 32.*{what}"
        ):
            resolved(
                sequence_len=64, max_position_embeddings=32, position_embedding_type=kind, export_hf=False
            )
    learned = resolved(sequence_len=64, position_embedding_type="learned_absolute", export_hf=False)
    assert learned.transformer_config().max_position_embeddings == 64


def test_a_longer_sequence_than_base_models_is_an_extension():
    base = {"base_model": "meta-llama/Meta-Llama-3-8B", "learning_rate": 0, "datasets": [{"path": "x"}]}
    yarn = base | {"sequence_len": 20000, "rope_scaling": {"rope_type": "yarn", "factor": 4}}
    config = resolve(make_config(yarn).config, 1).config
    assert config.rope_scaling["original_max_position_embeddings"] == 8192
    assert config.max_position_embeddings == 20000
    assert (
        hugging_face_config(
            Architecture.of(config), vocab_size=128, sequence_len=config.sequence_len, dtype="bfloat16"
        )["max_position_embeddings"]
        == 32768
    )
    again = resolve(make_config(config.model_dump()).config, 1).config  # as a worker reads the resolved file
    assert again == config
    same = resolve(make_config(base | {"sequence_len": 4096}).config, 1).config
    assert same.max_position_embeddings == 8192


# --- what nobody can mean ---------------------------------------------------------------------

ODD = ["four", -5, 0, 2.5, 2**60, True, [], {}, [1], {"a": 1}, float("nan"), float("inf"), "", None]
ODD_FIELDS = {
    "llama": (
        *("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
        *("head_dim", "intermediate_size", "vocab_size", "rms_norm_eps", "rope_theta", "rope_scaling"),
        *("max_position_embeddings", "hidden_act", "tie_word_embeddings", "attention_bias", "mlp_bias"),
        *("initializer_range", "rope_parameters", "partial_rotary_factor", "quantization_config"),
    ),
    "qwen2": ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types"),
    "gpt2": ("n_layer", "n_embd", "n_head", "n_inner", "n_positions", "activation_function", "scale_attn_weights"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "field"), [(kind, field) for kind, fields in ODD_FIELDS.items() for field in fields]
)
def test_an_odd_value_of_a_config_is_a_message_or_is_taken(tmp_path, kind, field):
    """A config.json from anywhere ends in a run or in a UserError: nothing else, and at once."""
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "vocab_size": 97,
    }
    gpt2 = {"n_layer": 2, "n_embd": 32, "n_head": 4, "vocab_size": 97, "activation_function": "gelu"}
    more = {"use_sliding_window": True, "sliding_window": 8} if kind == "qwen2" else {}
    good = {"model_type": kind} | (gpt2 if kind == "gpt2" else sizes) | more
    refused = 0
    for value in ODD:
        (tmp_path / "config.json").write_text(json.dumps(good | {field: value}))
        read_ = make_config({"base_model": str(tmp_path), "learning_rate": 1, "datasets": [{"path": "x"}], "sequence_len": 16, "export_hf": False})  # fmt: skip
        try:
            resolve(read_.config, 1).transformer_config()
        except UserError:
            refused += 1
    assert refused, f"every odd value of {field} was taken"


def test_whole_numbers_written_as_fractions_are_read():
    assert read("llama", intermediate_size=48.0)["ffn_hidden_size"] == 48
    with pytest.raises(UserError, match=r"intermediate_size 48.5: a whole number from 1"):
        read("llama", intermediate_size=48.5)


def test_a_config_that_cannot_be_read_is_a_message(tmp_path, monkeypatch):
    from pathlib import Path

    file = tmp_path / "config.json"
    for text in (b"{", b"\xff\xfe", b"[" * 100_000, b"7"):
        file.write_bytes(text)
        with pytest.raises(UserError, match="config.json"):
            architecture_of(str(tmp_path))

    def closed(path, **_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_text", closed)
    with pytest.raises(UserError, match=r"config.json cannot be read \(Permission denied\)"):
        architecture_of(str(tmp_path))


# --- fields of rotary positions that have no effect --------------------------------------------


def test_rope_fields_that_transformers_ignores_are_ignored_with_a_line(tmp_path):
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    extra = {"attn_factor": 1.0, "finetuned": True, "rope_theta": 5e5}
    found = read("llama", rope_scaling=yarn | extra)
    assert found["rope_scaling"] == yarn
    assert found["rotary_base"] == 5e5
    data = {"model_type": "llama", "hidden_size": 32, "rope_scaling": yarn | extra}
    (tmp_path / "config.json").write_text(json.dumps(data))
    (line,) = unused_fields(str(tmp_path))
    assert "attn_factor, finetuned (transformers ignores it too)" in line
    (tmp_path / "config.json").write_text(json.dumps(data | {"rope_scaling": yarn}))
    assert unused_fields(str(tmp_path)) == []
    # what has an effect is kept, and what a config of the user's own names stays refused
    assert (
        read("llama", rope_scaling=yarn | {"attention_factor": 2.0})["rope_scaling"]["attention_factor"]
        == 2.0
    )
    given = make_config({"base_model": str(tmp_path), "learning_rate": 1, "datasets": [{"path": "x"}], "rope_scaling": yarn | {"finetuned": True}, "num_hidden_layers": None})  # fmt: skip
    with pytest.raises(UserError, match="finetuned would have no effect"):
        resolve(given.config.model_copy(update={"num_layers": 2, "num_attention_heads": 4}), 1)
