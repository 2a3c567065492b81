"""Adapters on their way out: exports for PEFT, merging, and adapters that a run starts from."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import command
import pool
import tiny
from llamas import lora_run, make_llama, row_of_tokens, whole_logits
from longspan.config.lora import TARGETS
from longspan.errors import UserError
from longspan.tensor_parallel.lora import Adapter
from longspan.training.checkpoint import Checkpointer
from longspan.training.export import export
from longspan.training.trainer import Trainer

pytest.importorskip("peft")

CPU = torch.device("cpu")
TP2_CP2 = {"tensor_parallel_size": 2, "context_parallel_size": 2}


def trained_and_exported(prefix, base, folder, more):
    """Logits of a model with trained adapters; its export and its checkpoint."""
    trainer = Trainer(lora_run(prefix, base, params_dtype="float32", **more), CPU)
    for step in range(3):
        trainer.train_step(trainer.micro_batches(step))
    tokens = row_of_tokens()
    logits = whole_logits(trainer, tokens)
    export(trainer, Path(folder) / "hf")
    saves = Checkpointer(Path(folder) / "checkpoints", background=False)
    saves.save(3, trainer.model, trainer.optimizer, trainer.description())
    return tokens, logits, trainer.evaluate()["loss"]


def evaluation(prefix, base, more):
    return Trainer(lora_run(prefix, base, **more), CPU).evaluate()["loss"]


@pytest.fixture(scope="module")
def trained(prefix, base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    return folder, *pool.run(4, trained_and_exported, prefix, base, str(folder), TP2_CP2)[0]


def test_peft_loads_the_export(base, trained):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder, tokens, logits, _ = trained
    assert sorted(p.name for p in (folder / "hf").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    plain = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        assert (plain(tokens).logits - logits).abs().max() > 1e-2  # training did something
        model = PeftModel.from_pretrained(plain, folder / "hf")
        torch.testing.assert_close(model(tokens).logits, logits, rtol=0, atol=1e-4)
    said = json.loads((folder / "hf" / "adapter_config.json").read_text())
    assert (said["r"], said["lora_alpha"], said["base_model_name_or_path"]) == (3, 7.5, base)


def test_merged_weights_compute_what_the_adapters_do(prefix, base, trained, tmp_path):
    from transformers import AutoModelForCausalLM

    from longspan.cli import convert

    folder, tokens, logits, loss = trained
    convert.run(["--lora", str(folder / "hf"), "--output", str(tmp_path / "merged")])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, logits, rtol=0, atol=1e-4)
    full = {"adapter": None, "lora_r": None, "lora_alpha": None, "lora_target_linear": False}
    merged = pool.run(2, evaluation, prefix, str(tmp_path / "merged"), full | {"tensor_parallel_size": 2})[0]
    assert merged == pytest.approx(loss, rel=1e-6)
    with_adapters = pool.run(2, evaluation, prefix, base, {"lora_model_dir": str(folder / "hf"), "context_parallel_size": 2})[0]  # fmt: skip
    assert with_adapters == pytest.approx(merged, rel=1e-6)
    # the checkpoint's adapters are the same
    convert.run(["--checkpoint", str(folder / "checkpoints"), "--output", str(tmp_path / "again")])
    one, other = (load_file(f / "adapter_model.safetensors") for f in (folder / "hf", tmp_path / "again"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    # bfloat16 where it is asked for, rounded once
    arguments = ["--lora", str(folder / "hf"), "--model", base, "--dtype", "bfloat16"]
    convert.run([*arguments, "--output", str(tmp_path / "small")])
    small, wide = (load_file(tmp_path / f / "model.safetensors") for f in ("small", "merged"))
    assert all(torch.equal(small[name], wide[name].bfloat16()) for name in wide)
    assert json.loads((tmp_path / "small" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_merging_with_another_base_is_refused_and_leaves_nothing(trained, tmp_path):
    from longspan.cli import convert

    other = make_llama(tmp_path / "other", num_hidden_layers=1)
    wide = make_llama(tmp_path / "wide", intermediate_size=64)
    for model, message in (
        (other, "holds also base_model.model.model.layers.1."),
        (wide, "of another base model"),
    ):
        with pytest.raises(UserError, match=message):
            convert.run(
                ["--lora", str(trained[0] / "hf"), "--model", model, "--output", str(tmp_path / "out")]
            )
    with pytest.raises(UserError, match="there is no adapter_config.json in it"):
        convert.run(["--lora", other, "--output", str(tmp_path / "out")])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other", "wide"]


def test_a_merged_config_names_the_dtype_that_is_written(base, adapters, tmp_path):
    """Of the base's config.json, transformers cannot read "auto" back."""
    import shutil

    from longspan.cli import convert

    copied = tmp_path / "base"
    shutil.copytree(base, copied)
    said = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(said | {"dtype": "auto", "torch_dtype": "auto"}))
    convert.run(["--lora", adapters, "--model", str(copied), "--output", str(tmp_path / "merged")])
    merged = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert (merged["torch_dtype"], merged.get("dtype")) == ("float32", None)


