"""For scripts that were written for Megatron-LM: ``initialize``, ``get_args`` and ``get_timers``.

    args = longspan.initialize(extra_args_provider=add_arguments, args_defaults={"seq_length": 8192})
    model = GPTModel(config, args.vocab_size, args.seq_length)
    timers = longspan.get_timers()

``initialize`` reads Megatron-LM's flags with the same reader and the same rules as ``longspan pretrain``,
makes the groups of ``longspan.parallel_state``, and seeds the random numbers. The model, the data and the
loop are the script's own. So a flag about them is a value that the script reads, or has no effect, and the
model, the learning rate and the data may be missing. This is a leaf for users, as ``parallel_state`` is: no
other module imports it.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy
import torch
import torch.distributed as dist

from longspan import parallel_state
from longspan.cli.main import report
from longspan.cli.options import key_help
from longspan.config.dialects.megatron import parse_megatron_flags
from longspan.config.dialects.megatron_arguments import argument_name, as_arguments
from longspan.config.dialects.megatron_messages import by_flags
from longspan.config.dialects.table import EXTERNAL_NAMES
from longspan.config.load import Reading
from longspan.config.options import option_table
from longspan.config.resolve import complete
from longspan.config.schema import TrainConfig
from longspan.config.sizes import DEFAULT_ORDER, PIPELINE_FIRST
from longspan.errors import UserError, did_you_mean
from longspan.runs.start import Launch, choose_device, launched_world, quiet_logs, under_torchrun
from longspan.tensor_parallel import model_parallel_seed
from longspan.timers import HEADS, LEVELS, Timers

#: keys that a run needs and a script may lack; the three of a model are given together or not at all
_MODEL = ("num_layers", "hidden_size", "num_attention_heads")


class Arguments(argparse.Namespace):
    """The arguments of a script; a missing one is an AttributeError with the nearest name, or the reason."""

    def __getattr__(self, name: str) -> Any:
        if name in EXTERNAL_NAMES and not name.startswith("_"):
            raise AttributeError(
                f"args.{name}: no argument here: {EXTERNAL_NAMES[name].why} If the script itself needs it, add it in "
                "extra_args_provider."
            )
        raise AttributeError(f"args.{name}: unknown argument.{did_you_mean(name, vars(self))}")


class _Script:
    """What ``initialize`` has made; None before."""

    args: Arguments | None = None
    timers: Timers | None = None


_script = _Script()


def initialize(
    extra_args_provider: Callable[[argparse.ArgumentParser], Any] | None = None,
    args_defaults: Mapping[str, Any] | None = None,
    argv: Sequence[str] | None = None,
) -> Arguments:
    """Reads Megatron-LM's flags, makes the process groups and seeds the random numbers, on all ranks.

    The process group is the one that runs, or else that of the launcher (torchrun), or this process alone.
    Rank 0 prints the settings that have no effect here to stderr.

    Args:
        extra_args_provider: gets an ``argparse.ArgumentParser`` and adds the script's own options to it.
        args_defaults: argument -> its value where the flags do not set it. (Megatron-LM ignores such a value
            if the argument has a default of its own, as ``bf16`` has.)
        argv: the flags; None takes those of the command line. Then ``--help`` prints all flags, and a mistake
            is printed and ends the process with exit code 2, without a traceback.

    Returns:
        The arguments, by Megatron-LM's names (``seq_length``, ``lr``, ``train_iters``) and by those of the
        keys (``sequence_len``, ``learning_rate``, ``max_steps``), with those of the provider, ``rank``,
        ``world_size``, ``data_parallel_size`` and ``params_dtype`` (a torch.dtype, bfloat16 with ``--bf16``).

    Raises:
        UserError: flags are unknown or break rules, with all problems at once (only if ``argv`` is given).
        RuntimeError: model parallel groups are installed already.
    """
    if argv is not None:
        return _initialize(extra_args_provider, args_defaults or {}, list(argv))
    try:
        return _initialize(extra_args_provider, args_defaults or {}, sys.argv[1:], prints_help=True)
    except UserError as error:
        report(error)
        raise SystemExit(2) from None


def get_args() -> Arguments:
    """The arguments that :func:`initialize` has read.

    Raises:
        RuntimeError: it has not been called.
    """
    if _script.args is None:
        raise RuntimeError(
            "longspan.get_args(): there are no arguments yet. Call longspan.initialize(...) on every rank first."
        )
    return _script.args


def get_timers() -> Timers:
    """The timers of the script, which :func:`initialize` has made.

    Raises:
        RuntimeError: it has not been called.
    """
    if _script.timers is None:
        raise RuntimeError(
            "longspan.get_timers(): there are no timers yet. Call longspan.initialize(...) on every rank first."
        )
    return _script.timers


def _initialize(
    provider: Callable[[argparse.ArgumentParser], Any] | None,
    defaults: Mapping[str, Any],
    argv: list[str],
    prints_help: bool = False,
) -> Arguments:
    parser = _parser(provider)
    if prints_help and {"--help", "-h"} & set(argv):
        print(key_help(megatron=True) + "\n\nthe script's own:\n" + parser.format_help())
        raise SystemExit(0)
    own, flags, problems = _own_options(parser, defaults, argv)
    others = {name: value for name, value in defaults.items() if name not in _destinations(parser)}
    reading, taken = parse_megatron_flags(flags, _options(parser), others, own_data=True)
    reading.problems[:0] = problems
    try:
        config = _checked(reading)
    except UserError as error:
        raise UserError([by_flags(problem, taken) for problem in error.problems]) from None
    assert own is not None
    _make_groups(config)
    args = Arguments(**as_arguments(config) | vars(own))
    args.rank = dist.get_rank()
    args.params_dtype = torch.bfloat16 if config.bf16 else getattr(torch, config.params_dtype)
    random.seed(config.seed)
    numpy.random.seed(config.seed % 2**32)
    model_parallel_seed(config.seed)
    if reading.notes and args.rank == 0:
        notes = ["without effect here:", *(f"  {by_flags(note)}" for note in reading.notes)]
        print("\n".join(notes), file=sys.stderr)
    _script.args, _script.timers = args, Timers(args.timing_log_level, args.timing_log_option)
    return args


class _Parser(argparse.ArgumentParser):
    """Raises a UserError where argparse prints its usage and ends the process."""

    def error(self, message: str) -> Any:
        raise UserError(f"{message}.")


def _parser(provider: Callable[[argparse.ArgumentParser], Any] | None) -> argparse.ArgumentParser:
    """The parser of the timers' flags and of the script's own options.

    Raises:
        UserError: the script adds an option that is a flag already, or an argument without an option.
    """
    parser = _Parser(add_help=False, allow_abbrev=False, usage=argparse.SUPPRESS)
    timers = parser.add_argument_group("timers (longspan.get_timers)")
    timers.add_argument(
        "--timing-log-level", type=int, choices=LEVELS, default=0, help="timers up to this level are printed"
    )
    timers.add_argument(
        "--timing-log-option",
        choices=list(HEADS),
        default="minmax",
        help="what is printed of all ranks' times",
    )
    timers.add_argument(
        "--no-barrier-with-level-1-timing", action="store_false", dest="barrier_with_L1_time",
        help="args.barrier_with_L1_time, for start(barrier=...), is false",
    )  # fmt: skip
    if provider is None:
        return parser
    try:
        provider(parser)
    except argparse.ArgumentError as error:
        raise UserError(f"extra_args_provider: {error}. Choose another name.") from None
    problems = [
        f"extra_args_provider adds {option}, which is a flag of longspan already. Leave it out, or choose another name."
        for option in _options(parser)
        if argument_name(option) in option_table()
    ]
    problems += [
        f"extra_args_provider adds the positional argument {action.dest!r}, which would take the values of other flags. Make "
        "it an option that begins with --."
        for action in parser._actions
        if not action.option_strings
    ]
    if problems:
        raise UserError(problems)
    return parser


def _options(parser: argparse.ArgumentParser) -> list[str]:
    return [option for action in parser._actions for option in action.option_strings]


def _destinations(parser: argparse.ArgumentParser) -> set[str]:
    return {action.dest for action in parser._actions}


def _own_options(
    parser: argparse.ArgumentParser, defaults: Mapping[str, Any], argv: list[str]
) -> tuple[argparse.Namespace | None, list[str], list[str]]:
    """(the values of the parser's options or None if they are wrong, the other flags, problems)."""
    destinations = _destinations(parser)
    parser.set_defaults(**{name: value for name, value in defaults.items() if name in destinations})
    try:
        own, flags = parser.parse_known_args(argv)
        return own, flags, []
    except UserError as error:
        return None, _without(argv, set(_options(parser))), error.problems


def _without(argv: Sequence[str], options: set[str]) -> list[str]:
    """The arguments without some options and the values that follow them."""
    rest, skipping = [], False
    for argument in argv:
        if argument.startswith("--"):
            skipping = argument.partition("=")[0] in options
        if not skipping:
            rest.append(argument)
    return rest


def _checked(reading: Reading) -> TrainConfig:
    """The complete config of the processes that there are.

    Raises:
        UserError: with all problems.
    """
    config, bad, problems = reading.config, set(reading.bad), reading.problems
    if config is None:
        raise UserError(problems)
    if config.base_model is None and all(getattr(config, name) is None for name in _MODEL):
        bad |= set(_MODEL)
    if config.learning_rate is None:
        bad.add("learning_rate")
    device, world = "cpu", 1
    try:
        if dist.is_initialized():
            world = dist.get_world_size()
        elif under_torchrun():
            world = launched_world()
        device, _ = choose_device(config, Launch(processes=world))
    except UserError as error:
        problems = [*problems, *error.problems]
    return complete(config, world, device=device, bad_keys=bad, earlier=problems)


def _make_groups(config: TrainConfig) -> None:
    quiet_logs()
    virtual = config.virtual_pipeline_parallel_size or 1
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.tensor_parallel_size,
        pipeline_model_parallel_size=config.pipeline_parallel_size,
        virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
        context_parallel_size=config.context_parallel_size,
        hierarchical_context_parallel_sizes=config.hierarchical_context_parallel_sizes,
        expert_model_parallel_size=config.expert_parallel_size,
        expert_tensor_parallel_size=config.expert_tensor_parallel_size,
        data_parallel_replicate_size=config.dp_replicate_size,
        device_type=config.device,
        distributed_timeout_minutes=config.ddp_timeout / 60,
        order=PIPELINE_FIRST if config.use_tp_pp_dp_mapping else DEFAULT_ORDER,
    )
