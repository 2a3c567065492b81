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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
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
def hold(
    folder: Path, dying_s: float = DYING_S, launch: str = "", again: bool = False
) -> Iterator[int | None]:
    """Locks a folder for one run; makes the folder, and removes it again if nothing was written into it.

    Args:
        dying_s: seconds to wait for the processes of a run whose first process has been killed.
        launch: a name for this launch, which torchrun's ranks share over its restarts.
        again: this is a restart: what :class:`Launch` has is kept if the lock is of the same launch.

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
        held = _lock(file, folder, dying_s, launch, again)
        # A refused run may have removed its folder just now.
        if held and not _is_still_there(file, folder):
            with hold(folder, dying_s, launch, again) as lock:
                yield lock
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


@dataclass(frozen=True)
class Launch:
    """What the lock says of the launch that holds it, for a restart.

    Attributes:
        begun: it has begun to write into the folder.
        resumed: the checkpoint from which it began, at the places where it may be now; empty if it began anew.
        saved: names of the checkpoints that it has written, the newest last.
    """

    begun: bool = False
    resumed: tuple[str, ...] = ()
    saved: tuple[str, ...] = ()


#: names that the lock keeps
SAVED = 8


def launch_of(folder: Path) -> Launch:
    """What the launch that holds the lock of this folder has written of itself."""
    with contextlib.suppress(OSError):
        file = os.open(folder / LOCK, os.O_RDONLY)
        try:
            about = _read(file)
        finally:
            os.close(file)
        return Launch(
            bool(about.get("begun")), tuple(about.get("resumed") or ()), tuple(about.get("saved") or ())
        )
    return Launch()


def mark_begun(folder: Path, resumed: Sequence[str]) -> None:
    """Writes into the lock that this launch's run begins to write into the folder.

    Args:
        resumed: as in :class:`Launch`.
    """
    _change(folder, lambda about: about | {"begun": True, "resumed": list(resumed)})


def mark_saved(folder: Path, name: str) -> None:
    """Writes into the lock that this launch's run has saved a checkpoint."""

    def with_name(about: dict) -> dict:
        names = [other for other in about.get("saved") or () if other != name]
        return about | {"saved": [*names, name][-SAVED:]}

    _change(folder, with_name)


def _change(folder: Path, change: Callable[[dict], dict]) -> None:
    # On a full disk the run goes on; a restart would begin it anew.
    with contextlib.suppress(OSError):
        file = os.open(folder / LOCK, os.O_RDWR)
        try:
            _write(file, change(_read(file)))
        finally:
            os.close(file)


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


def _lock(file: int, folder: Path, dying_s: float, launch: str, again: bool) -> bool:
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
    if again and before.get("launch") == launch:
        about |= {name: before[name] for name in ("begun", "resumed", "saved") if name in before}
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
