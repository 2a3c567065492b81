"""longspan prepare and longspan merge by Megatron-LM's flags."""

import json

import pytest
from tokenizers import ByteLevelBPETokenizer

import tiny
from chats import write_tokenizer
from longspan.cli.main import main
from longspan.data import IndexedDataset, load_tokenizer
from longspan.errors import UserError
from longspan.runs.prepare import prepare_data


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two"):
        records = [{"text": f"the cat {i} of {name}\n" * 5, "title": f"cat {i}"} for i in range(20)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(["the cat"], 300, special_tokens=["<|endoftext|>"], show_progress=False)
    tokenizer.save_model(".")
    return tmp_path


def run(capsys, *arguments):
    code = main(list(map(str, arguments)))
    return code, capsys.readouterr()


GPT2 = ("--tokenizer-type", "GPT2BPETokenizer", "--vocab-file", "vocab.json", "--merge-file", "merges.txt")


def test_prepare_by_megatrons_flags(folder, capsys):
    code, said = run(
        capsys, "prepare", "--input", "*.jsonl", "--output-prefix", "out/p", "--json-keys", "text", "title",
        "--workers", 2, "--append-eod", "--log-interval", 10, "--partitions", 4, *GPT2,
    )  # fmt: skip
    assert code == 0, said.err
    assert "without effect here: --partitions" in said.err
    assert "processed 40 documents" in said.err
    assert "40 documents" in said.out
    text, title = IndexedDataset("out/p_text_document"), IndexedDataset("out/p_title_document")
    assert len(text) == len(title) == 40
    tokenizer = load_tokenizer(next((folder / "out" / "p_tokenizer").iterdir()))
    end = tokenizer.token_to_id("<|endoftext|>")
    assert tokenizer.decode(title.read(21)[:-1].tolist()) == "cat 1"
    assert title.read(21)[-1] == end


def test_prepare_numbers(folder, capsys):
    (folder / "n.jsonl").write_text('{"text": "1 2 3"}\n')
    null = ("--tokenizer-type", "NullTokenizer", "--vocab-size", 10)
    assert run(capsys, "prepare", "--input", "n.jsonl", "--output-prefix", "n", *null)[0] == 0
    assert IndexedDataset("n_text_document").read(0).tolist() == [1, 2, 3, 10]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--inptu", "one.jsonl", "--output-prefix", "x", *GPT2],
            "--inptu: unknown option. Did you mean --input?",
        ),
        (
            ["--input", "one.jsonl", "--output-prefix", "x", "--json-kyes", "t", *GPT2],
            "Did you mean --json-keys?",
        ),
        (["--input", "one.jsonl", "--output-prefix", "x"], "give one of --tokenizer FOLDER"),
        (["--input", "one.jsonl", *GPT2], "--output-prefix is missing"),
        (["--input", "one.jsonl", "--output-prefix", "x", "--vocab-file", "v"], "Give both"),
        (
            ["--input", "one.jsonl", "--output-prefix", "x", "--tokenizer", "t", *GPT2],
            "another tokenizer than the one",
        ),
        (
            ["--input", "one.jsonl", "--output-prefix", "x", "--tokenizer-type", "NullTokenizer"],
            "needs --vocab-size",
        ),
        (
            ["--input", "one.jsonl", "--output-prefix", "x", "--keep-newlines", *GPT2],
            "goes with --split-sentences",
        ),
        (["--input", "one.jsonl", "--output-prefix", "x", "--workers", "many", *GPT2], "--workers 'many'"),
        (["--input", "one.jsonl", "--output-prefix", "x", "--json-keys", *GPT2], "--json-keys needs a value"),
        (
            ["--input", "one.jsonl", "--output-prefix", "x", "--vocab-size", "9", *GPT2],
            "smaller than the tokenizer's",
        ),
        (
            ["--input", "one.jsonl", "--output-prefix", "x", "--tokenizer-type", "TikTokenizer"],
            "is not supported",
        ),
    ],
)
def test_prepare_refuses(folder, capsys, arguments, message):
    code, said = run(capsys, "prepare", *arguments)
    assert code == 2
    assert message in said.err, said.err
    assert not list(folder.glob("x_*document*"))


