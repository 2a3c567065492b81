"""The files of a checkpoint, read and written by torch's distributed checkpoint (DCP), tensors only.

DCP's ``.metadata`` is a pickle, and DCP also loads entries other than tensors by pickle, so a folder from
elsewhere could run code. Here ``.metadata`` is unpickled into records that do nothing, DCP's own objects are
made of checked values, and only tensors are read (``torch.load(weights_only=True)``). The files' checksums
are computed while they are written (``checksums``).
"""

from __future__ import annotations

import contextlib
import math
import os
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem, _FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from longspan.errors import UserError
from longspan.training.checksums import CHECKSUMS, Checksum, to_json

METADATA = ".metadata"
DESCRIPTION = "longspan.json"

# --- DCP's .metadata, read without running code ----------------------------------------------


class _Record:
    """Replaces an object of the pickle: it keeps its arguments and its state, and does nothing."""

    args: tuple
    state: Any

    def __new__(cls, *args: Any) -> _Record:
        record = super().__new__(cls)
        record.args, record.state = args, None
        return record

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def fields(self, *names: str) -> list[Any]:
        """The values of an object's attributes; an absent one is None."""
        if not isinstance(self.state, dict):
            raise ValueError(f"a {type(self).__name__} has no fields")
        return [self.state.get(name) for name in names]


_METADATA_MODULE, _FILES_MODULE = (
    "torch.distributed.checkpoint.metadata",
    "torch.distributed.checkpoint.filesystem",
)
_PATHS = ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
_DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}


def _stand_ins() -> dict[tuple[str, str], Any]:
    """Name that DCP pickles -> its replacement; no other name is allowed."""
    names = [
        *(
            (_METADATA_MODULE, name)
            for name in ("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties")
        ),
        *((_METADATA_MODULE, f"{kind}StorageMetadata") for kind in ("Tensor", "Bytes", "Chunk")),
        (_METADATA_MODULE, "_MEM_FORMAT_ENCODING"),
        (_FILES_MODULE, "_StorageInfo"),
        ("torch.serialization", "_get_layout"),
        # Python 3.13 moved these classes.
        *((module, name) for module in ("pathlib", "pathlib._local") for name in _PATHS),
    ]
    records: dict[tuple[str, str], Any] = {key: type(key[1], (_Record,), {}) for key in names}
    return records | {("torch", "Size"): tuple} | {("torch", name): kind for name, kind in _DTYPES.items()}


_ALLOWED = _stand_ins()


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise ValueError(
                f"it asks for {module}.{name}, which no checkpoint of tensors needs; none of its code was run"
            )
        return _ALLOWED[module, name]


def read_metadata(path: Path) -> Metadata:
    """Reads DCP's metadata of a checkpoint's folder into checked values, without running code from the file.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is damaged, contains code, or names a file outside the folder.
    """
    try:
        with (path / METADATA).open("rb") as file:
            return _checked(_Unpickler(file).load(), path)
    except (OSError, ValueError):
        raise
    # A damaged pickle can raise any error.
    except Exception as error:
        raise ValueError(f"it is no metadata of a checkpoint: {type(error).__name__}") from None


def _checked(raw: Any, folder: Path) -> Metadata:
    entries, storage = _is(raw, "Metadata").fields("state_dict_metadata", "storage_data")
    parts: dict[MetadataIndex, _StorageInfo] = {}
    # Resolving a link takes time, so it is done once for each file.
    places: dict[str, str] = {}
    for key, value in storage.items():
        name, offset = _is(key, "MetadataIndex").fields("fqn", "offset")
        place, start, length, transforms = _is(value, "_StorageInfo").fields(
            "relative_path", "offset", "length", "transform_descriptors"
        )
        if transforms:
            raise ValueError("its tensors are compressed, which longspan does not write")
        index = MetadataIndex(_text(name), None if offset is None else _sizes(offset))
        if place not in places:
            places[place] = _inside(place, folder)
        parts[index] = _StorageInfo(places[place], _count(start), _count(length))
    about: dict[str, Any] = {_text(name): _entry(name, entry, parts) for name, entry in entries.items()}
    return Metadata(about, planner_data=None, storage_data=parts, storage_meta=StorageMeta())


def _entry(
    name: str, entry: Any, parts: dict[MetadataIndex, _StorageInfo]
) -> TensorStorageMetadata | BytesStorageMetadata:
    if type(entry) is _ALLOWED[_METADATA_MODULE, "BytesStorageMetadata"]:
        return BytesStorageMetadata()
    properties, size, chunks = _is(entry, "TensorStorageMetadata").fields("properties", "size", "chunks")
    dtype = _is(properties, "TensorProperties").state[0]
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name} has no dtype")
    whole, found = _sizes(size), []
    for chunk in chunks:
        offsets, sizes = map(_sizes, _is(chunk, "ChunkStorageMetadata").fields("offsets", "sizes"))
        if not len(offsets) == len(sizes) == len(whole) or any(
            o + s > w for o, s, w in zip(offsets, sizes, whole)
        ):
            raise ValueError(f"a part of {name} lies outside of it")
        # This ensures that no tensor is larger than the files.
        if parts[MetadataIndex(name, offsets)].length < math.prod(sizes) * dtype.itemsize:
            raise ValueError(f"a part of {name} is larger than its place in the file")
        found.append(ChunkStorageMetadata(offsets, sizes))
    if sum(math.prod(chunk.sizes) for chunk in found) < math.prod(whole):
        raise ValueError(f"parts of {name} are missing")
    return TensorStorageMetadata(TensorProperties(dtype=dtype), whole, found)


