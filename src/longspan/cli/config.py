"""``longspan config CONFIG``: prints the config with every key.

``--schema`` prints a config's JSON Schema, ``--markdown`` a page of all keys.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from longspan.cli.options import key_help, number, read_config, take_options
from longspan.cli.reference import markdown
from longspan.config.load import to_yaml
from longspan.config.resolve import complete
from longspan.config.schema import TrainConfig
from longspan.errors import UserError

USAGE = """\
usage: longspan config CONFIG [--any-key value] [--num-processes N] [--json]
       longspan config --schema | --markdown

Prints the config with defaults filled in and the batch arithmetic done, or every problem it has.
  --num-processes N  processes to check the parallel sizes against
  --json             JSON instead of YAML
  --schema           the JSON Schema of a config, for editors
  --markdown         a page of all keys with their types, defaults and other names: docs/keys.md
"""
OPTIONS = {"--schema": False, "--markdown": False, "--json": False, "--num-processes": True}


def run(arguments: Sequence[str]) -> int:
    if "--help" in arguments or "-h" in arguments:
        print(USAGE)
        print(key_help())
        return 0
    taken, rest, problems = take_options(arguments, OPTIONS)
    if alone := [option for option in ("--schema", "--markdown") if option in taken]:
        others = [*rest, *(option for option in taken if option != alone[0])]
        if others or problems:
            raise UserError([*problems, *(f"{a!r}: {alone[0]} takes nothing else." for a in others)])
        print(
            json.dumps(TrainConfig.model_json_schema(), indent=2)
            if alone[0] == "--schema"
            else markdown().rstrip()
        )
        return 0
    reading = read_config("config", rest, list(OPTIONS), problems)
    world = number(taken, "--num-processes", reading.problems)
    assert reading.config is not None
    # Nothing is trained here, so the learning rate may be missing.
    unsaid = {"learning_rate"} if reading.config.learning_rate is None else set()
    config = complete(reading.config, world, bad_keys=reading.bad | unsaid, earlier=reading.problems)
    # These keys follow from the machine that trains, which may be another machine.
    open_keys = ("device", "bf16", "tf32", "torch_compile")
    config = config.model_copy(update={name: getattr(reading.config, name) for name in open_keys})
    print(json.dumps(config.model_dump(), indent=2) if "--json" in taken else to_yaml(config), end="")
    return 0
