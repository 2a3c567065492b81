"""The processes of a run on one machine: they are started, watched, sent signals and ended together."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from longspan.errors import UserError
from longspan.training.stopping import Heard, heeded, outliving_reader

if TYPE_CHECKING:
    from torch.distributed import TCPStore

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


def run_together(
    command: Sequence[str], environments: Mapping[int, Mapping[str, str]], kept: Sequence[int] = ()
) -> int:
    """Runs one process for each rank of this machine and waits for all, without a time limit.

    A first SIGTERM, SIGINT or SIGHUP is passed on, and the ranks save and stop in their own time; a second
    signal kills them. If one rank fails, the other ranks are ended too.

    Args:
        environments: rank -> its environment.
        kept: file descriptors that the ranks inherit.

    Returns:
        The exit code.
    """
    asked = Heard()
    before = {number: signal.signal(number, lambda n, _: asked.hear(n)) for number in heeded()}
    ranks: dict[int, subprocess.Popen] = {}
    try:
        for rank, environment in environments.items():
            ranks[rank] = start_rank(command, environment, kept)
        with outliving_reader():
            failures = _watch(ranks, asked)
    finally:
        _kill(ranks)
        for number, handler in before.items():
            signal.signal(number, handler)
    with outliving_reader():
        return _report(failures, asked)


def start_rank(
    command: Sequence[str], environment: Mapping[str, str], kept: Sequence[int]
) -> subprocess.Popen:
    """Starts one rank in its own session: only the launcher gets a terminal's Ctrl-C and passes it on."""
    return subprocess.Popen(command, env=dict(environment), pass_fds=tuple(kept), start_new_session=True)


def _watch(ranks: Mapping[int, subprocess.Popen], asked: list[signal.Signals]) -> dict[int, int]:
    """Waits until all ranks have ended, one rank has failed, or a second signal has come.

    After a failure the other ranks have ``GRACE_S`` seconds to end; none if it was a mistake of the user.

    Returns:
        Failed rank -> its exit code.
    """
    told, failures, until = False, {}, float("inf")
    while len(asked) < 2:
        alive = [rank for rank, process in ranks.items() if process.poll() is None]
        for rank, process in ranks.items():
            if process.returncode and rank not in failures:
                failures[rank] = process.returncode
                # Exit code 2 is a mistake of the user, which is printed already; other ranks would repeat it.
                until = min(until, time.monotonic() + (0 if process.returncode == 2 else GRACE_S))
        if not alive or time.monotonic() >= until:
            return failures
        if asked and not told:
            told = True
            for rank in alive:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(ranks[rank].pid, asked[0])
            text = f"longspan: {asked[0].name}: waiting for the ranks; a second signal stops them at once"
            # An error such as a full disk must not end the launcher while the ranks save.
            with contextlib.suppress(OSError):
                print(text, file=sys.stderr, flush=True)
        time.sleep(LOOK_S)
    return failures


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


def _report(failures: Mapping[int, int], asked: Sequence[signal.Signals]) -> int:
    """Prints why the ranks have ended. Returns the launcher's exit code."""
    if len(asked) > 1:
        print(
            f"longspan: stopped at once by a second signal, {asked[1].name}; what was not saved yet is lost",
            file=sys.stderr,
        )
        return 1
    if not failures:
        return 0
    # Exit code 2 is a mistake of the user, which a rank has printed already.
    if 2 in failures.values():
        return 2
    if asked:
        print(f"longspan: stopped by signal {asked[0].name}", file=sys.stderr)
        return 1
    rank, code = next(((r, c) for r, c in failures.items() if c < 0), next(iter(failures.items())))
    if code < 0:
        name = signal.Signals(-code).name
        hint = " (out of memory?)" if name == "SIGKILL" else ""
        text = f"rank {rank} was ended by {name}{hint}; the other ranks were stopped."
    else:
        text = f"rank {rank} failed with exit code {code}; its own message is above."
    print(f"longspan: {text}", file=sys.stderr)
    return 1