def test_merge(folder, capsys):
    for name in ("one", "two"):
        args = ("--input", f"{name}.jsonl", "--output-prefix", f"parts/{name}", *GPT2)
        assert run(capsys, "prepare", *args)[0] == 0
    code, said = run(capsys, "merge", "--input", "parts", "--output-prefix", "whole")
    assert code == 0, said.err
    assert "2 files, 40 documents" in said.out
    whole, two = IndexedDataset("whole"), IndexedDataset("parts/two_text_document")
    assert whole.read(39).tolist() == two.read(19).tolist()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--input", "texts", "--output-prefix", "x", "--json-keys", "text", "--split-sentences"],
            "--json-keys, --split-sentences: that is longspan prepare",
        ),
        (["--input", ".", "--output-perfix", "x"], "Did you mean --output-prefix?"),
        (["--input", "."], "--output-prefix is missing"),
        (["--input", ".", "--output-prefix", "x"], "no .bin/.idx pair in this folder"),
        (["--input", ".", "--output-prefix", "x", "--multimodal"], "only tokens are"),
    ],
)
def test_merge_refuses(folder, capsys, arguments, message):
    code, said = run(capsys, "merge", *arguments)
    assert code == 2
    assert message in said.err, said.err


def test_merge_does_not_write_among_its_inputs(folder, capsys):
    assert run(capsys, "prepare", "--input", "one.jsonl", "--output-prefix", "parts/one", *GPT2)[0] == 0
    code, said = run(capsys, "merge", "--input", "parts", "--output-prefix", "parts/all")
    assert code == 2
    assert "lies in --input" in said.err


def test_prepare_by_a_config_of_records_counts_its_samples(folder, capsys):
    """It once took the unit of its counter for an interval, and ended in a traceback."""
    records = [{"instruction": "add", "input": f"{i} and {i}", "output": str(2 * i)} for i in range(12)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "config.yaml").write_text(
        "datasets: [{path: sums.jsonl, type: alpaca}]\nvocab_file: vocab.json\nmerge_file: merges.txt\n"
        "num_layers: 1\nhidden_size: 8\nnum_attention_heads: 1\nsequence_len: 64\nmax_steps: 1\nlearning_rate: 1e-3\n"
    )
    code, said = run(capsys, "prepare", "config.yaml")
    assert code == 0, said.err
    assert "tokenised sums.jsonl: 12 samples" in said.err


CONFIG = (
    "vocab_file: vocab.json\nmerge_file: merges.txt\nnum_layers: 1\nhidden_size: 8\nnum_attention_heads: 1\n"
    "max_steps: 1\nlearning_rate: 1e-3\n"
)


@pytest.fixture
def sums(folder):
    """Two prompts with answers, one of them of two lines."""
    records = [{"q": "1+1=", "a": "2"}, {"q": "say\nit", "a": "so\nbe it"}]
    (folder / "sums.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    kind = (
        "{field_instruction: q, field_output: a, format: '{instruction}', no_input_format: '{instruction}'}"
    )
    (folder / "sums.yaml").write_text(
        f"datasets: [{{path: sums.jsonl, type: {kind}}}]\nsequence_len: 64\n{CONFIG}"
    )
    return folder


def test_prepare_shows_what_is_learned_to_scripts(sums, capsys):
    code, said = run(capsys, "prepare", "sums.yaml", "--show", "3", "--json")
    assert code == 0, said.err
    found = json.loads(said.out)
    assert found["num_documents"] == 2
    [sample] = found["samples"]  # both are packed into one
    documents = sorted(sample["documents"], key=lambda document: document["document"])
    shown = [[(piece["text"], piece["learned"]) for piece in document["pieces"]] for document in documents]
    assert shown == [
        [("1+1=", 0), ("2", 1), ("<|endoftext|>", 1)],
        [("say\nit", 0), ("so\nbe it", 1), ("<|endoftext|>", 1)],
    ]
    tokens = IndexedDataset(found["datasets"][0]["prepared"])
    for number, document in enumerate(documents):
        assert document["tokens"] == tokens.read(number).tolist()
        assert len(document["learned"]) == len(document["tokens"])
    learned = sum(sum(document["learned"]) for document in documents)
    assert found["num_learned"] == sample["num_learned"] == learned
    assert found["num_tokens"] == sample["num_tokens"] == tokens.num_tokens
    assert sample["num_padding"] == 64 - tokens.num_tokens
    # the numbers alone
    code, said = run(capsys, "prepare", "sums.yaml", "--json")
    assert json.loads(said.out) == found | {"samples": []}


