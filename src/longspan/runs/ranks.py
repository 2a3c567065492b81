"""The processes of a run on one machine: they are started, watched, sent signals and ended together."""

from __future__ import annotations

import contextlib
import datetime
import errno
import ipaddress
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from longspan.errors import NotReached, UserError
from longspan.training.stopping import SAVES, Heard, handling, heeded, outliving_reader

if TYPE_CHECKING:
    from torch.distributed import Store, TCPStore

#: seconds that the other ranks have to print their own errors after one rank has failed
GRACE_S = 10.0
LOOK_S = 0.05


def serve_store(ip: str, port: int, machines: int) -> tuple[TCPStore, int]:
    """Starts the store through which the ranks of all machines find each other. Returns it and its port.

    On one machine the store listens only on the loopback interface; on several machines only on the address
    ``ip``, unless that is no address of this machine (see ``_listen``). The launcher does not run or unpickle
    anything that it reads from the store.

    Args:
        port: 0 takes a free port.

    Raises:
        UserError: the store cannot listen there, for example because the port is in use.
    """
    from torch.distributed import TCPStore

    try:
        listener = _listen("127.0.0.1" if machines == 1 else ip, port)
    except OSError as error:
        raise UserError(
            f"--main-process-ip {ip} --main-process-port {port}: cannot listen there ({error.strerror}). Choose another port, or "
            "look for an earlier run that still has it."
        ) from None
    address, port = listener.getsockname()[:2]
    host = "127.0.0.1" if ipaddress.ip_address(address).is_unspecified else address
    store = TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
    return store, port


def meeting_store(ip: str, port: int, machines: int, number: int, wait_s: float) -> tuple[Store, int]:
    """The store of machine 0, for the launcher of any machine, and its port.

    Args:
        number: this machine, from 0.
        wait_s: seconds to wait for machine 0.

    Raises:
        UserError: machine 0 cannot listen there.
        NotReached: machine 0 cannot be reached.
    """
    from torch.distributed import TCPStore

    if number == 0:
        return serve_store(ip, port, machines)
    try:
        return TCPStore(ip, port, is_master=False, timeout=datetime.timedelta(seconds=wait_s)), port
    except RuntimeError as error:
        why = str(error).partition("\n")[0]
        raise NotReached(
            f"machine {number} found nobody at {ip}:{port} within {wait_s:g} s ({why}). Start machine 0, and look at "
            "--main-process-ip, --main-process-port and the firewall."
        ) from None


def _listen(ip: str, port: int) -> socket.socket:
    """A socket that listens on ``ip``, or on all IPv4 addresses of this machine if ``ip`` is none of them.

    It also listens on all of them if ``ip`` is a host name that means the loopback interface here. Many
    machines resolve their own name so, but on other machines this name means another address.
    """
    (family, *_, (address, *_)) = socket.getaddrinfo(ip, port, type=socket.SOCK_STREAM)[0]
    if ip == address or not ipaddress.ip_address(address).is_loopback:
        try:
            return socket.create_server((address, port), family=family, backlog=1024)
        except OSError as error:
            if error.errno != errno.EADDRNOTAVAIL:
                raise
    return socket.create_server(("", port), backlog=1024)


@dataclass(frozen=True)
class Ending:
    """How the ranks of this machine have ended.

    Attributes:
        failures: failed rank -> its exit code; a negative one is the signal that ended it.
        asked: the signals with which the user asked the launcher to stop.
        unanswered: rank that still ran when it was killed -> the state of its process (``T``: stopped by a signal).
        elsewhere: what happened on another machine, because of which these ranks were ended; "" for nothing.
    """

    failures: Mapping[int, int]
    asked: Sequence[signal.Signals] = ()
    unanswered: Mapping[int, str] = field(default_factory=dict)
    elsewhere: str = ""

    @property
    def well(self) -> bool:
        """Whether all ranks have done their work."""
        return not self.failures and len(self.asked) < 2 and not self.elsewhere

    def describe(self, consequences: Collection[int] = ()) -> str:
        """The failure that explains the others, as the beginning of a sentence: that of a killed rank, if any.

        Args:
            consequences: ranks that have failed because another one had.
        """
        causes = {rank: code for rank, code in self.failures.items() if rank not in consequences}
        causes = causes or dict(self.failures)
        killed = ((rank, code) for rank, code in causes.items() if code < 0)
        rank, code = next(killed, next(iter(causes.items())))
        if code < 0:
            name = signal.Signals(-code).name
            return f"rank {rank} was ended by {name}{' (out of memory?)' if name == 'SIGKILL' else ''}"
        return f"rank {rank} failed with exit code {code}"


