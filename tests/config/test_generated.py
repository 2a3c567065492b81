"""Generated configs: each is taken, or refused before any process starts by a message that names a key; never a traceback."""

import contextlib
import io
import random
from itertools import islice

import pytest
import torch
import yaml

import command
import pool
import tiny
from longspan.config.dialects.table import EXTERNAL_NAMES
from longspan.config.load import make_config
from longspan.config.resolve import resolve
from longspan.config.run import Run
from longspan.config.schema import names
from longspan.data.checks import check_data
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
    "recurrent_backend": ["torch", "fla", "mamba-ssm", "triton"],
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


#: (table, least, most): how many keys of each table a config has
PARTS = ((SIZES, 0, 2), (MODEL, 0, 3), (LAYOUT, 0, 3), (BATCH, 0, 3), (MEMORY, 0, 2), (OTHERS, 0, 1))


def drawn(count, parts):
    """``count`` mappings of keys to values, the same ones each time."""
    g = random.Random(0)
    for _ in range(count):
        keys = [
            (table, key)
            for table, least, most in parts
            for key in g.sample(sorted(table), g.randint(least, most))
        ]
        yield {key: g.choice(table[key]) for table, key in keys}


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


def test_a_thousand_configs_are_taken_or_refused_by_name(prefix):
    for changes in drawn(1000, PARTS):
        _, problems = run_of(tiny.values(prefix, **changes))
        for problem in problems:
            assert any(name in problem for name in KNOWN), (changes, problem)
            assert problem.strip().endswith((".", ")", "?")), (changes, problem)
            assert "\n" not in problem, (changes, problem)


def losses(values, world):
    """Two steps and an evaluation; (losses, held-out loss)."""
    run = Run.of(resolve(make_config(values).config, world).config)
    trainer = Trainer(run, torch.device("cpu"))
    train = [trainer.train_step(batches)["loss"] for batches in trainer.steps_ahead()]
    return train, trainer.evaluate()["loss"] if trainer.valid_data is not None else None


#: what a layout is made of, with the value of one process
ALONE = {name: None for name in LAYOUT} | {"micro_batch_size": 1, "gradient_accumulation_steps": None}


def taken(prefix, parts):
    """Drawn configs that are taken and need at most four processes, as (changes, values, run); two micro-batches a step."""
    for changes in drawn(2000, parts):
        start = {"max_steps": 2, "save_last": False, "export_hf": False, "val_set_size": 1}
        values = tiny.values(prefix, **start | changes)
        run, _ = run_of(values)
        if run is None or run.sizes.world_size > 4 or run.config.vocab_size < tiny.VOCAB:
            continue
        two = 2 * run.batch.micro * run.sizes.dp
        values |= {"global_batch_size": min(run.batch.global_size, two)}
        run, problems = run_of(values)
        assert run is not None, (changes, problems)
        try:
            check_data(Run.of(run.config))
        except UserError:  # a sample that all ranks together cannot hold
            continue
        yield changes, values, run


@pytest.mark.slow
def test_thirty_generated_configs_train_as_one_process_does(prefix):
    """Configs that are taken train two steps; the losses are those of one process with the same global batch."""
    parts = ((SIZES, 0, 1), (MODEL, 0, 1), (LAYOUT, 1, 3), (BATCH, 0, 1), (MEMORY, 0, 1))
    trained = compared = 0
    for changes, values, run in islice(taken(prefix, parts), 30):
        trained += 1
        many = pool.run(run.sizes.world_size, losses, values, run.sizes.world_size)
        assert all(m == many[0] for m in many), changes
        exact = run.precision.compute_dtype == "float64"
        if run.sizes.world_size == 1 or not exact:
            assert all(torch.isfinite(torch.tensor(many[0][0]))), changes
            continue
        compared += 1
        alone = values | ALONE | {"global_batch_size": run.batch.global_size}
        one = pool.run(1, losses, {k: v for k, v in alone.items() if v is not None}, 1)[0]
        assert many[0][0] == pytest.approx(one[0], rel=1e-9), changes
        if one[1] is not None:
            assert many[0][1] == pytest.approx(one[1], rel=1e-9), changes
    assert trained == 30
    assert compared >= 10, compared


@pytest.fixture(scope="module")
def found(prefix):
    """Configs of at most two processes with at least two changes: those that are taken, and those that are refused."""
    kinds = {False: [], True: []}
    for changes in drawn(200, PARTS):
        values = tiny.values(prefix, **{"max_steps": 1, "output_dir": "out"} | changes)
        run, problems = run_of(values)
        if (run is None or run.sizes.world_size <= 2) and len(changes) > 1:
            kinds[bool(problems)].append(values)
    return kinds


@pytest.mark.parametrize("number", range(10))
def test_ten_generated_configs_through_the_command_line(found, tmp_path, number):
    """Half of them refused: exit code 2, one line a problem, nothing written; the others train."""
    kind = found[bool(number % 2)]
    values = kind[number * len(kind) // 10]
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