def test_prepare_shows_what_is_learned_without_colour(sums, capsys):
    code, said = run(capsys, "prepare", "sums.yaml", "--show", "1")
    assert code == 0, said.err
    assert "\x1b" not in said.out
    lines = said.out.splitlines()
    assert any(line.startswith("sample 1: ") and "in 2 documents, " in line for line in lines)
    at = lines.index("  say\u21b5")
    assert lines[at : at + 4] == ["  say\u21b5", "  it", "> so\u21b5", "> be it<|endoftext|>"]
    assert lines[at - 1].startswith("--- document 1 of ")
    assert "> 2<|endoftext|>" in lines


@pytest.mark.parametrize("packing", ["true", "false"])
def test_prepare_shows_documents_of_text(folder, capsys, packing):
    (folder / "text.yaml").write_text(
        f"datasets: [{{path: one.jsonl}}]\nsequence_len: 16\nsample_packing: {packing}\n{CONFIG}"
    )
    code, said = run(capsys, "prepare", "text.yaml", "--show", "2", "--json")
    assert code == 0, said.err
    found = json.loads(said.out)
    assert len(found["samples"]) == 2
    whole = IndexedDataset(found["datasets"][0]["prepared"])
    for sample in found["samples"]:
        for document in sample["documents"]:
            start, tokens = document["start"], document["tokens"]
            assert tokens == whole.read(document["document"], start, start + len(tokens)).tolist()
            if packing == "true":
                assert document["learned"] == [0] + [1] * (len(tokens) - 1)
    assert found["num_tokens"] == whole.num_tokens
    assert run(capsys, "prepare", "text.yaml", "--show", "1")[0] == 0


def test_prepare_shows_a_whole_number_of_samples(sums, capsys):
    for value in ("0", "x"):
        code, said = run(capsys, "prepare", "sums.yaml", "--show", value)
        assert code == 2
        assert "--show" in said.err


def test_the_token_that_ends_a_document_is_the_tokenizers(folder):
    """For reset_position_ids and its like: of a NullTokenizer the token behind all others, of a tokenizer its own."""
    mock = {
        "datasets": [],
        "mock_data": True,
        "sample_packing": False,
        "reset_position_ids": True,
        "val_set_size": 0,
    }

    def prepared(**changes):
        return prepare_data(tiny.checked("none", 1, **mock | changes), show=False)

    run = prepared(tokenizer_type="NullTokenizer", vocab_size=50)
    config = run.config
    assert (config.eod_token_id, config.vocab_size) == (50, 51)
    assert prepare_data(run, show=False).config.eod_token_id == 50
    write_tokenizer(folder / "tokenizer")
    config = prepared(tokenizer_config="tokenizer", vocab_size=None).config
    assert config.eod_token_id == load_tokenizer("tokenizer").token_to_id("</s>")
    assert prepared(eod_token_id=7).config.eod_token_id == 7
    assert prepared(reset_position_ids=False).config.eod_token_id is None
    with pytest.raises(
        UserError, match="reset_position_ids: which token ends a document is not known: there is no tokenizer"
    ):
        prepared()


def test_the_streams_keys_are_refused_where_there_is_no_stream():
    chats = [{"path": "x.jsonl", "type": "chat_template"}]
    for changes, message in (
        ({"eod_mask_loss": True}, "eod_mask_loss: true is for the stream of documents"),
        ({"reset_attention_mask": True, "sample_packing": False, "datasets": chats}, "x.jsonl makes samples"),
        ({"eod_token_id": 3}, "eod_token_id 3 has no effect without"),
        ({"eod_token_id": 97, "eod_mask_loss": True, "sample_packing": False}, "is beyond vocab_size 97"),
    ):
        with pytest.raises(UserError, match=message):
            tiny.tiny_run("none", 1, **changes)
