"""Samples in a cache, and rows of them: whole, apart, with the labels of answers alone."""

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from chats import chat, write_lines, write_tokenizer
from longspan.config.keys.data import DatasetConfig
from longspan.data import (
    IndexedDataset,
    IndexedDatasetWriter,
    TokenDataset,
    open_masks,
    prepare_samples,
)
from longspan.data.instruct import Encoder, Recipe
from longspan.data.packing import IGNORE_INDEX
from longspan.errors import UserError

RECORDS = [{"instruction": "ab " * (i % 7), "output": "c " * (i % 5)} for i in range(60)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("t"))


def recipe(path, folder, **values):
    return Recipe.make(DatasetConfig(path=str(path), **{"type": "alpaca"} | values), folder)


def test_samples_are_prepared_once(tmp_path, folder):
    path = write_lines(tmp_path / "a.jsonl", RECORDS)
    seen = []

    def prepare():
        return prepare_samples(
            recipe(path, folder), tmp_path / "cache", progress=lambda *done: seen.append(done)
        )

    prefix = prepare()
    tokens, masks = IndexedDataset(prefix), open_masks(prefix)
    assert masks.dtype == np.uint8
    assert seen[-1] == (60, tokens.num_tokens)
    encoder = Encoder(recipe(path, folder))
    for number, record in enumerate(RECORDS):
        ids, mask = encoder("x", record)
        assert tokens.read(number).tolist() == ids.tolist()
        assert masks.read(number).tolist() == mask.tolist()
    once = len(seen)
    assert prepare() == prefix
    assert len(seen) == once
    masks.bin_path.unlink()  # the mask is gone: it is made again
    assert prepare() == prefix
    assert len(seen) == 2 * once
    assert open_masks(prefix).read(0).tolist() == encoder("x", RECORDS[0])[1].tolist()


def test_processes_make_the_same_samples_in_the_same_order(tmp_path, folder):
    path = write_lines(tmp_path / "a.jsonl", RECORDS)
    one = prepare_samples(recipe(path, folder), tmp_path / "one", processes=1, chunk=7)
    two = prepare_samples(recipe(path, folder), tmp_path / "two", processes=2, chunk=7)
    for name in ("samples", "samples_mask"):
        for end in (".bin", ".idx"):
            assert (one.parent / (name + end)).read_bytes() == (two.parent / (name + end)).read_bytes()
    write_lines(path, [*RECORDS, {"instruction": "a"}])
    with pytest.raises(UserError, match="a.jsonl, line 61: no field 'output'"):
        prepare_samples(recipe(path, folder), tmp_path / "two", processes=2, chunk=7)


def test_everything_that_matters_makes_other_samples(tmp_path, folder):
    path = write_lines(tmp_path / "a.jsonl", [r | {"messages": chat("a", "b")} for r in RECORDS])
    other = write_tokenizer(tmp_path / "other", eos_token="<|end|>")
    recipes = [
        recipe(path, folder),
        recipe(path, other),
        recipe(path, folder, split="train[:50]"),
        recipe(path, folder, type={"format": "{instruction}"}),
        recipe(path, folder, type="chat_template", chat_template="chatml"),
        recipe(path, folder, type="chat_template", chat_template="phi_3"),
        recipe(path, folder, type="chat_template", chat_template="chatml", roles_to_train=["user"]),
        Recipe.make(DatasetConfig(path=str(path), type="alpaca"), folder, train_on_inputs=True),
    ]
    assert len({prepare_samples(r, tmp_path / "cache") for r in recipes}) == len(recipes)


def test_a_broken_record_leaves_nothing(tmp_path, folder):
    path = write_lines(tmp_path / "a.jsonl", [*RECORDS, {"instruction": "a"}])
    with pytest.raises(UserError, match="line 61: no field 'output'"):
        prepare_samples(recipe(path, folder), tmp_path / "cache")
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file() and p.name != ".lock"]
    write_lines(path, [])
    with pytest.raises(UserError, match="no record"):
        prepare_samples(recipe(path, folder), tmp_path / "cache")


