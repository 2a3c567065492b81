"""``longspan generate``: continues a prompt with a model folder or a checkpoint, on one process."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from longspan.cli.options import number, positionals, take_options
from longspan.errors import UserError
from longspan.runs.generate import generate, is_checkpoint, of_checkpoint, of_folder

USAGE = """\
usage: longspan generate MODEL [--prompt TEXT] [--max-new-tokens N] [--temperature T] [--seed S] [--special-tokens]
                               [--tokenizer FOLDER]

Writes on from a prompt with a Hugging Face folder such as OUTPUT_DIR/hf, one of adapters in PEFT's format, or a run's
checkpoint: its folder (OUTPUT_DIR, the newest) or OUTPUT_DIR/checkpoints/step_00000100, trained at any layout. Each token
reads the whole text again (there is no key/value cache): good for a look at a model, not for serving.
In front of the prompt stands what training puts in front of a text (BOS), where the tokenizer has it; a prompt that begins
with a special token of its own, such as a chat written out, is taken as it is. Writing ends at the model's end tokens.
  --prompt TEXT       what to start from (default: nothing)
  --max-new-tokens N  default 64
  --temperature T     0 always takes the likeliest token (default 0.8)
  --seed S            of the choice between tokens (default 0)
  --special-tokens    print special tokens too, those put in front and the end token included
  --tokenizer FOLDER  for a checkpoint whose run names no tokenizer
"""
OPTIONS = {
    "--prompt": True,
    "--max-new-tokens": True,
    "--temperature": True,
    "--seed": True,
    "--special-tokens": False,
    "--tokenizer": True,
}


def run(arguments: Sequence[str]) -> int:
    if "--help" in arguments or "-h" in arguments:
        print(USAGE)
        return 0
    taken, rest, problems = take_options(arguments, OPTIONS)
    models = positionals(rest, OPTIONS, problems)
    if len(models) != 1:
        problems.append("longspan generate needs one model folder: longspan generate MODEL --prompt TEXT")
    count = number(taken, "--max-new-tokens", problems) or 64
    seed = number(taken, "--seed", problems, least=0) or 0
    temperature = 0.8
    try:
        temperature = float(taken.get("--temperature", temperature))
    except ValueError:
        problems.append(f"--temperature {taken['--temperature']!r}: a number from 0 on.")
    if temperature < 0:
        problems.append(f"--temperature {temperature}: a number from 0 on.")
    if problems:
        raise UserError(problems)
    with tempfile.TemporaryDirectory() as folder:
        if is_checkpoint(Path(models[0])):
            source = of_checkpoint(Path(models[0]), Path(folder), taken.get("--tokenizer"))
        elif "--tokenizer" in taken:
            raise UserError("--tokenizer goes with a checkpoint; a model folder holds its own. Leave it out.")
        else:
            source = of_folder(models[0])
        special = "--special-tokens" in taken
        print(generate(source, taken.get("--prompt", ""), count, temperature, seed, special))
    return 0
