"""Mamba-2, Qwen3-Next, Qwen3.5, OLMo Hybrid and Nemotron-H in and out, against transformers itself."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import hybrid_families
import llamas
import pool
from hybrid_families import FAMILIES
from llamas import row_of_tokens

#: the layouts at which models are read: name -> (ranks, keys)
LAYOUTS = {
    "tp2 x cp2": (4, {"tensor_parallel_size": 2, "context_parallel_size": 2}),
    "one": (1, {}),
}


def close(found, expected, bound=1e-4):
    error = ((found - expected).abs().max() / expected.abs().max()).item()
    assert error <= bound, f"{error:.1e}"


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_transformers_and_the_round_trip_is_bit_equal(prefix, tmp_path, name):
    from transformers import AutoModelForCausalLM

    base, made = hybrid_families.save(tmp_path / "base", name)
    before = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        expected = before(row_of_tokens()).logits
    for layout, (world, keys) in LAYOUTS.items():
        more = keys | {"params_dtype": "float32", "sequence_len": 50}
        logits = pool.run(world, llamas.imported, prefix, base, str(tmp_path / layout[:3]), more)[0]
        close(logits, expected)
    files = [load_file(tmp_path / folder / "model.safetensors") for folder in ("base", "one", "tp2")]
    assert files[0].keys() == files[1].keys()
    for key in files[0]:
        assert torch.equal(files[1][key], files[2][key]), key
        # transformers cuts a convolution into three equal tensors, and the published files into those of q, k and v.
        assert torch.equal(files[0][key], files[1][key]) or "_conv1d." in key, key
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    assert type(after) is type(made)
    with torch.no_grad():
        assert torch.equal(after(row_of_tokens()).logits, expected)


def test_the_text_model_of_one_that_reads_images_and_predicts_several_tokens(prefix, tmp_path):
    """The tensors of images and of further tokens are left out; the export is a text model."""
    import transformers

    text = hybrid_families.FAMILIES["qwen3_5_moe_text"][1]
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    torch.manual_seed(1)
    whole = transformers.Qwen3_5MoeConfig(
        text_config=text, vision_config=vision | {"num_position_embeddings": 16}, tie_word_embeddings=False
    )
    transformers.Qwen3_5MoeForConditionalGeneration(whole).save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    more = {"mtp.fc.weight": torch.zeros(4, 4)}
    save_file(load_file(file) | more, file, metadata={"format": "pt"})
    expected = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    keys = {"tensor_parallel_size": 2, "params_dtype": "float32", "sequence_len": 50}
    out = tmp_path / "out"
    logits = pool.run(2, llamas.imported, prefix, str(tmp_path / "base"), str(out), keys)[0]
    after = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert json.loads((out / "config.json").read_text())["model_type"] == "qwen3_5_moe_text"
    with torch.no_grad():
        close(logits, expected(row_of_tokens()).logits)
        close(after(row_of_tokens()).logits, expected(row_of_tokens()).logits, 1e-6)


def test_the_same_weights_in_other_names(prefix, tmp_path):
    """The names of transformers' modules, and of other files, as well as those that it writes."""
    renamed = {
        "nemotron_h": {"backbone.": "model."},
        "olmo_hybrid": {
            "attention_layer_norm": "input_layernorm",
            "feedforward_layer_norm": "post_attention_layernorm",
        },
    }
    keys = {"params_dtype": "float32", "sequence_len": 50}
    for name, changes in renamed.items():
        base, _ = hybrid_families.save(tmp_path / name, name)
        expected = pool.run(1, llamas.imported, prefix, base, str(tmp_path / f"{name} out"), keys)[0]
        file = tmp_path / name / "model.safetensors"
        tensors = load_file(file)
        for old, new in changes.items():
            tensors = {key.replace(old, new): tensor for key, tensor in tensors.items()}
        if name == "olmo_hybrid":
            for key in [key for key in tensors if ".q_conv1d." in key]:
                parts = [tensors.pop(key.replace(".q_", f".{letter}_")) for letter in "qkv"]
                tensors[key.replace(".q_conv1d.", ".conv1d.")] = torch.cat(parts)
        save_file(tensors, file, metadata={"format": "pt"})
        logits = pool.run(1, llamas.imported, prefix, base, str(tmp_path / f"{name} again"), keys)[0]
        assert torch.equal(logits, expected), name
