"""Messages at Megatron's entry point: flags in a flag's syntax, and nothing about what nobody gave."""

import re
import shlex

from longspan.cli.main import main
from longspan.config.dialects.megatron import parse_megatron_flags
from longspan.config.dialects.megatron_messages import as_flag, by_flags
from longspan.config.resolve import resolve
from longspan.config.schema import keys
from longspan.errors import UserError

NEEDED = (
    "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 128 --max-position-embeddings 128 --lr 1e-3 "
    "--train-iters 10 --mock-data --tokenizer-type NullTokenizer --vocab-size 500"
)
#: command lines with a mistake -> what the message begins with
MISTAKES = {
    "--micro-batch-size 3 --global-batch-size 16": "--global-batch-size 16 is not a multiple of --micro-batch-size 3 x dp 1 = 3",
    "--global-batch-size 0": "--global-batch-size 0 must be greater than or equal to 1.",
    "--hidden-size 65": "--hidden-size 65 is not divisible by --num-attention-heads 4",
    "--num-query-groups 3": "",
    "--lr fast": "--lr 'fast' must be a valid number",
    "--min-lr 1": "--min-lr 1 is above --lr 0.001",
    "--seq-length 256": "--seq-length 256 is larger than --max-position-embeddings 128",
    "--seq-length 0100": "--seq-length '0100' is ambiguous",
    "--cp-comm-type ring": "",
    "--context-parallel-size 2 --cp-comm-type a2a+p2p": "",
    "--hybrid-context-parallel": "--hybrid-context-parallel needs --max-seqlen-per-dp-cp-rank",
    "--max-seqlen-per-dp-cp-rank 5": "--max-seqlen-per-dp-cp-rank 5 has no effect without --hybrid-context-parallel",
    "--pipeline-model-parallel-size 2 --pipeline-schedule 1f1b": "--pipeline-schedule 1f1b with 1 micro-batches",
    "--expert-model-parallel-size 2": "--expert-model-parallel-size 2",
    "--num-experts 4 --expert-model-parallel-size 3": "--num-experts 4 is not divisible by --expert-model-parallel-size 3",
    "--num-experts 4 --moe-router-topk 5": "--moe-router-topk 5 is more than --num-experts 4",
    "--fp16": "--fp16 is not supported. Use --bf16",
    "--attention-dropout 0.1": "--attention-dropout",
    "--lr-decay-style WSD": "--lr-decay-style 'WSD' must be",
    "--optimizer sgd": "--optimizer 'sgd' must be",
    "--split 1,x": "--split '1,x'",
    "--split 0,1,1": "--split '0,1,1'",
    "--data-path a b": "--data-path and --mock-data are given",
    "--valid-data-path x": "--valid-data-path goes with --train-data-path",
    "--train-data-path a --split 9,1,0": "",
    "--vocab-file v": "--vocab-file without --merge-file",
    "--tokenizer-type GPT2BPETokenizer": "--tokenizer-type GPT2BPETokenizer needs --vocab-file and --merge-file",
    "--tokenizer-type Llama2Tokenizer": "--tokenizer-type",
    "--tokenizer-model ''": "--tokenizer-model '' must not be empty",
    "--sample-packing --reset-position-ids": "--reset-position-ids is for the stream of documents (--no-sample-packing)",
    "--eod-token-id 3": "--eod-token-id 3 has no effect without --reset-position-ids, --reset-attention-mask",
    "--use-rope-scaling": "--rope-scaling has no effect with --position-embedding-type learned_absolute",
    "--adapter lora --lora-r 4": "",
    "--lora-r 4": "--lora-r",
    "--tiled-mlp-num-shards 3": "--tiled-mlp-num-shards 3 has no effect without --tiled-mlp.",
    "--params-dtype float64 --bf16": "--bf16 with --params-dtype float64. Use float32, or --no-bf16.",
    "--params-dtype bf16": "--params-dtype",
    "--tf32 --params-dtype float64": "--tf32 with --params-dtype float64",
    "--recompute-granularity some": "--recompute-granularity",
    "--recompute-granularity offload --activation-offloading": "--recompute-granularity offload",
    "--warmup-steps 3 --warmup-ratio 0.1": "--lr-warmup-iters and --lr-warmup-fraction are both given",
    "--eval-max-samples 3 --eval-iters 2": "--eval-iters and --eval-max-samples are both given",
    "--lr-warmup-iters 3 --lr-warmup-iters 4 --warmup-steps 5": "",
    "--save-interval 2.5": "--save-interval 2.5",
    "--special-tokens '{eos: x}'": "",
    "--chat-template jinja": "--chat-template jinja needs --chat-template-jinja",
    "--reinit-weights": "--reinit-weights without --base-model",
    "--sliding-window 0": "",
    "--rotary-percent 1.5": "--rotary-percent",
    "--lr 1 --learning-rate 2": "",
    "--seed -1": "--seed -1 must be greater than or equal to 0",
}


