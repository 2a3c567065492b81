"""Weights and buffers of transformers' own classes: read as from_pretrained reads them, named where they do not fit."""

import json
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file

import pool
import tiny
from class_models import benchmark, class_run, make_folder

transformers = pytest.importorskip("transformers")

from longspan.errors import UserError  # noqa: E402
from longspan.runs.prepare import check_weights  # noqa: E402
from longspan.training.trainer import Trainer  # noqa: E402

CPU = torch.device("cpu")


def verdict_of(kind, comm_type, folder, chunk=None):
    from longspan.integrations import causal_lm

    with mock.patch.object(causal_lm, "CHUNK_NUMEL_CPU", chunk or causal_lm.CHUNK_NUMEL_CPU):
        return benchmark().verdict(kind, comm_type, "zigzag", folder)


#: one of each sort: plain, MoE in files one by one, MoE in one tensor, learned positions, a stand-in that fails
HANDFUL = ["olmo2", "glm4_moe", "minimax_m2", "gpt_neox", "opt", "cohere2"]


@pytest.mark.parametrize("kind", HANDFUL)
def test_types_compute_the_same_on_two_ranks_and_buffers_are_those_of_from_pretrained(kind, tmp_path):
    found = pool.run(2, verdict_of, kind, "p2p", str(tmp_path))[0]
    assert found["verdict"].startswith("same"), found
    assert max(found["plain"], found["packed"]) < (1e-9 if found["verdict"].startswith("same,") else 1e-5)


def test_three_ranks_and_moved_heads_compute_the_same(tmp_path):
    for kind, ranks, moves in (("smollm3", 3, "p2p"), ("olmo2", 3, "all_gather"), ("granite", 2, "a2a")):
        folder = tmp_path / kind
        folder.mkdir()
        found = pool.run(ranks, verdict_of, kind, moves, str(folder))[0]
        assert found["verdict"].startswith("same"), found


@pytest.mark.parametrize("kind", ["granite", "gemma3_text", "cohere"])
def test_what_a_class_does_behind_its_head_is_done_to_each_chunk(kind, tmp_path):
    """A division, a soft cap and a factor, in chunks of five rows."""
    found = pool.run(2, verdict_of, kind, "p2p", str(tmp_path), 5 * 61)[0]
    assert found["verdict"] in ("same", "same in float32"), found


def read_on_two(prefix, base):
    """The tied ends' place, the largest difference to from_pretrained's weights, and this rank's share of all."""
    trainer = Trainer(class_run(prefix, base, 2, params_dtype="float32", context_parallel_size=2), CPU)
    hf = trainer.model.hf
    expected = transformers.AutoModelForCausalLM.from_pretrained(base).state_dict()
    worst = max((p.full_tensor() - expected[n]).abs().max().item() for n, p in hf.named_parameters())
    tied = hf.lm_head.weight is hf.model.embed_tokens.weight
    parameters = list(hf.parameters())
    share = sum(p.to_local().numel() for p in parameters) / sum(p.numel() for p in parameters)
    return tied, worst, share


def test_each_rank_holds_its_share_and_tied_weights_stay_tied(tmp_path):
    prefix = tiny.write_data(tmp_path)
    base = make_folder("gemma3_text", tmp_path / "base")
    for tied, worst, share in pool.run(2, read_on_two, prefix, base):
        assert tied
        assert worst == 0
        assert share < 0.55


