"""Documents from files, tokenizers, and the cache of tokenised datasets."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from longspan.data import text as text_module
from longspan.data.indexed import IndexedDataset
from longspan.data.text import (
    eod_id,
    find_sources,
    iter_documents,
    load_tokenizer,
    prepare_dataset,
    special_tokens,
    tokenize_to_indexed,
    train_tokenizer,
)
from longspan.data.tokenizer_files import changed_copy
from longspan.errors import UserError

DOCUMENTS = ["the cat sat on the mat\n" * 20, "def f(x):\n    return x + 1\n" * 20, "größe 日本語"]


@pytest.fixture
def corpus(tmp_path):
    """A folder with three documents and what is to be skipped."""
    root = tmp_path / "corpus"
    for name, content in {
        "b.txt": DOCUMENTS[0],
        "a/z.py": DOCUMENTS[1],
        "c.MD": DOCUMENTS[2],
        "empty.txt": "",
        "data.bin": "no",
        "settings.json": "{}",
        ".git/x.py": "no",
        "a/__pycache__/x.py": "no",
        "node_modules/x.js": "no",
        "lib/site-packages/x.py": "no",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content.encode())
    return root


@pytest.fixture
def lines(tmp_path):
    def write(*records, name="x.jsonl"):
        path = tmp_path / name
        path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records), "utf-8")
        return path

    return write


def word_tokenizer(words):
    """A tokenizer of whole words, so that token numbers are known."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def test_find_sources_in_a_folder(corpus):
    names = [p.relative_to(corpus).as_posix() for p in find_sources(str(corpus))]
    assert names == ["a/z.py", "b.txt", "c.MD", "empty.txt"]
    assert [p.name for p in find_sources(corpus, suffixes={".py"})] == ["z.py"]


def test_find_sources_of_the_standard_library():
    names = {p.name for p in find_sources("python-stdlib")}
    assert {"argparse.py", "dataclasses.py"} <= names
    assert not any("site-packages" in p.parts for p in find_sources("python-stdlib"))


def test_find_sources_refuses(corpus, tmp_path):
    with pytest.raises(UserError, match=r"korpus: no such file.*Did you mean corpus\?"):
        find_sources(tmp_path / "korpus")
    with pytest.raises(UserError, match="no such file"):
        find_sources(tmp_path / "no" / "where")
    with pytest.raises(UserError, match="no text file in this folder"):
        find_sources(corpus / ".git", suffixes={".txt"})
    (tmp_path / "x.parquet").write_bytes(b"PAR1\0\0")
    with pytest.raises(UserError, match="zero bytes"):
        find_sources(tmp_path / "x.parquet")


def test_an_empty_path_is_not_the_current_folder(corpus, monkeypatch):
    monkeypatch.chdir(corpus)
    assert find_sources(".")
    for path in ("", " "):
        with pytest.raises(UserError, match="an empty path"):
            find_sources(path)


def test_documents_are_files(corpus, tmp_path):
    assert list(iter_documents(corpus)) == [DOCUMENTS[1], DOCUMENTS[0], DOCUMENTS[2]]
    broken = tmp_path / "broken.txt"
    broken.write_bytes(b"\xef\xbb\xbfa\xffb\r\n")
    assert list(iter_documents(str(broken))) == ["a\ufffdb\r\n"]


def test_documents_are_json_lines(lines):
    path = lines({"text": "one"}, "", {"text": ""}, {"text": "zwei ü", "n": 1}, r'{"text": "\ud800"}')
    assert list(iter_documents(path)) == ["one", "zwei ü", "?"]
    assert list(iter_documents(lines({"body": "b"}), field="body")) == ["b"]
    assert list(iter_documents(lines({"text": "b"}, name="x.json"))) == ["b"]
    assert list(iter_documents(lines('[{"text": "a"},', ' {"text": "b"}]', name="x.json"))) == ["a", "b"]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ('{"text": ', r"x.jsonl, line 3: not JSON"),
        ({"texts": "a", "id": 1}, r"x.jsonl, line 3: no field 'text'.*'texts', 'id'\. Did you mean texts"),
        ({}, r"x.jsonl, line 3: no field 'text'. The fields are none"),
        ('["a"]', r"x.jsonl, line 3: a JSON list"),
        ({"text": 3}, r"x.jsonl, line 3: .*int; it must be a string"),
    ],
)
def test_broken_lines_are_named(lines, record, message):
    with pytest.raises(UserError, match=message):
        list(iter_documents(lines({"text": "a"}, "", record)))