def test_documents_of_records_have_no_masks(tmp_path, folder):
    path = write_lines(tmp_path / "a.jsonl", [{"body": "a b"}, {"body": ""}, {"body": "c"}])
    prefix = prepare_samples(
        recipe(path, folder, type="completion", field="body", split="train[:3]"), tmp_path
    )
    assert open_masks(prefix) is None
    found = IndexedDataset(prefix)
    assert len(found) == 2
    assert found.read(1).tolist()[:1] + found.read(1).tolist()[-1:] == [1, 2]  # <s> ... </s>


@pytest.mark.parametrize("processes", [1, 2])
def test_what_a_template_leaves_out_is_said_every_time_with_counts(tmp_path, folder, processes):
    thought = [*chat("a"), {"role": "assistant", "content": "b", "reasoning_content": "x"}]
    records = [
        {"messages": thought if i % 3 == 0 else chat("a", "b"), "tools": [{}] if i == 5 else []}
        for i in range(30)
    ]
    path = write_lines(tmp_path / "a.jsonl", records)
    made = recipe(path, folder, type="chat_template", chat_template="chatml")
    said = []
    prepare_samples(made, tmp_path / "cache", processes, remark=said.append, chunk=7)
    assert [line.partition(": ")[2].partition(" that")[0] for line in said] == [
        "10 of 30 chats hold thoughts (reasoning_content)",
        "1 of 30 chats hold tools",
    ]
    assert all(line.startswith(f"{path}, chat template chatml: ") for line in said)
    prepare_samples(made, tmp_path / "cache", processes, remark=said.append, chunk=7)
    assert said[2:] == said[:2]  # the samples are there


# --- rows ---------------------------------------------------------------------------------------


def write(prefix, lengths, answers=None, first=1):
    """Documents numbered through; with `answers`, samples whose last tokens are learned."""
    masks = None
    with IndexedDatasetWriter(prefix, np.int32) as writer:
        for length in lengths:
            writer.add_document(np.arange(first, first + length))
            first += length
    if answers is not None:
        with IndexedDatasetWriter(f"{prefix}_mask", np.uint8) as writer:
            for length, answer in zip(lengths, answers):
                writer.add_document(np.array([0] * (length - answer) + [1] * answer, dtype=np.uint8))
        masks = open_masks(prefix)
    return IndexedDataset(prefix), masks


def test_processes_that_come_at_once_find_what_one_makes(tmp_path, folder, caplog):
    """The second once met the first's token files before their masks. Locks of threads are as those of processes."""
    path = write_lines(tmp_path / "a.jsonl", RECORDS)
    made = []

    def slowly(*done):
        made.append(done)
        time.sleep(0.3)

    with ThreadPoolExecutor(4) as pool:
        found = list(
            pool.map(lambda _: prepare_samples(recipe(path, folder), tmp_path / "cache", 1, slowly), range(4))
        )
    assert len(set(found)) == 1
    assert len(made) == 1
    assert "waiting for it" in caplog.text


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Samples of 1 to 40 tokens and documents of up to 90."""
    folder = tmp_path_factory.mktemp("mixed")
    lengths = [1, 3, 40, 20, 5, 33, 8, 2, 32, 31, 7, 16]
    answers = [0, 1, 9, 20, 0, 20, 3, 1, 30, 31, 2, 4]
    one = write(folder / "samples", lengths, answers)
    two = write(folder / "documents", [90, 4, 33], first=1000)
    return [one[0], two[0]], [one[1], two[1]], lengths, answers


def labels_of(data):
    found = []
    for index in range(len(data)):
        row = data.row(index)
        found += row.labels[row.labels != IGNORE_INDEX].tolist()
    return sorted(found)


def wanted(lengths, answers, strategy, size):
    """The tokens to be learned: of a sample the answer's, and never its first token, which nothing comes before."""
    found, first = [], 1
    for length, answer in zip(lengths, answers):
        kept = length if length <= size else size if strategy == "truncate" else 0
        found += range(first + max(1, length - answer), first + kept)
        first += length
    return sorted(found)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("strategy", ["drop", "truncate"])
