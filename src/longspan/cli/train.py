"""``longspan train``: check, tokenise, start the processes, train."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longspan.cli.environment import without_effect
from longspan.cli.launch import (
    HELP,
    OPTIONS,
    Launch,
    choose_device,
    launcher,
    read_launch,
    start,
    under_torchrun,
)
from longspan.cli.options import key_help, read_config, take_options
from longspan.cli.prepare import check_weights, prepare_config
from longspan.config.architecture import unused_fields
from longspan.config.data_rules import PATHS, read_blend
from longspan.config.load import Reading, to_yaml
from longspan.config.resolve import Run, resolve
from longspan.config.schema import DatasetConfig, TrainConfig
from longspan.errors import UserError
from longspan.parent import end_with_parent
from longspan.training.lock import CONFIG, hold, unwritable

if TYPE_CHECKING:
    import torch

USAGE = f"""\
usage: longspan train CONFIG [--any-key value] [launcher options] [--launcher torchrun -- torchrun arguments]

Checks the config, tokenises its datasets, starts the processes and trains. Under torchrun it joins.
{HELP}"""


def run(arguments: Sequence[str]) -> int:
    if "--help" in arguments or "-h" in arguments:
        print(USAGE)
        print(key_help())
        return 0
    return start_or_join(*read_run("train", arguments))


def start_or_join(resolved: Run, launch: Launch, device: str) -> int:
    """Trains in this process where a launcher started it or one is enough; else starts the processes."""
    alone = resolved.world_size == 1 and launch.machines == 1 and not launch.torchrun_arguments
    if under_torchrun() or alone:
        return join(resolved, device)
    output = Path(resolved.config.output_dir)
    # of the launchers of a job the first holds the folder that they may share; among torchrun's the first rank does
    first = launch.machine_rank == 0 and not launch.torchrun_arguments
    with ExitStack() as until_the_end:
        lock = until_the_end.enter_context(claim(output)) if first else None
        config = prepared(resolved, show=True)
        if first:
            path = write_config(config, output)
        else:
            path = Path(until_the_end.enter_context(tempfile.TemporaryDirectory())) / CONFIG
            path.write_text(to_yaml(config), encoding="utf-8")
        # the ranks hold the lock too: it lasts as long as any process that can write
        kept = [] if lock is None else [lock]
        return start(launch, resolved.world_size, ["train", str(path)], device, kept)


def read_run(command: str, arguments: Sequence[str], more_options: dict[str, bool] | None = None, taken=None):
    """Reads config, overrides and launcher options, and checks all rules.

    Returns:
        (Run, Launch, device type). ``taken`` (a dict) receives the command's own options.

    Raises:
        UserError: with all problems at once.
    """
    arguments, torchrun_arguments = _split_at_dashes(list(arguments))
    own = OPTIONS | (more_options or {})
    options, rest, problems = take_options(arguments, own)
    if taken is not None:
        taken.update(options)
    launch = read_launch(options, torchrun_arguments, problems)
    return checked(read_config(command, rest, list(own), problems), launch)


def checked(reading: Reading, launch: Launch, announce: str = "") -> tuple[Run, Launch, str]:
    """What was read with every rule checked, and the device and the arithmetic filled in; says what has no effect.

    Args:
        announce: is said too, when all is well.

    Raises:
        UserError: with all problems at once.
    """
    config, problems, bad = reading.config, reading.problems, reading.bad
    assert config is not None
    world = launch.processes
    try:
        device, world = choose_device(config, launch)
    except UserError as error:
        problems += error.problems
        device = "cpu"
    problems += missing_sources(config) if "datasets" not in bad else []
    resolved = resolve(config, world, bad_keys=bad, earlier=problems)
    if config.base_model is not None and config.rope_scaling is None:
        reading.notes += unused_fields(config.base_model)
    bf16 = device == "cuda" and config.params_dtype == "float32" if config.bf16 == "auto" else config.bf16
    compiled = config.torch_compile
    if compiled == "auto":
        compiled = device == "cuda" and not config.deterministic_mode
    if compiled:
        import torch

        from longspan.compiled import check_compiler

        try:
            check_compiler(torch.device(device))
        except UserError as error:
            if config.torch_compile is True:
                raise
            compiled = False
            reading.notes.append(f"torch_compile: auto compiles nothing on this machine: {error}")
    final = resolved.config.model_copy(
        update={
            "device": device,
            "bf16": bf16,
            "torch_compile": compiled,
            "micro_batch_size": resolved.micro_batch_size,
            "gradient_accumulation_steps": resolved.accumulation,
            "global_batch_size": resolved.global_batch_size,
            "dp_shard_size": resolved.sizes.dp_shard,
            # off is off; without tensor parallelism the key has nothing to say
            "sequence_parallel": resolved.sequence_parallel if resolved.sizes.tp > 1 else None,
        }
    )
    final_run = resolve(final, resolved.world_size)
    found = [*reading.notes, *without_effect(os.environ, device, joined=under_torchrun())]
    notes = ["without effect here:", *(f"  {note}" for note in found)] if found else []
    if (notes or announce) and os.environ.get("RANK", "0") == "0":
        print("\n".join([announce, *notes] if announce else notes), file=sys.stderr)
    if final.attention_backend != "auto":
        check_backend(final_run, device)
    return final_run, launch, device


def check_backend(run: Run, device: str) -> None:
    """Refuses an attention backend that cannot serve this run (UserError)."""
    import torch

    from longspan.context_parallel.kernels import select_kernel

    dtype = torch.bfloat16 if run.config.bf16 is True else getattr(torch, run.config.params_dtype)
    head_dim = run.transformer_config().kv_channels
    select_kernel(
        torch.device(device), dtype, head_dim, run.config.attention_backend, run.config.deterministic_mode
    )


def missing_sources(config) -> list[str]:
    """Datasets that are not there, found before anything is tokenised or started."""
    from longspan.data.sources import check_source

    problems = []
    for name in PATHS:
        try:
            for member in read_blend(name, values) if (values := getattr(config, name)) else []:
                problems += [f"{name}: {problem}" for problem in missing_files(member.path)]
        except UserError:  # the blend itself is wrong: the rules between keys say so
            continue
    for source in [*config.datasets, *config.test_datasets]:
        stem = source.path[:-4] if source.path.endswith((".bin", ".idx")) else source.path
        if source.prepared:
            continue
        if any(Path(stem + suffix).exists() for suffix in (".bin", ".idx")):
            problems += unused_of_tokens(source)
            continue
        try:
            check_source(source)
        except UserError as error:
            problems += [f"datasets: {problem}" for problem in error.problems]
    return problems


def unused_of_tokens(source: DatasetConfig) -> list[str]:
    """Keys that say which records and texts to read, where there are tokens."""
    given = [
        name
        for name in ("split", "field", "name", "data_files", "ds_type", "revision")
        if getattr(source, name) != DatasetConfig.model_fields[name].default
    ]
    text = "{}: {} has no effect on token files, which are taken whole (val_set_size holds documents out). Leave it out."
    return [f"datasets: {text.format(source.path, name)}" for name in given]


def missing_files(prefix: str) -> list[str]:
    """What is not there of a .bin/.idx pair."""
    from longspan.data.indexed import bin_and_idx, missing_file

    missing = next((path for path in reversed(bin_and_idx(prefix)) if not path.is_file()), None)
    if missing is None:
        return []
    if Path(prefix).is_file():  # it has neither ending, or its own half would be there
        return [
            f"{prefix} is no .bin/.idx pair. Make one: longspan prepare --input {prefix} --output-prefix PREFIX, or train on "
            "it by datasets."
        ]
    return [missing_file(missing)]


WRITTEN_BY = "# written by longspan"


def claim(output: Path) -> AbstractContextManager[int | None]:
    """Holds a run's folder, as :func:`longspan.training.lock.hold` does; one with a foreign config.yaml is refused."""
    path = output / CONFIG
    try:
        foreign = path.is_file() and not path.read_text(encoding="utf-8").startswith(WRITTEN_BY)
    except OSError as error:
        raise unwritable(output, error) from None
    if foreign:
        raise UserError(
            f"output_dir {output}: there is a config.yaml that longspan did not write. Choose another output_dir; nothing "
            "is overwritten."
        )
    return hold(output)


