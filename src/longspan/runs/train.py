"""A training from a checked config to its end: the folder is claimed, the processes start or are joined."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

from longspan.config.load import to_yaml
from longspan.config.resolve import Run, resolve
from longspan.config.schema import TrainConfig
from longspan.errors import UserError
from longspan.files import write_whole
from longspan.runs.prepare import prepared
from longspan.runs.start import Launch, end_with_launcher, launcher, quiet_logs, start, under_torchrun
from longspan.training.lock import CONFIG, hold, unwritable

WRITTEN_BY = "# written by longspan"


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
    path = output / CONFIG
    try:
        write_whole(path, f"{WRITTEN_BY}; every key resolved\n{to_yaml(config)}")
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
    from longspan.runs.session import leave, train
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