def test_train_tokenizer(tmp_path):
    folder = train_tokenizer(DOCUMENTS, 300, tmp_path / "tok")
    assert folder == tmp_path / "tok"
    tokenizer = load_tokenizer(folder)
    assert tokenizer.token_to_id("<|endoftext|>") == 0
    assert 257 < tokenizer.get_vocab_size() <= 300
    for document in [*DOCUMENTS, "\x00 \t anything ☃"]:
        assert tokenizer.decode(tokenizer.encode(document).ids) == document
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert settings["eos_token"] == "<|endoftext|>"
    assert sorted(p.name for p in folder.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    with pytest.raises(UserError, match="at least 257"):
        train_tokenizer(DOCUMENTS, 256, tmp_path / "small")


def test_training_is_the_same_in_another_process(tmp_path):
    train_tokenizer(DOCUMENTS, 320, tmp_path / "here")
    code = (
        "import sys; from longspan.data.text import train_tokenizer;"
        f"train_tokenizer({DOCUMENTS!r}, 320, sys.argv[1])"
    )
    source = Path(text_module.__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(source), "PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "there")], check=True, env=environment)
    here, there = ((tmp_path / name / "tokenizer.json").read_bytes() for name in ("here", "there"))
    assert here == there


def test_transformers_reads_the_folder(tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = train_tokenizer(DOCUMENTS, 300, tmp_path / "tok")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.eos_token_id == 0
    assert tokenizer(DOCUMENTS[0])["input_ids"] == load_tokenizer(folder).encode(DOCUMENTS[0]).ids


def test_load_tokenizer(tmp_path):
    tokenizer = word_tokenizer(["?", "a"])
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        assert load_tokenizer(path).encode("a a a").ids == [1, 1, 1]
    with pytest.raises(UserError, match=r"Did you mean tokenizer.json\?"):
        load_tokenizer(tmp_path / "tokeniser.json")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no tokenizer\.json in this folder"):
        load_tokenizer(tmp_path / "empty")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="not a tokenizer"):
        load_tokenizer(tmp_path)


def test_eod_id(tmp_path):
    tokenizer = word_tokenizer(["?", "</s>", "<end>", "<|endoftext|>"])
    config = tmp_path / "tokenizer_config.json"
    assert eod_id(tokenizer, None) == 3
    assert eod_id(tokenizer, tmp_path) == 3
    for token, number in (("<end>", 2), ({"content": "<end>", "lstrip": False}, 2), (None, 3), ("<gone>", 3)):
        config.write_text(json.dumps({"eos_token": token}))
        assert eod_id(tokenizer, tmp_path) == number
        assert eod_id(tokenizer, tmp_path / "tokenizer.json") == number
    assert eod_id(word_tokenizer(["?", "</s>"]), None) == 1
    assert eod_id(word_tokenizer(["?"]), None) is None
    config.write_text("{")
    with pytest.raises(UserError, match="not a JSON object"):
        eod_id(tokenizer, tmp_path)


def test_special_tokens_of_both_settings_files(tmp_path):
    config, older = tmp_path / "tokenizer_config.json", tmp_path / "special_tokens_map.json"
    older.write_text(json.dumps({"eos_token": {"content": "<end>"}, "bos_token": "<s>", "extra": ["x"]}))
    assert special_tokens(tmp_path) == {"eos_token": "<end>", "bos_token": "<s>"}
    assert eod_id(word_tokenizer(["?", "</s>", "<end>"]), tmp_path) == 2
    config.write_text(json.dumps({"eos_token": "</s>", "bos_token": None}))
    assert special_tokens(tmp_path) == {"eos_token": "<end>", "bos_token": "<s>"}  # as transformers has it
    config.write_text(json.dumps({"eos_token": "</s>", "added_tokens_decoder": {}}))
    assert special_tokens(tmp_path / "tokenizer.json") == {"eos_token": "</s>", "bos_token": "<s>"}
    for file in (config, older):
        for wrong in ("[]", "{", "[" * 100_000):
            file.write_text(wrong)
            with pytest.raises(UserError, match=f"{file.name}: "):
                special_tokens(tmp_path)
        file.write_text("{}")


def test_special_tokens_agree_with_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    word_tokenizer(["?", "</s>", "<end>", "<s>"]).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "<end>", "bos_token": "<s>"}')
    for decoder in ({}, {"added_tokens_decoder": {"1": {"content": "</s>"}, "3": {"content": "<s>"}}}):
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "bos_token": "<s>"}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | decoder))
        loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
        assert special_tokens(tmp_path) == {"eos_token": loaded.eos_token, "bos_token": loaded.bos_token}


def test_a_tokenizers_copy_keeps_the_tokens_of_both_files(tmp_path):
    given = tmp_path / "given"
    given.mkdir()
    word_tokenizer(["?", "</s>", "<end>", "<s>"]).save(str(given / "tokenizer.json"))
    (given / "special_tokens_map.json").write_text('{"eos_token": "<end>", "bos_token": "<s>"}')
    has = special_tokens(given)
    assert changed_copy(given, {"eos_token": "<end>"}, None, has, tmp_path) == given
    copy = changed_copy(given, {"eos_token": "</s>"}, None, has, tmp_path)
    assert special_tokens(copy) == {"eos_token": "</s>", "bos_token": "<s>"}


@pytest.mark.parametrize("eod", [None, 3])
def test_tokenize_to_indexed(tmp_path, eod):
    tokenizer = word_tokenizer(["?", "a", "b", "<end>"])
    seen = []
    result = tokenize_to_indexed(
        ["a b", " ", "b b b", "a"],
        tokenizer,
        tmp_path / "x",
        eod,
        4,
        lambda *done: seen.append(done),
        batch=3,
        batch_characters=6,
    )
    data = IndexedDataset(tmp_path / "x")
    end = [] if eod is None else [eod]
    assert [data.read(i).tolist() for i in range(3)] == [[1, 2, *end], [2, 2, 2, *end], [1, *end]]
    assert result == {"documents": 3, "tokens": data.num_tokens}
    assert seen[-1] == (3, data.num_tokens)
    assert len(seen) == 2


