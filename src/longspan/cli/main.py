"""``longspan``: the command line. Nothing heavy is imported before the command has been read."""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Sequence

from longspan import __version__
from longspan.errors import NotReached, UserError, did_you_mean

#: command -> (module, one line for --help)
COMMANDS = {
    "init": ("longspan.cli.init", "list the bundled examples, or copy one here"),
    "validate": (
        "longspan.cli.validate",
        "check configs: every problem at once, or mesh and batch arithmetic",
    ),
    "config": ("longspan.cli.config", "print a config with every key resolved, or its JSON Schema"),
    "train": ("longspan.cli.train", "train a model as a config says"),
    "pretrain": ("longspan.cli.pretrain", "train by Megatron-LM's flags, as pretrain_gpt.py does"),
    "eval": ("longspan.cli.evaluate", "loss by position and a needle test of a trained model"),
    "generate": ("longspan.cli.generate", "let a trained model write on from a prompt"),
    "prepare": ("longspan.cli.prepare", "tokenise text, jsonl or code into .bin/.idx"),
    "merge": ("longspan.cli.merge", "put .bin/.idx files of a folder together into one"),
    "convert": ("longspan.cli.convert", "between a checkpoint and a Hugging Face folder"),
    "verify": ("longspan.cli.verify", "compare the config's layout with one process: loss, gradients"),
    "profile": ("longspan.cli.profile", "train a few steps and show where time and memory go"),
    "layout": ("longspan.cli.layout", "show who holds and computes what, and what travels, for a pack"),
    "plan": ("longspan.cli.plan", "the memory of a run before it runs: does it fit?"),
    "experts": ("longspan.cli.experts", "show how evenly a run has used its experts"),
    "env": ("longspan.cli.env", "print versions, devices and variables; --check: are these machines sound?"),
    "completion": ("longspan.cli.completion", "print a completion script for bash, zsh or fish"),
}

EPILOG = """\
longspan COMMAND --help   says what a command takes. Start here:
  longspan init quickstart && longspan train quickstart.yaml
  longspan train config.yaml --context-parallel-size 4 --learning-rate 1e-4
Exit codes: 0 success, 1 a negative answer or a failed run, 2 a mistake in what was asked."""


def usage() -> str:
    lines = [
        f"longspan {__version__}: train large language models on long context",
        "",
        "usage: longspan COMMAND ...",
        "",
    ]
    lines += [f"  {name:<10} {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join([*lines, "", EPILOG])


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if arguments else 2
    if arguments[0] in ("-V", "--version"):
        print(__version__)
        return 0
    name = arguments.pop(0)
    try:
        if name not in COMMANDS:
            raise UserError(
                f"{name!r} is no command of longspan.{did_you_mean(name, COMMANDS)} See longspan --help."
            )
        return importlib.import_module(COMMANDS[name][0]).run(arguments)
    except UserError as error:
        report(error, as_json="--json" in arguments)
        return 1 if isinstance(error, NotReached) else 2
    # Example: `longspan train --help | head`.
    except BrokenPipeError:
        sys.stdout = None  # type: ignore[assignment]
        return 0
    # A file cannot be read or written, before a run has started.
    except OSError as error:
        problem = f"{error.filename or ''}: {error.strerror or error}. Check the path and its permissions."
        report(UserError(problem), as_json="--json" in arguments)
        return 2
    except KeyboardInterrupt:
        print("longspan: interrupted", file=sys.stderr)
        return 1


#: seconds that all ranks but the first wait before they report a mistake themselves
FIRST_RANK_TELLS_S = 10.0


def report(error: UserError, as_json: bool = False) -> None:
    """Prints a user's mistakes to stderr, one a line; ``as_json`` also to stdout as ``{"problems": [...]}``.

    Under torchrun every rank finds the same mistake, and torchrun ends all ranks when one has ended. So the
    first rank reports it while the others wait. A rank that still runs then has found another mistake.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("RANK", "0") != "0":
        time.sleep(FIRST_RANK_TELLS_S)
    for problem in error.problems:
        print(f"longspan: error: {problem}", file=sys.stderr, flush=True)
    if as_json:
        print(json.dumps({"problems": error.problems}, indent=2))


if __name__ == "__main__":
    sys.exit(main())
