"""Models that transformers' own class computes, trained from a config: curves at every layout, checkpoints, adapters, exports."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import pool
import tiny
from class_models import class_run, make_folder

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from longspan.training.checkpoint import Checkpointer  # noqa: E402
from longspan.training.export import export  # noqa: E402
from longspan.training.trainer import Trainer  # noqa: E402

CPU = torch.device("cpu")
STEPS = 20
CP2 = {"context_parallel_size": 2}
LORA = {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_target_linear": True}


@pytest.fixture(scope="module")
def prefix(tmp_path_factory):
    return tiny.write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Type -> folder, made when it is asked for."""
    made = {}

    def folder(kind):
        if kind not in made:
            made[kind] = make_folder(kind, tmp_path_factory.mktemp(kind))
        return made[kind]

    return folder


def steps_of(trainer, steps):
    return [trainer.train_step(trainer.micro_batches(trainer.step)) for _ in range(steps)]


def curve(prefix, base, changes, steps=STEPS, save=None, resume=None, to=None):
    """(losses, gradient norms, evaluation) of some steps; a checkpoint is read before or written behind them."""
    run = class_run(prefix, base, dist.get_world_size(), **changes)
    trainer = Trainer(run, CPU)
    if resume is not None:
        trainer.resume(Path(resume))
    records = steps_of(trainer, steps)
    if save is not None:
        saver = Checkpointer(Path(save))
        saver.save(trainer.step, trainer.model, trainer.optimizer, trainer.description())
        saver.finish()
    if to is not None:
        export(trainer, Path(to))
    evaluation = trainer.evaluate()["loss"]
    return [r["loss"] for r in records], [r["grad_norm"] for r in records], evaluation


def same(found, expected, rel=1e-6):
    """The class computes norms and rotations in float32, so that float64 is equal up to their rounding."""
    for ours, theirs in zip(found, expected):
        assert ours == pytest.approx(theirs, rel=rel)


@pytest.mark.parametrize("kind", ["phi3", "gemma3_text"])
def test_one_curve_at_every_layout_and_over_a_resume_at_another_one(kind, folders, prefix, tmp_path):
    base = folders(kind)
    whole = pool.run(1, curve, prefix, base, {})[0]
    assert whole[0][-1] < whole[0][0] - 0.5
    saved = str(tmp_path / "checkpoints")
    cut = pool.run(2, curve, prefix, base, CP2, 12, saved)[0]
    same([x[:12] for x in whole[:2]], cut[:2])
    more = {"gradient_checkpointing": True, "cp_comm_type": ["p2p", "a2a"], "dp_replicate_size": 2} | CP2
    rest = pool.run(4, curve, prefix, base, more, 8, None, f"{saved}/step_00000012")[0]
    same([x[12:] for x in whole[:2]], rest[:2])
    assert rest[2] == pytest.approx(whole[2], rel=1e-6)
    same(pool.run(4, curve, prefix, base, {"dp_shard_size": 2} | CP2)[0], whole)


def test_documents_cut_over_as_many_ranks_as_they_need(folders, prefix):
    expected = pool.run(1, curve, prefix, folders("phi3"), {}, 4)[0]
    hybrid = {"hybrid_context_parallel": True, "max_seqlen_per_dp_cp_rank": 30} | CP2
    same(pool.run(2, curve, prefix, folders("phi3"), hybrid, 4)[0], expected)


def test_a_stream_without_packing_and_several_rows_a_micro_batch(folders, prefix):
    more = {"sample_packing": False, "micro_batch_size": 2}
    expected = pool.run(1, curve, prefix, folders("gemma3_text"), more, 4)[0]
    same(pool.run(2, curve, prefix, folders("gemma3_text"), more | CP2, 4)[0], expected)


