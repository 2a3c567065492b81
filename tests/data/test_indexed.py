"""Megatron's token files: the bytes, the faults, and that a failed write leaves nothing."""

import struct

import numpy as np
import pytest

from longspan.data.indexed import IndexedDataset, IndexedDatasetWriter, best_dtype
from longspan.errors import UserError

MAGIC = b"MMIDIDX\x00\x00"


def index_bytes(lengths, pointers, documents, *, magic=MAGIC, version=1, code=8):
    """An .idx written out by hand."""
    return (
        magic
        + struct.pack("<Q", version)
        + struct.pack("<B", code)
        + struct.pack("<QQ", len(lengths), len(documents))
        + struct.pack(f"<{len(lengths)}i", *lengths)
        + struct.pack(f"<{len(pointers)}q", *pointers)
        + struct.pack(f"<{len(documents)}q", *documents)
    )


# Three documents of uint16: two sequences (2 + 3 tokens), none, one sequence (1 token).
TOKENS = struct.pack("<6H", 5, 6, 7, 8, 65535, 10)
INDEX = index_bytes([2, 3, 1], [0, 4, 10], [0, 2, 2, 3])


@pytest.fixture
def files(tmp_path):
    def write(idx=INDEX, tokens=TOKENS, name="corpus"):
        (tmp_path / f"{name}.idx").write_bytes(idx)
        (tmp_path / f"{name}.bin").write_bytes(tokens)
        return tmp_path / name

    return write


@pytest.mark.parametrize("suffix", ["", ".bin", ".idx"])
def test_reads_bytes_put_together_by_hand(files, suffix):
    data = IndexedDataset(str(files(name="corpus.v2")) + suffix)
    assert len(data) == 3
    assert data.num_tokens == 6
    assert data.dtype == np.uint16
    assert data.document_lengths.dtype == np.int64
    assert data.document_lengths.tolist() == [5, 0, 1]
    assert data.read(0).tolist() == [5, 6, 7, 8, 65535]
    assert data.read(0).dtype == np.int64
    assert data.read(1).tolist() == []
    assert data.read(1).dtype == np.int64
    assert data.read(2).tolist() == [10]
    assert "3 documents" in repr(data)


def test_reads_every_range_across_sequences(files):
    data = IndexedDataset(files())
    whole = [5, 6, 7, 8, 65535]
    for start in range(6):
        for stop in range(start, 6):
            assert data.read(0, start, stop).tolist() == whole[start:stop]


def test_reading_outside_is_an_error(files):
    data = IndexedDataset(files())
    for document in (-1, 3):
        with pytest.raises(IndexError, match="of 3"):
            data.read(document)
    for start, stop in ((0, 6), (-1, 2), (3, 2)):
        with pytest.raises(ValueError, match="which has 5"):
            data.read(0, start, stop)


@pytest.mark.parametrize(
    ("code", "dtype"), [(1, "u1"), (2, "i1"), (3, "<i2"), (4, "<i4"), (5, "<i8"), (8, "<u2")]
)
def test_every_integer_type_both_ways(files, tmp_path, code, dtype):
    size = np.dtype(dtype).itemsize
    tokens = np.array([1, 2, 100], dtype=dtype).tobytes()
    index = index_bytes([1, 2], [0, size], [0, 1, 2], code=code)
    data = IndexedDataset(files(index, tokens))
    assert data.read(1).tolist() == [2, 100]
    with IndexedDatasetWriter(tmp_path / "again", dtype) as writer:
        writer.add_document([1])
        writer.add_document([2, 100])
    assert (tmp_path / "again.bin").read_bytes() == tokens
    assert (tmp_path / "again.idx").read_bytes() == index


@pytest.mark.parametrize(
    ("index", "tokens", "message"),
    [
        (index_bytes([1], [0], [0, 1], magic=b"notmagic!"), TOKENS, "not an .idx file"),
        (b"", TOKENS, "not an .idx file"),
        (index_bytes([1], [0], [0, 1], version=2), TOKENS, "version 2"),
        (index_bytes([1], [0], [0, 1], code=9), TOKENS, "code 9"),
        (index_bytes([1], [0], [0, 1], code=6), TOKENS, "float64"),
        (index_bytes([1], [0], [0, 1], code=7), TOKENS, "float32"),
        (INDEX[:20], TOKENS, "34 bytes expected, 20 found"),
        (INDEX[:-1], TOKENS, f"{len(INDEX)} bytes expected, {len(INDEX) - 1} found"),
        (INDEX, TOKENS[:-3], "12 bytes expected, 9 found"),
        (INDEX, b"", "12 bytes expected, 0 found"),
        (INDEX, TOKENS + b"\0\0", "14 bytes, but corpus.idx describes 12: 6 tokens of uint16"),
        (index_bytes([2, 3, 1], [0, 4, 12], [0, 3]), TOKENS, "sequence 2 starts at byte 12, .*end at 10"),
        (index_bytes([2, 3, 1], [-2, 4, 10], [0, 3]), TOKENS, "sequence 0 starts at byte -2"),
        (index_bytes([2, 3, 1], [0, 10, 4], [0, 3]), TOKENS, "sequence 1 starts at byte 10"),
        (index_bytes([6], [2**63 - 1], [0, 1]), TOKENS, "starts at byte 9223372036854775807"),
        # the type byte of another width: seen by the places, and where there is one sequence by the size
        (
            index_bytes([2, 3, 1], [0, 4, 10], [0, 2, 2, 3], code=4),
            TOKENS,
            "sequence 1 starts at byte 4, .*int32",
        ),
        (index_bytes([3], [0], [0, 1], code=4), TOKENS[:6], "12 bytes expected, 6 found"),
        (index_bytes([6], [0], [0, 1], code=1), TOKENS, "12 bytes, but corpus.idx describes 6"),
        # lengths of other data
        (index_bytes([2, 3], [0, 4], [0, 2]), TOKENS, "12 bytes, but corpus.idx describes 10"),
        (index_bytes([3, 2, 1], [0, 4, 10], [0, 3]), TOKENS, "sequence 1 starts at byte 4, .*end at 6"),
        (INDEX + bytes(2), TOKENS, "2 bytes behind the"),
        (INDEX + bytes(4), TOKENS, "one a sequence"),
        (index_bytes([2, -3], [0, 4], [0, 2]), TOKENS, "-3 tokens"),
        (index_bytes([2, 3, 1], [0, 4, 10], [1, 3]), TOKENS, "start with 1"),
        (index_bytes([2, 3, 1], [0, 4, 10], []), TOKENS, "start with nothing"),
        (index_bytes([2, 3, 1], [0, 4, 10], [0, 2, 1, 3]), TOKENS, "1 after 2"),
        (index_bytes([2, 3, 1], [0, 4, 10], [0, 2]), TOKENS, "end at sequence 2"),
    ],
)
def test_every_fault_is_found_when_opened(files, index, tokens, message):
    prefix = files(index, tokens)
    with pytest.raises(UserError, match=message) as error:
        IndexedDataset(prefix)
    assert "corpus." in str(error.value)


