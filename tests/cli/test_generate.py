"""``longspan generate``: what stands in front of a prompt, what ends the text, and special tokens."""

import json

import pytest
import torch
from safetensors.torch import save_file

import tiny
from chats import write_tokenizer
from longspan import TransformerConfig
from longspan.cli import main
from longspan.config.load import make_config
from longspan.config.parameters import parameter_shapes
from longspan.data import load_tokenizer
from longspan.data.instruct import Encoder, Recipe
from longspan.models.hf_weights import Names
from longspan.runs.generate import end_ids, prompt_ids


@pytest.mark.parametrize("begin", [True, False])
@pytest.mark.parametrize("settings", [{}, {"bos_token": "<|im_start|>"}], ids=["own bos", "another bos"])
def test_a_prompt_begins_as_a_sample_does_in_training(tmp_path, begin, settings):
    folder = write_tokenizer(tmp_path / "tokenizer", begin=begin, **settings)
    tokenizer = load_tokenizer(folder)
    source = make_config(tiny.values("data", datasets=[{"path": "x.jsonl"}])).config.datasets[0]
    trained, _ = Encoder(Recipe.make(source, folder))("", {"text": "the capital"})
    assert trained[-1] == 2
    assert prompt_ids(tokenizer, folder, "the capital") == trained[:-1].tolist()


def test_a_prompt_that_brings_its_own_special_token_is_taken_as_it_is(tmp_path):
    folder = write_tokenizer(tmp_path / "tokenizer")
    tokenizer = load_tokenizer(folder)
    assert (
        prompt_ids(tokenizer, folder, "<s>the")[:2]
        == [1, *tokenizer.encode("the", add_special_tokens=False).ids][:2]
    )
    assert prompt_ids(tokenizer, folder, "<|im_start|>user")[0] == 3
    assert prompt_ids(tokenizer, folder, "") == [1]
    bare = write_tokenizer(tmp_path / "bare", begin=False)
    assert prompt_ids(load_tokenizer(bare), bare, "") == [2]


def test_text_ends_at_every_end_token(tmp_path):
    folder = write_tokenizer(tmp_path / "tokenizer")
    tokenizer = load_tokenizer(folder)
    assert end_ids(tokenizer, [folder]) == {2}
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 4]}))
    assert end_ids(tokenizer, [folder, tmp_path]) == {2, 4}
    assert end_ids(tokenizer, [tmp_path, folder]) == {2, 4}


def model_that_writes(folder, token, begin=True):
    """A model whose logits are largest at one token, whatever it reads: zero layers of effect and one loud row."""
    write_tokenizer(folder, begin=begin)
    sizes = {"vocab_size": 420, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    data = {"model_type": "llama", "intermediate_size": 8, "rms_norm_eps": 1e-5} | sizes
    (folder / "config.json").write_text(json.dumps(data))
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1, ffn_hidden_size=8,
                               normalization="RMSNorm", gated_linear_unit=True, add_bias_linear=False)  # fmt: skip
    shapes = {"embed_tokens": (420, 8), "lm_head": (420, 8), "norm": (8,), "layernorm": (8,)}
    weights = {}
    for name in parameter_shapes(config, 420):
        place = Names(config, 420).places(name)[0].name
        shape = next((s for part, s in shapes.items() if part in place), (8, 8))
        weights[place] = torch.ones(shape) if len(shape) == 1 or "embed" in place else torch.zeros(shape)
    weights["lm_head.weight"][token] = 1.0
    save_file(weights, folder / "model.safetensors")
    return str(folder)


def written(capsys, model, *more):
    arguments = ["generate", model, "--prompt", "the", "--max-new-tokens", "2", "--temperature", "0", *more]
    assert main.main(arguments) == 0
    return capsys.readouterr().out


def test_special_tokens_are_printed_on_request(tmp_path, capsys):
    ending = model_that_writes(tmp_path / "ending", 2)
    assert written(capsys, ending) == "the\n"
    assert written(capsys, ending, "--special-tokens") == "<s>the</s>\n"
    going_on = model_that_writes(tmp_path / "going-on", 3, begin=False)
    assert written(capsys, going_on) == "the\n"
    assert written(capsys, going_on, "--special-tokens") == "the<|im_start|><|im_start|>\n"
    (tmp_path / "going-on" / "generation_config.json").write_text('{"eos_token_id": [2, 3]}')
    assert written(capsys, going_on, "--special-tokens") == "the<|im_start|>\n"


def test_a_nan_in_the_weights_is_named(tmp_path, capsys):
    from safetensors.torch import load_file

    model = model_that_writes(tmp_path / "model", 2)
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, tmp_path / "model" / "model.safetensors")
    assert main.main(["generate", model]) == 2
    assert "model.norm.weight in model.safetensors holds NaN" in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["vocab_size", "hidden_size", "num_hidden_layers", "model_type"])
def test_a_config_without_a_size_is_a_message(tmp_path, capsys, missing):
    model = model_that_writes(tmp_path / "model", 2)
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != missing}))
    for arguments in (["generate", model], ["convert", "--model", model, "--output", str(tmp_path / "out")]):
        assert main.main(arguments) == 2
        assert "longspan: error: " in capsys.readouterr().err
