"""Megatron's flags: generated from the schema, with Megatron's defaults."""

import contextlib

import pytest

from longspan.config.megatron import parse_megatron_flags
from longspan.config.schema import keys
from longspan.errors import UserError


def test_flags_become_keys_with_megatrons_defaults():
    config, defaults = parse_megatron_flags(
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
        given = [k.flag, sample] if k.takes_value else [k.flag]
        with contextlib.suppress(UserError):
            config, _ = parse_megatron_flags(given)
            assert k.name in config.model_fields_set
            continue
        # a value of the wrong kind is named by its key, never as an unknown flag
        with pytest.raises(UserError, match=f"^{k.name}"):
            parse_megatron_flags(given)


def test_mistakes_come_at_once_with_near_misses():
    with pytest.raises(UserError) as caught:
        parse_megatron_flags(["--tensor-model-paralel-size", "2", "--lr", "fast", "stray"])
    assert caught.value.problems == [
        "--tensor-model-paralel-size: unknown option. Did you mean --tensor-model-parallel-size?",
        "'stray': unexpected argument; values follow their --flag.",
        "learning_rate: 'fast' must be a valid number, unable to parse string as a number.",
    ]