def write_config(config, output: Path) -> Path:
    from longspan.training.checkpoint import write_atomically

    path = output / CONFIG
    try:
        write_atomically(path, f"{WRITTEN_BY}; every key resolved\n{to_yaml(config)}")
    except OSError as error:
        raise unwritable(output, error) from None
    return path


def join(resolved: Run, device_type: str) -> int:
    """Trains as one rank of the world (or as the whole world, when it is one process)."""
    started_by, alone = launcher(), resolved.world_size == 1 and not under_torchrun()
    end_with_launcher()
    import torch
    import torch.distributed as dist

    from longspan.mesh.mesh import close_distributed, init_distributed
    from longspan.training.session import leave, train
    from longspan.training.stopping import Stopping

    quiet_logs()
    local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if device_type == "cpu":
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_processes))
    local_rank, output = int(os.environ.get("LOCAL_RANK", "0")), Path(resolved.config.output_dir)
    with ExitStack() as until_the_end:

        def hold() -> None:
            until_the_end.enter_context(claim(output))

        config = None
        if alone:
            hold()
            config = prepared(resolved, show=True)
        first = os.environ.get("RANK", "0") == "0"
        stopping = until_the_end.enter_context(Stopping(speaks=first, second_ends=started_by is None))
        try:
            init_distributed(device_type, resolved.config.ddp_timeout)
            if config is None:
                config = prepared_together(resolved, local_rank, hold if started_by is None else None)
            device = torch.device(device_type, local_rank) if device_type == "cuda" else torch.device("cpu")
            if dist.get_rank() == 0:
                write_config(config, output)
            code = train(resolve(config, resolved.world_size), device, stopping)
            close_distributed()
        except RuntimeError as error:
            leave(error, output, resolved.config.ddp_timeout)
    return code