def test_tokenize_refuses_and_leaves_nothing(tmp_path):
    tokenizer = word_tokenizer(["?", "a", "b"])
    with pytest.raises(UserError, match="no document"):
        tokenize_to_indexed([], tokenizer, tmp_path / "x", None, 3)
    with pytest.raises(UserError, match="token 2, but the vocabulary size is 2"):
        tokenize_to_indexed(["a", "b"], tokenizer, tmp_path / "x", None, 2)
    assert list(tmp_path.iterdir()) == []


def test_prepare_dataset_trains_and_caches(corpus, tmp_path):
    cache = tmp_path / "cache"
    prefix, folder = prepare_dataset(corpus, cache_dir=cache, train_vocab_size=300)
    assert prefix.parent == folder.parent
    assert prefix.parent.name.startswith("corpus-")
    assert len(prefix.parent.name) == len("corpus-") + 12
    data, tokenizer = IndexedDataset(prefix), load_tokenizer(folder)
    assert len(data) == 3
    assert [data.read(i)[-1] for i in range(3)] == [0, 0, 0]
    assert tokenizer.decode(data.read(1)[:-1].tolist()) == DOCUMENTS[0]

    def files():
        found = [*map(prefix.with_suffix, (".bin", ".idx")), folder / "tokenizer.json"]
        return [(path.stat().st_ino, path.stat().st_mtime_ns) for path in found]

    written = files()
    assert prepare_dataset(str(corpus), cache_dir=cache, train_vocab_size=300) == (prefix, folder)
    assert files() == written

    # Not whole: made again.
    prefix.with_suffix(".bin").write_bytes(b"")
    assert prepare_dataset(corpus, cache_dir=cache, train_vocab_size=300) == (prefix, folder)
    assert IndexedDataset(prefix).num_tokens == data.num_tokens

    others = {prefix.parent}
    others.add(prepare_dataset(corpus, cache_dir=cache, train_vocab_size=301)[0].parent)
    others.add(prepare_dataset(corpus, cache_dir=cache, train_vocab_size=300, field="body")[0].parent)
    (corpus / "b.txt").write_text("something else")
    others.add(prepare_dataset(corpus, cache_dir=cache, train_vocab_size=300)[0].parent)
    assert len(others) == 4


def test_prepare_dataset_with_a_tokenizer(lines, tmp_path):
    path = lines({"body": "a b"}, {"body": "b"})
    given = tmp_path / "given"
    given.mkdir()
    word_tokenizer(["?", "a", "b", "<end>"]).save(str(given / "tokenizer.json"))
    plain, _ = prepare_dataset(path, cache_dir=tmp_path / "c", tokenizer_path=given, field="body")
    assert plain.parent.name.startswith("x-")
    assert IndexedDataset(plain).read(0).tolist() == [1, 2]
    (given / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    (given / "model.safetensors").write_text("")
    prefix, folder = prepare_dataset(path, cache_dir=tmp_path / "c", tokenizer_path=given, field="body")
    assert IndexedDataset(prefix).read(0).tolist() == [1, 2, 3]
    assert sorted(p.name for p in folder.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]


def test_files_of_one_name_size_and_time_are_two_caches(tmp_path):
    found = []
    for folder, letter in (("one", "a"), ("two", "b")):
        path = tmp_path / folder / "x.txt"
        path.parent.mkdir()
        path.write_text(letter * 9)
        os.utime(path, ns=(1, 1))
        prefix, tokenizer = prepare_dataset(path, cache_dir=tmp_path / "c", train_vocab_size=257)
        found.append(load_tokenizer(tokenizer).decode(IndexedDataset(prefix).read(0).tolist()))
    assert found == ["a" * 9, "b" * 9]


def test_the_cache_is_new_where_special_tokens_map_changes(lines, tmp_path):
    given = tmp_path / "given"
    given.mkdir()
    word_tokenizer(["?", "a", "<one>", "<two>"]).save(str(given / "tokenizer.json"))
    for name, number in (("<one>", 2), ("<two>", 3)):
        (given / "special_tokens_map.json").write_text(json.dumps({"eos_token": name}))
        prefix, _ = prepare_dataset(lines({"text": "a"}), cache_dir=tmp_path / "c", tokenizer_path=given)
        assert IndexedDataset(prefix).read(0).tolist() == [1, number]


def test_prepare_dataset_refuses(lines, tmp_path):
    path = lines({"text": "a"})
    with pytest.raises(UserError, match="no tokenizer"):
        prepare_dataset(path, cache_dir=tmp_path / "c")
    with pytest.raises(UserError, match="no such tokenizer"):
        prepare_dataset(path, cache_dir=tmp_path / "c", tokenizer_path=tmp_path / "nope")
    assert not (tmp_path / "c").exists()
