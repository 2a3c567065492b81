"""Generated configs: each is taken, or refused before any process starts by a message that names a key; never a traceback."""

import contextlib
import io

import hypothesis.strategies as st
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings

import command
import pool
import tiny
from longspan.config.dialects.table import EXTERNAL_NAMES
from longspan.config.load import make_config
from longspan.config.resolve import resolve
from longspan.config.run import Run
from longspan.config.schema import names
from longspan.errors import UserError
from longspan.runs.check import checked
from longspan.runs.start import Launch
from longspan.training.trainer import Trainer

#: key -> values worth trying, good and bad; a key not drawn keeps tiny's value or its default
SIZES = {
    "num_layers": [1, 3],
    "hidden_size": [24, 33, 48],
    "num_attention_heads": [1, 2, 3, 6],
    "num_query_groups": [1, 2, 3, 4],
    "kv_channels": [7, 8, 16],
    "ffn_hidden_size": [30, 33, 64],
    "vocab_size": [50, 101, 300],
    "sequence_len": [1, 16, 31, 53],
}
MODEL = {
    "normalization": ["LayerNorm", "RMSNorm", "rmsnorm"],
    "gated_linear_unit": [False, True],
    "activation_func": ["gelu", "relu", "silu"],
    "add_bias_linear": [True],
    "add_qkv_bias": [True],
    "qk_layernorm": [True],
    "position_embedding_type": ["none", "learned_absolute"],
    "max_position_embeddings": [8, 64],
    "layernorm_zero_centered_gamma": [True],
    "tie_word_embeddings": [True],
    "attention_dropout": [0.1],
    "rope_scaling": [
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        {"rope_type": "lineer"},
        {"rope_type": "linear"},
    ],
    "sliding_window": [1, 5, [4, None], 0, []],
    "adapter": ["lora"],
    "lora_r": [2],
}
LAYOUT = {
    "tensor_parallel_size": [2, 4, 3],
    "context_parallel_size": [2, 3, 4],
    "dp_shard_size": [1, 2],
    "dp_replicate_size": [2],
    "pipeline_parallel_size": [2],
    "sequence_parallel": [True, False],
    "cp_comm_type": ["all_gather", "a2a", "a2a+p2p", ["p2p", "a2a"], "ring"],
    "hierarchical_context_parallel_sizes": [[2, 2], [2], [3, 1]],
    "cp_layout": ["contiguous", "zigzag", "per_document_zigzag", "balanced"],
    "hybrid_context_parallel": [True],
    "max_seqlen_per_dp_cp_rank": [16, 64],
}
BATCH = {
    "micro_batch_size": [2, 3],
    "gradient_accumulation_steps": [2],
    "global_batch_size": [6, 8, 5],
    "sample_packing": [False],
    "warmup_steps": [0, 1],
    "warmup_ratio": [0.5],
    "lr_scheduler": ["linear", "constant", "cosin"],
    "min_lr": [1e-4, 1.0],
    "lr_decay_iters": [1],
    "max_grad_norm": [0.0, 0.1],
    "val_set_size": [0.0, 1, 0.5, 1.5],
    "eval_steps": [1, 0.5, 2.5],
    "save_steps": [1],
}
MEMORY = {
    "bf16": [True, "auto", "yes"],
    "params_dtype": ["float32"],
    "gradient_checkpointing": [True, "selective", "offload", "most"],
    "activation_offloading": [True],
    "offload_params": [True],
    "tiled_mlp": [True],
    "tiled_mlp_num_shards": [2],
    "reshard_after_forward": [False],
    "attention_backend": ["math", "cpu-flash", "cpu-blocks", "cudnn", "flash"],
    "deterministic_mode": [True],
}
OTHERS = {
    "flash_attention": [True],
    "fp16": [False, True],
    "fsdp_version": [2, 1],
    "fsdp_config": [{"reshard_after_forward": True}, {"offload_parms": True}, 3],
    "load_in_4bit": [True],
    "micro_batch": [2],
    "learning_rte": [0.1],
    "plugins": [["axolotl.integrations.liger.LigerPlugin"], ["my.Plugin"]],
}


def some(table, most, least=0):
    """A mapping of ``least`` to ``most`` of a table's keys, each to one of its values."""
    pairs = st.sampled_from(sorted(table)).flatmap(lambda k: st.tuples(st.just(k), st.sampled_from(table[k])))
    return st.lists(pairs, min_size=least, max_size=most).map(dict)


