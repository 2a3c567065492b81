"""``longspan pretrain`` and ``pretrain_gpt.py``: training with Megatron-LM's flags and defaults only."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from longspan.cli.launch import HELP, OPTIONS, read_launch
from longspan.cli.options import key_help, take_options
from longspan.config.dialects.megatron import parse_megatron_flags
from longspan.config.dialects.megatron_messages import as_flag, by_flags
from longspan.config.schema import keys
from longspan.errors import UserError
from longspan.runs.check import checked
from longspan.runs.train import start_or_join

USAGE = f"""\
usage: torchrun --nproc-per-node N pretrain_gpt.py FLAGS
       longspan pretrain FLAGS [launcher options]

Trains by Megatron-LM's flags, with Megatron-LM's defaults: LayerNorm, GELU, biases and learned positions unless
--normalization RMSNorm --swiglu --disable-bias-linear --position-embedding-type rope say otherwise. Data: --data-path
PREFIX of .bin/.idx (longspan prepare makes them), or --mock-data. Dropout is 0.
{HELP}"""


def run(arguments: Sequence[str]) -> int:
    if "--help" in arguments or "-h" in arguments:
        print(USAGE)
        print(key_help(megatron=True))
        return 0
    options, rest, problems = take_options(arguments, OPTIONS)
    launch = read_launch(options, [], problems)
    reading, defaults = parse_megatron_flags(rest, list(OPTIONS))
    reading.problems[:0] = problems
    reading.notes = [by_flags(note) for note in reading.notes]
    try:
        if reading.config is None:
            raise UserError(reading.problems)
        return start_or_join(*checked(reading, launch, announce=announcement(defaults)))
    except UserError as error:
        raise UserError([by_flags(problem, defaults) for problem in error.problems]) from None


def announcement(defaults: dict[str, object]) -> str:
    """The line that lists the defaults of Megatron-LM, and states that dropout is not among them."""
    taken = ", ".join(as_flag(k, defaults[k.name]) for k in keys() if k.name in defaults)
    return f"Megatron-LM's defaults taken: {taken}\ndropout: 0 (Megatron-LM's default is 0.1)"


def main() -> int:
    """The entry point of ``pretrain_gpt.py``."""
    from longspan.cli.main import main as longspan

    return longspan(["pretrain", *sys.argv[1:]])