def test_modes_of_a_multimodal_index_may_follow(files):
    assert len(IndexedDataset(files(INDEX + bytes(3)))) == 3


def test_missing_files_name_the_near_ones(files, tmp_path):
    files(name="corpus_text_document")
    with pytest.raises(UserError, match=r"Did you mean .*corpus_text_document"):
        IndexedDataset(tmp_path / "corpus")
    with pytest.raises(UserError, match="Did you mean corpus_text_document"):
        IndexedDataset(tmp_path / "korpus_text_document")
    with pytest.raises(UserError, match="The folder has corpus_text_document"):
        IndexedDataset(tmp_path / "zzz")
    with pytest.raises(UserError, match="is a folder; it holds corpus_text_document"):
        IndexedDataset(tmp_path)
    with pytest.raises(UserError, match="nowhere does not exist"):
        IndexedDataset(tmp_path / "nowhere" / "corpus")
    (tmp_path / "corpus_text_document.bin").unlink()
    with pytest.raises(UserError, match=r"corpus_text_document.bin: no such file.*idx is there"):
        IndexedDataset(tmp_path / "corpus_text_document")
    with pytest.raises(UserError, match="not a folder"):
        IndexedDataset(".")


def test_round_trip_with_sequences_and_empty_documents(tmp_path):
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 60000, size) for size in (7, 0, 1, 30)]
    prefix = tmp_path / "new" / "folder" / "x"
    with IndexedDatasetWriter(prefix, best_dtype(60000)) as writer:
        for tokens in documents[:-1]:
            writer.add_document(tokens)
        writer.add_document(documents[-1], sequence_lengths=[10, 0, 20])
        assert (writer.num_documents, writer.num_tokens) == (4, 38)
    data = IndexedDataset(prefix)
    assert [data.read(i).tolist() for i in range(4)] == [d.tolist() for d in documents]
    assert sorted(p.name for p in prefix.parent.iterdir()) == ["x.bin", "x.idx"]


def test_nothing_written_is_an_empty_dataset(tmp_path):
    with IndexedDatasetWriter(tmp_path / "x", "i4"):
        pass
    assert len(IndexedDataset(tmp_path / "x")) == 0


def fail_while_writing(prefix):
    with IndexedDatasetWriter(prefix, "i4") as writer:
        writer.add_document([3])
        raise RuntimeError


def test_an_exception_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError):
        fail_while_writing(tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_an_exception_leaves_the_old_files(tmp_path):
    with IndexedDatasetWriter(tmp_path / "x", "i4") as writer:
        writer.add_document([1, 2])
        assert not (tmp_path / "x.bin").exists()  # nothing is there before all is
    with pytest.raises(RuntimeError):
        fail_while_writing(tmp_path / "x")
    assert IndexedDataset(tmp_path / "x").read(0).tolist() == [1, 2]
    with IndexedDatasetWriter(tmp_path / "x", "u1") as writer:
        writer.add_document([3])
    assert IndexedDataset(tmp_path / "x").read(0).tolist() == [3]


def test_writer_refuses_what_does_not_fit(tmp_path):
    with pytest.raises(UserError, match="float32"):
        IndexedDatasetWriter(tmp_path / "x", np.float32)
    with IndexedDatasetWriter(tmp_path / "x", np.uint16) as writer:
        with pytest.raises(UserError, match="token 65536 does not fit uint16"):
            writer.add_document([1, 65536])
        with pytest.raises(UserError, match="token -1"):
            writer.add_document([-1])
        with pytest.raises(ValueError, match="in a document of 3"):
            writer.add_document([1, 2, 3], sequence_lengths=[1, 1])
        with pytest.raises(ValueError, match="float64"):
            writer.add_document([1.5])
    assert len(IndexedDataset(tmp_path / "x")) == 0


def test_best_dtype():
    assert best_dtype(65499) == np.uint16
    assert best_dtype(65500) == np.int32
