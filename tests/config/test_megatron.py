"""Megatron's flags: generated from the schema, with Megatron's defaults."""

import shlex

import pytest

from longspan.config.dialects.megatron import parse_megatron_flags
from longspan.config.dialects.table import EXTERNAL_NAMES
from longspan.config.options import option_table
from longspan.config.resolve import resolve
from longspan.config.schema import keys, names

NEEDED = [
    *("--num-layers", "2", "--hidden-size", "64", "--num-attention-heads", "4", "--seq-length", "128"),
    *("--max-position-embeddings", "128", "--lr", "1e-3", "--train-iters", "10", "--mock-data"),
    *("--tokenizer-type", "NullTokenizer", "--vocab-size", "500"),
]


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
            left_out = any(note.startswith(f"{k.name}: ") for note in reading.notes)
            assert left_out or k.name in reading.config.model_fields_set
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
    assert not spellings & set(EXTERNAL_NAMES)
    for name, external in EXTERNAL_NAMES.items():
        assert external.why.endswith((".", ")")), name


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--swiglu"], {"gated_linear_unit": True, "activation_func": "silu"}),
        (["--distributed-timeout-minutes", "30"], {"ddp_timeout": 1800.0}),
        (["--optimizer", "adam"], {"optimizer": "adamw_torch_fused"}),
        (["--load", "out", "--finetune"], {"no_load_optim": True, "no_load_rng": True}),
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


@pytest.mark.parametrize(
    ("flags", "idle", "expected"),
    [
        (
            "--split 100,0,0 --eval-interval 1000 --eval-iters 10",
            "eval_steps eval_iters",
            {"eval_steps": None, "eval_iters": None},
        ),
        ("--eval-interval 100 --eval-iters 0", "eval_steps", {"eval_iters": 0}),
        ("--save-interval 0 --eval-interval 0", "eval_steps save_steps", {"save_steps": None}),
        ("--sequence-parallel", "sequence_parallel", {"sequence_parallel": False}),
        (
            "--lr-decay-style constant --lr-decay-iters 9 --min-lr 1e-5",
            "lr_decay_iters min_lr",
            {"min_lr": None, "lr_decay_iters": None},
        ),
        ("--lr-warmup-fraction .01 --lr-warmup-iters 0", "warmup_steps", {"warmup_ratio": 0.01}),
        ("--no-load-optim --no-load-rng", "no_load_optim no_load_rng", {"no_load_optim": False}),
        ("--hierarchical-context-parallel-sizes 1", "hierarchical_context_parallel_sizes", {}),
        ("--wandb-exp-name run", "wandb_name", {"wandb_name": None, "use_wandb": False}),
        ("--wandb-project ''", "wandb_project", {"use_wandb": False}),
    ],
)
def test_leftovers_of_a_launch_script_are_left_out_with_a_line(flags, idle, expected):
    reading, _ = parse_megatron_flags([*NEEDED, *shlex.split(flags)])
    assert reading.problems == []
    assert [note.split(":")[0] for note in reading.notes] == idle.split()
    resolve(reading.config)
    assert {name: getattr(reading.config, name) for name in expected} == expected


def test_what_a_launch_script_asks_for_is_not_taken_for_a_leftover():
    flags = "--split 90,10,0 --eval-interval 7 --eval-iters 3 --lr-decay-style cosine --lr-decay-iters 9 --min-lr 1e-5"
    reading, _ = parse_megatron_flags([*NEEDED, *flags.split(), "--load", "out", "--no-load-optim"])
    assert (reading.problems, reading.notes) == ([], [])
    assert (reading.config.eval_steps, reading.config.eval_iters, reading.config.min_lr) == (7, 3, 1e-5)
    assert reading.config.no_load_optim


#: the flags of published launch scripts that are about this kind of model and machine
SCRIPTS = {
    "GPT-3": "--attention-backend auto --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.95 --init-method-std 0.006 "
    "--clip-grad 1.0 --bf16 --lr-decay-style cosine --min-lr 6.0e-6 --lr-warmup-fraction .001 --lr-decay-iters 430000 "
    "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 1 --split 949,50,1 --log-interval 100 "
    "--save-interval 10000 --eval-interval 1000 --eval-iters 10 --tensorboard-dir logs --save out",
    "Llama": "--use-mcore-models --ffn-hidden-size 224 --group-query-attention --num-query-groups 2 --kv-channels 16 "
    "--position-embedding-type rope --rotary-base 1000000 --rotary-percent 1.0 --attention-dropout 0.0 "
    "--hidden-dropout 0.0 --swiglu --init-method-std 0.0134 --attention-backend fused --apply-layernorm-1p "
    "--untie-embeddings-and-output-weights --disable-bias-linear --lr-decay-style cosine --bf16 --grad-reduce-in-bf16 "
    "--cross-entropy-loss-fusion --calculate-per-token-loss --manual-gc --empty-unused-memory-level 1 "
    "--fp8-amax-history-len 1024 --fp8-amax-compute-algo max --use-distributed-optimizer --overlap-grad-reduce "
    "--overlap-param-gather --tensor-model-parallel-size 1 --context-parallel-size 2 --sequence-parallel "
    "--data-cache-path cache --tiktoken-pattern v2 --split 99,1,0 --no-create-attention-mask-in-dataloader "
    "--no-mmap-bin-files --num-workers 1 --eval-iters 32 --eval-interval 100 --save-interval 1000 --log-throughput "
    "--profile --profile-step-start 4 --profile-step-end 6 --ckpt-format torch_dist --distributed-timeout-minutes 60",
    "Qwen": "--ffn-hidden-size 224 --group-query-attention --num-query-groups 2 --normalization RMSNorm --norm-epsilon 1e-6 "
    "--swiglu --disable-bias-linear --add-qkv-bias --qk-layernorm --use-rotary-position-embeddings --no-rope-fusion "
    "--rotary-base 1000000 --rotary-seq-len-interpolation-factor 1 --untie-embeddings-and-output-weights "
    "--no-load-optim --no-load-rng --log-params-norm --log-num-zeros-in-grad --initial-loss-scale 65536 "
    "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1 --transformer-impl transformer_engine "
    "--no-masked-softmax-fusion --eod-mask-loss --reset-position-ids --reset-attention-mask --split 100,0,0 "
    "--eval-interval 10000 --eval-iters 10 --dataloader-type cyclic --use-flash-attn --no-save-rng --bf16",
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_published_launch_scripts_run(name):
    reading, _ = parse_megatron_flags([*NEEDED, *SCRIPTS[name].split()])
    assert reading.problems == []
    run = resolve(reading.config)
    if name == "Qwen":
        assert run.config.reset_position_ids
        assert not run.config.sample_packing
        assert run.config.log_params_norm
        assert run.config.gradient_checkpointing == "full"


def test_a_pattern_of_layers_may_be_written_as_megatron_does():
    for text, expected in {"([0]*1+[1]*3)": [0, 1, 1, 1], "[0,1]": [0, 1], "2": 2}.items():
        reading, _ = parse_megatron_flags(["--num-experts", "4", "--moe-layer-freq", text])
        assert reading.config.moe_layer_freq == expected
    reading, _ = parse_megatron_flags(["--num-experts", "4", "--moe-layer-freq", "[0]*len('ab')"])
    assert any("moe-layer-freq" in problem or "moe_layer_freq" in problem for problem in reading.problems)