@pytest.mark.parametrize("tensor", ["base", "adapters"])
def test_a_nan_is_not_merged(base, adapters, tmp_path, tensor):
    import shutil

    from safetensors.torch import save_file

    from longspan.cli import convert

    shutil.copytree(base, tmp_path / "base")
    shutil.copytree(adapters, tmp_path / "adapters")
    file = next((tmp_path / tensor).glob("*.safetensors"))
    weights = load_file(file)
    name = next(n for n in sorted(weights) if "q_proj" in n)
    weights[name][0, 0] = float("nan")
    save_file(weights, file, metadata={"format": "pt"})
    arguments = ["--lora", str(tmp_path / "adapters"), "--model", str(tmp_path / "base"), "--output"]
    with pytest.raises(UserError, match=rf"{name} in {file.name} holds NaN"):
        convert.run([*arguments, str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_adapters_that_moved_the_base_are_refused_and_pefts_conversion_is_read(base, tmp_path):
    """PiSSA as PEFT makes it, and plain LoRA of it as PEFT converts it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from longspan.cli import convert

    torch.manual_seed(0)
    kind = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], init_lora_weights="pissa", task_type="CAUSAL_LM")  # fmt: skip
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), kind)
    model.peft_config[
        "default"
    ].init_lora_weights = True  # or PEFT would move the weights again when it reads them
    model.save_pretrained(tmp_path / "before")
    model.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter += 0.05
    model.save_pretrained(tmp_path / "moved")
    arguments = ["--model", base, "--output", str(tmp_path / "merged")]
    with pytest.raises(UserError, match="init_lora_weights 'pissa'"):
        convert.run(["--lora", str(tmp_path / "moved"), *arguments])
    before = str(tmp_path / "before")
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=before)
    convert.run(["--lora", str(tmp_path / "plain"), *arguments])
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    for layer in range(2):
        name = f"model.layers.{layer}.self_attn.q_proj"
        part = model.base_model.model.get_submodule(name)
        expected = part.base_layer.weight + part.get_delta_weight("default")
        torch.testing.assert_close(merged[f"{name}.weight"], expected.detach(), rtol=0, atol=1e-5)


def start_refusals(prefix, base, folder):
    def message(**more):
        with pytest.raises(UserError) as caught:
            Trainer(lora_run(prefix, base, **more), CPU)
        return str(caught.value)

    assert "lora_r there: 3, in the config: 4" in message(lora_model_dir=folder, lora_r=4)
    some = {"lora_target_linear": False, "lora_target_modules": ["q_proj"]}
    assert "the targets there: " in message(lora_model_dir=folder, **some)
    assert "there is no adapter_config.json" in message(lora_model_dir=base)


def other_shape(prefix, base, folder):
    with pytest.raises(UserError, match="another base model"):
        Trainer(lora_run(prefix, base, lora_model_dir=folder), CPU)


def test_adapters_of_another_kind_are_refused_at_start(prefix, base, adapters, tmp_path):
    pool.run(1, start_refusals, prefix, base, adapters)
    pool.run(1, other_shape, prefix, make_llama(tmp_path / "wide", intermediate_size=64), adapters)


def skipped(prefix, base):
    """Every adapter takes part: a change of any one changes the loss."""
    trainer = Trainer(lora_run(prefix, base), CPU)
    before = trainer.evaluate()["loss"]
    seen = 0
    for name, module in trainer.model.named_modules():
        if isinstance(module, Adapter):
            with torch.no_grad():
                module.B.to_local().fill_(0.1)
                assert trainer.evaluate()["loss"] != before, name
                module.B.to_local().zero_()
            seen += 1
    assert seen == 2 * len(TARGETS)


def test_no_adapter_is_skipped(prefix, base):
    pool.run(1, skipped, prefix, base)


def test_generate_reads_adapters(base, adapters, tmp_path):
    """What the adapters write is what the merged model writes, and not what the base model does."""
    import shutil

    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    from longspan.cli import convert

    tokenizer = Tokenizer(WordLevel({f"w{i}": i for i in range(tiny.VOCAB)}, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    folder = tmp_path / "adapters"
    shutil.copytree(adapters, folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    convert.run(["--lora", str(folder), "--model", base, "--output", str(tmp_path / "merged")])
    shutil.copytree(base, tmp_path / "base")
    tokenizer.save(str(tmp_path / "base" / "tokenizer.json"))

    def written(name):
        options = ["--prompt", "w5 w6", "--temperature", "0", "--max-new-tokens", "8"]
        done = command.run("generate", name, *options, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert written("adapters") == written("merged") != written("base")
