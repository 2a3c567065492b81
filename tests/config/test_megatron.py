"""Megatron's flags: generated from the schema, with Megatron's defaults."""

import pytest

from longspan.config.load import FOREIGN, option_table
from longspan.config.megatron import parse_megatron_flags
from longspan.config.schema import keys, names


def test_flags_become_keys_with_megatrons_defaults():
    reading, defaults = parse_megatron_flags(
        [
            "--tensor-model-parallel-size",
            "2",
            "--context-parallel-size",
            "4",
            "--num-layers",
            "2",
            "--hidden-size",
            "64",
            "--num-attention-heads",
            "4",
            "--seq-length",
            "128",
            "--lr",
            "1e-4",
            "--train-iters",
            "10",
            "--lr-decay-style",
            "cosine",
            "--untie-embeddings-and-output-weights",
            "--clip-grad",
            "0.5",
            "--bf16",
        ]
    )
    config = reading.config
    assert (config.tensor_parallel_size, config.context_parallel_size) == (2, 4)
    assert (config.sequence_len, config.max_steps, config.learning_rate) == (128, 10, 1e-4)
    assert (config.lr_scheduler, config.tie_word_embeddings, config.bf16) == ("cosine", False, True)
    assert (config.seed, config.weight_decay, config.sequence_parallel) == (1234, 0.01, False)
    assert "seed" in defaults
    assert "lr_scheduler" not in defaults


def test_every_key_can_be_given_by_its_flag():
    for k in keys():
        takes_bool = bool in (k.annotation, *getattr(k.annotation, "__args__", ()))
        sample = "true" if takes_bool else "x" if isinstance(k.default, str) else "1"
        reading, _ = parse_megatron_flags([k.flag, sample])
        if reading.problems:  # a value of the wrong kind is named by its key, never as an unknown flag
            assert reading.problems[0].startswith(k.name), reading.problems
        else:
            assert k.name in reading.config.model_fields_set
        for switch, value in k.switches.items():
            reading, _ = parse_megatron_flags([switch])
            assert getattr(reading.config, k.name) == value


def test_mistakes_come_at_once_with_near_misses():
    reading, _ = parse_megatron_flags(["--tensor-model-paralel-size", "2", "--lr", "fast", "stray"])
    assert reading.problems == [
        "--tensor-model-paralel-size: unknown option. Did you mean --tensor-model-parallel-size?",
        "'stray': unexpected argument; values follow their --flag.",
        "learning_rate: 'fast' must be a valid number, unable to parse string as a number.",
    ]


def test_no_name_is_both_a_key_and_something_else():
    spellings = set(option_table()) | set(names())
    assert not spellings & set(FOREIGN)
    for name, fate in FOREIGN.items():
        assert fate.why.endswith((".", ")")), name


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--swiglu"], {"gated_linear_unit": True, "activation_func": "silu"}),
        (["--distributed-timeout-minutes", "30"], {"ddp_timeout": 1800.0}),
        (["--optimizer", "adam"], {"optimizer": "adamw_torch_fused"}),
        (["--finetune"], {"no_load_optim": True, "no_load_rng": True}),
        (["--disable-bias-linear"], {"add_bias_linear": False}),
        (["--use-rotary-position-embeddings"], {"position_embedding_type": "rope"}),
        (["--recompute-activations"], {"gradient_checkpointing": "selective"}),
        (["--data-path", "0.3", "a", "0.7", "b"], {"data_path": ["0.3", "a", "0.7", "b"]}),
        (["--data-path", "a"], {"data_path": ["a"]}),
    ],
)
def test_flags_that_are_said_otherwise_here(flags, expected):
    reading, _ = parse_megatron_flags(flags)
    assert reading.problems == []
    assert {name: getattr(reading.config, name) for name in expected} == expected


def test_flags_without_effect_are_listed_and_others_refused_with_the_way():
    reading, _ = parse_megatron_flags(["--use-flash-attn", "--num-workers", "2", "--seed", "3"])
    assert reading.problems == []
    assert [note.split(":")[0] for note in reading.notes] == ["--use-flash-attn", "--num-workers"]
    reading, _ = parse_megatron_flags(["--fp16", "--rampup-batch-size", "16", "16", "5000", "--seed", "3"])
    assert reading.problems == [
        "--fp16: True is not supported. Use bf16: true, whose range needs no loss scaling.",
        "--rampup-batch-size: [16, 16, 5000] is not supported. The global batch is the same in every step.",
    ]


def test_one_key_given_twice_by_two_names_is_refused():
    reading, _ = parse_megatron_flags(["--lr", "1e-4", "--learning-rate", "2e-4"])
    assert reading.problems == [
        "--learning-rate and --lr are the same key, learning_rate, with two values. Keep one."
    ]


def test_warm_up_and_evaluations_by_megatrons_defaults():
    base = [
        "--num-layers",
        "1",
        "--hidden-size",
        "8",
        "--num-attention-heads",
        "1",
        "--lr",
        "1e-3",
        "--train-iters",
        "4",
    ]

    def schedule(*flags):
        config = parse_megatron_flags([*base, *flags])[0].config
        return config.warmup_steps, config.eval_steps, config.eval_iters

    assert schedule("--mock-data") == (0, 1000, 100)
    assert schedule("--mock-data", "--lr-warmup-fraction", "0.1", "--eval-interval", "7") == (None, 7, 100)
    assert schedule("--mock-data", "--split", "100,0,0") == (0, None, None)
    assert schedule("--train-data-path", "x") == (0, None, None)
    assert schedule("--mock-data", "--eval-iters", "0") == (0, None, 0)
