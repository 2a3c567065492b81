"""One run a folder, ensured by a lock of the operating system. The lock ends with the processes that hold it,
so a kill or a power cut leaves no folder blocked."""

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

#: the first file that ``longspan train`` writes into a run's folder
CONFIG = "config.yaml"
#: The file that is locked. It stays when the lock ends; only the lock has a meaning.
LOCK = ".longspan.lock"
#: seconds that the processes of a killed launcher have to end; a process with a GPU takes some
DYING_S = 10.0
#: the errors of a file system without locks
WITHOUT_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}


def unwritable(folder: Path, error: OSError, key: str = "output_dir") -> UserError:
    """The error for a folder that a key names and that cannot be written to."""
    return UserError(f"{key} {folder}: cannot write there ({error.strerror}). Choose another {key}.")


@contextlib.contextmanager
def hold(folder: Path, dying_s: float = DYING_S, launch: str = "") -> Iterator[int | None]:
    """Locks a folder for one run; makes the folder, and removes it again if nothing was written into it.

    Args:
        dying_s: seconds to wait for the processes of a run whose first process has been killed.
        launch: names the launch if torchrun may start this process again: what ``mark_begun`` has written is
            kept then. Without it every lock is a new launch.

    Yields:
        The descriptor of the lock: a child that inherits it holds the lock too, until both have ended. None
        if the file system has no locks, which a printed line reports.

    Raises:
        UserError: another run, named by its host and process id, uses the folder; or the folder is not
            writable.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise unwritable(folder, error) from None
    try:
        held = _lock(file, folder, dying_s, launch)
        # A refused run may have removed its folder just now.
        if held and not _is_still_there(file, folder):
            with hold(folder, dying_s, launch) as again:
                yield again
        else:
            yield file if held else None
    finally:
        if made:
            with contextlib.suppress(OSError):
                if os.listdir(folder) == [LOCK]:
                    os.unlink(folder / LOCK)
                # The innermost folder comes first; one that is not empty stays, and so do those around it.
                for path in made:
                    path.rmdir()
        os.close(file)


def _is_still_there(file: int, folder: Path) -> bool:
    """Whether the lock's path still leads to the file that is locked."""
    with contextlib.suppress(OSError):
        return os.path.samestat(os.fstat(file), os.stat(folder / LOCK))
    return False


def mark_begun(folder: Path) -> None:
    """Writes into the lock that this launch's run has begun to write into the folder."""
    # On a full disk the run goes on; a restart would begin it anew.
    with contextlib.suppress(OSError):
        file = os.open(folder / LOCK, os.O_RDWR)
        try:
            _write(file, _read(file) | {"begun": True})
        finally:
            os.close(file)


def has_begun(folder: Path) -> bool:
    """Whether the launch that holds the lock has begun to write there; what is there then is its own."""
    with contextlib.suppress(OSError):
        file = os.open(folder / LOCK, os.O_RDONLY)
        try:
            return bool(_read(file).get("begun"))
        finally:
            os.close(file)
    return False


def _read(file: int) -> dict:
    try:
        about = json.loads(os.pread(file, 4096, 0))
    except (OSError, ValueError):
        return {}
    return about if isinstance(about, dict) else {}


def _write(file: int, about: dict) -> None:
    # On a full disk the lock is held even if its owner cannot be written.
    with contextlib.suppress(OSError):
        os.ftruncate(file, 0)
        os.pwrite(file, json.dumps(about).encode(), 0)


def _lock(file: int, folder: Path, dying_s: float, launch: str) -> bool:
    """Takes the lock and writes its owner into it; False if the file system has no locks."""
    until = time.monotonic() + dying_s
    held = True
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
        held = False
    about = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    before = _read(file)
    if launch and before.get("launch") == launch and before.get("begun"):
        about["begun"] = True
    _write(file, about | ({"launch": launch} if launch else {}))
    return held


def _has_died(file: int) -> bool:
    """Whether the lock's owner, a process of this machine, has ended; its child processes may end later."""
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
    """The owner as written in the lock; an owner that has just taken it may not have written it yet."""
    for _ in range(20):
        try:
            about = json.loads(os.pread(file, 4096, 0))
            return f"process {about['pid']} on host {about['host']}, since {about['since']}"
        except (ValueError, KeyError, TypeError):
            time.sleep(0.05)
    return "a process that has not signed"
