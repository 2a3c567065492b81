"""``longspan train``: checks the config, tokenises the data, starts the processes and trains."""

from __future__ import annotations

from collections.abc import Sequence

from longspan.cli.launch import HELP, OPTIONS, read_launch, split_at_dashes
from longspan.cli.options import key_help, read_config, take_options
from longspan.config.run import Checked
from longspan.runs.check import checked
from longspan.runs.start import WORKER, Launch, read_run
from longspan.runs.train import join, start_or_join

USAGE = f"""\
usage: longspan train CONFIG [--any-key value] [launcher options] [--launcher torchrun -- torchrun arguments]

Checks the config, tokenises its datasets, starts the processes and trains. Under torchrun it joins.
{HELP}"""


def run(arguments: Sequence[str]) -> int:
    if "--help" in arguments or "-h" in arguments:
        print(USAGE)
        print(key_help())
        return 0
    if WORKER in arguments:
        return join(read_run(arguments[0]))
    return start_or_join(*read_checked("train", arguments))


def read_checked(
    command: str,
    arguments: Sequence[str],
    more_options: dict[str, bool] | None = None,
    taken: dict[str, str] | None = None,
) -> tuple[Checked, Launch]:
    """Reads config, overrides and launcher options, and checks all rules.

    Args:
        more_options: the command's own options -> whether a value follows.
        taken: is filled with the options that were taken: the command's own and the launcher's.

    Raises:
        UserError: with all problems at once.
    """
    arguments, torchrun_arguments = split_at_dashes(arguments)
    own = OPTIONS | (more_options or {})
    options, rest, problems = take_options(arguments, own)
    if taken is not None:
        taken.update(options)
    launch = read_launch(options, torchrun_arguments, problems)
    return checked(read_config(command, rest, list(own), problems), launch)
