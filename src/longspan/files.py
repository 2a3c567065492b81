"""Files and folders that are never half written: they are written under a hidden name and then renamed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a whole file; if that fails, the earlier file stays.

    Args:
        content: text is written as UTF-8; its line ends are not changed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def begin_folder(folder: Path) -> Path:
    """Makes an empty folder beside ``folder``. The caller fills it, then :func:`name_folder` renames it."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def name_folder(partial: Path, folder: Path) -> None:
    """Gives a filled folder its final name; a folder that has this name already is deleted."""
    if folder.exists():
        shutil.rmtree(folder)
    os.rename(partial, folder)


def remove_partial(*folders: Path) -> None:
    """Removes what killed processes have left half written or half removed; the caller holds the run's lock."""
    for folder in folders:
        for partial in [*folder.glob(".*.partial"), *folder.glob(".step_*.removed")]:
            if partial.is_dir():
                shutil.rmtree(partial, ignore_errors=True)
            else:
                partial.unlink(missing_ok=True)
