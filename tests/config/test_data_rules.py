"""What a config may say of its data, and what it is told otherwise."""

from fractions import Fraction

import pytest

from longspan.config.data import has_validation, read_blend, read_split
from longspan.config.dialects.megatron import parse_megatron_flags
from longspan.config.load import load_config, make_config
from longspan.config.resolve import resolve
from longspan.errors import UserError

MODEL = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 1, "learning_rate": 1e-3}


def problems(**values):
    reading = make_config(MODEL | values)
    try:
        resolve(reading.config, bad_keys=reading.bad, earlier=reading.problems)
    except UserError as error:
        return error.problems
    return []


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["a"], [("a", None)]),
        (["a", "b"], [("a", None), ("b", None)]),
        (["a", "b", "c"], [("a", None), ("b", None), ("c", None)]),
        (["0.1", "a", "3e-1", "b"], [("a", Fraction(1, 10)), ("b", Fraction(3, 10))]),
        (["1", "./2"], [("./2", Fraction(1))]),
    ],
)
def test_blends(values, expected):
    assert read_blend("data_path", values) == expected


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["0.3", "a", "b"], "weights and prefixes alternate"),
        (["a", "0.3"], "weights and prefixes alternate"),
        (["0.3", "0.7"], "weights and prefixes alternate"),
        (["0", "a", "1", "b"], "a has weight 0; it must be above 0"),
        (["-1", "a"], "must be above 0"),
        (["1", "a", "2", "a"], "a is given 2 times"),
        ([], "empty"),
        ([""], "empty"),
    ],
)
def test_wrong_blends(values, message):
    with pytest.raises(UserError, match=message):
        read_blend("data_path", values)


def test_splits():
    assert read_split("99,1,0") == [0.99, 0.01, 0.0]
    assert read_split("969, 30, 1") == [0.969, 0.03, 0.001]
    assert read_split("1") == [1.0, 0.0, 0.0]
    for wrong in ("", "0,1", "1,-1", "a,b", "1,2,3,4", "1,nan"):
        with pytest.raises(UserError, match=r"such as 99,1,0"):
            read_split(wrong)


