"""The processes of a run on one machine: started together, watched, told of signals, and ended together."""

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

#: seconds that the others have to tell of their own when one has failed
GRACE_S = 10.0
LOOK_S = 0.05


def serve_store(ip: str, port: int, machines: int) -> tuple[TCPStore, int]:
    """The store in which the ranks of all machines find each other, and its port.

    It listens where the ranks are and nowhere else: on one machine on the loopback interface, on several on
    the address that the others were given. Nothing that is read from it is run or unpickled by the launcher.

    Raises:
        UserError: the port is taken.
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
    """A listening socket on an address of this machine; on all of them where ``ip`` is none of its own.

    A name that means the loopback interface here (as many machines have their own name) means another
    address elsewhere.
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
    """Runs one process a rank of this machine and waits for all, as long as it takes. Returns the exit code.

    A first SIGTERM, SIGINT or SIGHUP is handed on, and the ranks save and stop in their own time; a second
    one kills them. When one fails the others are ended too.

    Args:
        environments: rank -> its environment.
        kept: descriptors that the ranks inherit.
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
    """Starts one rank, in a session of its own: a terminal's Ctrl-C reaches the launcher alone, which hands it on once."""
    return subprocess.Popen(command, env=dict(environment), pass_fds=tuple(kept), start_new_session=True)


def _watch(ranks: Mapping[int, subprocess.Popen], asked: list[signal.Signals]) -> dict[int, int]:
    """Waits until the ranks have ended, one has failed, or a second signal came. Returns rank -> exit code
    of failures."""
    told, failures, until = False, {}, float("inf")
    while len(asked) < 2:
        alive = [rank for rank, process in ranks.items() if process.poll() is None]
        for rank, process in ranks.items():
            if process.returncode and rank not in failures:
                failures[rank] = process.returncode
                # a mistake of the user's has been told, and the other ranks would only tell it again
                until = min(until, time.monotonic() + (0 if process.returncode == 2 else GRACE_S))
        if not alive or time.monotonic() >= until:
            return failures
        if asked and not told:
            told = True
            for rank in alive:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(ranks[rank].pid, asked[0])
            text = f"longspan: {asked[0].name}: waiting for the ranks; a second signal stops them at once"
            with contextlib.suppress(OSError):  # such as a full disk: the ranks are saving
                print(text, file=sys.stderr, flush=True)
        time.sleep(LOOK_S)
    return failures


def _kill(ranks: Mapping[int, subprocess.Popen]) -> None:
    """Ends what is left, with the processes it has started."""
    for process in ranks.values():
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    for process in ranks.values():
        # one that waits for a device that does not answer cannot be ended
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)


def _report(failures: Mapping[int, int], asked: Sequence[signal.Signals]) -> int:
    """Tells why the ranks have ended. Returns the launcher's exit code."""
    if len(asked) > 1:
        print(
            f"longspan: stopped at once by a second signal, {asked[1].name}; what was not saved yet is lost",
            file=sys.stderr,
        )
        return 1
    if not failures:
        return 0
    if 2 in failures.values():  # a mistake of the user's, told already
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
