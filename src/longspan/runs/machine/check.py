"""The check of the machines from start to end: the launcher starts ranks, which run all checks."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from longspan.config.load import make_config
from longspan.files import write_whole
from longspan.runs.start import WORKER, Launch, ProcessesFailed, choose_device, join_processes, start

if TYPE_CHECKING:
    from longspan.runs.machine.protocol import Board, Check, Finding, Place

#: seconds in which all ranks have to start, on all machines
START_S = 120.0
#: seconds that an exchange waits for an answer, unless the user gives another time
EXCHANGE_S = 20.0
#: times that an exchange may be late before no further check begins
CHECKS_LATE = 12
#: seconds in which a rank that does nothing else ends after the checks have stopped
ENDS_S = 5.0
#: processes of a machine without a GPU
ON_CPU = 2


def device_and_processes(launch: Launch, device: str) -> tuple[str, int]:
    """The device, and the number of processes over all machines: all GPUs, or two processes a machine.

    Args:
        device: ``auto``, ``cpu`` or ``cuda``.

    Raises:
        UserError: there are fewer GPUs than processes, or too many processes.
    """
    import torch

    config = make_config({"device": device}).config
    assert config is not None
    if launch.processes is None and (device == "cpu" or (device == "auto" and not torch.cuda.device_count())):
        launch = replace(launch, processes=ON_CPU * launch.machines)
    return choose_device(config, launch)


def check_machines(launch: Launch, device: str, processes: int, options: list[str]) -> dict[str, Any]:
    """Starts the ranks of this machine, which run all checks, and waits for them.

    Args:
        options: of ``longspan env``, for the ranks.

    Returns:
        passed, device, hosts (of each rank) and findings.

    Raises:
        ProcessesFailed: the ranks ended without a report; their messages are on stderr.
    """
    with tempfile.TemporaryDirectory() as folder:
        worker = ["env", "--check", WORKER, folder, "--device", device, *options]
        code = start(launch, processes, worker, device)
        reports = sorted(Path(folder).glob("rank-*.json"))
        if not reports:
            raise ProcessesFailed(code or 1)
        report = json.loads(reports[0].read_text(encoding="utf-8"))
        return report | {"passed": report["passed"] and code == 0}


def all_checks(world: int, device: str) -> list[Check]:
    """All checks, in their order: exchanges, their speed, kernels, and training."""
    from longspan.runs.machine import collectives, kernels, small_verify, speed

    # One rank alone sends nothing, so there is no speed to measure.
    between = [*speed.checks_of_bandwidth(device), speed.check_of_links(device)] if world > 1 else []
    return [
        *collectives.checks_of_results(device),
        *between,
        speed.check_of_compute(),
        *kernels.checks_of_attention(device),
        kernels.check_of_experts(),
        *small_verify.checks_of_training(world, device),
    ]


def work(
    folder: Path,
    device: str,
    exchange_s: float,
    began: Callable[[str], None],
    found: Callable[[Finding], None],
) -> NoReturn:
    """Runs all checks on one rank, writes the report into the launcher's folder, and ends the process.

    The exit code is 0 if all checks ran to their end, whatever they found, and 1 otherwise: then a rank may
    never end by itself, and the launcher has to end it.

    Args:
        exchange_s: seconds that an exchange waits for an answer.
        began, found: called on the first rank with the name of each check, and with each finding.
    """
    # NCCL ends a process whose exchange is late, so the rank that is late is named before that.
    waits = exchange_s if device == "cpu" else 4 * exchange_s
    try:
        own_device = join_processes(device, waits, START_S)
    except RuntimeError as error:
        _leave(1, f"BROKEN  the ranks cannot connect to each other: {socket.gethostname()}: {error}")
    import torch.distributed as dist

    from longspan.mesh.mesh import common_store
    from longspan.runs.machine.protocol import Board, Limits, Place, RankLost, run_checks

    rank, store = dist.get_rank(), common_store()
    board = Board(store, rank, dist.get_world_size())
    assert dist.group.WORLD is not None
    place = Place(
        rank, tuple(board.shared("host", socket.gethostname())), own_device, dist.group.WORLD, exchange_s
    )
    limits = Limits(whole=max(Limits.whole, CHECKS_LATE * exchange_s))
    threading.Thread(target=_end_if_hung, args=(Board(store, rank, place.world),), daemon=True).start()
    try:
        findings, hung = run_checks(all_checks(place.world, device), place, store, limits, began, found)
        if not hung:
            board.end()
    except (RankLost, dist.DistError) as error:
        _leave(1, str(error))
    write_whole(folder / f"rank-{rank}.json", json.dumps(report_of(findings, hung, place)))
    _leave(1 if hung else 0)


def report_of(findings: list[Finding], hung: bool, place: Place) -> dict[str, Any]:
    """The report: passed if nothing is broken or wrong and no rank hung; device, hosts and findings."""
    from longspan.runs.machine.protocol import FAILED

    return {
        "passed": not hung and not any(finding.status in FAILED for finding in findings),
        "device": place.device.type,
        "hosts": place.hosts,
        "findings": [vars(finding) for finding in findings],
    }


def _end_if_hung(board: Board) -> None:
    """Ends this process some seconds after the checks have ended because a rank gave no answer."""
    # The store is gone when the launcher that holds it has ended.
    with contextlib.suppress(RuntimeError):
        if board.hung(3600.0):
            time.sleep(ENDS_S)
            _leave(1)


def _leave(code: int, message: str = "") -> NoReturn:
    """Ends this process at once: torch's own tear-down may wait for other ranks."""
    if message:
        print(f"longspan: {message}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