def logits_of(model, seed=3):
    tokens = torch.randint(tiny.VOCAB, (1, 30), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return model.eval()(input_ids=tokens).logits


def class_logits(trainer):
    """The logits of the trained class, of a whole sequence."""
    hf = trainer.model.hf
    hf.set_attn_implementation("sdpa")
    for module in trainer.model.modules():
        if hasattr(module, "unshard"):
            module.unshard()
    return logits_of(hf)


def trained(prefix, base, changes, to):
    """Trains some steps, exports, and returns the class's own logits."""
    trainer = Trainer(class_run(prefix, base, dist.get_world_size(), **changes), CPU)
    steps_of(trainer, 4)
    export(trainer, Path(to))
    return class_logits(trainer)


@pytest.mark.parametrize("kind", ["phi3", "gemma3_text", "granite", "glm4_moe"])
def test_an_export_is_what_transformers_loads_with_equal_logits(kind, folders, prefix, tmp_path):
    more = {"params_dtype": "float32", "export_dtype": "float32", "cp_comm_type": "all_gather"} | CP2
    expected = pool.run(2, trained, prefix, folders(kind), more, str(tmp_path / "hf"))[0]
    model, about = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", output_loading_info=True
    )
    assert not any(about.values()), about
    assert model.config.architectures == [type(model).__name__]
    torch.testing.assert_close(logits_of(model), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["phi3", "gemma3_text"])
def test_adapters_train_alike_and_peft_loads_them(kind, folders, prefix, tmp_path):
    base = folders(kind)
    expected = pool.run(1, curve, prefix, base, LORA, 6)[0]
    same(pool.run(2, curve, prefix, base, CP2 | LORA, 6)[0], expected)
    more = {"params_dtype": "float32"} | CP2 | LORA
    logits = pool.run(2, trained, prefix, base, more, str(tmp_path / "adapters"))[0]
    plain = transformers.AutoModelForCausalLM.from_pretrained(base)
    before = logits_of(plain)
    model = peft.PeftModel.from_pretrained(plain, tmp_path / "adapters")
    torch.testing.assert_close(logits_of(model), logits, rtol=1e-5, atol=1e-5)
    assert (before - logits).abs().max() > 1e-2


def test_adapters_are_resumed_at_another_layout_with_shards_in_the_cpus_memory(folders, prefix, tmp_path):
    base, saved = folders("phi3"), str(tmp_path / "checkpoints")
    lora = LORA | {"lora_target_linear": False, "lora_target_modules": ["qkv_proj", "o_proj"]}
    whole = pool.run(1, curve, prefix, base, lora, 6)[0]
    pool.run(2, curve, prefix, base, CP2 | lora, 3, saved)
    more = {"dp_shard_size": 2, "offload_params": True} | lora
    rest = pool.run(2, curve, prefix, base, more, 3, None, f"{saved}/step_00000003")[0]
    same(rest[:2], [x[3:] for x in whole[:2]])


def parameters_of(prefix, base, changes):
    """All parameters whole, as a checksum each, and whether a rank holds no more than its share."""
    trainer = Trainer(class_run(prefix, base, dist.get_world_size(), **changes), CPU)
    held = sum(p.to_local().numel() for p in trainer.model.parameters())
    whole = sum(p.numel() for p in trainer.model.parameters())
    found = {n: p.full_tensor().double().square().sum().item() for n, p in trainer.model.named_parameters()}
    return found, held / whole


def test_weights_from_nothing_are_the_same_at_every_layout(folders, prefix):
    more = {"reinit_weights": True}
    one, _ = pool.run(1, parameters_of, prefix, folders("gemma3_text"), more)[0]
    two = pool.run(2, parameters_of, prefix, folders("gemma3_text"), more | {"dp_shard_size": 2})
    assert two[0][0] == one
    assert all(share < 0.6 for _, share in two)
    other, _ = pool.run(1, parameters_of, prefix, folders("gemma3_text"), more | {"seed": 5})[0]
    assert other["hf.model.embed_tokens.weight"] != one["hf.model.embed_tokens.weight"]


def mixed(prefix, base):
    """The dtype of weights, of what computes and of the optimizer, and a few losses, in mixed precision."""
    trainer = Trainer(class_run(prefix, base, 2, params_dtype="float32", bf16=True, **CP2), CPU)
    losses = [r["loss"] for r in steps_of(trainer, 6)]
    states = {s["exp_avg"].dtype for s in trainer.optimizer.state.values()}
    return losses, {p.dtype for p in trainer.model.parameters()}, states


def test_bfloat16_computes_beside_float32_weights(folders, prefix):
    losses, weights, states = pool.run(2, mixed, prefix, folders("phi3"))[0]
    assert weights == states == {torch.float32}
    expected = pool.run(1, curve, prefix, folders("phi3"), {}, 6)[0][0]
    assert losses == pytest.approx(expected, rel=2e-2)
    assert losses != pytest.approx(expected, rel=1e-7)
