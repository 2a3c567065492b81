"""Lines to token files: byte for byte what the format says, several fields, sentences, workers."""

import json
import struct

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from longspan.data.preprocess import Encoding, documents_of, input_files, preprocess, sentence_splitter
from longspan.errors import UserError

WORDS = ["?", "a", "b", "c", "d", "."]


@pytest.fixture
def tokenizer(tmp_path):
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "tokenizer.json"))
    return str(tmp_path / "tokenizer.json")


@pytest.fixture
def lines(tmp_path):
    def write(*records, name="x.jsonl"):
        path = tmp_path / name
        path.write_text("\n".join(map(json.dumps, records)) + "\n", "utf-8")
        return path

    return write


def read_pair(prefix):
    """Documents as lists of sequences, by a reader that knows the format and nothing else."""
    raw = (prefix.parent / (prefix.name + ".idx")).read_bytes()
    tokens = (prefix.parent / (prefix.name + ".bin")).read_bytes()
    assert raw[:9] == b"MMIDIDX\x00\x00"
    version, code, sequences, documents = struct.unpack_from("<QBQQ", raw, 9)
    assert version == 1
    at = 34
    lengths = struct.unpack_from(f"<{sequences}i", raw, at)
    pointers = struct.unpack_from(f"<{sequences}q", raw, at + 4 * sequences)
    ends = struct.unpack_from(f"<{documents}q", raw, at + 12 * sequences)
    assert len(raw) == at + 12 * sequences + 8 * documents
    kind, size = {8: ("H", 2), 4: ("i", 4)}[code]
    assert pointers == tuple(size * sum(lengths[:i]) for i in range(sequences))
    assert len(tokens) == size * sum(lengths)
    rows = [list(struct.unpack_from(f"<{n}{kind}", tokens, p)) for n, p in zip(lengths, pointers)]
    return [rows[a:b] for a, b in zip(ends, ends[1:])]


def test_fields_become_files_and_empty_documents_keep_their_line(lines, tokenizer, tmp_path):
    path = lines({"x": "a b", "y": "c"}, {"x": "", "y": "d d"}, {"x": "zzz c", "y": ["a", "", "b c"]})
    prefixes = [tmp_path / "p_x_document", tmp_path / "p_y_document"]
    done = preprocess(documents_of([path], ["x", "y"]), prefixes, Encoding(tokenizer, 6, 5))
    assert done == [{"documents": 3, "tokens": 6}, {"documents": 3, "tokens": 9}]
    assert read_pair(prefixes[0]) == [[[1, 2, 5]], [], [[0, 3, 5]]]
    assert read_pair(prefixes[1]) == [[[3, 5]], [[4, 4, 5]], [[1], [2, 3, 5]]]


def test_the_type_follows_from_the_vocabulary(lines, tokenizer, tmp_path):
    path = lines({"text": "a"})
    preprocess(documents_of([path], ["text"]), [tmp_path / "small"], Encoding(tokenizer, 65499, None))
    preprocess(documents_of([path], ["text"]), [tmp_path / "large"], Encoding(tokenizer, 65500, None))
    assert (tmp_path / "small.bin").read_bytes() == b"\1\0"
    assert (tmp_path / "large.bin").read_bytes() == b"\1\0\0\0"


def test_workers_give_the_same_bytes(lines, tokenizer, tmp_path):
    path = lines(*({"text": "a b c d " * (i % 7)} for i in range(1000)))
    for workers, name in ((1, "one"), (2, "two")):
        preprocess(documents_of([path], ["text"]), [tmp_path / name], Encoding(tokenizer, 6, 5), workers)
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"one{suffix}").read_bytes() == (tmp_path / f"two{suffix}").read_bytes()
    assert len(read_pair(tmp_path / "one")) == 1000


def test_a_mistake_in_a_worker_is_the_users_and_leaves_nothing(lines, tmp_path):
    path = lines({"text": "1 2"}, {"text": "3 x"})
    for workers in (1, 2):
        with pytest.raises(UserError, match="NullTokenizer reads numbers"):
            preprocess(documents_of([path], ["text"]), [tmp_path / "out"], Encoding(None, 9, None), workers)
    assert not list(tmp_path.glob("*out*"))


def test_no_tokenizer_reads_numbers(lines, tmp_path):
    path = lines({"text": "1 2  3"}, {"text": "8"})
    preprocess(documents_of([path], ["text"]), [tmp_path / "n"], Encoding(None, 9, 9))
    assert read_pair(tmp_path / "n") == [[[1, 2, 3, 9]], [[8, 9]]]
    with pytest.raises(UserError, match="tokens 9 to 9 with --vocab-size 9"):
        preprocess(documents_of([lines({"text": "9"})], ["text"]), [tmp_path / "n"], Encoding(None, 9, 9))


def test_input_files(lines, tmp_path):
    a, b = lines({"text": "a"}, name="a.jsonl"), lines({"text": "b"}, name="b.jsonl")
    assert input_files([str(tmp_path / "*.jsonl")]) == [a, b]
    assert input_files([str(b), str(tmp_path / "*.jsonl")]) == [b, a]
    with pytest.raises(UserError, match="no file matches"):
        input_files([str(tmp_path / "*.parquet")])
    (tmp_path / "x.txt").write_text("a")
    with pytest.raises(UserError, match="x.txt: not .jsonl"):
        list(documents_of([tmp_path / "x.txt"], ["body"]))
    with pytest.raises(UserError, match="line 1: no field 'body'"):
        list(documents_of([a], ["body"]))
    with pytest.raises(UserError, match="no document with any text"):
        preprocess(documents_of([lines({"text": ""})], ["text"]), [tmp_path / "n"], Encoding(None, 9, 9))


def test_sentences(lines, tokenizer, tmp_path, monkeypatch):
    nltk = pytest.importorskip("nltk")
    from nltk.tokenize import punkt

    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    with pytest.raises(
        UserError, match=r"its model of 'english' is not: python -m nltk.downloader punkt_tab"
    ):
        sentence_splitter("english", False)
    trainer = punkt.PunktTrainer("Dr. A went. Dr. B went. Dr. C went. They saw Dr. D. It was late.")
    folder = tmp_path / "tokenizers" / "punkt_tab" / "english"
    folder.mkdir(parents=True)
    punkt.save_punkt_params(trainer.get_params(), str(folder))
    text = "A cat.\n\nA dog sat. It slept."
    assert sentence_splitter("english", False)(text) == ["A cat.", "A dog sat.", "It slept."]
    assert sentence_splitter("english", True)(text) == ["A cat.\n\n", "A dog sat. ", "It slept."]
    path = lines({"text": "a cats. A dog."})
    encoding = Encoding(tokenizer, 6, 4, language="english")
    preprocess(documents_of([path], ["text"]), [tmp_path / "s"], encoding)
    assert read_pair(tmp_path / "s") == [[[1, 0, 5], [0, 0, 5, 4]]]


def test_without_nltk_the_remedy_is_said(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "nltk.tokenize.punkt", None)
    with pytest.raises(UserError, match=r"pip install 'longspan\[sentences\]'"):
        sentence_splitter("english", False)
