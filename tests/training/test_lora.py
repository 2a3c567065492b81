"""Adapters beside frozen weights: gradients against PEFT in float64, curves, checkpoints, exports, merging."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

import command
import pool
import tiny
from longspan.config.lora import TARGETS
from longspan.context_parallel import SequenceLayout
from longspan.errors import UserError
from longspan.models.peft import is_adapter, peft_name
from longspan.tensor_parallel.lora import Adapter
from longspan.training import checkpoint
from longspan.training.adapters import parameter_counts
from longspan.training.checkpoint import Checkpointer
from longspan.training.export import export
from longspan.training.optimizer import gradient_norm
from longspan.training.trainer import Trainer

pytest.importorskip("peft")

CPU = torch.device("cpu")
TP2_CP2 = {"tensor_parallel_size": 2, "context_parallel_size": 2}
LORA = {"adapter": "lora", "lora_r": 3, "lora_alpha": 7.5, "lora_target_linear": True}


@pytest.fixture(scope="module")
def prefix(tmp_path_factory):
    return tiny.write_data(tmp_path_factory.mktemp("data"))


def make_llama(folder, tied=False, dtype=torch.float32, seed=1, **sizes):
    """A random Llama: grouped heads, a vocabulary that is no multiple of 128."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    fields = {
        "vocab_size": tiny.VOCAB,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 128,
        "tie_word_embeddings": tied,
        "initializer_range": 0.2,
    }
    LlamaForCausalLM(LlamaConfig(**fields | sizes)).to(dtype).save_pretrained(folder)
    return str(folder)


def make_adapters(base, folder, targets=TARGETS, rank=3, alpha=7.5, rslora=False, seed=2):
    """Adapters that change something (B is random too), as PEFT saves them."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=list(targets),
        use_rslora=rslora,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_llama(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory):
    return make_adapters(base, tmp_path_factory.mktemp("adapters"))


def changes(base, **more):
    """A config that takes its architecture from base_model alone."""
    own = (
        "num_layers",
        "hidden_size",
        "num_attention_heads",
        "num_query_groups",
        "ffn_hidden_size",
        "vocab_size",
    )
    return {name: None for name in (*own, "init_method_std")} | {"base_model": base} | LORA | more


def lora_run(prefix, base, **more):
    return tiny.tiny_run(prefix, dist.get_world_size(), **changes(base, **more))


# --- against PEFT ---------------------------------------------------------------------------


def gradients(prefix, base, more):
    """The loss and every adapter's whole gradient (by PEFT's name) of the first global batch, and that batch."""
    trainer = Trainer(lora_run(prefix, base, **more), CPU)
    batches = trainer.micro_batches(0)
    loss, count = trainer.compute_gradients(batches)
    found = {}
    for name, parameter in trainer.model.named_parameters():
        assert parameter.requires_grad == is_adapter(name)
        if is_adapter(name):
            found[peft_name(name)] = parameter.grad.full_tensor().clone()
        else:
            assert parameter.grad is None, name
    total = math.sqrt(sum(g.double().square().sum().item() for g in found.values()))
    assert gradient_norm(trainer.model).item() == pytest.approx(total, rel=1e-5)
    trainer.apply_gradients(rate=0.01)
    state = trainer.optimizer.state
    assert len(state) == len(found)
    return loss, count, found, [(b.tokens, b.labels) for b in batches]


class _Rotary(torch.nn.Module):
    """transformers' table of rotations, which it makes in float32, in float64."""

    def __init__(self, inv_freq):
        super().__init__()
        self.inv_freq = inv_freq

    def forward(self, x, position_ids):
        angles = position_ids[..., None].double() * self.inv_freq
        angles = torch.cat([angles, angles], -1)
        return angles.cos(), angles.sin()


def in_float64(model):
    """transformers' Llama without its float32 islands: norms and rotation."""
    config = model.config
    size = config.hidden_size // config.num_attention_heads
    inv_freq = 10000.0 ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
    model.model.rotary_emb = _Rotary(inv_freq)
    for module in model.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.forward = lambda x, m=module: torch.nn.functional.rms_norm(
                x, m.weight.shape, m.weight, m.variance_epsilon
            )
    return model


