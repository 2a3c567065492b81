"""Starts the processes of a run: on which device, how many, and by which launcher."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from longspan.config.load import load_config
from longspan.config.resolve import processes_asked_for
from longspan.config.run import Run
from longspan.config.schema import TrainConfig
from longspan.errors import UserError
from longspan.parent import end_with_parent
from longspan.runs.environment import LAUNCHER, RESTARTS, RUN_ID
from longspan.runs.machines import Machines, OneMachine, SeveralMachines
from longspan.runs.notes import Notes
from longspan.runs.ranks import listening, meeting_store, report, run_together
from longspan.runs.restarts import Restarts, pause, who_did_not_answer
from longspan.training.stopping import heeded

if TYPE_CHECKING:
    import torch

#: the option of a process that longspan starts with a prepared config, from which its Run is made unchanged
WORKER = "--worker"

#: seconds to wait for the other machines, unless a run's ddp_timeout is longer
START_S = 600.0
#: The most processes for each core of a machine; more would keep it busy with starting them.
PROCESSES_PER_CORE = 64


@dataclass(frozen=True)
class Launch:
    """How the processes of a run are started.

    Attributes:
        processes: number of processes over all machines; None derives it from the config and the GPUs.
        machines, machine_rank: number of machines, and the number of this one, from 0.
        ip, port: address of the first machine, at which the ranks find each other; port 0 takes a free port.
        torchrun_arguments: arguments for torchrun; if there are any, torchrun starts the processes.
    """

    processes: int | None = None
    machines: int = 1
    machine_rank: int = 0
    ip: str = "127.0.0.1"
    port: int = 0
    torchrun_arguments: list[str] = field(default_factory=list)


def under_torchrun() -> bool:
    """Whether a launcher, longspan or torchrun, has started this process as one of many."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def launcher() -> int | None:
    """The process id of the longspan launcher that started this process; None if torchrun or none did."""
    return int(os.environ[LAUNCHER]) if under_torchrun() and LAUNCHER in os.environ else None


def restart_count() -> int:
    """How often the launcher has started this process's rank before."""
    return int(os.environ.get(RESTARTS, "0"))


def own_notes() -> Notes:
    """The notes that this rank leaves for the longspan launcher that started it."""
    if launcher() is None:
        return Notes(None)
    return Notes.at(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), restart_count())


def launched_world() -> int:
    """The number of processes that the launcher started.

    Raises:
        UserError: the launcher's variables are incomplete or invalid, for example because one is left over in
            the environment.
    """
    texts = {name: os.environ[name] for name in ("RANK", "WORLD_SIZE")}
    remedy = "Start with torchrun, or unset RANK and WORLD_SIZE."
    if not all(text.isdigit() for text in texts.values()) or int(texts["RANK"]) >= int(texts["WORLD_SIZE"]):
        found = " ".join(f"{name}={text}" for name, text in texts.items())
        raise UserError(f"{found} in the environment: a rank is from 0 to WORLD_SIZE - 1. {remedy}")
    if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise UserError(
            f"RANK and WORLD_SIZE are set in the environment, {' and '.join(missing)} not. {remedy}"
        )
    return int(texts["WORLD_SIZE"])


def choose_device(config: TrainConfig, launch: Launch) -> tuple[str, int]:
    """The device type and the number of processes over all machines.

    Raises:
        UserError: ``device: cuda`` with fewer GPUs than local processes; a number of processes that is not a
            multiple of the machines or differs from the launcher's; or too many processes for a machine.
    """
    device, processes = _choose(config, launch)
    if processes % launch.machines:
        raise UserError(
            f"{processes} processes do not divide by {launch.machines} machines: each runs the same number. Choose parallel "
            "sizes, or --num-processes, whose product is a multiple."
        )
    cores, local = os.cpu_count() or 1, processes // launch.machines
    if local > PROCESSES_PER_CORE * cores and not under_torchrun():
        raise UserError(
            f"{local:,} processes on this machine, which has {cores} cores: at most {PROCESSES_PER_CORE} a core are started. "
            "Choose smaller parallel sizes, or more machines (--num-machines). To check a config for others: longspan validate."
        )
    return device, processes


