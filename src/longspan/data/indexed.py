"""Token files on disk: the ``.bin``/``.idx`` pair that Megatron's preprocessing writes.

``.bin`` holds the tokens of all sequences one after another, raw and little-endian.
``.idx`` holds the places of the sequences:

    bytes   content
    9       ``MMIDIDX\\0\\0``
    8       version, u64: 1
    1       code of the token type, u8 (see `DTYPES`)
    8 + 8   number of sequences S and of document indices D, u64 each
    4 S     tokens in each sequence, int32
    8 S     where each sequence starts in ``.bin``, int64, in bytes
    8 D     the sequence each document starts with, int64: starts with 0, ends with S

So there are D - 1 documents, and a document is one or more whole sequences. (Megatron's
multimodal files have one more byte for each sequence, its mode, which is not read.) The
sequences must lie one after another, without a gap, and fill ``.bin``. A check of this detects a
wrong token type and a ``.bin`` of other data.

Every error in a pair of files is found when it is opened, not at step 40,000, and is a
`UserError` that names the file.
"""

from __future__ import annotations

import os
import struct
import uuid
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from longspan.errors import UserError, did_you_mean

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
# magic, version, dtype code, sequences, document indices
HEADER = struct.Struct("<9sQBQQ")

DTYPES: dict[int, np.dtype] = {
    1: np.dtype("u1"),
    2: np.dtype("i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    6: np.dtype("<f8"),
    7: np.dtype("<f4"),
    8: np.dtype("<u2"),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}

# Lengths are int32 in the .idx.
MAX_SEQUENCE = 2**31 - 1


def best_dtype(vocab_size: int) -> np.dtype:
    """The narrowest type that Megatron would choose: uint16 below 65,500 tokens, otherwise int32."""
    return np.dtype("<u2") if vocab_size < 65500 else np.dtype("<i4")


def bin_and_idx(prefix: str | Path) -> tuple[Path, Path]:
    """The two paths of a prefix, which may already end in ``.bin`` or ``.idx``."""
    path = Path(prefix).expanduser()
    # with_suffix is not used, because a prefix such as "corpus.v2" has a dot of its own.
    base = path.name.removesuffix(".bin").removesuffix(".idx")
    return path.with_name(base + ".bin"), path.with_name(base + ".idx")


class IndexedDataset:
    """A pair of token files, memory-mapped.

    Args:
        prefix: the path without ``.bin``/``.idx``, or with one of them.

    Raises:
        UserError: a file is missing, invalid or too short.
    """

    def __init__(self, prefix: str | Path):
        if Path(prefix).name in ("", ".", ".."):
            raise UserError(f"{prefix!s}: a prefix of a .bin/.idx pair is needed, not a folder.")
        self.bin_path, self.idx_path = bin_and_idx(prefix)
        for path in (self.idx_path, self.bin_path):
            if not path.is_file():
                raise UserError(missing_file(path))
        self._read_index()
        self._open_tokens()

    def __len__(self) -> int:
        """The number of documents."""
        return len(self._documents) - 1

    def __repr__(self) -> str:
        name = str(self.bin_path).removesuffix(".bin")
        return f"IndexedDataset({name!r}: {len(self)} documents, {self.num_tokens} tokens, {self.dtype})"

    def token_range(self, most: int) -> tuple[int, int]:
        """The smallest and the largest of the first ``most`` tokens of the file; (0, 0) without tokens."""
        count = min(most, self.num_tokens)
        head = self._bytes[: count * self.dtype.itemsize].view(self.dtype)
        return (int(head.min()), int(head.max())) if len(head) else (0, 0)

    def read(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Tokens ``[start, stop)`` of a document (to its end without `stop`).

        Returns:
            int64 ``[stop - start]``, a copy.

        Raises:
            IndexError: there is no such document.
            ValueError: the range is not inside the document.
        """
        if not 0 <= document < len(self):
            raise IndexError(f"{self.bin_path}: document {document} of {len(self)}")
        first, last = int(self._documents[document]), int(self._documents[document + 1])
        length = int(self.document_lengths[document])
        stop = length if stop is None else stop
        if not 0 <= start <= stop <= length:
            raise ValueError(
                f"{self.bin_path}: tokens {start} to {stop} of document {document}, which has {length}"
            )
        parts = []
        # The sequence's place in the document, in tokens.
        offset = 0
        for sequence in range(first, last):
            if offset >= stop:
                break
            tokens = int(self._lengths[sequence])
            low, high = max(start - offset, 0), min(stop - offset, tokens)
            if low < high:
                parts.append(self._sequence(sequence, low, high))
            offset += tokens
        if len(parts) == 1:
            return parts[0].astype(np.int64)
        return np.concatenate([np.empty(0, np.int64), *parts]).astype(np.int64, copy=False)

    def pieces(self, most: int) -> Iterator[np.ndarray]:
        """The bytes of all sequences in their order, at most `most` at a time."""
        for at in range(0, len(self._bytes), most):
            yield self._bytes[at : at + most]

    def _sequence(self, sequence: int, low: int, high: int) -> np.ndarray:
        """A view of tokens ``[low, high)`` of a sequence, in the file's type."""
        begin = int(self._pointers[sequence])
        size = self.dtype.itemsize
        return self._bytes[begin + low * size : begin + high * size].view(self.dtype)

    def _read_index(self) -> None:
        path = self.idx_path
        found = path.stat().st_size
        with path.open("rb") as file:
            header = file.read(HEADER.size)
        if header[: len(MAGIC)] != MAGIC[: len(header)] or not header:
            raise UserError(
                f"{path}: not an .idx file: it starts with {header[: len(MAGIC)]!r}, not {MAGIC!r}. "
                "Write it with `longspan prepare` or Megatron's preprocess_data.py."
            )
        if len(header) < HEADER.size:
            raise UserError(_short(path, HEADER.size, found))
        _, version, code, sequences, indices = HEADER.unpack(header)
        if version != VERSION:
            raise UserError(
                f"{path}: version {version} of the format; only {VERSION} is read. Write it anew."
            )
        if code not in DTYPES:
            raise UserError(
                f"{path}: token type code {code} is none of {sorted(DTYPES)}; the file is damaged."
            )
        self.dtype = DTYPES[code]
        if self.dtype.kind == "f":
            raise UserError(f"{path}: holds {self.dtype} numbers, not tokens; an integer type is needed.")
        expected = HEADER.size + 12 * sequences + 8 * indices
        if found < expected:
            raise UserError(_short(path, expected, found))
        if found not in (expected, expected + sequences):
            raise UserError(
                f"{path}: {found - expected} bytes behind the {expected} that its numbers of sequences ({sequences}) and "
                f"documents ask for; there may be none, or one a sequence (Megatron's modes). {_DAMAGED}"
            )

        raw = np.memmap(path, dtype=np.uint8, mode="r")
        lengths_end = HEADER.size + 4 * sequences
        pointers_end = lengths_end + 8 * sequences
        self._lengths = raw[HEADER.size : lengths_end].view("<i4")
        self._pointers = raw[lengths_end:pointers_end].view("<i8")
        self._documents = raw[pointers_end:expected].view("<i8")

        if sequences and int(self._lengths.min()) < 0:
            raise UserError(f"{path}: a sequence of {int(self._lengths.min())} tokens; the file is damaged.")
        documents = self._documents
        if indices == 0 or documents[0] != 0:
            first = int(documents[0]) if indices else "nothing"
            raise UserError(f"{path}: document indices start with {first}, not 0; the file is damaged.")
        if np.any(documents[1:] < documents[:-1]):
            at = int(np.argmax(documents[1:] < documents[:-1]))
            raise UserError(
                f"{path}: document indices do not ascend: {int(documents[at + 1])} after "
                f"{int(documents[at])}; the file is damaged."
            )
        if documents[-1] != sequences:
            raise UserError(
                f"{path}: document indices end at sequence {int(documents[-1])}, but there are {sequences} "
                "sequences; the file is damaged."
            )
        tokens_before = np.concatenate([[0], np.cumsum(self._lengths, dtype=np.int64)])
        size = self.dtype.itemsize
        if np.any(wrong := self._pointers != tokens_before[:-1] * size):
            at = int(np.argmax(wrong))
            raise UserError(
                f"{path}: sequence {at} starts at byte {int(self._pointers[at])}, but the sequences before it end at "
                f"{int(tokens_before[at]) * size}: {int(tokens_before[at])} tokens of {size} bytes ({self.dtype}). The lengths, "
                f"the places or the token type are wrong. {_DAMAGED}"
            )
        self.num_tokens = int(tokens_before[-1])
        self.document_lengths = np.diff(tokens_before[documents])
        """int64 ``[documents]``: tokens of each document."""

    def _open_tokens(self) -> None:
        found = self.bin_path.stat().st_size
        expected = self.num_tokens * self.dtype.itemsize
        if found < expected:
            raise UserError(_short(self.bin_path, expected, found))
        if found > expected:
            raise UserError(
                f"{self.bin_path}: {found} bytes, but {self.idx_path.name} describes {expected}: {self.num_tokens} tokens of "
                f"{self.dtype}. The two files do not belong together, or one is damaged. Copy both or write them again."
            )
        # An empty file cannot be mapped.
        self._bytes = np.memmap(self.bin_path, np.uint8, "r") if found else np.empty(0, np.uint8)


class IndexedDatasetWriter:
    """Writes a pair of token files, completely or not at all.

    It is a context manager. The tokens go to temporary files beside the final files. The temporary
    files are renamed at the end of the block, and removed if the block raises an error.

    Args:
        prefix: the path without ``.bin``/``.idx``, or with one of them; folders are created.
        dtype: one of the integer types in `DTYPES`; see `best_dtype`.

    Raises:
        UserError: tokens of this type cannot be written.
    """

    def __init__(self, prefix: str | Path, dtype: np.dtype | type | str):
        self.bin_path, self.idx_path = bin_and_idx(prefix)
        self.dtype = np.dtype(dtype).newbyteorder("<")
        if self.dtype not in CODES or self.dtype.kind == "f":
            known = ", ".join(str(d) for d in CODES if d.kind != "f")
            raise UserError(f"tokens of type {self.dtype} cannot be written; take one of {known}.")
        self._limits = np.iinfo(self.dtype)
        self.num_tokens = 0
        self._lengths = array("q")
        self._documents = array("q", [0])

    @property
    def num_documents(self) -> int:
        return len(self._documents) - 1

    def __enter__(self) -> IndexedDatasetWriter:
        self.bin_path.parent.mkdir(parents=True, exist_ok=True)
        # Two writers of one prefix use different temporary files.
        mark = f".{uuid.uuid4().hex[:8]}.tmp"
        self._bin_tmp = self.bin_path.with_name("." + self.bin_path.name + mark)
        self._idx_tmp = self.idx_path.with_name("." + self.idx_path.name + mark)
        self._file = self._bin_tmp.open("wb", buffering=1 << 20)
        return self

    def add_document(
        self, tokens: Sequence[int] | np.ndarray, sequence_lengths: Sequence[int] | None = None
    ) -> None:
        """Appends a document.

        Args:
            tokens: ``[t]`` token numbers.
            sequence_lengths: tokens in each of the document's sequences; None means one sequence.

        Raises:
            UserError: a token does not fit the type, or a sequence is too long for the format.
            ValueError: the sum of the sequences' lengths is not the number of tokens.
        """
        values = np.asarray(tokens, dtype=np.int64 if len(tokens) == 0 else None)
        if values.ndim != 1 or values.dtype.kind not in "iu":
            raise ValueError(f"tokens must be one row of integers, not {values.dtype} {list(values.shape)}")
        lengths = [len(values)] if sequence_lengths is None else [int(n) for n in sequence_lengths]
        if sum(lengths) != len(values) or min(lengths, default=0) < 0:
            raise ValueError(f"sequences of {lengths} tokens in a document of {len(values)}")
        if max(lengths, default=0) > MAX_SEQUENCE:
            raise UserError(f"a sequence of {max(lengths)} tokens; the format holds {MAX_SEQUENCE} at most.")
        if len(values):
            low, high = int(values.min()), int(values.max())
            if low < self._limits.min or high > self._limits.max:
                wrong = low if low < self._limits.min else high
                raise UserError(
                    f"token {wrong} does not fit {self.dtype.name} "
                    f"({self._limits.min} to {self._limits.max}): "
                    "take the type by best_dtype(vocab_size)."
                )
        self._file.write(values.astype(self.dtype, copy=False).tobytes())
        self._lengths.extend(lengths)
        self._documents.append(len(self._lengths))
        self.num_tokens += len(values)

    def add_file(self, other: IndexedDataset) -> None:
        """Appends all documents and sequences of a file with the same token type; copies tokens in pieces.

        Raises:
            ValueError: the file has another token type.
        """
        if other.dtype != self.dtype:
            raise ValueError(f"{other.dtype} tokens into a file of {self.dtype}")
        for piece in other.pieces(1 << 24):
            self._file.write(piece.data)
        before = len(self._lengths)
        self._lengths.frombytes(other._lengths.astype(np.int64).tobytes())
        self._documents.frombytes((other._documents[1:] + before).astype(np.int64).tobytes())
        self.num_tokens += other.num_tokens

    def __exit__(self, kind, value, traceback) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._file.close()
            self._bin_tmp.unlink(missing_ok=True)
            self._idx_tmp.unlink(missing_ok=True)

    def _finish(self) -> None:
        _sync(self._file)
        self._file.close()
        lengths = np.frombuffer(self._lengths, dtype=np.int64)
        pointers = (np.cumsum(lengths) - lengths) * self.dtype.itemsize
        documents = np.frombuffer(self._documents, dtype=np.int64)
        with self._idx_tmp.open("wb") as file:
            file.write(HEADER.pack(MAGIC, VERSION, CODES[self.dtype], len(lengths), len(documents)))
            file.write(lengths.astype("<i4").tobytes())
            file.write(pointers.astype("<i8").tobytes())
            file.write(documents.astype("<i8").tobytes())
            _sync(file)
        # An older .idx must never stand beside the new .bin.
        self.idx_path.unlink(missing_ok=True)
        os.replace(self._bin_tmp, self.bin_path)
        os.replace(self._idx_tmp, self.idx_path)


def _sync(file) -> None:
    file.flush()
    os.fsync(file.fileno())


_DAMAGED = "The file is damaged: copy it or write it again."


def _short(path: Path, expected: int, found: int) -> str:
    return f"{path}: cut short: {expected} bytes expected, {found} found. Copy it or write it again."


def missing_file(path: Path) -> str:
    """The message for a missing file, with similar names in its folder."""
    prefix = path.stem
    message = f"{path}: no such file. A dataset is a prefix with a .bin and an .idx file."
    if not path.parent.is_dir():
        return message + f" The folder {path.parent} does not exist."
    folder = path.parent
    other = path.with_suffix(".idx" if path.suffix == ".bin" else ".bin")
    if other.is_file():
        return message + f" {other.name} is there, its other half is not: copy it or write both again."
    if path.with_suffix("").is_dir():
        # The user gave the folder instead of a prefix in it.
        inside = sorted(p.stem for p in path.with_suffix("").glob("*.idx"))
        return message + (f" {prefix} is a folder; it holds {', '.join(inside[:5])}." if inside else "")
    known = sorted({p.stem for p in folder.iterdir() if p.suffix in (".bin", ".idx") and p.name[0] != "."})
    longer = [name for name in known if name.startswith(prefix)]
    # The usual mistake: Megatron adds "_text_document" to the prefix that the user gave.
    if longer:
        return message + f" Did you mean {folder / longer[0]}?"
    near = did_you_mean(prefix, known)
    if near or not known:
        return message + near
    return message + f" The folder has {', '.join(known[:5])}."
