"""Adapters on recurrent layers: in PEFT's format out and in, merged, and trained at any layout."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import hybrid_families
import llamas
import pool
from llamas import row_of_tokens
from longspan.config.lora import read_peft_config
from longspan.errors import UserError
from longspan.models.hf_weights import FolderWriter, SafetensorsFolder
from longspan.models.peft import merge
from longspan.training.checkpoint import Checkpointer
from longspan.training.export import export
from longspan.training.trainer import Trainer

pytest.importorskip("peft")

CPU = torch.device("cpu")
NAMES = ("qwen3_next", "olmo_hybrid", "nemotron_h, experts")


def trained_and_exported(prefix, base, folder, more):
    """Logits of a model with trained adapters, and its export."""
    trainer = Trainer(llamas.lora_run(prefix, base, params_dtype="float32", **more), CPU)
    for step in range(2):
        trainer.train_step(trainer.micro_batches(step))
    logits = llamas.whole_logits(trainer, row_of_tokens())
    export(trainer, Path(folder))
    return logits


def read_again(prefix, base, folder, more):
    more = more | {"lora_model_dir": folder, "params_dtype": "float32"}
    return llamas.whole_logits(Trainer(llamas.lora_run(prefix, base, **more), CPU), row_of_tokens())


def close(found, expected):
    error = ((found - expected).abs().max() / expected.abs().max()).item()
    assert error <= 1e-4, f"{error:.1e}"


@pytest.mark.parametrize("name", NAMES)
def test_peft_reads_what_is_written_and_so_does_longspan(prefix, tmp_path, name):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base, _ = hybrid_families.save(tmp_path / "base", name)
    keys = {"sequence_len": 50, "learning_rate": 0.01}
    if name == "qwen3_next":
        # PEFT takes adapters on up_proj of this type for adapters on its experts, also those of the shared expert.
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "in_proj", "out_proj"]
        keys |= {"lora_target_linear": False, "lora_target_modules": targets}
    cut = keys | {"tensor_parallel_size": 2}
    logits = pool.run(2, trained_and_exported, prefix, base, str(tmp_path / "hf"), cut)[0]
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(base)
        before = plain(row_of_tokens()).logits
        model = PeftModel.from_pretrained(plain, tmp_path / "hf")
        held = {n for n in model.state_dict() if ".lora_" in n}
        written = load_file(tmp_path / "hf" / "adapter_model.safetensors")
        # PEFT makes adapters for exactly the modules in the file.
        assert {n.replace(".default.", ".") for n in held} == written.keys()
        close(logits, model(row_of_tokens()).logits)
    assert (logits - before).abs().max() > 1e-3
    lora, _ = read_peft_config(tmp_path / "hf")
    assert "in_proj" in lora.targets
    assert ("out_proj" in lora.targets) == (not name.startswith("nemotron"))
    close(pool.run(1, read_again, prefix, base, str(tmp_path / "hf"), keys)[0], logits)
    merged = FolderWriter(tmp_path / "merged", None, None)
    merge(SafetensorsFolder(base), tmp_path / "hf", merged)
    merged.finish({"config.json": (Path(base) / "config.json").read_bytes()})
    with torch.no_grad():
        close(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(row_of_tokens()).logits, logits)


def test_different_factors_of_one_layer_are_refused(prefix, tmp_path):
    base, _ = hybrid_families.save(tmp_path / "base", "qwen3_5_text")
    keys = {"sequence_len": 50, "lora_target_linear": False, "lora_target_modules": ["in_proj"]}
    pool.run(1, trained_and_exported, prefix, base, str(tmp_path / "hf"), keys)
    said = json.loads((tmp_path / "hf" / "adapter_config.json").read_text())
    assert said["target_modules"] == ["in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"]
    file = tmp_path / "hf" / "adapter_model.safetensors"
    tensors = load_file(file)
    assert len(tensors) == 2 * 4 * 3
    changed = next(n for n in tensors if n.endswith("in_proj_b.lora_A.weight"))
    tensors[changed] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    words = pool.run(1, refused, prefix, base, str(tmp_path / "hf"), keys)[0]
    assert "in_proj_b.lora_A.weight differ, and here the two modules are one layer" in words


def refused(prefix, base, folder, keys):
    with pytest.raises(UserError) as caught:
        read_again(prefix, base, folder, keys)
    return str(caught.value)


def trained_and_continued(prefix, base, folder, more):
    """Losses and gradient norms of three steps, the last one by a run that goes on from a checkpoint."""
    run = llamas.lora_run(prefix, base, params_dtype="float64", **more)
    trainer = Trainer(run, CPU)
    records = [trainer.train_step(trainer.micro_batches(step)) for step in range(2)]
    saver = Checkpointer(Path(folder), background=False)
    path = saver.save(2, trainer.model, trainer.optimizer, trainer.description())
    trainer = Trainer(run, CPU)
    trainer.resume(path)
    records.append(trainer.train_step(trainer.micro_batches(2)))
    return [(record["loss"], record["grad_norm"]) for record in records]


def test_a_stage_without_a_target_trains_nothing(prefix, tmp_path):
    types = ["linear_attention", "linear_attention", "full_attention", "full_attention"]
    base, _ = hybrid_families.save(tmp_path / "base", "qwen3_5_text", layer_types=types)
    keys = {"sequence_len": 50, "lora_target_linear": False, "lora_target_modules": ["q_proj"]}
    expected = pool.run(1, trained_and_continued, prefix, base, str(tmp_path / "1"), keys)[0]
    for schedule in ("1f1b", "zbv"):
        cut = keys | {"pipeline_parallel_size": 2, "pipeline_schedule": schedule}
        found = pool.run(2, trained_and_continued, prefix, base, str(tmp_path / schedule), cut)[0]
        for got, wanted in zip(found, expected):
            assert got == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("targets", [["in_proj", "out_proj"], ["q_proj"]])
def test_context_parallel_ranks_follow_one_process(prefix, tmp_path, targets):
    """What is frozen has no gradient on any rank, so all ranks take part in the same exchanges."""
    base, _ = hybrid_families.save(tmp_path / "base", "qwen3_5_text")
    keys = {"sequence_len": 50, "lora_target_linear": False, "lora_target_modules": targets}
    expected = pool.run(1, trained_and_continued, prefix, base, str(tmp_path / "1"), keys)[0]
    for way in ("state", "a2a"):
        cut = keys | {"context_parallel_size": 2, "ssm_cp_type": way}
        found = pool.run(2, trained_and_continued, prefix, base, str(tmp_path / way), cut)[0]
        for got, wanted in zip(found, expected):
            assert got == pytest.approx(wanted, rel=1e-9)