def _is(value: Any, name: str) -> _Record:
    if not (isinstance(value, _Record) and type(value).__name__ == name):
        raise ValueError(f"a {name} is missing")
    return value


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 62:
        raise ValueError(f"{value!r} is no size")
    return value


def _sizes(value: Any) -> torch.Size:
    if not isinstance(value, (tuple, list)):
        raise ValueError("a size is missing")
    return torch.Size([_count(number) for number in value])


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("a name is no text")
    return value


def _inside(name: Any, folder: Path) -> str:
    """The name of a file that lies in the folder itself, links followed."""
    plain = isinstance(name, str) and name == os.path.basename(name) and name not in ("", ".", "..")
    if not plain or "\0" in name or (folder / name).resolve().parent != folder.resolve():
        raise ValueError(f"it names the file {name!r}, which is not in the checkpoint's folder")
    return name


# --- reading --------------------------------------------------------------------------------


class TensorReader(dcp.FileSystemReader):
    """Reads the tensors of a checkpoint's folder by metadata that has been read already."""

    def __init__(self, path: Path, metadata: Metadata):
        super().__init__(path)
        self.metadata = metadata

    def read_metadata(self, *_args: Any, **_kwargs: Any) -> Metadata:
        return self.metadata


class TensorPlanner(dcp.DefaultLoadPlanner):
    """Refuses entries other than tensors, which DCP would load with ``weights_only=False``."""

    def load_bytes(self, read_item: Any, value: Any) -> None:
        raise ValueError(f"{read_item.dest_index.fqn} is no tensor there; it was not read")


def read_tensors(
    path: Path, state: dict[str, Any], metadata: Metadata, option: str = "resume", no_dist: bool = False
) -> None:
    """Fills the tensors of a nested dict with those of a checkpoint; collective unless ``no_dist``.

    Args:
        metadata: the metadata of that checkpoint (``read_metadata``).
        option: the option that named the checkpoint, for messages.

    Raises:
        UserError: a tensor is missing, has another shape, or cannot be read; the same on all ranks.
    """
    try:
        dcp.load(state, storage_reader=TensorReader(path, metadata), planner=TensorPlanner(), no_dist=no_dist)
    except CheckpointException as error:
        raise UserError(
            f"{option}: {path} cannot be loaded: {cause(error)}. Use another checkpoint."
        ) from None


def cause(error: BaseException) -> str:
    """The first rank's failure in DCP's exception (whose class is not a subclass of ``Exception``)."""
    failures = getattr(error, "failures", None) or {0: (error,)}
    first = next(iter(failures.values()))[0]
    return f"{type(first).__name__}: {first}"


# --- writing --------------------------------------------------------------------------------


class _SummedStream:
    """A file that computes the checksum of the bytes written to it."""

    def __init__(self, file: Any, checksum: Checksum):
        self.file, self.checksum = file, checksum

    def write(self, data: Any) -> int:
        self.checksum.update(data)
        return self.file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


class _SummingFileSystem(FileSystem):
    """Keeps the checksum of every file that is written through it: name -> checksum."""

    def __init__(self) -> None:
        self.checksums: dict[str, Checksum] = {}

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[Any]:
        with super().create_stream(path, mode) as file:
            self.checksums[Path(path).name] = checksum = Checksum()
            yield _SummedStream(file, checksum)

    def rename(self, path: str | os.PathLike, new_path: str | os.PathLike) -> None:
        super().rename(path, new_path)
        self.checksums[Path(new_path).name] = self.checksums.pop(Path(path).name)

    def records(self) -> dict[str, dict[str, Any]]:
        return {name: checksum.record() for name, checksum in self.checksums.items()}


@dataclass
class _RankChecksums:
    """A rank's checksums, sent to the first rank as one of DCP's write results."""

    files: dict[str, dict[str, Any]]


class SummingWriter(_FileSystemWriter):
    """DCP's writer with checksums: the first rank writes the description and ``checksums.json`` last.

    The public ``FileSystemWriter`` is not used, because its stager copies tensors on the CPU once more.

    Args:
        description: the text of ``longspan.json``.
    """

    def __init__(self, path: Path, description: str):
        super().__init__(path)
        self.fs: _SummingFileSystem = _SummingFileSystem()
        self.description = description

    def write_data(self, plan: Any, planner: Any) -> Any:
        written = super().write_data(plan, planner)
        with_checksums: torch.futures.Future = torch.futures.Future()
        with_checksums.set_result([*written.value(), _RankChecksums(self.fs.records())])
        return with_checksums

    def finish(self, metadata: Metadata, results: list[list[Any]]) -> None:
        records: dict[str, dict[str, Any]] = {}
        for checksums in (r for of_rank in results for r in of_rank if isinstance(r, _RankChecksums)):
            records |= checksums.files
        self._write(DESCRIPTION, self.description)
        super().finish(
            metadata, [[r for r in of_rank if not isinstance(r, _RankChecksums)] for of_rank in results]
        )
        self._write(CHECKSUMS, to_json(records | self.fs.records()))

    def _write(self, name: str, text: str) -> None:
        with self.fs.create_stream(Path(self.path) / name, "wb") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