@pytest.mark.parametrize(
    "values",
    [
        {"data_path": "a", "vocab_size": 9},
        {"data_path": [0.3, "a", 0.7, "b"], "split": "99,1,0", "eval_steps": 5},
        {"train_data_path": ["a"], "valid_data_path": ["b"], "test_data_path": ["c"], "eval_steps": 5},
        {"mock_data": True, "split": [9, 1], "eval_steps": 5},
        {"datasets": [{"path": "a", "weight": 1}, {"path": "b", "weight": 2}], "val_set_size": 0.1},
        {"data_path": "a", "vocab_file": "v", "merge_file": "m"},
        {"data_path": "a", "tokenizer_type": "GPT2BPETokenizer", "vocab_file": "v", "merge_file": "m"},
        {"data_path": "a", "tokenizer_type": "NullTokenizer", "vocab_size": 9},
        {"datasets": [{"path": "a"}], "tokenizer_type": "AutoTokenizer", "tokenizer_config": "t"},
    ],
)
def test_what_goes_together(values):
    assert problems(**values) == []


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "datasets: missing. A list such as"),
        (
            {"datasets": [{"path": "a"}], "data_path": "a"},
            "datasets and data_path are given: each says what to train on",
        ),
        ({"data_path": "a", "train_data_path": "b"}, "data_path and train_data_path are given"),
        ({"data_path": "a", "mock_data": True}, "data_path and mock_data are given"),
        (
            {"data_path": "a", "valid_data_path": "b"},
            "valid_data_path goes with train_data_path; data_path is cut by split",
        ),
        ({"datasets": [{"path": "a"}], "split": "9,1"}, "split '9,1' cuts data_path, which is not given"),
        ({"train_data_path": "a", "split": "9,1"}, "split '9,1' cuts data_path, which is not given"),
        ({"data_path": "a", "split": "9;1"}, "split '9;1': give one to three shares"),
        ({"data_path": "a", "val_set_size": 0.1}, "val_set_size goes with datasets; here (data_path) split"),
        ({"data_path": "a", "tokenizer_train_vocab_size": 300}, "there is no text to train a tokenizer on"),
        (
            {"data_path": "a", "split": "1,0,0", "eval_steps": 5},
            "eval_steps is given but nothing is held out",
        ),
        ({"train_data_path": "a", "eval_steps": 5}, "eval_steps is given but nothing is held out"),
        ({"datasets": [{"path": "a"}], "eval_steps": 5}, "eval_steps is given but val_set_size is 0"),
        (
            {"datasets": [{"path": "a", "weight": 1}, {"path": "b"}]},
            "datasets: b without a weight beside others",
        ),
        (
            {"datasets": [{"path": "a", "weight": 1}, {"path": "a", "weight": 1}]},
            "datasets: a is given 2 times",
        ),
        (
            {"datasets": [{"path": "a", "weight": 1}, {"path": "b", "weight": 1}], "val_set_size": 3},
            "val_set_size 3 is a number of documents; with weights give a share",
        ),
        ({"datasets": [{"path": "a", "weight": 0}]}, "datasets.0.weight"),
        ({"data_path": "a", "vocab_file": "v"}, "vocab_file without merge_file"),
        ({"data_path": "a", "tokenizer_type": "GPT2BPETokenizer"}, "needs vocab_file and merge_file"),
        ({"data_path": "a", "tokenizer_type": "HuggingFaceTokenizer"}, "needs tokenizer_config"),
        ({"data_path": "a", "tokenizer_type": "NullTokenizer"}, "needs vocab_size"),
        (
            {"data_path": "a", "tokenizer_type": "NullTokenizer", "vocab_size": 9, "tokenizer_config": "t"},
            "it is no tokenizer at all",
        ),
        (
            {"data_path": "a", "vocab_file": "v", "merge_file": "m", "tokenizer_config": "t"},
            "vocab_file and merge_file with tokenizer_config: which tokenizer is it?",
        ),
        (
            {"data_path": "a", "tokenizer_type": "Llama2Tokenizer"},
            "is not supported; save the tokenizer as tokenizer.json",
        ),
        ({"data_path": "a", "tokenizer_type": "GPT2BPETokeniser"}, "Did you mean GPT2BPETokenizer"),
    ],
)
def test_what_does_not(values, message):
    assert any(message in problem for problem in problems(**values)), problems(**values)


def test_a_blend_by_flags_stays_text(tmp_path):
    flags = ["--data-path", "0.3", "a", "0.7", "2024-01-01", "--split", "99,1,0"]
    reading, _ = parse_megatron_flags(flags)
    assert reading.problems == []
    assert reading.config.data_path == ["0.3", "a", "0.7", "2024-01-01"]
    path = tmp_path / "c.yaml"
    path.write_text("data_path: [0.3, a, 1, b]\nsplit: 99,1,0\n")
    assert load_config(path).data_path == ["0.3", "a", "1", "b"]


def test_what_is_held_out():
    def held(**values):
        return has_validation(make_config(values).config)

    assert held(data_path="a")
    assert held(mock_data=True)
    assert held(data_path="a", split="9,1")
    assert not held(data_path="a", split="1")
    assert held(datasets=[{"path": "a"}], val_set_size=0.1)
    assert not held(datasets=[{"path": "a"}])
    assert not held(train_data_path="a")
    assert held(train_data_path="a", valid_data_path="b")


def test_classes_of_transformers_are_hugging_face_tokenizers():
    for name in (
        "AutoTokenizer",
        "LlamaTokenizer",
        "LlamaTokenizerFast",
        "Qwen2Tokenizer",
        "HuggingFaceTokenizer",
    ):
        assert make_config({"tokenizer_type": name}).config.tokenizer_type == "HuggingFaceTokenizer", name
