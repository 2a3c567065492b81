"""Merges the token files of one folder into one pair, as Megatron-LM's ``merge_datasets.py`` does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from longspan.data.indexed import IndexedDataset, IndexedDatasetWriter, bin_and_idx, missing_file
from longspan.errors import UserError


def pairs_of(folder: str | Path) -> list[Path]:
    """The prefixes of a folder's .bin/.idx pairs, sorted by name.

    Raises:
        UserError: there is no such folder, it has no pair, or one file of a pair is missing.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        found = "is a file" if folder.exists() else "does not exist"
        raise UserError(f"--input {folder} {found}; a folder of .bin/.idx pairs is needed.")
    names = sorted({p.stem for p in folder.iterdir() if p.suffix in (".bin", ".idx") and p.name[0] != "."})
    if not names:
        raise UserError(
            f"--input {folder}: no .bin/.idx pair in this folder. To make them from text: longspan prepare --input {folder} "
            "--output-prefix PREFIX."
        )
    prefixes = [folder / name for name in names]
    halves = [missing_file(file) for prefix in prefixes for file in bin_and_idx(prefix) if not file.is_file()]
    if halves:
        raise UserError(halves)
    return prefixes


def merge(
    prefixes: list[Path], output: str | Path, progress: Callable[[int, int], None] | None = None
) -> dict[str, int]:
    """Writes the documents of all files, one file after another, with unchanged sequences.

    Tokens are copied in pieces, so memory holds only the lengths. The output is complete or absent.

    Returns:
        ``{"documents": ..., "tokens": ...}``: the numbers of documents and tokens that were written.

    Raises:
        UserError: a file is broken, or the files hold tokens of different types.
    """
    files = [IndexedDataset(prefix) for prefix in prefixes]
    kinds: dict[np.dtype, str] = {}
    for prefix, file in zip(prefixes, files):
        kinds.setdefault(file.dtype, prefix.name)
    if len(kinds) > 1:
        found = ", ".join(f"{kind.name} in {name}" for kind, name in kinds.items())
        raise UserError(
            f"the files hold tokens of different types: {found}. The type follows from the vocabulary's size, so they were made "
            "by different tokenizers: prepare them again with one, or blend them by weights (data_path) if it was one."
        )
    with IndexedDatasetWriter(output, files[0].dtype) as writer:
        for file in files:
            writer.add_file(file)
            if progress is not None:
                progress(writer.num_documents, writer.num_tokens)
    return {"documents": writer.num_documents, "tokens": writer.num_tokens}
