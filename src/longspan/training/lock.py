"""One run a folder: a lock of the operating system, gone with the processes that hold it, so that no kill
and no power cut leaves a folder blocked."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from longspan.errors import UserError

#: the file of a run's folder that is written first; ``longspan train`` writes it
CONFIG = "config.yaml"
#: the file that is locked; it stays, and only the lock on it means something
LOCK = ".longspan.lock"
#: seconds in which the processes of a killed launcher have to end; one that holds a GPU takes some
DYING_S = 10.0
#: what a file system without locks answers
WITHOUT_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}


def unwritable(folder: Path, error: OSError, key: str = "output_dir") -> UserError:
    """The refusal of a folder that a key names and nothing can be written to."""
    return UserError(f"{key} {folder}: cannot write there ({error.strerror}). Choose another {key}.")


@contextlib.contextmanager
def hold(folder: Path) -> Iterator[int | None]:
    """Holds a folder for one run; makes the folder, and takes it away again where nothing was written into it.

    Yields:
        The descriptor of the lock: a child that inherits it holds the lock too, until both have ended. None
        where the file system has no locks, which a line tells.

    Raises:
        UserError: another run writes there, named by its host and process id; or nothing can be written
            there.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise unwritable(folder, error) from None
    try:
        held = _lock(file, folder)
        if held and not _is_still_there(file, folder):  # a refused run has just taken its folder away
            with hold(folder) as again:
                yield again
        else:
            yield file if held else None
    finally:
        if made:
            with contextlib.suppress(OSError):
                if os.listdir(folder) == [LOCK]:
                    os.unlink(folder / LOCK)
                for path in made:  # the innermost first; one that is not empty stays, with those around it
                    path.rmdir()
        os.close(file)


def _is_still_there(file: int, folder: Path) -> bool:
    """Does the folder's name for the lock still stand for the file that is locked?"""
    with contextlib.suppress(OSError):
        return os.path.samestat(os.fstat(file), os.stat(folder / LOCK))
    return False


def _lock(file: int, folder: Path) -> bool:
    """Takes the lock and signs it; False where the file system has none."""
    until = time.monotonic() + DYING_S
    try:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not _has_died(file) or time.monotonic() >= until:
                    raise
                time.sleep(0.1)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise UserError(
                f"output_dir {folder}: another run writes there ({_owner(file)}). Wait until it has ended, stop it, or choose "
                "another output_dir."
            ) from None
        if error.errno not in WITHOUT_LOCKS:
            raise
        print(
            f"output_dir {folder}: its file system has no locks ({error.strerror}), so a second run in it is not noticed: "
            "start only one",
            file=sys.stderr,
            flush=True,
        )
        return False
    about = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    with contextlib.suppress(OSError):  # on a full disk the lock is held all the same
        os.ftruncate(file, 0)
        os.pwrite(file, json.dumps(about).encode(), 0)
    return True


def _has_died(file: int) -> bool:
    """Has the process of this machine that signed the lock ended? Those it started may take a moment to do so."""
    try:
        about = json.loads(os.pread(file, 4096, 0))
        if about["host"] == socket.gethostname():
            os.kill(about["pid"], 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        pass
    return False


def _owner(file: int) -> str:
    """Who holds the lock, by what is written in it; the owner may be about to write."""
    for _ in range(20):
        try:
            about = json.loads(os.pread(file, 4096, 0))
            return f"process {about['pid']} on host {about['host']}, since {about['since']}"
        except (ValueError, KeyError, TypeError):
            time.sleep(0.05)
    return "a process that has not signed"
