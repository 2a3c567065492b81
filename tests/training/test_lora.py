"""Adapters beside frozen weights: gradients against PEFT in float64, curves, checkpoints."""

import math
from pathlib import Path

import pytest
import torch

import pool
from llamas import lora_run, make_adapters, make_llama
from longspan.config.lora import TARGETS
from longspan.errors import UserError
from longspan.models import GPTModel
from longspan.models.hf_weights import Names
from longspan.models.peft import adapter_places, attach, is_adapter
from longspan.parallelize import parallelize
from longspan.training import checkpoint
from longspan.training.adapters import parameter_counts
from longspan.training.checkpoint import Checkpointer
from longspan.training.optimizer import gradient_norm, make_optimizer
from longspan.training.trainer import Trainer
from longspan.weights import fill

pytest.importorskip("peft")

CPU = torch.device("cpu")
TP2_CP2 = {"tensor_parallel_size": 2, "context_parallel_size": 2}


# --- against PEFT ---------------------------------------------------------------------------


def gradients(prefix, base, more):
    """The loss and every adapter's whole gradient (by PEFT's name) of the first global batch, and that batch."""
    trainer = Trainer(lora_run(prefix, base, **more), CPU)
    batches = trainer.micro_batches(0)
    loss, count = trainer.compute_gradients(batches)
    names = Names(trainer.run.model, trainer.run.vocab_size)
    found = {}
    for name, parameter in trainer.model.named_parameters():
        assert parameter.requires_grad == is_adapter(name)
        if is_adapter(name):
            found[adapter_places(names, name)[0].name] = parameter.grad.full_tensor().clone()
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


def curve(prefix, base, steps, more, wide=False):
    """Losses, gradient norms and evaluations; the rate is high, so that few steps teach something."""
    trainer = Trainer(lora_run(prefix, base, learning_rate=0.03, **more), CPU)
    if wide:
        hold_frozen_weights_wide(trainer)
    frozen = {n: p.to_local().clone() for n, p in trainer.model.named_parameters() if not is_adapter(n)}
    evals = [trainer.evaluate()["loss"]]
    records = [trainer.train_step(trainer.micro_batches(step)) for step in range(steps)]
    for name, parameter in trainer.model.named_parameters():  # an evaluation leaves some gathered
        assert is_adapter(name) or torch.equal(frozen[name], parameter.to_local()), name
    evals.append(trainer.evaluate()["loss"])
    return [r["loss"] for r in records], [r["grad_norm"] for r in records], evals


@pytest.fixture(scope="module")
def one_process(prefix, base):
    return pool.run(1, curve, prefix, base, 6, {})[0]


@pytest.mark.parametrize(
    ("world", "more"),
    [
        (4, TP2_CP2 | {"micro_batch_size": 2}),
        (3, {"context_parallel_size": 3, "micro_batch_size": 2}),
        (4, {"dp_shard_size": 2, "context_parallel_size": 2, "max_grad_norm": 1.0}),
    ],
    ids=str,
)
def test_training_follows_the_curve_of_one_process(prefix, base, one_process, world, more):
    got = pool.run(world, curve, prefix, base, 6, more)
    assert all(rank == got[0] for rank in got)
    for ours, expected in zip(got[0], one_process):
        assert ours == pytest.approx(expected, rel=1e-9)
    assert got[0][2][1] < 0.97 * got[0][2][0]


@pytest.mark.slow
def test_bf16_holds_frozen_weights_in_bf16_and_computes_the_same(prefix, base):
    more = {"params_dtype": "float32", "bf16": True}
    alone = pool.run(1, curve, prefix, base, 6, more)[0]
    assert pool.run(1, curve, prefix, base, 6, more, True)[0] == alone
    cut = pool.run(2, curve, prefix, base, 6, more | {"context_parallel_size": 2, "micro_batch_size": 2})[0]
    assert cut[0][-1] == pytest.approx(alone[0][-1], rel=0.05)


def hold_frozen_weights_wide(trainer):
    """Gives a trainer a model that holds its frozen weights in float32 and computes in bfloat16."""
    run = trainer.run
    with torch.device("meta"):
        model = GPTModel(
            run.transformer_config(torch.float32),
            run.vocab_size,
            run.batch.sequence_len,
            pg_collection=trainer.groups,
        )
    attach(model, run.lora)
    trainer.model = parallelize(model, trainer.mesh, seed=None, device=CPU, compute_dtype=torch.bfloat16)
    fill(trainer.model, run)
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
    trainer.optimizer = make_optimizer(trainer.model, run.config)


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
    trainer = Trainer(lora_run(prefix, base, max_steps=20, global_batch_size=2, **more), CPU)
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


@pytest.mark.slow
def test_a_checkpoint_holds_the_adapters_alone_and_goes_on_at_another_layout(prefix, base, tmp_path):
    import torch.distributed.checkpoint as dcp

    whole = pool.run(4, steps, prefix, base, TP2_CP2, str(tmp_path / "a"), 0, 4)[0]
    head = pool.run(4, steps, prefix, base, TP2_CP2, str(tmp_path / "b"), 0, 2)[0]
    at = checkpoint.find(tmp_path / "b")
    names = dcp.FileSystemReader(str(at)).read_metadata().state_dict_metadata
    weights = {name for name in names if name.startswith("model.")}
    assert len(weights) == 2 * 2 * len(TARGETS)
    assert all(is_adapter(name) for name in weights)
    assert all(is_adapter(name) for name in names if name.startswith("optimizer.state."))
    assert checkpoint.describe(at)["adapter"]["base_model"] == base
    assert head + pool.run(4, steps, prefix, base, TP2_CP2, str(tmp_path / "b"), 2, 4)[0] == whole
    for world, more in ((3, {"context_parallel_size": 3}), (2, {"dp_shard_size": 2}), (1, {})):
        import shutil

        folder = tmp_path / f"to-{world}"
        folder.mkdir()
        shutil.copytree(at, folder / at.name)
        (folder / "latest").write_text(at.name + "\n")
        tail = pool.run(world, steps, prefix, base, more, str(folder), 2, 4)[0]
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
