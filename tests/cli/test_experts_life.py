"""The life of a model with experts by commands: train, go on at another layout, export, import, adapters."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

import command
import tiny
from chats import write_tokenizer
from cli_folder import records, write

pytestmark = pytest.mark.slow

EXPERTS = {
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 24,
    "moe_aux_loss_coeff": 0.05,
    "save_steps": 2,
    "params_dtype": "float32",
    "vocab_size": 420,
}


def ran(folder, *arguments):
    done = command.run(*arguments, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a run of three steps on two ranks that share the experts."""
    path = tmp_path_factory.mktemp("life")
    tiny.write_data(path)
    write_tokenizer(path / "tokenizer")
    write(
        path, "train.yaml", **EXPERTS, dp_shard_size=2, expert_parallel_size=2, tokenizer_config="tokenizer"
    )
    ran(path, "train", "train.yaml")
    return path


def losses(path):
    return [record["loss"] for record in records(path)]


def test_it_goes_on_at_another_layout(folder):
    expected = losses(folder / "out")
    resume = ("--output-dir", "again", "--resume", "out/checkpoints/step_00000002")
    ran(folder, "train", "train.yaml", *resume, "--expert-parallel-size", "1", "--tensor-parallel-size", "2")
    assert losses(folder / "again") == pytest.approx(expected[2:], rel=1e-4)


@pytest.mark.skipif(not shutil.which("g++") and not shutil.which("clang++"), reason="needs a C++ compiler")
def test_compiled_parts_and_recomputation_give_the_same_losses(folder):
    more = ("--torch-compile", "true", "--gradient-checkpointing", "selective")
    ran(folder, "train", "train.yaml", "--output-dir", "compiled", *more)
    assert losses(folder / "compiled") == pytest.approx(losses(folder / "out"), rel=1e-5)


def test_a_checkpoint_and_the_export_are_one_model(folder):
    ran(folder, "convert", "--checkpoint", "out/checkpoints/step_00000003", "--output", "converted")
    exported = (folder / "out/hf/model.safetensors").read_bytes()
    assert (folder / "converted/model.safetensors").read_bytes() == exported
    ran(folder, "convert", "--model", "converted", "--output", "checkpoint")
    config, same = (json.loads((folder / of / "config.json").read_text()) for of in ("out/hf", "converted"))
    assert config["router_aux_loss_coef"] == same["router_aux_loss_coef"] > 0
    # A Mixtral has no dense size, so that the checkpoint takes the one of its experts; no layer uses it.
    weights_only = ("--resume", "checkpoint", "--no-load-optim", "true", "--max-steps", "1")
    ran(folder, "train", "train.yaml", "--output-dir", "from_weights", *weights_only)
    text = ran(folder, "generate", "out/hf", "--prompt", "the capital", "--max-new-tokens", "3")
    assert text.startswith("the capital")


def test_adapters_on_attention(folder):
    base = {"base_model": "out/hf", "adapter": "lora", "lora_r": 4, "lora_alpha": 8}
    own = ("num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "ffn_hidden_size", "vocab_size",
           "init_method_std")  # fmt: skip
    more = {"dp_shard_size": 2, "expert_parallel_size": 2, "params_dtype": "float32"}
    write(folder, "lora.yaml", remove=own, **base, **more)
    ran(folder, "train", "lora.yaml", "--output-dir", "lora", "--lora-target-modules", "[q_proj, v_proj]")
    adapters = load_file(folder / "lora/hf/adapter_model.safetensors")
    assert all(".self_attn." in name for name in adapters)
    ran(folder, "convert", "--lora", "lora/hf", "--output", "merged")
    ran(folder, "convert", "--checkpoint", "lora/checkpoints/step_00000003", "--output", "adapters")
    assert load_file(folder / "adapters/adapter_model.safetensors").keys() == adapters.keys()
    before, merged = (load_file(folder / path / "model.safetensors") for path in ("out/hf", "merged"))
    changed = {name for name, value in before.items() if not torch.equal(merged[name], value)}
    assert changed
    assert all("q_proj" in name or "v_proj" in name for name in changed)
    assert json.loads((folder / "merged/config.json").read_text())["model_type"] == "mixtral"


def test_adapters_on_a_shared_expert_are_merged(folder):
    """Linear layers of experts have the same names as those of dense layers, and get no adapters."""
    shared = {"moe_shared_expert_intermediate_size": 16, "moe_shared_expert_gate": True, "add_qkv_bias": True}
    small = {"dp_shard_size": 1, "expert_parallel_size": 1, "max_steps": 1, "moe_router_pre_softmax": True}
    write(folder, "shared.yaml", **EXPERTS, **shared, tokenizer_config="tokenizer")
    options = [
        part for name, value in small.items() for part in (f"--{name.replace('_', '-')}", str(value).lower())
    ]
    ran(folder, "train", "shared.yaml", "--output-dir", "shared", *options)
    assert json.loads((folder / "shared/hf/config.json").read_text())["model_type"] == "qwen2_moe"
    own = ("num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "ffn_hidden_size", "vocab_size",
           "init_method_std")  # fmt: skip
    lora = {
        "base_model": "shared/hf",
        "adapter": "lora",
        "lora_r": 4,
        "lora_alpha": 8,
        "lora_target_linear": True,
    }
    write(folder, "shared_lora.yaml", remove=own, **lora, params_dtype="float32")
    ran(folder, "train", "shared_lora.yaml", "--output-dir", "shared_lora", "--max-steps", "2")
    ran(folder, "convert", "--lora", "shared_lora/hf", "--output", "shared_merged")
    before, merged = (load_file(folder / at / "model.safetensors") for at in ("shared/hf", "shared_merged"))
    changed = {name for name, value in before.items() if not torch.equal(merged[name], value)}
    assert any(".shared_expert." in name for name in changed)
    assert not any(".experts." in name for name in changed)