@pytest.fixture(scope="module")
def by_peft(prefix, base, adapters):
    """Loss and gradients by PEFT itself, one process, float64, for the batch that ours trains on."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    more = {"sample_packing": False, "lora_model_dir": adapters}
    batches = pool.run(1, gradients, prefix, base, more)[0][3]
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64, attn_implementation="sdpa")
    model = PeftModel.from_pretrained(in_float64(model), adapters, is_trainable=True)
    count = sum(int((labels != -100).sum()) for _, labels in batches)
    total = 0.0
    for tokens, labels in batches:
        logits = model(tokens, use_cache=False).logits
        assert logits.dtype == torch.float64
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        (loss / count).backward()
        total += loss.item() / count
    found = {
        name.replace(".default", ""): p.grad.clone()
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    return total, count, found


LAYOUTS = {
    "one process": (1, {}),
    "tp2": (2, {"tensor_parallel_size": 2}),
    "tp2, no sequence parallelism": (2, {"tensor_parallel_size": 2, "sequence_parallel": False}),
    "cp2": (2, {"context_parallel_size": 2}),
    "tp2, tiled": (2, {"tensor_parallel_size": 2, "tiled_mlp": True, "tiled_mlp_num_shards": 3}),
    "cp3, recompute": (3, {"context_parallel_size": 3, "gradient_checkpointing": True}),
    "dp_shard2 x cp2": (4, {"dp_shard_size": 2, "context_parallel_size": 2}),
    "dp_replicate2 x dp_shard2": (4, {"dp_replicate_size": 2, "dp_shard_size": 2}),
    "tp2 x cp2 with sequence parallelism": (4, TP2_CP2 | {"gradient_checkpointing": "selective"}),
    "tp2 x dp_shard2": (4, {"tensor_parallel_size": 2, "dp_shard_size": 2}),
}


def compare(got, expected, tolerance=1e-10):
    assert got[1] == expected[1]
    assert abs(got[0] - expected[0]) <= tolerance * abs(expected[0])
    assert got[2].keys() == expected[2].keys()
    for name, whole in expected[2].items():
        error = (got[2][name] - whole).abs().max() / whole.abs().max()
        assert error <= tolerance, f"{name}: {error:.1e}"


@pytest.mark.parametrize("name", LAYOUTS)
def test_loss_and_gradients_are_pefts(name, prefix, base, adapters, by_peft):
    world, more = LAYOUTS[name]
    more = more | {"sample_packing": False, "lora_model_dir": adapters}
    compare(pool.run(world, gradients, prefix, base, more)[0], by_peft)


def test_packed_documents_some_targets_rslora_and_tied_embeddings(prefix, tmp_path):
    tied = make_llama(tmp_path / "tied", tied=True)
    targets = ("q_proj", "down_proj")
    folder = make_adapters(tied, tmp_path / "adapters", targets, rank=5, alpha=2, rslora=True)
    more = {
        "lora_target_linear": False,
        "lora_target_modules": list(reversed(targets)),
        "lora_r": 5,
        "lora_alpha": 2,
        "peft_use_rslora": True,
        "lora_model_dir": folder,
    }
    expected = pool.run(1, gradients, prefix, tied, more)[0]
    assert len(expected[2]) == 2 * 2 * len(targets)
    compare(pool.run(4, gradients, prefix, tied, more | TP2_CP2)[0], expected)
    compare(pool.run(3, gradients, prefix, tied, more | {"context_parallel_size": 3})[0], expected)


# --- curves ---------------------------------------------------------------------------------


def curve(prefix, base, steps, more):
    trainer = Trainer(lora_run(prefix, base, **more), CPU)
    frozen = {n: p.to_local().clone() for n, p in trainer.model.named_parameters() if not is_adapter(n)}
    evals = [trainer.evaluate()["loss"]]
    records = [trainer.train_step(trainer.micro_batches(step)) for step in range(steps)]
    for name, parameter in trainer.model.named_parameters():  # an evaluation leaves some gathered
        assert is_adapter(name) or torch.equal(frozen[name], parameter.to_local()), name
    evals.append(trainer.evaluate()["loss"])
    return [r["loss"] for r in records], [r["grad_norm"] for r in records], evals


@pytest.fixture(scope="module")
def one_process(prefix, base):
    return pool.run(1, curve, prefix, base, 12, {})[0]


@pytest.mark.parametrize(
    ("world", "more"),
    [
        (4, TP2_CP2),
        (3, {"context_parallel_size": 3, "micro_batch_size": 2}),
        (4, {"dp_shard_size": 2, "context_parallel_size": 2, "max_grad_norm": 1.0}),
    ],
    ids=str,
)
def test_training_follows_the_curve_of_one_process(prefix, base, one_process, world, more):
    got = pool.run(world, curve, prefix, base, 12, more)
    assert all(rank == got[0] for rank in got)
    for ours, expected in zip(got[0], one_process):
        assert ours == pytest.approx(expected, rel=1e-9)
    assert got[0][2][1] < 0.97 * got[0][2][0]


def test_bf16_holds_frozen_weights_in_bf16_and_computes_the_same(prefix, base):
    more = {"params_dtype": "float32", "bf16": True}
    alone = pool.run(1, curve, prefix, base, 20, more)[0]
    assert pool.run(1, curve_of_wide_frozen_weights, prefix, base, 20, more)[0] == alone
    cut = pool.run(2, curve, prefix, base, 20, more | {"context_parallel_size": 2})[0]
    assert cut[0][-1] == pytest.approx(alone[0][-1], rel=0.05)


def curve_of_wide_frozen_weights(prefix, base, steps, more):
    from longspan.models import peft
    from longspan.training import build

    whole = build.attach
    build.attach = lambda model, lora, frozen_dtype: peft.attach(model, lora)
    try:
        return curve(prefix, base, steps, more)
    finally:
        build.attach = whole


def first_values(prefix, base, more):
    trainer = Trainer(lora_run(prefix, base, **more), CPU)
    kinds = {(is_adapter(n), p.dtype) for n, p in trainer.model.named_parameters()}
    wholes = {n: p.full_tensor().detach() for n, p in trainer.model.named_parameters() if is_adapter(n)}
    return wholes, kinds, parameter_counts(trainer.model)


def test_adapters_start_the_same_at_every_layout(prefix, base):
    """A is uniform in +-1/sqrt(input), as PEFT's; B is zero."""
    expected, _, counts = pool.run(1, first_values, prefix, base, {})[0]
    got, kinds, more_counts = pool.run(
        4, first_values, prefix, base, TP2_CP2 | {"params_dtype": "float32", "bf16": True}
    )[0]
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)}
    assert counts == more_counts
    assert counts[1] == sum(t.numel() for t in expected.values())
    for name, whole in expected.items():
        torch.testing.assert_close(got[name].double(), whole, rtol=1e-6, atol=1e-8)
        if name.endswith(".B"):
            assert not whole.any()
        else:
            bound = whole.shape[1] ** -0.5
            assert 0.8 * bound < whole.abs().max() <= bound
            assert whole.std().item() == pytest.approx(bound / 3**0.5, rel=0.2)
    other, _, _ = pool.run(1, first_values, prefix, base, {"seed": 7})[0]
    assert not torch.equal(other["decoder.layers.0.mlp.linear_up.lora.A"], expected["decoder.layers.0.mlp.linear_up.lora.A"])  # fmt: skip


