"""Merged token files: the documents and sequences of all, byte for byte."""

import numpy as np
import pytest

from longspan.data import indexed
from longspan.data.indexed import HEADER, IndexedDataset, IndexedDatasetWriter
from longspan.data.merge import merge, pairs_of
from longspan.errors import UserError


def write(prefix, documents, dtype="u2"):
    with IndexedDatasetWriter(prefix, dtype) as writer:
        for sequences in documents:
            writer.add_document([t for s in sequences for t in s], [len(s) for s in sequences])


DOCUMENTS = {"b": [[[1, 2], [3]], []], "a": [[[4]]], "c": [[[5, 6, 7]], [[8], [9, 9]]]}


def test_it_is_what_writing_all_at_once_gives(tmp_path):
    folder = tmp_path / "in"
    for name, documents in DOCUMENTS.items():
        write(folder / name, documents)
    (folder / "notes.json").write_text("{}")
    prefixes = pairs_of(folder)
    assert [p.name for p in prefixes] == ["a", "b", "c"]
    assert merge(prefixes, tmp_path / "out") == {"documents": 5, "tokens": 10}
    write(tmp_path / "whole", [d for name in "abc" for d in DOCUMENTS[name]])
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"out{suffix}").read_bytes() == (tmp_path / f"whole{suffix}").read_bytes()


def test_a_file_whose_sequences_are_not_in_order_is_refused(tmp_path):
    folder = tmp_path / "in"
    write(folder / "a", [[[1, 2]], [[3]]])
    idx = folder / "a.idx"
    raw = bytearray(idx.read_bytes())
    at = HEADER.size + 2 * 4
    raw[HEADER.size : HEADER.size + 8] = np.array([1, 2], "<i4").tobytes()
    raw[at : at + 16] = np.array([4, 0], "<i8").tobytes()  # the last token first
    idx.write_bytes(bytes(raw))
    with pytest.raises(UserError, match="a.idx: sequence 0 starts at byte 4"):
        merge(pairs_of(folder), tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_pieces_are_small(tmp_path):
    write(tmp_path / "a", [[list(range(100))]])
    assert [len(p) for p in IndexedDataset(tmp_path / "a").pieces(64)] == [64, 64, 64, 8]


def test_what_does_not_fit_is_refused(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        pairs_of(tmp_path / "in")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "x.jsonl").write_text("{}")
    with pytest.raises(UserError, match=r"no .bin/.idx pair in this folder.*longspan prepare --input"):
        pairs_of(tmp_path / "in")
    write(tmp_path / "in" / "a", [[[1]]])
    write(tmp_path / "in" / "b", [[[1]]], "i4")
    with pytest.raises(UserError, match="uint16 in a, int32 in b"):
        merge(pairs_of(tmp_path / "in"), tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))
    (tmp_path / "in" / "b.bin").unlink()
    with pytest.raises(UserError, match="b.bin: no such file"):
        pairs_of(tmp_path / "in")
    assert indexed.missing_file(tmp_path / "in" / "b.bin").startswith(str(tmp_path))
