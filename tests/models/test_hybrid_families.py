"""Mamba-2, Qwen3-Next, Qwen3.5, OLMo Hybrid and Nemotron-H in and out, against transformers itself."""

import pytest
import torch
from safetensors.torch import load_file

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