CONFIGS = st.tuples(
    some(SIZES, 2), some(MODEL, 3), some(LAYOUT, 3), some(BATCH, 3), some(MEMORY, 2), some(OTHERS, 1)
).map(lambda parts: {k: v for part in parts for k, v in part.items()})


def run_of(values):
    """The checked run of a config, or the problems it is refused for."""
    reading = make_config(values)
    assert reading.config is not None
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            return checked(reading, Launch())[0], []
    except UserError as error:
        return None, error.problems


KNOWN = [*names(), *EXTERNAL_NAMES, *MODEL, *LAYOUT, *OTHERS, "parallel sizes"]


@settings(max_examples=1000, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(changes=CONFIGS)
def test_a_thousand_configs_are_taken_or_refused_by_name(prefix, changes):
    _, problems = run_of(tiny.values(prefix, **changes))
    for problem in problems:
        assert any(name in problem for name in KNOWN), problem
        assert problem.strip().endswith((".", ")", "?")), problem
        assert "\n" not in problem


def losses(values, world):
    """Two steps and an evaluation; (losses, held-out loss)."""
    run = Run.of(resolve(make_config(values).config, world).config)
    trainer = Trainer(run, torch.device("cpu"))
    train = [trainer.train_step(batches)["loss"] for batches in trainer.steps_ahead()]
    return train, trainer.evaluate()["loss"] if trainer.valid_data is not None else None


#: what a layout is made of, with the value of one process
ALONE = {name: None for name in LAYOUT} | {"micro_batch_size": 1, "gradient_accumulation_steps": None}


@pytest.mark.slow
def test_thirty_generated_configs_train_as_one_process_does(prefix):
    """Configs that are taken train two steps; the losses are those of one process with the same global batch."""
    done = {"trained": 0, "compared": 0}

    @settings(
        max_examples=400,
        derandomize=True,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        database=None,
    )
    @given(
        st.tuples(some(SIZES, 1), some(MODEL, 1), some(LAYOUT, 3, 1), some(BATCH, 1), some(MEMORY, 1)).map(
            lambda parts: {k: v for part in parts for k, v in part.items()}
        )
    )
    def train(changes):
        if done["trained"] >= 30:
            return
        values = tiny.values(prefix, **{"max_steps": 2, "save_last": False, "export_hf": False} | changes)
        run, _ = run_of(values)
        if run is None or run.sizes.world_size > 4 or run.config.vocab_size < tiny.VOCAB:
            return
        done["trained"] += 1
        many = pool.run(run.sizes.world_size, losses, values, run.sizes.world_size)
        assert all(m == many[0] for m in many), changes
        exact = run.precision.compute_dtype == "float64"
        if run.sizes.world_size == 1 or not exact:
            assert all(torch.isfinite(torch.tensor(many[0][0]))), changes
            return
        done["compared"] += 1
        alone = values | ALONE | {"global_batch_size": run.batch.global_size}
        one = pool.run(1, losses, {k: v for k, v in alone.items() if v is not None}, 1)[0]
        assert many[0][0] == pytest.approx(one[0], rel=1e-9), changes
        if one[1] is not None:
            assert many[0][1] == pytest.approx(one[1], rel=1e-9), changes

    train()
    assert done["trained"] == 30, done
    assert done["compared"] >= 10, done


@pytest.mark.parametrize("number", range(10))
def test_ten_generated_configs_through_the_command_line(prefix, tmp_path, number):
    """Half of them refused: exit code 2, one line a problem, nothing written; the others train."""
    found = []

    @settings(
        max_examples=200,
        derandomize=True,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        database=None,
    )
    @given(CONFIGS)
    def collect(changes):
        values = tiny.values(prefix, **{"max_steps": 1, "output_dir": str(tmp_path / "out")} | changes)
        run, problems = run_of(values)
        if (
            bool(problems) == bool(number % 2)
            and (run is None or run.sizes.world_size <= 2)
            and len(changes) > 1
        ):
            found.append(values)

    collect()
    values = found[number * len(found) // 10]
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(values))
    done = command.run("train", "c.yaml", cwd=tmp_path)
    assert "Traceback" not in done.stderr, (values, done.stderr)
    if number % 2:
        assert done.returncode == 2, (values, done.stderr)
        assert all(line.startswith("longspan: error: ") for line in done.stderr.splitlines()), done.stderr
        assert not (tmp_path / "out").exists()
    else:
        assert done.returncode == 0, (values, done.stderr)
        assert (tmp_path / "out" / "metrics.jsonl").is_file()