CHANGES = {
    "missing": (lambda t: t.pop("model.layers.1.self_attn.o_proj.weight"), "o_proj.weight missing"),
    "left over": (
        lambda t: t.update(extra=torch.zeros(2)),
        "hold extra, for which Phi3ForCausalLM has no place",
    ),
    "mis-shaped": (
        lambda t: t.update({"model.norm.weight": torch.zeros(5)}),
        r"model.norm.weight has shape \[5\], and the class \[32\]",
    ),
    "of integers": (
        lambda t: t.update({"model.norm.weight": torch.zeros(32, dtype=torch.int32)}),
        "is of type I32",
    ),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_tensor_that_does_not_fit_is_named_before_processes_start(tmp_path, what):
    base = Path(make_folder("phi3", tmp_path / "base"))
    change, text = CHANGES[what]
    tensors = load_file(base / "model.safetensors")
    change(tensors)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    run = class_run(tiny.write_data(tmp_path), str(base), 1)
    with pytest.raises(UserError, match=text):
        check_weights(run)


def test_an_adapter_on_no_linear_layer_is_refused_with_a_near_miss(tmp_path):
    pytest.importorskip("peft")
    base = make_folder("phi3", tmp_path / "base")
    lora = {"adapter": "lora", "lora_r": 4, "lora_target_modules": ["qkv_prj"]}
    run = class_run(tiny.write_data(tmp_path), base, 1, **lora)
    with pytest.raises(
        UserError, match=r"'qkv_prj' is no linear layer of Phi3ForCausalLM.*Did you mean qkv_proj"
    ):
        check_weights(run)


def damaged(prefix, base):
    """What a rank says of a value that is no number."""
    try:
        Trainer(class_run(prefix, base, 2, context_parallel_size=2), CPU)
    except UserError as error:
        return error.problems
    return []


def test_a_value_that_is_no_number_is_found_on_all_ranks(tmp_path):
    base = Path(make_folder("phi3", tmp_path / "base"))
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"][-1] = float("nan")
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    found = pool.run(2, damaged, tiny.write_data(tmp_path), str(base))
    assert all("lm_head.weight in model.safetensors holds NaN" in problems[0] for problems in found)


def mixing_elsewhere(prefix, base):
    """What is said of a class whose tokens also meet outside of attention, here in the last layer's MLP."""
    from transformers.models.phi3 import modeling_phi3

    real = modeling_phi3.Phi3MLP.forward
    modeling_phi3.Phi3MLP.forward = lambda self, x: real(self, x) + x.cumsum(1)
    try:
        return damaged(prefix, base)
    finally:
        modeling_phi3.Phi3MLP.forward = real


def test_a_class_whose_tokens_meet_elsewhere_is_found_before_the_first_step(tmp_path):
    base = make_folder("phi3", tmp_path / "base")
    found = pool.run(2, mixing_elsewhere, tiny.write_data(tmp_path), base)
    assert all("its tokens meet elsewhere than in attention" in problems[0] for problems in found)


def test_a_config_of_another_size_than_the_weights_is_refused(tmp_path):
    base = Path(make_folder("phi3", tmp_path / "base"))
    fields = json.loads((base / "config.json").read_text()) | {"intermediate_size": 40}
    (base / "config.json").write_text(json.dumps(fields))
    run = class_run(tiny.write_data(tmp_path), str(base), 1)
    with pytest.raises(UserError, match="Its config.json and its weights do not belong together"):
        check_weights(run)


def test_the_text_part_of_a_multimodal_model_is_a_model_of_its_own(tmp_path):
    """The lines of docs/models.md, on a tiny Gemma 3 that reads images."""
    text_fields = {"vocab_size": tiny.VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "head_dim": 8}
    text_fields |= {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.AutoConfig.for_model(
        "gemma3", text_config=text_fields, vision_config=vision | {"image_size": 28, "patch_size": 14}
    )
    whole = transformers.AutoModelForImageTextToText.from_config(config)
    text = transformers.AutoModelForCausalLM.from_config(whole.config.get_text_config(), dtype=whole.dtype)
    text.model.load_state_dict(whole.model.language_model.state_dict())
    text.lm_head.load_state_dict(whole.lm_head.state_dict())
    text.save_pretrained(tmp_path / "text")
    run = class_run(tiny.write_data(tmp_path), str(tmp_path / "text"), 1)
    check_weights(run)
    tokens = torch.arange(1, 20).unsqueeze(0)
    with torch.no_grad():
        expected = whole.eval()(input_ids=tokens).logits
        torch.testing.assert_close(text.eval()(input_ids=tokens).logits, expected)
