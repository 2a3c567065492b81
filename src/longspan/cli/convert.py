"""``longspan convert``: converts between a checkpoint and a Hugging Face folder, and merges adapters.

Conversions read one tensor after another, compute nothing and make no process group. The optimizer's
state of a checkpoint is not converted, and a checkpoint made from a Hugging Face folder has none.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from longspan.cli.options import take_options
from longspan.errors import UserError, did_you_mean
from longspan.runs.convert import (
    holds_tokenizer,
    merge_adapters,
    to_checkpoint,
    to_hugging_face,
    tokenizer_of,
)
from longspan.runs.start import quiet_logs

USAGE = """\
usage: longspan convert --checkpoint STEP_FOLDER --output FOLDER [--tokenizer FOLDER] [--dtype float32|bfloat16]
       longspan convert --model HF_FOLDER --output STEP_FOLDER
       longspan convert --lora ADAPTER_FOLDER [--model HF_FOLDER] --output FOLDER [--dtype float32|bfloat16]

The first makes a Hugging Face folder of a checkpoint (of one that holds adapters: a folder in PEFT's format), the second
a checkpoint of a Hugging Face model, to start from with --resume STEP_FOLDER --no-load-optim. The third merges adapters
in PEFT's format into the weights of their base model: a plain Hugging Face folder.
  --model HF_FOLDER   with --lora, the base model (default: the one that the adapters name)
  --tokenizer FOLDER  put this tokenizer beside the weights (default with --lora: the adapters', else the base model's)
  --dtype D           of the written weights (default float32; with --lora the base model's)
"""
OPTIONS = {
    "--checkpoint": True,
    "--model": True,
    "--lora": True,
    "--output": True,
    "--tokenizer": True,
    "--dtype": True,
}
DTYPES = ("float32", "bfloat16")


def run(arguments: Sequence[str]) -> int:
    if not arguments or "--help" in arguments or "-h" in arguments:
        print(USAGE)
        return 0 if arguments else 2
    taken, rest, problems = take_options(arguments, OPTIONS)
    problems += [f"{a}: unknown option.{did_you_mean(a, OPTIONS)}" for a in rest]
    if "--lora" in taken and "--checkpoint" in taken:
        problems.append(
            "--lora takes adapters in PEFT's format: make them with --checkpoint STEP_FOLDER --output FOLDER first."
        )
    elif "--lora" not in taken and ("--checkpoint" in taken) == ("--model" in taken):
        problems.append("give one of --checkpoint STEP_FOLDER and --model HF_FOLDER.")
    if "--output" not in taken:
        problems.append("--output is missing.")
    elif Path(taken["--output"]).exists():
        problems.append(f"--output {taken['--output']} exists. Give a new folder; nothing is overwritten.")
    if "--model" in taken and "--lora" not in taken:
        problems += [
            f"{o} goes with --checkpoint or --lora only." for o in ("--tokenizer", "--dtype") if o in taken
        ]
    if taken.get("--dtype", "float32") not in DTYPES:
        problems.append(f"--dtype {taken['--dtype']!r}: one of {', '.join(DTYPES)}.")
    if "--tokenizer" in taken and not holds_tokenizer(Path(taken["--tokenizer"])):
        problems.append(
            f"--tokenizer {taken['--tokenizer']}: there is no tokenizer.json. Give it, or its folder."
        )
    if problems:
        raise UserError(problems)
    quiet_logs()
    output = Path(taken["--output"])
    tokenizer = Path(taken["--tokenizer"]) if "--tokenizer" in taken else None
    if "--lora" in taken:
        merge_adapters(Path(taken["--lora"]), taken.get("--model"), output, tokenizer, taken.get("--dtype"))
    elif "--checkpoint" in taken:
        from longspan.training.checkpoint import find

        path = find(Path(taken["--checkpoint"]), "--checkpoint")
        tokenizer = tokenizer or tokenizer_of(path)
        to_hugging_face(path, output, tokenizer, taken.get("--dtype", "float32"))
        if not holds_tokenizer(output):
            print("no tokenizer: the run names none that is here. Give --tokenizer.", file=sys.stderr)
    else:
        to_checkpoint(taken["--model"], output)
    print(f"wrote {output}")
    return 0