@contextlib.contextmanager
def listening() -> Iterator[Heard]:
    """Inside this context the launcher's signals are collected instead of ending it, and passed on to the ranks."""
    asked = Heard()
    with handling((*heeded(), SAVES), lambda number, _: asked.hear(number)):
        yield asked


def run_together(
    command: Sequence[str],
    environments: Mapping[int, Mapping[str, str]],
    kept: Sequence[int],
    asked: Heard,
    elsewhere: Callable[[], str] = lambda: "",
) -> Ending:
    """Runs one process for each rank of this machine and waits for all, without a time limit.

    A first SIGTERM, SIGINT or SIGHUP is passed on, and the ranks save and stop in their own time; a second
    signal kills them. SIGUSR1 is passed on too, and the ranks save and go on. If one rank fails, the other
    ranks are ended too.

    Args:
        environments: rank -> its environment.
        kept: file descriptors that the ranks inherit.
        asked: the signals that the launcher has received (``listening``).
        elsewhere: returns why the ranks of another machine have ended, "" while they run.
    """
    ranks: dict[int, subprocess.Popen] = {}
    try:
        # The signal would end a rank that has not begun to handle it, so the ranks start with it ignored.
        with handling([SAVES], signal.SIG_IGN):
            for rank, environment in environments.items():
                ranks[rank] = start_rank(command, environment, kept)
        with outliving_reader():
            return _watch(ranks, asked, elsewhere)
    finally:
        _kill(ranks)


def start_rank(
    command: Sequence[str], environment: Mapping[str, str], kept: Sequence[int]
) -> subprocess.Popen:
    """Starts one rank in its own session: only the launcher gets a terminal's Ctrl-C and passes it on."""
    return subprocess.Popen(command, env=dict(environment), pass_fds=tuple(kept), start_new_session=True)


def _watch(ranks: Mapping[int, subprocess.Popen], asked: Heard, elsewhere: Callable[[], str]) -> Ending:
    """Waits until all ranks have ended, one rank has failed, or a second signal has come.

    After a failure the other ranks have ``GRACE_S`` seconds to end; none if it was a mistake of the user.
    """
    passed_on, failures, until, why = False, {}, float("inf"), ""
    while len(asked) < 2:
        alive = [rank for rank, process in ranks.items() if process.poll() is None]
        for rank, process in ranks.items():
            if process.returncode and rank not in failures:
                failures[rank] = process.returncode
                # Exit code 2 is a mistake of the user, which is printed already; other ranks would repeat it.
                until = min(until, time.monotonic() + (0 if process.returncode == 2 else GRACE_S))
        if not alive or time.monotonic() >= until:
            return Ending(
                failures, asked, {rank: _state(ranks[rank].pid) for rank in alive}, why if alive else ""
            )
        if not why and (why := elsewhere()):
            until = min(until, time.monotonic() + GRACE_S)
        if asked.to_save:
            asked.to_save = False
            _send([ranks[rank] for rank in alive], SAVES)
        if asked and not passed_on:
            passed_on = True
            _send([ranks[rank] for rank in alive], asked[0])
            text = f"longspan: {asked[0].name}: waiting for the ranks; a second signal stops them at once"
            # An error such as a full disk must not end the launcher while the ranks save.
            with contextlib.suppress(OSError):
                print(text, file=sys.stderr, flush=True)
        time.sleep(LOOK_S)
    return Ending(failures, asked)


def _send(processes: Sequence[subprocess.Popen], number: signal.Signals) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, number)


def _state(pid: int) -> str:
    """The state of a process as Linux writes it (``T``: stopped by a signal); "" if it is not known."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""


def _kill(ranks: Mapping[int, subprocess.Popen]) -> None:
    """Kills the ranks that still run, with the processes that they have started."""
    for process in ranks.values():
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    for process in ranks.values():
        # A process that waits for a device that does not answer cannot be ended.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)


def report(ending: Ending) -> int:
    """Prints why the ranks have ended. Returns the launcher's exit code."""
    with outliving_reader():
        return _report(ending)


def _report(ending: Ending) -> int:
    asked, text = ending.asked, ""
    if len(asked) > 1:
        text = f"stopped at once by a second signal, {asked[1].name}; what was not saved yet is lost"
    elif ending.well:
        return 0
    # Exit code 2 is a mistake of the user, which a rank has printed already.
    elif 2 in ending.failures.values():
        return 2
    elif asked:
        text = f"stopped by signal {asked[0].name}"
    elif not ending.failures:
        text = f"{ending.elsewhere}; the ranks of this machine were stopped."
    elif min(ending.failures.values()) < 0:
        text = f"{ending.describe()}; the other ranks were stopped."
    else:
        text = f"{ending.describe()}; its own message is above."
    print(f"longspan: {text}", file=sys.stderr)
    return 1
