"""Hybrid models in training: every mix of axes, recomputation and pipelines against one process. fp64."""

from pathlib import Path

import pytest
import torch

import pool
import tiny
from chats import write_tokenizer
from longspan.context_parallel import SequenceLayout
from longspan.data import load_tokenizer
from longspan.runs.generate import generate, of_checkpoint, prompt_ids
from longspan.training.checkpoint import Checkpointer
from longspan.training.trainer import Trainer
from step_results import References, alike, continued, saved


@pytest.fixture(scope="module")
def reference(prefix):
    return References(prefix)


SIZES = {
    "mamba_num_heads": 4,
    "mamba_head_dim": 8,
    "mamba_num_groups": 2,
    "mamba_state_dim": 6,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 4,
}
TYPES = SIZES | {
    "export_hf": False,
    "eval_max_samples": 2,
    "num_layers": 4,
    "layer_types": ["mamba", "gated_delta", "attention", "mamba"],
}
EXPERTS = SIZES | {
    "export_hf": False,
    "eval_max_samples": 2,
    "num_layers": 6,
    "hybrid_override_pattern": "M*EG-E",
    "num_moe_experts": 4,
    "moe_ffn_hidden_size": 24,
    "moe_aux_loss_coeff": 0.2,
}
PP2, CP2, TP2 = ({f"{axis}_parallel_size": 2} for axis in ("pipeline", "context", "tensor"))
#: name -> (processes, the layout, the model)
CASES = {
    "tp2 x cp2, states": (4, TP2 | CP2 | {"ssm_cp_type": "state"}, TYPES),
    "cp3, contiguous attention": (
        3,
        {"context_parallel_size": 3, "attention_cp_layout": "contiguous"},
        TYPES,
    ),
    "cp2, heads, one stream": (2, CP2 | {"ssm_cp_type": "a2a"}, TYPES | {"sample_packing": False}),
    "dp_shard2 x cp2, full recomputation": (
        4,
        CP2 | {"dp_shard_size": 2, "gradient_checkpointing": True},
        TYPES | {"global_batch_size": 8},
    ),
    "pp2 x cp2, selective recomputation": (4, PP2 | CP2 | {"gradient_checkpointing": "selective"}, TYPES),
    "zero bubble, cp2, states": (
        4,
        PP2 | CP2 | {"pipeline_schedule": "interleaved_zero_bubble", "ssm_cp_type": "state"},
        TYPES,
    ),
    "zbv": (2, PP2 | {"pipeline_schedule": "zbv"}, TYPES),
    "experts folded over cp2": (2, CP2 | {"expert_parallel_size": 2}, EXPERTS),
    "experts, pp2 x ep2 x cp2": (4, PP2 | CP2 | {"expert_parallel_size": 2}, EXPERTS),
    "offloading, cp2": (2, CP2 | {"activation_offloading": True, "gradient_checkpointing": True}, TYPES),
}


@pytest.mark.parametrize("name", CASES)
def test_steps_equal_one_process(name, prefix, reference):
    world, layout, model = CASES[name]
    alike(
        prefix, reference(2, model, evaluates_first=True), 2, [(world, layout | model)], evaluates_first=True
    )


def test_a_checkpoint_goes_on_at_every_layout(prefix, tmp_path):
    path, expected = pool.run(2, saved, prefix, str(tmp_path / "cp2"), TYPES | CP2)[0]
    assert pool.run(2, continued, prefix, path, TYPES | CP2)[0] == expected
    for world, layout in ((2, TP2), (2, PP2), (2, {"dp_shard_size": 2}), (3, {"context_parallel_size": 3})):
        assert pool.run(world, continued, prefix, path, TYPES | layout)[0] == pytest.approx(
            expected, rel=1e-9
        )


def next_token(prefix, folder, changes, ids):
    """A checkpoint after a step, and the token that its model finds likeliest after some."""
    trainer = Trainer(tiny.tiny_run(prefix, 1, **changes), torch.device("cpu"))
    trainer.train_step(trainer.micro_batches(0))
    path = Checkpointer(Path(folder), background=False).save(
        1, trainer.model, trainer.optimizer, trainer.description()
    )
    with torch.no_grad():
        logits = trainer.model(torch.tensor([ids]), layout=SequenceLayout.contiguous(len(ids), 1))
    return str(path), int(logits[0, -1].argmax())


def test_a_model_without_a_family_writes_from_its_checkpoint(prefix, tmp_path):
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    ids = prompt_ids(load_tokenizer(tokenizer), tokenizer, "the")
    changes = TYPES | {"vocab_size": 420, "params_dtype": "float32"}
    path, expected = pool.run(1, next_token, prefix, str(tmp_path / "run"), changes, ids)[0]
    source = of_checkpoint(Path(path), tmp_path, str(tokenizer))
    text = generate(source, "the", 1, 0, 0, special=True)
    assert text == load_tokenizer(tokenizer).decode([*ids, expected], skip_special_tokens=False)
