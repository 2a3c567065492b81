"""config.json of hybrid models, read and written, and what of it is refused; no torch but transformers' own."""

import json

import pytest

import hybrid_families
from longspan.config.architecture import Architecture, architecture_problems
from longspan.config.families.config_json import export_problem, family_of, hugging_face_config, keys_of
from longspan.config.load import architecture_config
from longspan.errors import UserError


def config_json(name, **more):
    """The fields of a config.json as transformers writes it."""
    import transformers

    kind, fields = hybrid_families.FAMILIES[name]
    config = getattr(transformers, f"{kind}Config")(**fields)
    return json.loads(config.to_json_string(use_diff=False)) | more


def model_of(data):
    return Architecture.of(architecture_config(keys_of(data, "config.json"), 64))


@pytest.mark.parametrize("name", hybrid_families.FAMILIES)
def test_there_and_back(name):
    theirs = config_json(name)
    model = model_of(theirs)
    assert not architecture_problems(model)
    assert export_problem(model) is None
    for base in (None, theirs):
        written = hugging_face_config(model, vocab_size=97, sequence_len=64, dtype="float32", base=base)
        written = json.loads(json.dumps(written))
        assert model_of(written) == model
        if base is None and name == "qwen3_5_moe_text":
            # The same architecture as Qwen3-Next, which is written without a base model.
            assert written["model_type"] == "qwen3_next"
            continue
        assert written["model_type"] == theirs["model_type"]
        assert keys_of(written, "config.json") == keys_of(theirs, "config.json")
        same = {
            k: v
            for k, v in theirs.items()
            if k in written and k not in ("architectures", "dtype", "max_position_embeddings")
        }
        assert {k: written[k] for k in same} == same


def test_defaults_are_transformers():
    """A file that names only the sizes of all types."""
    import transformers

    for kind in ("Qwen3Next", "Qwen3_5Text", "Qwen3_5MoeText", "OlmoHybrid", "NemotronH", "Mamba2"):
        config = getattr(transformers, f"{kind}Config")()
        full = json.loads(config.to_json_string(use_diff=False))
        bare = {
            name: full[name]
            for name in (
                "model_type",
                "hidden_size",
                "num_hidden_layers",
                "num_attention_heads",
                "vocab_size",
            )
            if name in full
        }
        # The published files of these types have these fields; longspan has its own default, as for other types.
        for name in (
            "intermediate_size",
            "max_position_embeddings",
            "initializer_range",
            "layers_block_type",
        ):
            if name in full:
                bare[name] = full[name]
        assert model_of(bare) == model_of(full), kind


def test_an_older_nemotron():
    theirs = config_json("nemotron_h")
    older = {k: v for k, v in theirs.items() if k not in ("layers_block_type", "n_groups", "time_step_min")}
    older |= {"hybrid_override_pattern": "M-*-M", "mamba_n_groups": 2, "mamba_dt_min": 0.001}
    assert model_of(older) == model_of(theirs)
    names = {"linear_attention": "mamba", "full_attention": "attention"}
    types = [names.get(one, one) for one in theirs["layers_block_type"]]
    assert model_of(theirs | {"layers_block_type": types}) == model_of(theirs)


def test_the_text_model_of_one_that_reads_images():
    text = config_json("qwen3_5_text")
    rope = text["rope_parameters"] | {"mrope_section": [1, 1, 0], "mrope_interleaved": True}
    whole = {
        "model_type": "qwen3_5",
        "text_config": text | {"rope_parameters": rope},
        "vision_config": {"depth": 2},
        "tie_word_embeddings": True,
    }
    assert model_of(whole) == model_of(text)
    written = hugging_face_config(
        model_of(whole), vocab_size=97, sequence_len=64, dtype="float32", base=whole
    )
    assert written["model_type"] == "qwen3_5_text"
    assert "vision_config" not in written
    with pytest.raises(UserError, match="qwen3_5 and has no text_config"):
        keys_of({"model_type": "qwen3_5"}, "config.json")
    with pytest.raises(UserError, match="text_config of config.json sets attention_bias True"):
        keys_of(whole | {"text_config": text | {"attention_bias": True}}, "config.json")


@pytest.mark.parametrize(
    ("name", "fields", "words"),
    [
        ("mamba2", {"hidden_act": "gelu"}, "sets hidden_act 'gelu', which is not supported for mamba2: only silu or swish"),
        ("mamba2", {"time_step_limit": [0.0, 0.1]}, r"time_step_limit \[0.0, 0.1\]; only \[a number from 0 on, Infinity\]"),
        ("mamba2", {"expand": 3}, "expand 3, which makes 96 features, and num_heads x head_dim 64"),
        ("qwen3_next", {"attention_bias": True}, "sets attention_bias True"),
        ("qwen3_next", {"hidden_act": "gelu"}, "sets hidden_act 'gelu'"),
        ("qwen3_next", {"layer_types": ["sliding_attention"] * 4}, "has layer_types sliding_attention"),
        ("qwen3_next", {"rope_parameters": {"partial_rotary_factor": 0}}, "partial_rotary_factor 0: a number above 0"),
        ("qwen3_next", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("olmo_hybrid", {"attention_dropout": 0.1}, "sets attention_dropout 0.1"),
        ("nemotron_h", {"mlp_bias": True}, "sets mlp_bias True"),
        ("nemotron_h", {"use_bias": True}, "sets use_bias True"),
        ("nemotron_h", {"sliding_window": 8}, "sets sliding_window 8, .*only null"),
        ("nemotron_h", {"mlp_hidden_act": "gelu_new"}, "mlp_hidden_act 'gelu_new'"),
        ("nemotron_h", {"layers_block_type": ["M", "conv"]}, "has conv in layers_block_type"),
        ("nemotron_h", {"layers_block_type": None}, "has no layers_block_type"),
        ("nemotron_h, experts", {"moe_latent_size": 8}, "sets moe_latent_size 8"),
        ("nemotron_h, experts", {"norm_topk_prob": False}, "sets norm_topk_prob False"),
        ("nemotron_h, experts", {"num_experts_per_tok": 1}, "num_experts_per_tok 1"),
        ("nemotron_h, experts", {"n_group": 2, "topk_group": 2}, "n_group 2, topk_group 2 and num_experts_per_tok 2"),
    ],
)  # fmt: skip
def test_refusals(name, fields, words):
    with pytest.raises(UserError, match=words):
        keys_of(config_json(name) | fields, "config.json")


def test_a_hybrid_without_a_counterpart_is_not_exported():
    model = model_of(config_json("qwen3_5_text"))
    changed = Architecture(**{**vars(model), "attention_output_gate": False})
    problem = export_problem(changed)
    assert problem is not None
    assert "hybrid model" in problem
    assert "attention_output_gate false (needs true)" in problem
    assert family_of(changed) is None