# --- checkpoints ----------------------------------------------------------------------------


def steps(prefix, base, more, folder, first, last):
    """Trains steps first+1 .. last, from the checkpoint in ``folder`` unless first is 0, and saves there."""
    folder = Path(folder)
    trainer = Trainer(lora_run(prefix, base, max_steps=20, **more), CPU)
    if first:
        trainer.resume(checkpoint.find(folder))
        assert trainer.step == first
    losses = [
        trainer.train_step(batches)["loss"] for batches, _ in zip(trainer.steps_ahead(), range(last - first))
    ]
    saves = Checkpointer(folder)
    saves.save(trainer.step, trainer.model, trainer.optimizer, trainer.description())
    saves.finish()
    return losses


def test_a_checkpoint_holds_the_adapters_alone_and_goes_on_at_another_layout(prefix, base, tmp_path):
    import torch.distributed.checkpoint as dcp

    whole = pool.run(4, steps, prefix, base, TP2_CP2, str(tmp_path / "a"), 0, 6)[0]
    head = pool.run(4, steps, prefix, base, TP2_CP2, str(tmp_path / "b"), 0, 4)[0]
    at = checkpoint.find(tmp_path / "b")
    names = dcp.FileSystemReader(str(at)).read_metadata().state_dict_metadata
    weights = {name for name in names if name.startswith("model.")}
    assert len(weights) == 2 * 2 * len(TARGETS)
    assert all(is_adapter(name) for name in weights)
    assert all(is_adapter(name) for name in names if name.startswith("optimizer.state."))
    assert checkpoint.describe(at)["adapter"]["base_model"] == base
    assert head + pool.run(4, steps, prefix, base, TP2_CP2, str(tmp_path / "b"), 4, 6)[0] == whole
    for world, more in ((3, {"context_parallel_size": 3}), (2, {"dp_shard_size": 2}), (1, {})):
        import shutil

        folder = tmp_path / f"to-{world}"
        folder.mkdir()
        shutil.copytree(at, folder / at.name)
        (folder / "latest").write_text(at.name + "\n")
        tail = pool.run(world, steps, prefix, base, more, str(folder), 4, 6)[0]
        assert head + tail == pytest.approx(whole, rel=1e-9)


