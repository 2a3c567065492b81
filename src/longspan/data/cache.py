"""What is prepared once and found again: one process makes it, others wait."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from longspan.data.indexed import IndexedDataset
from longspan.errors import UserError


def is_whole(prefix: Path) -> bool:
    """Whether there are token files with at least a document in them."""
    try:
        return len(IndexedDataset(prefix)) > 0
    except UserError:
        return False


@contextmanager
def only_here(folder: Path) -> Iterator[None]:
    """Nobody else is in here with this folder, which is made where it is not there. The system lets go of the lock of a
    process that ends, however it ends."""
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
