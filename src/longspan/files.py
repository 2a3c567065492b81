"""Files and folders that are whole or absent: written beside their place and renamed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file whole, or leaves what was there.

    Args:
        content: text is written as UTF-8, with the line ends it has.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def begin_folder(folder: Path) -> Path:
    """An empty folder beside ``folder``, to be filled and given its name by :func:`name_folder`."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def name_folder(partial: Path, folder: Path) -> None:
    """Gives a filled folder its name; what was there goes."""
    if folder.exists():
        shutil.rmtree(folder)
    os.rename(partial, folder)