def refusals(prefix, base, other_base, with_adapters, without):
    def problems(folder, **more):
        run = lora_run(prefix, more.pop("base", base), **more)
        trainer = Trainer(run, CPU)
        with pytest.raises(UserError) as caught:
            trainer.resume(checkpoint.find(Path(folder)))
        return "\n".join(caught.value.problems)

    plain = {"adapter": None, "lora_r": None, "lora_alpha": None, "lora_target_linear": False}
    assert "holds adapters only (adapter: lora, lora_r 3, on q_proj, " in problems(with_adapters, **plain)
    assert "holds a whole model, and the config trains adapters" in problems(without)
    text = problems(with_adapters, lora_r=4, lora_alpha=8)
    assert "trained with lora_r 3, the config says 4" in text
    assert "lora_alpha 7.5, the config says 8" in text
    some = {"lora_target_linear": False, "lora_target_modules": ["q_proj"]}
    assert "trained with targets ['q_proj', 'k_proj'," in problems(with_adapters, **some)
    assert "base_model" in problems(with_adapters, base=other_base)
    assert "has others. Give the base model" in problems(with_adapters, base=other_base)


def test_a_checkpoint_of_another_kind_is_refused(prefix, base, tmp_path):
    other = make_llama(tmp_path / "other", seed=9)
    plain = {"adapter": None, "lora_r": None, "lora_alpha": None, "lora_target_linear": False}
    pool.run(1, steps, prefix, base, {}, str(tmp_path / "with"), 0, 1)
    pool.run(1, steps, prefix, base, plain, str(tmp_path / "without"), 0, 1)
    pool.run(1, refusals, prefix, base, other, str(tmp_path / "with"), str(tmp_path / "without"))


# --- exports and merging --------------------------------------------------------------------


def trained_and_exported(prefix, base, folder, more):
    """Logits of a model with trained adapters; its export and its checkpoint."""
    trainer = Trainer(lora_run(prefix, base, params_dtype="float32", **more), CPU)
    for step in range(3):
        trainer.train_step(trainer.micro_batches(step))
    tokens = torch.arange(45).view(1, 45) * 7 % tiny.VOCAB
    layout = SequenceLayout.zigzag(45, trainer.run.sizes.cp, multiple_of=trainer.run.sizes.tp)
    trainer.model.parallel_output = False
    with torch.no_grad():
        local = trainer.model(layout.shard(tokens, trainer.shard.cp_rank, dim=1), layout=layout)
    export(trainer, Path(folder) / "hf")
    saves = Checkpointer(Path(folder) / "checkpoints", background=False)
    saves.save(3, trainer.model, trainer.optimizer, trainer.description())
    return tokens, layout.unshard(local, trainer.groups.cp, dim=1), trainer.evaluate()["loss"]


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