def test_rows_hold_whole_samples_with_their_answers(mixed, packing, strategy):
    files, masks, lengths, answers = mixed
    data = TokenDataset(files, 32, 3, packing, masks=masks, excess_length_strategy=strategy)
    documents = [*range(1001, 1090), *range(1091, 1094), *range(1095, 1127)]
    assert labels_of(data) == wanted(lengths, answers, strategy, 32) + documents
    assert data.num_excess == 2
    assert data.num_tokens == sum(lengths) + 127 - (73 if strategy == "drop" else 9)
    for index in range(len(data)):
        row = data.row(index)
        assert packing or len(data.boundaries(index)) == 2
        for begin, end in zip(data.boundaries(index), data.boundaries(index)[1:]):
            tokens = row.tokens[begin:end]
            assert np.array_equal(np.diff(tokens), np.ones(len(tokens) - 1))
            if packing:
                assert row.positions[begin:end].tolist() == list(range(end - begin))
            if tokens[0] < 1000:  # a sample begins with its own first token
                assert tokens[0] in np.cumsum([1, *lengths])
    assert len(data) > 5 if packing else len(data) == len(data._plan.documents)


def test_too_long_samples_may_be_refused(mixed, tmp_path):
    files, masks, *_ = mixed
    with pytest.raises(
        UserError, match=r"sample 2 has 40 tokens, sequence_len is 32 \(2 samples are longer\)"
    ):
        TokenDataset(files, 32, 3, masks=masks, excess_length_strategy="raise")
    data, own = write(tmp_path / "long", [3, 4, 5], [1, 1, 1])
    with pytest.raises(UserError, match="every one of the 2 train samples is longer than sequence_len 2"):
        TokenDataset([data], 2, 3, masks=[own], val_set_size=1)
    assert TokenDataset(files, 40, 3, masks=masks, excess_length_strategy="raise").num_excess == 0


def test_held_out_samples_are_the_same_at_every_length(mixed):
    files, masks, *_ = mixed
    held = [TokenDataset(files, n, 3, True, "validation", 5, masks).documents.tolist() for n in (16, 32, 99)]
    assert set(held[0]) <= set(held[1]) <= set(held[2])
    assert len(held[2]) == 5


def test_a_whole_dataset_keeps_its_order(mixed):
    files, masks, *_ = mixed
    data = TokenDataset(files, 99, 3, False, "whole", masks=masks)
    assert [int(data.row(i).tokens[0]) for i in data.global_batch(0, 3)] == [1, 2, 5]


def test_documents_alone_are_as_they_were(mixed):
    files, *_ = mixed
    for packing in (True, False):
        plain = TokenDataset(files, 32, 3, packing)
        said = TokenDataset(files, 32, 3, packing, masks=[None, None])
        assert len(plain) == len(said)
        for index in range(len(plain)):
            assert all(np.array_equal(a, b) for a, b in zip(plain.row(index), said.row(index)))


def test_masks_of_other_samples_are_refused(tmp_path):
    write(tmp_path / "a", [3, 4], [1, 1])
    write(tmp_path / "b", [3, 5], [1, 1])
    for end in (".bin", ".idx"):
        (tmp_path / f"b_mask{end}").replace(tmp_path / f"a_mask{end}")
    with pytest.raises(UserError, match="does not belong to"):
        open_masks(tmp_path / "a")


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("strategy", ["drop", "truncate"])
def test_the_number_of_learned_tokens_is_that_of_the_labels(tmp_path, packing, strategy):
    """Samples and documents, too long ones and ones of a single token among them, with some held out."""
    random = np.random.default_rng(0)
    lengths = [*random.integers(1, 30, 40), 1, 1, 25]
    write(tmp_path / "samples", lengths, [random.integers(0, n + 1) for n in lengths])
    write(tmp_path / "documents", [1, 45, 7])
    files = [IndexedDataset(tmp_path / name) for name in ("documents", "samples")]
    for some, masks in {1: [None], 2: [None, open_masks(tmp_path / "samples")]}.items():
        for split in ("train", "validation"):
            data = TokenDataset(
                files[:some], 20, 3, packing, split, 0.3, masks=masks, excess_length_strategy=strategy
            )
            rows = [data.row(i) for i in range(len(data))]
            assert data.num_learned == sum(int((row.labels != IGNORE_INDEX).sum()) for row in rows)
            pieces = [piece for i in range(len(data)) for piece in data.sources(i)]
            assert sum(stop - start for *_, start, stop in pieces) == data.num_tokens
