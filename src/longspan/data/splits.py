"""From the data that a config names to its datasets for training, evaluation and test.

There are two ways to name data: ``datasets`` with ``val_set_size`` (documents held out at random), and
Megatron-LM's ``data_path`` with ``split`` (documents in the order of their file, cut into three ranges).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import pairwise

import numpy as np

from longspan.config.data import DEFAULT_SPLIT, Member, marks_documents, read_blend, read_split
from longspan.config.run import Run
from longspan.config.schema import DatasetConfig, TrainConfig
from longspan.data.blend import BlendedDataset
from longspan.data.indexed import IndexedDataset
from longspan.data.loader import TokenDataset
from longspan.data.mock import MockDocuments
from longspan.data.packing import EndOfDocument
from longspan.data.samples import open_masks
from longspan.errors import UserError

PARTS = ("training", "evaluation", "test")

Documents = IndexedDataset | MockDocuments


class DocumentRange:
    """Documents ``[first, last)`` of a file, with the interface of a file."""

    def __init__(self, file: Documents, first: int, last: int):
        self.file, self.first = file, first
        self.document_lengths = file.document_lengths[first:last]

    def __len__(self) -> int:
        return len(self.document_lengths)

    def read(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        return self.file.read(self.first + document, start, stop)


def named_files(config: TrainConfig) -> list[tuple[str, Documents]]:
    """All files of a prepared config, each once, with its name in the config."""
    if config.mock_data:
        return [("mock_data", _mock(config))]
    if config.datasets:
        sources = [*config.datasets, *config.test_datasets]
        return [(source.path, IndexedDataset(source.prepared or source.path)) for source in sources]
    paths = (m.path for name in ("data_path", *_OWN.values()) for m in _members(config, name))
    return [(path, IndexedDataset(path)) for path in dict.fromkeys(paths)]


def open_parts(config: TrainConfig) -> tuple[TokenDataset, TokenDataset | None, TokenDataset | None]:
    """The training, the evaluation and the test set of a prepared config; None for a missing set.

    Raises:
        UserError: a file is missing or broken, or a part that the config names has no document.
    """
    if config.datasets:
        own, valid = _axolotl(config, config.datasets, "train"), None
        if config.test_datasets:
            valid = _axolotl(config, config.test_datasets, "whole")
        elif config.val_set_size > 0:
            valid = _axolotl(config, config.datasets, "validation")
        return own, valid, None
    if config.train_data_path is not None:
        parts = [
            _blend(config, part, [(m, IndexedDataset(m.path)) for m in _members(config, name)])
            for part, name in _OWN.items()
        ]
    else:
        parts = _split(config)
    train, valid, test = parts
    assert train is not None
    return train, valid, test


def split_ranges(documents: int, shares: list[float]) -> list[tuple[int, int]]:
    """The (first, last) document of each part: sums of the shares, rounded to documents as in Megatron-LM."""
    ends = [round(sum(shares[:i]) * documents) for i in range(len(shares) + 1)]
    return list(pairwise(ends))


#: Part -> the key that names the files of this part alone.
_OWN = dict(zip(PARTS, ("train_data_path", "valid_data_path", "test_data_path")))


def _mock(config: TrainConfig) -> MockDocuments:
    assert config.vocab_size is not None
    return MockDocuments(config.vocab_size, config.sequence_len, config.seed)


def _members(config: TrainConfig, name: str) -> list[Member]:
    values = getattr(config, name)
    return read_blend(name, values) if values else []


def _make(config: TrainConfig, files: list, **split) -> TokenDataset:
    return TokenDataset(
        files,
        config.sequence_len,
        config.seed,
        sample_packing=config.sample_packing,
        end_of_document=_end_of_document(config),
        **split,
    )


def _end_of_document(config: TrainConfig) -> EndOfDocument | None:
    if not marks_documents(config):
        return None
    assert config.eod_token_id is not None
    return EndOfDocument(
        config.eod_token_id, config.reset_position_ids, config.reset_attention_mask, config.eod_mask_loss
    )


def _axolotl(config: TrainConfig, sources: list[DatasetConfig], split: str) -> TokenDataset:
    prefixes = [source.prepared or source.path for source in sources]
    files = [(IndexedDataset(prefix), open_masks(prefix)) for prefix in prefixes]

    def make(files: list) -> TokenDataset:
        return _make(
            config,
            [file for file, _ in files],
            masks=[mask for _, mask in files],
            split=split,
            val_set_size=config.val_set_size,
            excess_length_strategy=config.excess_length_strategy,
        )

    weights = [None if s.weight is None else Fraction(str(s.weight)) for s in sources]
    return _mix(files, weights, make, held_out=split != "train")


def _split(config: TrainConfig) -> list[TokenDataset | None]:
    shares = read_split(config.split or DEFAULT_SPLIT)
    members = [Member("mock_data", None)] if config.mock_data else _members(config, "data_path")
    files: list[Documents] = (
        [_mock(config)] if config.mock_data else [IndexedDataset(m.path) for m in members]
    )
    ranges = [split_ranges(len(file), shares) for file in files]
    parts = []
    for i, part in enumerate(PARTS):
        cut = [(m, DocumentRange(file, *r[i])) for m, file, r in zip(members, files, ranges)]
        made = _blend(config, part, cut)
        if made is None and shares[i] > 0 and (config.split is not None or i == 0):
            counts = ", ".join(f"{len(file)} of {m.path}" for m, file in zip(members, files))
            raise UserError(
                f"split {config.split or DEFAULT_SPLIT!r} leaves no document with a token in it for {part} (documents: {counts}). "
                f"{'Give training a larger share' if i == 0 else f'Give {part} a larger share, or 0'}, or give more documents."
            )
        parts.append(made)
    return parts


def _blend(
    config: TrainConfig, part: str, files: Sequence[tuple[Member, Documents | DocumentRange]]
) -> TokenDataset | None:
    """A part's files as one dataset; None without tokens. Training files with a weight must have tokens."""
    full = [(member, file) for member, file in files if file.document_lengths.any()]
    empty = [member.path for member, file in files if not file.document_lengths.any()]
    if empty and full and part == "training" and files[0][0].weight is not None:
        raise UserError(
            f"{', '.join(empty)}: no document with a token in it for training, but a weight in the blend. Leave it out, or give "
            "training a larger share of split."
        )
    if not full:
        if part in _OWN and getattr(config, _OWN[part]) is not None:
            raise UserError(f"{_OWN[part]}: no document with a token in it.")
        return None
    weights = [member.weight for member, _ in full]
    return _mix(
        [file for _, file in full], weights, lambda some: _make(config, some), held_out=part != "training"
    )


def _mix(
    files: list, weights: list[Fraction | None], make: Callable[[list], TokenDataset], held_out: bool
) -> TokenDataset:
    """One dataset of all files, or, if there are weights, a blend of one dataset for each file."""
    if len(files) == 1 or weights[0] is None:
        return make(files)
    return BlendedDataset([make([file]) for file in files], [w for w in weights if w is not None], held_out)


def open_datasets(run: Run) -> tuple[TokenDataset, TokenDataset | None, TokenDataset | None]:
    """The training set, the held-out set and the test set of a prepared config; None for a missing set."""
    train, valid, test = open_parts(run.config)
    return (train, None, None) if run.config.eval_iters == 0 else (train, valid, test)
