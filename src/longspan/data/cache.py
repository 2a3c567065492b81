"""A cache of prepared data: one process makes the files, and others wait for them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from longspan.data.indexed import IndexedDataset
from longspan.errors import UserError


def is_whole(prefix: Path) -> bool:
    """Whether the prefix has valid token files with at least one document."""
    try:
        return len(IndexedDataset(prefix)) > 0
    except UserError:
        return False


@contextmanager
def only_here(folder: Path) -> Iterator[None]:
    """A context that only one process at a time can enter for a folder; it makes a missing folder.

    The system releases the lock when the process ends, also when it is killed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logging.getLogger("longspan").warning("another process prepares %s: waiting for it", folder)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
