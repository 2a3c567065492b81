"""Mixtral, Qwen2-MoE and Qwen3-MoE in and out, against transformers itself, at every mix of ranks."""

import json

import pytest
import torch
from safetensors.torch import load_file

import llamas
import pool
from llamas import row_of_tokens
from longspan.config.architecture import Architecture
from longspan.config.families.config_json import hugging_face_config, keys_of
from longspan.config.load import architecture_config

#: name -> (class of transformers, fields beside llamas.SHAPE)
FAMILIES = {
    "mixtral": ("Mixtral", dict(num_local_experts=4, num_experts_per_tok=2)),
    "qwen2_moe": (
        "Qwen2Moe",
        dict(
            *(),
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=24,
            mlp_only_layers=[1],
            num_hidden_layers=3,
        ),
    ),
    "qwen2_moe, renormalised": (
        "Qwen2Moe",
        dict(
            num_experts=4,
            num_experts_per_tok=3,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=24,
            norm_topk_prob=True,
        ),
    ),
    "qwen3_moe": (
        "Qwen3Moe",
        dict(
            head_dim=16,
            num_experts=8,
            num_experts_per_tok=3,
            moe_intermediate_size=16,
            norm_topk_prob=True,
            decoder_sparse_step=2,
            num_hidden_layers=4,
        ),
    ),
    "qwen3_moe, as they are": (
        "Qwen3Moe",
        dict(head_dim=16, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=16),
    ),
}
LAYOUTS = {
    "ep2 x tp2": (4, {"expert_parallel_size": 2, "tensor_parallel_size": 2}),
    "ep4 over cp2": (4, {"expert_parallel_size": 4, "context_parallel_size": 2}),
    "one": (1, {}),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_transformers_and_the_round_trip_is_bit_equal(prefix, tmp_path, name):
    from transformers import AutoModelForCausalLM

    kind, fields = FAMILIES[name]
    base = llamas.make_llama(tmp_path / "base", kind=kind, **fields)
    before = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        expected = before(row_of_tokens()).logits
    written = {}
    for layout, (world, changes) in LAYOUTS.items():
        out = tmp_path / layout.replace(" ", "")
        more = changes | {"params_dtype": "float32"}
        logits = pool.run(world, llamas.imported, prefix, base, str(out), more)[0]
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4, msg=lambda m, at=layout: f"{at}: {m}")
        written[layout] = {file.name: file.read_bytes() for file in out.iterdir() if file.is_file()}
    assert written["ep2 x tp2"] == written["one"] == written["ep4 over cp2"]
    ours, theirs = (
        load_file(tmp_path / "one" / "model.safetensors"),
        load_file(tmp_path / "base" / "model.safetensors"),
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[n], theirs[n]) for n in theirs)
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    with torch.no_grad():
        assert torch.equal(after(row_of_tokens()).logits, expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_config_json_there_and_back(name):
    import transformers

    kind, fields = FAMILIES[name]
    theirs = getattr(transformers, f"{kind}Config")(
        **llamas.SHAPE | {"tie_word_embeddings": False} | fields
    ).to_dict()
    config = architecture_config(keys_of(theirs, "config.json"), 64)
    model = Architecture.of(config)
    written = json.loads(
        json.dumps(hugging_face_config(model, vocab_size=97, sequence_len=64, dtype="float32"))
    )
    assert written["model_type"] == theirs["model_type"]
    again = Architecture.of(architecture_config(keys_of(written, "config.json"), 64))
    assert again == model
    # Their coefficient pools all layers and adds up to k where the load is even.
    k, layers = model.moe_router_topk, len(model.expert_layers)
    assert model.moe_aux_loss_coeff == pytest.approx(0.001 * k / layers)
    assert written["router_aux_loss_coef"] == pytest.approx(0.001)
