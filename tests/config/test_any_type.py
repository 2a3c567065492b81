"""Model types that transformers' own class computes: their keys from config.json alone, and what is refused."""

import json
from pathlib import Path

import pytest

import command
from longspan.config.families.any_type import keys_of
from longspan.config.load import make_config
from longspan.config.resolve import complete
from longspan.config.run import Checked
from longspan.errors import UserError

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}


def folder_of(tmp_path, kind, **fields):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind} | SIZES | fields))
    return str(tmp_path)


def problems_of(base, world=1, **changes):
    """The problems of a config from a model folder, and the complete config if there are none."""
    given = {"base_model": base, "datasets": [{"path": "data"}], "learning_rate": 0.01, "device": "cpu"}
    reading = make_config(given | {"sequence_len": 50} | changes)
    assert not reading.problems, reading.problems
    try:
        return [], complete(reading.config, world)
    except UserError as error:
        return error.problems, None


def test_the_keys_are_those_that_transformers_reads(tmp_path):
    found = keys_of({"model_type": "gemma3_text", "head_dim": 8, "sliding_window": 7} | SIZES, "x")
    assert found["num_query_groups"] == 2
    assert found["kv_channels"] == 8
    assert found["tie_word_embeddings"]
    assert found["sliding_window"] == [7, 7]
    # fields that the file does not have are the class's defaults, not longspan's
    bare = keys_of({"model_type": "starcoder2", "num_hidden_layers": 2}, "x")
    default = transformers.AutoConfig.for_model("starcoder2")
    assert bare["hidden_size"] == default.hidden_size
    assert bare["vocab_size"] == default.vocab_size


def test_auto_is_native_where_there_is_an_implementation(tmp_path):
    llama, phi = tmp_path / "llama", tmp_path / "phi"
    llama.mkdir(), phi.mkdir()
    for folder, kind, asked, expected in (
        (llama, "llama", "auto", "native"),
        (llama, "llama", "transformers", "transformers"),
        (phi, "phi3", "auto", "transformers"),
    ):
        problems, config = problems_of(folder_of(folder, kind), model_implementation=asked)
        assert not problems
        assert config.model_implementation == expected
        run = Checked.of(config)
        assert run.by_class == (expected == "transformers")
        assert Checked.of(complete(config, 1)) == run
    problems, _ = problems_of(folder_of(phi, "phi3"), model_implementation="native")
    assert "supported: llama" in problems[0]
    assert problems[0].endswith("by transformers' own class (model_implementation: transformers).")


REFUSED = [
    ("mamba", {}, "recurrent or convolutional layers"),
    ("jamba", {}, "recurrent or convolutional layers"),
    ("gemma2", {}, "caps its attention scores (attn_logit_softcapping"),
    ("llama4_text", {}, "layers of type chunked_attention"),
    ("deepseek_v3", {"qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}, "query heads of 12 features and value heads of 8"),
    ("phi3", {"resid_pdrop": 0.1}, "sets resid_pdrop 0.1"),
    ("phimoe", {"router_jitter_noise": 0.01}, "router_jitter_noise 0.01"),
    ("bloom", {}, "adds a bias by distance"),
    ("mimo_v2_flash", {}, "value heads of another size"),
    ("t5", {}, "cross-attention"),
    ("bert", {}, "reads its text in both directions"),
    ("vit", {}, "no causal language model in transformers"),
    ("gemma3", {"text_config": SIZES}, "multimodal model. Its text part, gemma3_text, can be trained alone"),
    ("phi3", {"quantization_config": {"bits": 4}}, "only whole weights are read"),
    ("phi33", {}, "neither longspan nor the installed transformers has. Did you mean phi3?"),
    ("own", {"auto_map": {"AutoModel": "code.Model"}}, "own code (auto_map) is never run"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "fields", "text"), REFUSED)
def test_what_cannot_be_cut_is_refused_from_config_json_alone(tmp_path, kind, fields, text):
    problems, _ = problems_of(folder_of(tmp_path, kind, **fields))
    assert len(problems) == 1, problems
    assert text in problems[0]
    assert kind in problems[0]


KEYS = [
    ({"tensor_parallel_size": 2}, 2, "tensor_parallel_size 2: this model is computed by transformers' own class"),
    ({"pipeline_parallel_size": 2}, 2, "its layers are not put into stages. Use context_parallel_size"),
    ({"gradient_checkpointing": "selective"}, 1, "recomputes whole layers only. Use true"),
    ({"tiled_mlp": True}, 1, "tiled_mlp true"),
    ({"torch_compile": True}, 1, "it is not compiled"),
    ({"rope_scaling": {"rope_type": "linear", "factor": 2}}, 1, "reads its own from config.json"),
    ({"num_layers": 3}, 1, "num_layers 3: base_model is computed by transformers' own class, which reads its config.json"),
    ({"reset_position_ids": True, "sample_packing": False}, 1, "Set both, or neither"),
    ({"sequence_len": 65}, 1, "sequence_len 65 is larger than max_position_embeddings 64"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "world", "text"), KEYS)
def test_keys_that_the_class_does_not_have_are_refused_by_name(tmp_path, changes, world, text):
    problems, _ = problems_of(folder_of(tmp_path, "phi3"), world, **changes)
    assert [one for one in problems if text in one], problems


def test_angles_that_follow_the_largest_position_are_refused_beyond_their_limit(tmp_path):
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    rope = {"rope_type": "longrope", "original_max_position_embeddings": 32, "rope_theta": 10000.0, **factors}
    base = folder_of(tmp_path, "phi3", rope_parameters=rope, original_max_position_embeddings=32)
    assert not problems_of(base, sequence_len=32)[0]
    problems, _ = problems_of(base, sequence_len=50)
    assert len(problems) == 1
    assert "beyond 32 tokens its angles follow the largest position" in problems[0]


def test_a_loss_over_routes_is_left_out_and_said_so(tmp_path):
    base = folder_of(
        tmp_path,
        "phimoe",
        output_router_logits=True,
        router_jitter_noise=0.0,
        input_jitter_noise=0.0,
        vocab_size=300,
    )
    (tmp_path / "config.yaml").write_text(
        f"base_model: {base}\ndatasets: [{{path: python-stdlib}}]\nlearning_rate: 0.01\nsequence_len: 50\n"
        "tokenizer_train_vocab_size: 300\n"
    )
    done = command.run("validate", "config.yaml", cwd=tmp_path)
    assert "config.yaml: valid" in done.stdout, done.stderr
    assert "output_router_logits" in done.stdout
    assert "trains without this loss" in done.stdout


@pytest.mark.parametrize(
    ("kind", "options", "text"),
    [
        ("rwkv", (), "(rwkv) has recurrent"),
        ("phi3", ("--tensor-parallel-size", "2"), "its weights are not cut"),
    ],
)
def test_a_user_sees_one_message_and_no_traceback(tmp_path, kind, options, text):
    base = folder_of(tmp_path, kind, vocab_size=300)
    Path(tmp_path / "config.yaml").write_text(
        f"base_model: {base}\ndatasets: [{{path: python-stdlib}}]\nlearning_rate: 0.01\nsequence_len: 50\n"
        "tokenizer_train_vocab_size: 300\n"
    )
    done = command.run("train", "config.yaml", *options, cwd=tmp_path)
    assert done.returncode != 0
    assert done.stderr.count("longspan: error:") == 1, done.stderr
    assert text in done.stderr
    assert "Traceback" not in done.stderr
