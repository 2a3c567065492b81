"""A training from a Checked to its end: locks the run's folder, and starts the processes or joins them."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

from longspan.config.load import to_yaml
from longspan.config.run import Checked, Run
from longspan.config.schema import TrainConfig
from longspan.errors import UserError
from longspan.files import remove_partial, write_whole
from longspan.parent import parent_since
from longspan.runs.notes import Failure
from longspan.runs.prepare import prepare
from longspan.runs.restarts import Restarts
from longspan.runs.start import (
    START_S,
    WORKER,
    Launch,
    end_with_launcher,
    launcher,
    own_notes,
    quiet_logs,
    restart_count,
    start,
    under_torchrun,
)
from longspan.training.lock import CONFIG, hold, launch_of, unwritable
from longspan.training.stopping import SAVES, handling

WRITTEN_BY = "# written by longspan"


def start_or_join(checked: Checked, launch: Launch) -> int:
    """Trains in this process if a launcher started it or if one process is enough; else starts the processes.

    Returns:
        The exit code.
    """
    # The signal that saves a run has nothing to save before that, and would end a process that does not handle it.
    with handling([SAVES], signal.SIG_IGN):
        return _start_or_join(checked, launch)


def _start_or_join(checked: Checked, launch: Launch) -> int:
    config = checked.config
    alone = checked.sizes.world_size == 1 and launch.machines == 1 and not launch.torchrun_arguments
    if under_torchrun() or (alone and not config.max_restarts):
        return join(checked)
    output = Path(checked.config.output_dir)
    # The launchers of a job may share the folder, so only the first launcher locks it; with torchrun, the
    # first rank does.
    first = launch.machine_rank == 0 and not launch.torchrun_arguments
    with ExitStack() as until_the_end:
        lock = until_the_end.enter_context(claim(output)) if first else None
        run = prepare(checked, show=True)
        if first:
            path = write_config(run.config, output)
        else:
            path = Path(until_the_end.enter_context(tempfile.TemporaryDirectory())) / CONFIG
            path.write_text(to_yaml(run.config), encoding="utf-8")
        # The ranks hold the lock too, so that it lasts as long as any process that can write.
        kept = [] if lock is None else [lock]
        restarts = Restarts(config.max_restarts, lambda: newest_name(output))
        wait_s = max(START_S, config.ddp_timeout)
        arguments = ["train", str(path), WORKER]
        code = start(launch, run.sizes.world_size, arguments, run.device, kept, restarts, wait_s)
        if first:
            remove_partial(output, output / "checkpoints")
        return code


def claim(output: Path) -> AbstractContextManager[int | None]:
    """Locks a run's folder with :func:`longspan.training.lock.hold`.

    Raises:
        UserError: longspan did not write the folder's config.yaml, or the folder cannot be locked or read.
    """
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
    # torchrun starts the ranks again under the same agent; our own launcher holds the lock over all its attempts.
    agent = os.environ.get("TORCHELASTIC_RUN_ID") if under_torchrun() else None
    return hold(output, launch=f"{agent}, agent {parent_since()}", again=restart_count() > 0)


def newest_name(output: Path) -> str | None:
    """The name of the newest checkpoint of this launch's run, ``step_NNNNNNNN``; None before the first one."""
    return next(reversed(launch_of(output).saved), None)


def after_restart(run: Run) -> tuple[Run, bool]:
    """The run from its newest checkpoint, if the launcher has started the ranks again. Collective.

    Returns:
        The run, and whether the output folder holds this launch's own records.

    Raises:
        UserError: on every rank, if no checkpoint is whole.
    """
    import torch.distributed as dist

    from longspan.training.checkpoint_folder import newest_own

    # Under torchrun a machine that came back counts from 0.
    counts: list = [None] * dist.get_world_size()
    dist.all_gather_object(counts, restart_count())
    if not any(counts):
        return run, False
    output = Path(run.config.output_dir)
    found: list = [(False, None, False, [])]
    if dist.get_rank() == 0:
        launch = launch_of(output)
        try:
            own = newest_own(output / "checkpoints", launch.saved)
            # Before the first checkpoint the run begins as it began, from the same weights.
            first = next((place for place in launch.resumed if Path(place).is_dir()), None)
            found = [(launch.begun, str(own) if own else first, own is not None, [])]
        except (UserError, OSError) as error:
            found = [(True, None, False, getattr(error, "problems", [str(error)]))]
    dist.broadcast_object_list(found, src=0)
    begun, path, whole, problems = found[0]
    if problems:
        raise UserError(problems)
    if whole:
        run = run.with_keys(resume=path, no_load_optim=False, no_load_rng=False)
    elif begun and path is not None:
        run = run.with_keys(resume=path)
    return run, begun


