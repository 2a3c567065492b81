"""GPT-2's two files as a tokenizer.json: the same tokens as transformers', and what is wrong with them."""

import json

import pytest
from tokenizers import ByteLevelBPETokenizer

from longspan.data.gpt2 import gpt2_tokenizer
from longspan.data.text import eod_id, load_tokenizer, vocabulary_size
from longspan.errors import UserError

TEXTS = ["the cat sat on the mat\n" * 20, "def f(x):\n    return x + 1\n" * 20, " größe 日本語 it's  12345 "]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpt2")
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        TEXTS, vocab_size=320, special_tokens=["<|endoftext|>"], show_progress=False
    )
    tokenizer.save_model(str(folder))
    return folder / "vocab.json", folder / "merges.txt"


def test_it_tokenises_as_transformers_does(files, tmp_path):
    folder = gpt2_tokenizer(*files, tmp_path)
    tokenizer = load_tokenizer(folder)
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GPT2Tokenizer(vocab=str(files[0]), merges=str(files[1]))
    for text in [*TEXTS, "\x00 \t anything ☃"]:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert ids == theirs(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text
    assert eod_id(tokenizer, folder) == json.loads(files[0].read_text())["<|endoftext|>"]
    assert vocabulary_size(tokenizer) == len(json.loads(files[0].read_text()))
    auto = transformers.AutoTokenizer.from_pretrained(str(folder))
    assert auto(TEXTS[2])["input_ids"] == tokenizer.encode(TEXTS[2]).ids
    assert auto.eos_token == "<|endoftext|>"


def test_it_is_made_once(files, tmp_path):
    folder = gpt2_tokenizer(*files, tmp_path)
    stamp = (folder / "tokenizer.json").stat().st_mtime_ns
    assert gpt2_tokenizer(*files, tmp_path) == folder
    assert (folder / "tokenizer.json").stat().st_mtime_ns == stamp
    assert sorted(p.name for p in folder.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]


def test_what_is_wrong_is_named(files, tmp_path):
    with pytest.raises(UserError, match=r"vocab_file .*vocab.jsn does not exist. Did you mean vocab.json"):
        gpt2_tokenizer(files[0].with_name("vocab.jsn"), files[1], tmp_path)
    with pytest.raises(UserError, match="not JSON"):
        gpt2_tokenizer(files[1], files[1], tmp_path)
    with pytest.raises(UserError, match="line 1: .* is no merge"):
        gpt2_tokenizer(files[0], files[0], tmp_path)
    (tmp_path / "v.json").write_text('{"a": 0}')
    with pytest.raises(UserError, match="no <|endoftext|>"):
        gpt2_tokenizer(tmp_path / "v.json", files[1], tmp_path)
    (tmp_path / "l.json").write_text("[1]")
    with pytest.raises(UserError, match="not a mapping"):
        gpt2_tokenizer(tmp_path / "l.json", files[1], tmp_path)