def messages(flags):
    reading, defaults = parse_megatron_flags(shlex.split(f"{NEEDED} {flags}"))
    try:
        if reading.config is None:
            raise UserError(reading.problems)
        resolve(reading.config, bad_keys=reading.bad, earlier=reading.problems)
    except UserError as error:
        return [by_flags(problem, defaults) for problem in error.problems]
    return []


def names_a_key(message):
    """Whether a message names a key by its YAML name, or writes ``flag: value`` as YAML has it."""
    for k in keys():
        if "_" in k.name and re.search(rf"(?<![\w-]){k.name}(?![\w-])", message):
            return True
        if re.search(rf"(?<![\w-]){k.name}: (true|false|\d)", message):
            return True
    return re.search(r"--[a-z0-9-]+: (true|false|True|\d|'|\[)", message) is not None


def test_no_message_names_a_key_as_yaml_does():
    wrong = {}
    for flags, beginning in MISTAKES.items():
        found = messages(flags)
        if not found or not found[0].startswith(beginning) or any(map(names_a_key, found)):
            wrong[flags] = found
    assert not wrong


def test_what_nobody_gave_is_named_as_a_default_or_not_at_all():
    (message,) = messages("--use-rope-scaling")
    assert message.endswith("(--position-embedding-type learned_absolute is Megatron-LM's default.)")
    (message,) = messages("--micro-batch-size 3 --global-batch-size 16")
    assert "accumulation" not in message
    reading, defaults = parse_megatron_flags([])
    try:
        resolve(reading.config, earlier=reading.problems)
    except UserError as error:
        found = [by_flags(problem, defaults) for problem in error.problems]
    assert [text.split(":")[0] for text in found] == [
        "--num-layers, --hidden-size, --num-attention-heads",
        "--lr",
        "--data-path",
    ]


def test_validate_and_pretrain_have_one_text(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    arguments = [
        *NEEDED.split(),
        "--micro-batch-size",
        "3",
        "--global-batch-size",
        "16",
        "--bf16",
        "--fp8-format",
        "e4m3",
    ]
    assert main(["validate", "--megatron", *arguments]) == 2
    first = capsys.readouterr().err
    assert main(["pretrain", *arguments]) == 2
    assert capsys.readouterr().err == first
    assert "--micro-batch-size 3 x dp 1" in first
    assert main(["validate", "--megatron", *NEEDED.split(), "--split", "1,0,0", "--eval-interval", "9"]) == 0
    assert "--eval-interval: Nothing is held out, so nothing is evaluated." in capsys.readouterr().out


def test_values_as_a_flag_takes_them():
    table = {k.name: k for k in keys()}
    assert as_flag(table["add_bias_linear"], False) == "--disable-bias-linear"
    assert as_flag(table["sample_packing"], False) == "--no-sample-packing"
    assert as_flag(table["sequence_len"], 8) == "--seq-length 8"
    assert as_flag(table["bf16"], True) == "--bf16"