def end_with_launcher() -> None:
    """Has this process end with the launcher that started it, longspan or torchrun; a shell that did may go."""
    if launcher() is not None or (under_torchrun() and "TORCHELASTIC_RUN_ID" in os.environ):
        end_with_parent(launcher())


@contextmanager
def joined(config: TrainConfig, device_type: str) -> Iterator[torch.device]:
    """The process group of a launched process that finds its config ready; gives the device it computes on.

    An error ends the process with a message, as in training.
    """
    end_with_launcher()
    import torch

    from longspan.mesh.mesh import close_distributed, init_distributed
    from longspan.training.session import leave

    quiet_logs()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    try:
        init_distributed(device_type, config.ddp_timeout)
        local = int(os.environ["LOCAL_RANK"]) if device_type == "cuda" else None
        yield torch.device(device_type, local) if local is not None else torch.device("cpu")
        close_distributed()
    except RuntimeError as error:
        leave(error, Path(config.output_dir), config.ddp_timeout)


def resume_point(run: Run, show: bool = True) -> str | None:
    """The checkpoint ``resume`` stands for, checked against the config before anything starts.

    Args:
        show: print which checkpoint was taken instead of another, and one without checksums.

    Raises:
        UserError: there is none, it is not whole, or it is of another model, batch or data.
    """
    config = run.config
    if config.resume is None:
        if config.no_load_optim or config.no_load_rng:
            raise UserError(
                "no_load_optim and no_load_rng say what to leave out of a resume: give resume too."
            )
        return None
    from longspan.training.checkpoint import check_fits, find, newest, refuse_megatron
    from longspan.training.checkpoint_folder import to_stderr
    from longspan.training.loop import describe_run, open_datasets

    given = Path(config.resume)
    look: dict[str, Any] = {
        "verify": config.verify_checkpoint,
        "say": to_stderr if show else (lambda line: None),
    }
    if config.resume == "auto":
        path = newest(Path(config.output_dir) / "checkpoints", **look)
    elif config.exit_on_missing_checkpoint or given.name.startswith("step_"):
        path = find(given, **look)
    else:
        refuse_megatron(given)
        path = newest(given, **look) or newest(given / "checkpoints", **look)
    if path is None:
        return None
    check_fits(path, describe_run(run, open_datasets(run)[0]), weights_only=config.no_load_optim)
    return str(path)


def prepared(resolved: Run, show: bool) -> TrainConfig:
    """The config with its data tokenised and checked, and its checkpoint found."""
    from longspan.training.export import check_export
    from longspan.training.loop import check_data

    config = prepare_config(resolved.config, show=show)
    checked = resolve(config, resolved.world_size)
    check_data(checked)
    check_weights(checked)
    check_export(checked)
    if config.use_tensorboard and config.tensorboard_dir is not None:
        try:
            Path(config.tensorboard_dir).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unwritable(Path(config.tensorboard_dir), error, "tensorboard_dir") from None
    resume = resume_point(checked, show)
    if resume is None and config.resume is not None:
        if show and config.resume != "auto":
            print(f"no checkpoint at {config.resume}: the run starts anew", file=sys.stderr)
        return config.model_copy(update={"resume": None, "no_load_optim": False, "no_load_rng": False})
    return config.model_copy(update={"resume": resume})


def prepared_together(resolved: Run, local_rank: int, hold: Callable[[], None] | None = None) -> TrainConfig:
    """One process a machine does :func:`prepared`; the others wait for it, for as long as it takes, and take its config.

    Args:
        hold: takes the run's folder, on the first rank; None where the launcher has it.
    """
    import datetime

    import torch.distributed as dist

    from longspan.mesh.mesh import close_distributed

    waiting = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=1))
    config, problems = None, []
    if local_rank == 0:
        try:
            if hold is not None and dist.get_rank() == 0:
                hold()
            # a launcher of ours has shown what there is to see
            config = prepared(resolved, show=hold is not None and dist.get_rank() == 0)
        except UserError as error:
            problems = error.problems
    found: list = [None] * dist.get_world_size()
    dist.all_gather_object(found, (config, problems), group=waiting)
    dist.destroy_process_group(waiting)
    if trouble := [problem for _, problems in found for problem in problems]:
        close_distributed()
        raise UserError(dict.fromkeys(trouble))  # the first rank tells
    return found[dist.get_rank() - local_rank][0]


def quiet_logs() -> None:
    """Hides what torch says to its own developers; errors stay."""
    import logging
    import warnings

    for name in (
        "torch.distributed.tensor._redistribute",
        "torch.distributed.device_mesh",
        "torch.distributed.fsdp",
    ):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")


def _split_at_dashes(arguments: list[str]) -> tuple[list[str], list[str]]:
    if "--" not in arguments:
        return arguments, []
    at = arguments.index("--")
    return arguments[:at], arguments[at + 1 :]
