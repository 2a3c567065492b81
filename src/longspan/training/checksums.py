"""Checksums of a checkpoint's files: made while the files are written, checked before they are used.

    checksums.json   {"piece_bytes": n, "crc32": of "files",
                      "files": {name: {"bytes": n, "crc32": [of each piece]}}}

It covers every other file of the folder, so a flipped bit, a file of another step and a swapped description
are noticed. The sums guard against accidents only: whoever can write the files can write their sums too.
CRC-32 is the fastest check of the standard library that notices moved bytes (about 1 GB/s a core, SHA-256
0.7, BLAKE2b 0.3). Large files are summed in pieces, so that any number of ranks can share the reading evenly.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

CHECKSUMS = "checksums.json"
#: bytes of a piece of a file; each piece has a checksum
PIECE = 1 << 26
#: bytes of one read
BLOCK = 1 << 22
#: threads of a process that read and sum in parallel, because zlib releases the interpreter's lock
THREADS = 4


class Checksum:
    """Sums the bytes of a file in the order in which they are written.

    Args:
        piece_bytes: the size of a piece; all files of a checkpoint have the same.
    """

    def __init__(self, piece_bytes: int = PIECE) -> None:
        self.piece_bytes = piece_bytes
        self.bytes = 0
        self.pieces: list[int] = []

    def update(self, data: Any) -> None:
        """Adds the next bytes, from any object with a buffer."""
        view = memoryview(data).cast("B")
        while len(view):
            at = self.bytes % self.piece_bytes
            if at == 0:
                self.pieces.append(0)
            part = view[: self.piece_bytes - at]
            self.pieces[-1] = zlib.crc32(part, self.pieces[-1])
            self.bytes += len(part)
            view = view[len(part) :]

    def record(self) -> dict[str, Any]:
        return {"bytes": self.bytes, "crc32": [f"{piece:08x}" for piece in self.pieces]}


def to_json(files: Mapping[str, Mapping[str, Any]], piece_bytes: int = PIECE) -> str:
    """The text of ``checksums.json`` for the records of its files, which were summed in pieces of this size."""
    return json.dumps({"piece_bytes": piece_bytes, "files": files, "crc32": _own_sum(files)}, indent=1)


def _own_sum(files: Mapping[str, Mapping[str, Any]]) -> str:
    return f"{zlib.crc32(json.dumps(files, sort_keys=True).encode()):08x}"


class Manifest:
    """The content of ``checksums.json`` in a checkpoint's folder.

    Args:
        block_bytes: the most bytes that one read takes.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is damaged.
    """

    def __init__(self, folder: Path, block_bytes: int = BLOCK):
        self.folder, self.block_bytes = folder, block_bytes
        try:
            found = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
            self.piece_bytes, self.files = found["piece_bytes"], found["files"]
            whole = found["crc32"] == _own_sum(self.files) and type(self.piece_bytes) is int
            whole = whole and self.piece_bytes > 0 and all(_is_record(r) for r in self.files.values())
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            whole = False
        if not whole:
            raise ValueError(f"{CHECKSUMS} is damaged")

    def damaged(self, names: Iterable[str] | None = None, share: int = 0, shares: int = 1) -> list[str]:
        """The files that differ from what was written, as found in one share of the work.

        Args:
            names: files to check; None checks all.
            share, shares: number of the part of the bytes to read, and number of parts.

        Returns:
            Names of files; for a file that cannot be read, with the reason.
        """
        chosen = sorted(self.files if names is None else names)
        pieces = [(name, n) for name in chosen for n in range(max(1, len(self.files[name]["crc32"])))]
        mine = pieces[len(pieces) * share // shares : len(pieces) * (share + 1) // shares]
        with ThreadPoolExecutor(THREADS) as threads:
            found = threads.map(lambda piece: self._trouble(*piece), mine)
            return sorted({trouble for trouble in found if trouble})

    def _trouble(self, name: str, number: int) -> str | None:
        record, path = self.files[name], self.folder / name
        try:
            if path.stat().st_size != record["bytes"]:
                return name
            # An empty file has no pieces.
            if not record["crc32"]:
                return None
            found = self._sum_of_piece(path, number)
        except OSError as error:
            return f"{name} ({error.strerror})"
        return None if f"{found:08x}" == record["crc32"][number] else name

    def _sum_of_piece(self, path: Path, number: int) -> int:
        found, left = 0, self.piece_bytes
        block = memoryview(bytearray(min(self.block_bytes, left)))
        with path.open("rb", buffering=0) as file:
            file.seek(number * self.piece_bytes)
            while left and (count := file.readinto(block[: min(len(block), left)])):
                found = zlib.crc32(block[:count], found)
                left -= count
        return found


def _is_record(record: Any) -> bool:
    return isinstance(record["bytes"], int) and isinstance(record["crc32"], list)