def write_config(config: TrainConfig, output: Path) -> Path:
    path = output / CONFIG
    try:
        write_whole(path, f"{WRITTEN_BY}; every key resolved\n{to_yaml(config)}")
    except OSError as error:
        raise unwritable(output, error) from None
    return path


def join(checked: Checked | Run) -> int:
    """Trains as one rank of a run, or as its only process. Returns the exit code.

    Args:
        checked: a Run if the launcher has prepared it.

    Raises:
        UserError: on every rank, with the problems that any rank found.
    """
    started_by, alone = launcher(), checked.sizes.world_size == 1 and not under_torchrun()
    end_with_launcher()
    import torch
    import torch.distributed as dist

    from longspan.mesh.mesh import close_distributed, init_distributed
    from longspan.runs.session import leave, train
    from longspan.training.stopping import Stopping

    quiet_logs()
    local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if checked.device == "cpu":
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_processes))
    config = checked.config
    local_rank, output = int(os.environ.get("LOCAL_RANK", "0")), Path(checked.config.output_dir)
    with ExitStack() as until_the_end:

        def hold() -> None:
            until_the_end.enter_context(claim(output))

        run = checked if isinstance(checked, Run) and started_by is not None else None
        if alone:
            hold()
            run = prepare(checked, show=True)
        first = os.environ.get("RANK", "0") == "0"
        within = checked.config.stop_timeout
        stopping = until_the_end.enter_context(Stopping(first, second_ends=started_by is None, within=within))
        notes = own_notes()
        try:
            init_distributed(checked.device, checked.config.ddp_timeout)
            if run is None:
                run = prepare_together(checked, local_rank, hold)
            device = torch.device(run.device, local_rank) if run.device == "cuda" else torch.device("cpu")
            if dist.get_rank() == 0 and started_by is None:
                write_config(run.config, output)
                if config.max_restarts and under_torchrun() and not restart_count():
                    print(
                        "max_restarts: torchrun has started this run, and its own --max-restarts counts",
                        file=sys.stderr,
                    )
            run, again = after_restart(run)
            code = train(run, device, stopping, notes, again)
            if code:
                notes.fail(dist.get_rank(), Failure("chosen", "", None, ""))
            close_distributed()
        except UserError:
            raise
        except Exception as error:
            leave(error, output, checked.config.ddp_timeout, notes=notes)
    return code


def prepare_together(checked: Checked | Run, local_rank: int, hold: Callable[[], None]) -> Run:
    """One process of each machine calls :func:`prepare`, unless the launcher has; others wait up to a day.

    Args:
        hold: locks the run's folder; called on the first rank.

    Raises:
        UserError: on every rank, with the problems that any rank found.
    """
    import datetime

    import torch.distributed as dist

    from longspan.mesh.mesh import close_distributed

    waiting = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=1))
    run, problems = None, []
    if local_rank == 0:
        try:
            if dist.get_rank() == 0:
                hold()
            run = checked if isinstance(checked, Run) else prepare(checked, show=dist.get_rank() == 0)
        except UserError as error:
            problems = error.problems
    found: list = [None] * dist.get_world_size()
    dist.all_gather_object(found, (run, problems), group=waiting)
    dist.destroy_process_group(waiting)
    if trouble := [problem for _, problems in found for problem in problems]:
        close_distributed()
        # All ranks raise the same error, so that the first one can print it.
        raise UserError(dict.fromkeys(trouble))
    return found[dist.get_rank() - local_rank][0]
