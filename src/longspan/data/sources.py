"""Records from files, folders, and datasets of the Hugging Face hub.

JSON, JSON lines and CSV are read by this module, Parquet and Arrow files with pyarrow, and the hub, and
folders that its library saved, with ``datasets``. The two packages are imported when they are needed,
and no other module of longspan needs them.
"""

from __future__ import annotations

import csv
import logging
import re
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from longspan.config.keys.data import DatasetConfig
from longspan.config.packages import has_package
from longspan.data.json_lines import json_records, valid_text
from longspan.data.text import STDLIB, TEXT_SUFFIXES, find_sources
from longspan.errors import UserError, did_you_mean

#: Suffix of a file -> its kind (ds_type).
KINDS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv", ".arrow": "arrow"}
EXTRA = "pip install 'longspan[hf]'"

_SPLIT = re.compile(r"(\w+)(?:\[(-?\d+%?)?:(-?\d+%?)?\])?")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
#: Separators of fields in files that are named CSV but have no commas.
_NO_COMMAS = {";": "semicolons", "\t": "tabs", "|": "bars"}
#: Word in a file's name -> the part of the data that the file holds.
_PARTS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}


def is_text(source: DatasetConfig) -> bool:
    """Whether ``data.text`` reads the source's documents: text, lines of JSON, a folder of text and code."""
    asks = source.split != "train" or source.data_files or source.name or source.ds_type not in (None, "json")
    if source.type != "completion" or asks:
        return False
    path = Path(source.path)
    if not path.is_dir():
        return path.suffix.lower() not in (".parquet", ".csv", ".arrow") and not _on_hub(source)
    if _own_format(path) is not None:
        return False
    try:
        return bool(find_sources(path))
    # The folder has no text.
    except UserError:
        return not any(p.suffix.lower() in KINDS for p in path.rglob("*"))


def check_source(source: DatasetConfig) -> None:
    """Raises UserError for a source that does not exist, before anything is read."""
    if is_text(source):
        if source.revision is not None:
            raise UserError(
                f"{source.path}: revision is for datasets of the hub; these are files. Leave it out."
            )
        find_sources(source.path)
    elif _on_hub(source):
        _needs(
            "datasets",
            f"{source.path!r} is no file or folder here, so it is a dataset of the Hugging Face hub",
        )
    elif not _saved(source):
        _files(source)


def stamp(source: DatasetConfig) -> list:
    """Values that change with the records: files' paths, sizes, times; a hub dataset's name and revision."""
    asked = [source.split, source.name, source.data_files, source.ds_type, source.revision]
    if _on_hub(source):
        return [source.path, *asked]
    if _saved(source):
        files = sorted(p for p in Path(source.path).rglob("*") if p.is_file())
    else:
        files = _files(source)
    return [*asked, *([str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns] for p in files)]


#: The most levels of lists and objects in a record.
MAX_DEPTH = 100