def _choose(config: TrainConfig, launch: Launch) -> tuple[str, int]:
    asked = launch.processes
    if under_torchrun():
        world = launched_world()
        if asked not in (None, world):
            raise UserError(f"--num-processes {asked}, but the launcher started {world}. Leave it out.")
        asked = world
        local: int | None = int(os.environ.get("LOCAL_WORLD_SIZE", asked))
    else:
        local = asked // launch.machines if asked else None
    if config.device == "cpu":
        return "cpu", asked or processes_asked_for(config)
    import torch

    gpus = torch.cuda.device_count()
    if config.device == "cuda" and (gpus == 0 or (local or 1) > gpus):
        raise UserError(
            f"device: cuda asks for {local or 1} GPUs on this machine and there are {gpus}. Use fewer processes, or "
            "device: cpu."
        )
    if (
        gpus
        and (local is None or local <= gpus)
        and (local is not None or processes_asked_for(config) <= gpus)
    ):
        return "cuda", asked or gpus * launch.machines
    return "cpu", asked or processes_asked_for(config)


def start(
    launch: Launch,
    processes: int,
    arguments: Sequence[str],
    device: str,
    kept: Sequence[int] = (),
    restarts: Restarts | None = None,
    wait_s: float = START_S,
    variables: Mapping[str, str] | None = None,
) -> int:
    """Runs ``python -m longspan ARGUMENTS`` in every local process and waits. Returns the exit code.

    Args:
        processes: number of processes over all machines.
        kept: file descriptors that the processes inherit (not with torchrun), such as the folder's lock.
        restarts: decides whether failed processes are started again (not with torchrun); None never does.
        wait_s: seconds to wait for the other machines.
        variables: environment variables of the processes, where the user has not set them.
    """
    for name, value in (variables or {}).items():
        os.environ.setdefault(name, value)
    local = processes // launch.machines
    if device == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // local))
    command = ["-m", "longspan", *arguments]
    if launch.torchrun_arguments:
        return _torchrun(launch, command, local, restarts.most if restarts else 0)
    store, port = meeting_store(launch.ip, launch.port, launch.machines, launch.machine_rank, wait_s)
    machines: Machines = OneMachine()
    if launch.machines > 1:
        # Without this variable the rendezvous opens a second store, on a port that no firewall expects.
        os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
        machines = SeveralMachines(store, launch.machine_rank, launch.machines, wait_s)
    restarts = restarts or Restarts(0, lambda: None)
    with listening() as asked:
        while True:
            attempt = machines.meet(asked)
            if attempt is None:
                machines.close()
                why = f"stopped by signal {asked[0].name}" if asked else machines.elsewhere()
                print(f"longspan: {why}", file=sys.stderr, flush=True)
                return 1
            environments = _environments(launch, processes, port, attempt)
            notes = Notes(store, attempt)
            ending = run_together([sys.executable, *command], environments, kept, asked, machines.elsewhere)
            if ending.well:
                return 0
            if ending.asked:
                machines.close()
                return report(ending)
            decision = restarts.decide(ending, notes)
            for line in (*who_did_not_answer(ending, notes), decision.text):
                if line:
                    print(f"longspan: {line}", file=sys.stderr, flush=True)
            if not decision.again or pause(decision.pause, asked):
                machines.close()
                return report(ending)


def _environments(launch: Launch, processes: int, port: int, attempt: int) -> dict[int, dict[str, str]]:
    """rank of this machine -> the variables of its process.

    Args:
        port: the port of the launcher's store.
        attempt: how often the ranks were started before.
    """
    local = processes // launch.machines
    together = {
        "WORLD_SIZE": processes,
        "LOCAL_WORLD_SIZE": local,
        "GROUP_RANK": launch.machine_rank,
        "MASTER_ADDR": launch.ip,
        "MASTER_PORT": port,
        LAUNCHER: os.getpid(),
        # With these variables torch uses the launcher's store, which outlives every rank.
        "TORCHELASTIC_RUN_ID": RUN_ID,
        "TORCHELASTIC_USE_AGENT_STORE": True,
        RESTARTS: attempt,
    }
    environments = {}
    for number_here in range(local):
        rank = launch.machine_rank * local + number_here
        own = together | {"RANK": rank, "LOCAL_RANK": number_here}
        environments[rank] = os.environ | {name: str(value) for name, value in own.items()}
    return environments