def plain(value: Any, depth: int = 0) -> Any:
    """A value of a record, without differences between the kinds of files.

    Null fields of objects are left out, at every depth, because in Arrow and Parquet all objects of a
    column have the same fields, and fields that an object does not have are null. So null means
    the same in every kind of file: the field is absent. A null in a list stays. Half of a
    surrogate pair, which only JSON can hold, is not text and becomes a question mark.

    Raises:
        UserError: the value is nested more deeply than `MAX_DEPTH`.
    """
    if depth > MAX_DEPTH:
        raise UserError(
            f"lists and objects lie in each other more than {MAX_DEPTH} deep. Flatten the record."
        )
    if isinstance(value, str):
        return valid_text(value)
    if isinstance(value, Mapping):
        return {plain(k): plain(v, depth + 1) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [plain(v, depth + 1) for v in value]
    return value


def iter_records(source: DatasetConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (place, record) for each record of a source, in its order.

    Raises:
        UserError: a record cannot be read; the message names the file and the line.
    """
    if _on_hub(source) or _saved(source):
        yield from _library_records(source)
        return
    files = _files(source)
    found = _SPLIT.fullmatch(source.split)
    # _files has checked the split.
    assert found is not None
    start, stop = found[2], found[3]
    records = (record for file in files for record in _file_records(file, _kind(file, source)))
    if start is None and stop is None:
        yield from records
        return
    total = sum(1 for file in files for _ in _file_records(file, _kind(file, source)))
    yield from islice(records, _place(start, total, 0), _place(stop, total, total))


def _place(text: str | None, total: int, default: int) -> int:
    """A bound of a slice, as a number of records from the beginning."""
    if text is None:
        return default
    number = int(text.rstrip("%"))
    at = round(total * number / 100) if text.endswith("%") else number
    return min(max(at + total if number < 0 else at, 0), total)


def _on_hub(source: DatasetConfig) -> bool:
    """Whether the source is not a local path and may be the name of a dataset of the hub."""
    path, local = source.path, Path(source.path)
    if local.exists() or path == STDLIB or _is_loader(source) or _HUB_NAME.fullmatch(path) is None:
        return False
    if local.suffix.lower() in {*KINDS, ".txt", ".gz", ".zst", ".bin", ".idx"}:
        return False
    # A name that may be a mistyped path is not looked up on the hub.
    return not local.parent.is_dir() if "/" in path else source.type != "completion"


def _is_loader(source: DatasetConfig) -> bool:
    """Whether the source is ``path: json, data_files: ...``, the hub library's way to name files."""
    return source.path in ("json", "csv", "parquet", "arrow", "text") and source.data_files is not None


def _own_format(path: Path) -> str | None:
    """The data that ``datasets`` saved in a folder: "parts" (train, test ...), one "dataset", or None."""
    if (path / "dataset_dict.json").is_file():
        return "parts"
    return "dataset" if (path / "state.json").is_file() else None


def _saved(source: DatasetConfig) -> bool:
    return Path(source.path).is_dir() and _own_format(Path(source.path)) is not None


def _needs(package: str, what: str) -> None:
    if not has_package(package):
        raise UserError(f"datasets: {what}, which needs the {package} package. {EXTRA}.")


def _library_records(source: DatasetConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    """Records read with the ``datasets`` library."""
    _needs("datasets", f"{source.path!r} is read by the Hugging Face library")
    import datasets

    # The library logs each retry; longspan prints one message instead.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        if _saved(source):
            data = datasets.load_from_disk(source.path)
            part = _SPLIT.fullmatch(source.split)
            if _own_format(Path(source.path)) == "parts":
                data = data[part[1] if part else source.split]
            if part and (part[2] or part[3]):
                bounds = [_place(part[2], len(data), 0), _place(part[3], len(data), len(data))]
                data = data.select(range(*bounds))
        else:
            data = datasets.load_dataset(
                source.path,
                name=source.name,
                split=source.split,
                revision=source.revision,
                data_files=source.data_files,
            )
    # The library raises many kinds of errors, offline and for wrong names.
    except Exception as error:
        reason = str(error).strip().split("\n")[0][:300] or type(error).__name__
        raise UserError(
            f"datasets: {source.path!r} could not be loaded from the Hugging Face hub ({type(error).__name__}: {reason}). Check "
            "the name, split and connection; or copy it here and give its folder or file as path."
        ) from None
    for number, record in enumerate(data):
        yield f"{source.path} ({source.split}), row {number}", record


def _files(source: DatasetConfig) -> list[Path]:
    """The files of a source, for the part that its split names.

    Raises:
        UserError: there are no such files, or their kind is unknown.
    """
    found = _SPLIT.fullmatch(source.split)
    if found is None:
        raise UserError(f"split {source.split!r}: such as train, train[:1000] or train[10%:20%].")
    if source.name is not None or source.revision is not None:
        which = "name" if source.name is not None else "revision"
        raise UserError(f"{source.path}: {which} is for datasets of the hub; these are files. Leave it out.")
    root = Path(source.path)
    if found[1] != "train" and (source.data_files is not None or root.is_file()):
        raise UserError(
            f"{source.path}: split {source.split!r}: of single files every record is train; give train, a slice such as "
            "train[:10%], or a folder that has a file for each part."
        )
    if source.data_files is not None:
        base = root if root.is_dir() else Path()
        given = [source.data_files] if isinstance(source.data_files, str) else source.data_files
        files = []
        for pattern in given:
            file = (base / Path(pattern).expanduser()).absolute()
            top = Path(file.anchor)
            matches = [file] if file.is_file() else sorted(top.glob(file.relative_to(top).as_posix()))
            if not matches:
                raise UserError(f"data_files {pattern!r}: no such file in {base.resolve()}.")
            files += matches
    elif root.is_file():
        files = [root]
    elif root.is_dir():
        kinds = {k for k in KINDS if source.ds_type in (None, KINDS[k])}
        if source.ds_type == "text":
            kinds = set(TEXT_SUFFIXES)
        inside = (p.relative_to(root) for p in root.rglob("*") if p.suffix.lower() in kinds and p.is_file())
        hidden = [root / p for p in sorted(inside) if not any(part[0] == "." for part in p.parts)]
        files = _of_part(hidden, root, found[1])
        if not files:
            raise UserError(
                f"{source.path}: no file of {found[1]} in this folder. Looked for {' '.join(sorted(kinds))}; say another "
                "kind by ds_type, or single files by data_files."
            )
    else:
        near = did_you_mean(
            root.name, [p.name for p in root.parent.iterdir()] if root.parent.is_dir() else []
        )
        raise UserError(
            f"{source.path}: no such file or folder. Give a file ({', '.join(KINDS)}), a folder of them, or the name of a "
            f"dataset of the Hugging Face hub.{near}"
        )
    for file in files:
        _kind(file, source)
    return files


def _of_part(files: list[Path], root: Path, part: str) -> list[Path]:
    """The files whose names contain this part of the data; for train all files if no name has a part."""
    parts = {
        file: next(
            (_PARTS[w] for w in re.split(r"[-_./]", str(file.relative_to(root)).lower()) if w in _PARTS), None
        )
        for file in files
    }
    if not any(parts.values()):
        return files if part == "train" else []
    return [file for file, own in parts.items() if own == _PARTS.get(part, part)]


def _kind(file: Path, source: DatasetConfig) -> str:
    loader = source.path if _is_loader(source) else None
    kind = source.ds_type or KINDS.get(file.suffix.lower()) or loader
    if kind is None and source.type == "completion" and file.suffix.lower() in TEXT_SUFFIXES:
        kind = "text"
    if kind is None:
        raise UserError(
            f"{file}: of what kind is it? The name ends with none of {', '.join(KINDS)}. Say ds_type: json, parquet, csv or "
            "arrow (compressed files must be unpacked first)."
        )
    if kind in ("parquet", "arrow"):
        _needs("pyarrow", f"{file} is a {kind} file")
    return kind


def _file_records(file: Path, kind: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (place, record) from one file."""
    reader = {"json": _json, "csv": _csv, "text": _lines, "parquet": _parquet, "arrow": _arrow}[kind]
    try:
        yield from reader(file)
    except UserError:
        raise
    except UnicodeDecodeError:
        raise UserError(f"{file}: not text in UTF-8. Is it {kind}?") from None
    # pyarrow's errors are subclasses of these.
    except (OSError, csv.Error, ValueError) as error:
        raise UserError(f"{file}: cannot be read as {kind}: {str(error).splitlines()[0]}.") from None


def _json(file: Path):
    for where, record in json_records(file):
        if not isinstance(record, dict):
            raise UserError(f"{where}: a JSON {type(record).__name__}, not an object with fields.")
        yield where, record


def _csv(file: Path):
    # Python's own limit, 131,072 characters a field, is too small for one long document.
    csv.field_size_limit(2**31 - 1)
    with file.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines)
        names = reader.fieldnames or [""]
        other = next((name for mark, name in _NO_COMMAS.items() if mark in names[0]), None)
        if len(names) == 1 and other is not None:
            raise UserError(
                f"{file}: the first line, {names[0][:60]!r}, has {other} and no comma between its fields. A CSV has commas: "
                "save it with them, or as JSON lines or Parquet."
            )
        for record in reader:
            where = f"{file}, line {reader.line_num}"
            if None in record or None in record.values():
                raise UserError(f"{where}: not as many fields as the first line names ({reader.fieldnames}).")
            yield where, record


def _lines(file: Path):
    """One document for each line, in the field text, as ``datasets`` reads text."""
    with file.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            yield f"{file}, line {number}", {"text": line.rstrip("\n")}


def _parquet(file: Path):
    import pyarrow.parquet

    number = 0
    for batch in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=1024):
        for record in batch.to_pylist():
            yield f"{file}, row {number}", record
            number += 1


def _arrow(file: Path):
    import pyarrow

    with pyarrow.memory_map(str(file)) as data:
        try:
            batches = pyarrow.ipc.open_stream(data)
        # Arrow has two formats, and the file has the format that was not tried yet.
        except pyarrow.ArrowInvalid:
            opened = pyarrow.ipc.open_file(data)
            batches = (opened.get_batch(i) for i in range(opened.num_record_batches))
        number = 0
        for batch in batches:
            for record in batch.to_pylist():
                yield f"{file}, row {number}", record
                number += 1