def _torchrun(launch: Launch, command: list[str], local: int, max_restarts: int) -> int:
    """Runs torchrun with the user's arguments. Returns the exit code.

    The numbers of processes and machines are those of ``launch`` unless the arguments give them, and so is
    ``max_restarts``, which torchrun counts over the whole job.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    given = launch.torchrun_arguments
    ours: dict[str, object] = {"--nproc-per-node": local, "--max-restarts": max_restarts}
    if launch.machines > 1:
        ours |= {
            "--nnodes": launch.machines,
            "--node-rank": launch.machine_rank,
            "--master-addr": launch.ip,
            "--master-port": launch.port,
        }
    named = option_names(given)
    # With these options torchrun itself finds the machines, so it gets no address and no machine rank.
    if named & {"--rdzv-endpoint", "--rdzv-backend", "--standalone"}:
        ours = {
            name: ours[name] for name in ("--nproc-per-node", "--max-restarts", "--nnodes") if name in ours
        }
    for name, value in torchrun_settings().items():
        os.environ.setdefault(name, value)
    try:
        torchrun([*(f"{k}={v}" for k, v in ours.items() if k not in named), *given, *command])
    except SignalException as error:
        print(f"longspan: stopped by signal {error.sigval.name}", file=sys.stderr)
        return 1
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return 2 if failure.exitcode == 2 else 1
    # torchrun's option parser ends in this way.
    except SystemExit as error:
        return 2 if error.code else 0
    return 0


def option_names(given: Sequence[str]) -> set[str]:
    """The names of the options in torchrun's arguments, with dashes; torchrun also accepts underscores."""
    return {a.partition("=")[0].replace("_", "-") for a in given if a.startswith("-")}


def torchrun_settings() -> dict[str, str]:
    """Variables that make torchrun leave ignored signals ignored (nohup), and wait until a step is saved."""
    stopping = ",".join([number.name for number in heeded()] + ["SIGQUIT"])
    return {
        "TORCHELASTIC_SIGNALS_TO_HANDLE": stopping,
        # This variable replaces torchrun's argument, with which torchrun overwrites the variable above.
        "PET_SIGNALS_TO_HANDLE": stopping,
        # A week, in seconds: the ranks have a limit of their own (stop_timeout).
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(7 * 24 * 3600),
    }


def end_with_launcher() -> None:
    """Makes this process end when its launcher (longspan or torchrun, but not a shell) ends."""
    if launcher() is not None or (under_torchrun() and "TORCHELASTIC_RUN_ID" in os.environ):
        end_with_parent(launcher())


class ProcessesFailed(RuntimeError):
    """Processes that were started have failed; their messages are on stderr.

    Attributes:
        code: the launcher's exit code.
    """

    def __init__(self, code: int):
        super().__init__(f"the processes ended with exit code {code}; their messages are above.")
        self.code = code


def read_run(path: str) -> Run:
    """The Run of a config that the launcher has prepared and written, for a process that it started.

    Raises:
        UserError: the file cannot be read, or the number of started processes is not that of the config.
    """
    run = Run.of(load_config(path))
    if (world := launched_world()) != run.sizes.world_size:
        raise UserError(
            f"parallel sizes: {run.sizes.equation(world)}. The product must be the number of processes."
        )
    return run


def join_processes(device: str, *waiting: float) -> torch.device:
    """Makes this launched process a member of the process group. Returns the device on which it computes.

    Args:
        waiting: ``timeout_s`` and ``start_s`` of :func:`longspan.mesh.mesh.init_distributed`.
    """
    end_with_launcher()
    import torch

    from longspan.mesh.mesh import init_distributed

    quiet_logs()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    init_distributed(device, *waiting)
    return torch.device("cuda", int(os.environ["LOCAL_RANK"])) if device == "cuda" else torch.device("cpu")


@contextmanager
def joined(run: Run) -> Iterator[torch.device]:
    """A context in which a launched process belongs to the process group.

    A RuntimeError ends the process with a message, as in training.

    Yields:
        The device on which the process computes.
    """
    from longspan.mesh.mesh import close_distributed
    from longspan.runs.session import leave

    config = run.config
    try:
        yield join_processes(run.device, config.ddp_timeout)
        close_distributed()
    except RuntimeError as error:
        leave(error, Path(config.output_dir), config.ddp_timeout)


def quiet_logs() -> None:
    """Hides log messages and warnings that torch has for its own developers; errors are still shown."""
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
