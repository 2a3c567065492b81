"""Records from files, folders, and by the Hugging Face library (without a hub)."""

import json
import os
import sys

import pytest

from chats import write_lines, write_tokenizer
from longspan.config.keys.data import DatasetConfig
from longspan.data.instruct import Encoder, Recipe
from longspan.data.sources import check_source, is_text, iter_records, plain, stamp
from longspan.data.text import iter_documents
from longspan.errors import UserError

RECORDS = [{"instruction": f"question {i}", "output": "é\n"} for i in range(10)]


def source(path, **values):
    return DatasetConfig(path=str(path), **{"type": "alpaca"} | values)


def read(path, **values):
    check_source(source(path, **values))
    return [record for _, record in iter_records(source(path, **values))]


def write(folder, kind):
    path = folder / f"some.{kind}"
    if kind == "jsonl":
        return write_lines(path, RECORDS)
    if kind == "json":
        path.write_text(json.dumps(RECORDS))
    elif kind == "csv":
        quoted = "".join(f'{r["instruction"]},"{r["output"]}"\n' for r in RECORDS)
        path.write_text("instruction,output\n" + quoted, encoding="utf-8")
    else:
        pyarrow = pytest.importorskip("pyarrow")
        table = pyarrow.Table.from_pylist(RECORDS)
        if kind == "parquet":
            import pyarrow.parquet

            pyarrow.parquet.write_table(table, path, row_group_size=3)
        else:
            make = pyarrow.ipc.new_stream if kind == "arrow" else pyarrow.ipc.new_file
            path = folder / "some.arrow"
            with make(str(path), table.schema) as writer:
                writer.write_table(table, max_chunksize=4)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "arrow", "feather"])
def test_every_kind_of_file_gives_the_same_records(tmp_path, kind):
    path = write(tmp_path, kind)
    assert read(path) == RECORDS
    assert read(tmp_path) == RECORDS
    assert read(path, split="train[2:5]") == RECORDS[2:5]
    assert read(path, split="train[-20%:]") == RECORDS[8:]
    assert read(path, split="train[:50%]") == RECORDS[:5]
    where = [where for where, _ in iter_records(source(path))]
    assert len(set(where)) == 10
    assert all(str(path) in place for place in where)


def test_a_folder_of_parts(tmp_path):
    write_lines(tmp_path / "data" / "train-0.jsonl", RECORDS[:2])
    write_lines(tmp_path / "data" / "train-1.jsonl", RECORDS[2:3])
    write_lines(tmp_path / "data" / "test-0.jsonl", RECORDS[3:])
    write_lines(tmp_path / ".cache" / "train.jsonl", RECORDS)
    assert read(tmp_path) == RECORDS[:3]
    assert read(tmp_path, split="test") == RECORDS[3:]
    assert read(tmp_path, data_files="data/*-0.jsonl") == RECORDS[3:] + RECORDS[:2]
    assert read("json", data_files=[str(tmp_path / "data" / "train-0.jsonl")]) == RECORDS[:2]
    with pytest.raises(UserError, match="no file of validation"):
        read(tmp_path, split="validation")
    with pytest.raises(UserError, match="data_files 'no.jsonl': no such file"):
        read(tmp_path, data_files="no.jsonl")


def test_a_kind_may_be_said(tmp_path):
    path = write_lines(tmp_path / "some.data", RECORDS)
    assert read(path, ds_type="json") == RECORDS
    with pytest.raises(UserError, match="of what kind is it"):
        read(path)
    (tmp_path / "words.txt").write_text("one\ntwo\n")
    assert read(tmp_path / "words.txt", type="completion", ds_type="text") == [
        {"text": "one"},
        {"text": "two"},
    ]


def test_text_stays_with_the_reader_of_text(tmp_path):
    lines = write_lines(tmp_path / "a.jsonl", [{"text": "x"}])
    assert is_text(DatasetConfig(path=str(lines)))
    assert is_text(DatasetConfig(path=str(tmp_path)))
    assert is_text(DatasetConfig(path="python-stdlib"))
    assert not is_text(DatasetConfig(path=str(lines), split="train[:1]"))
    assert not is_text(source(lines))
    only = tmp_path / "only"
    only.mkdir()
    write(only, "csv")
    assert not is_text(DatasetConfig(path=str(only)))
    assert len(read(only, type="completion")) == 10


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"a": 1}\n[1]\n', "a.jsonl, line 2: a JSON list"),
        ("a.jsonl", '{"a": 1}\n{"a"\n', "a.jsonl, line 2: not JSON"),
        ("a.csv", "a,b\n1,2\n1\n", "a.csv, line 3: not as many fields"),
        ("a.parquet", "no parquet", "a.parquet: cannot be read as parquet"),
        ("a.arrow", "no arrow file at all", "a.arrow: cannot be read as arrow"),
    ],
)
def test_broken_files_are_named(tmp_path, name, text, message):
    if name.endswith(("parquet", "arrow")):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        read(tmp_path / name)


def test_what_is_not_there(tmp_path, monkeypatch):
    write_lines(tmp_path / "train.jsonl", RECORDS)
    with pytest.raises(UserError, match="no such file or folder.*Did you mean train.jsonl"):
        read(tmp_path / "trian.jsonl")
    with pytest.raises(UserError, match="split 'train:10'"):
        read(tmp_path / "train.jsonl", split="train:10")
    with pytest.raises(UserError, match="revision is for datasets of the hub"):
        read(tmp_path / "train.jsonl", revision="main")
    for name in ("datasets", "pyarrow"):  # as where neither is installed
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        UserError, match=r"owner/name.*dataset of the Hugging Face hub, which needs.*longspan\[hf\]"
    ):
        read("owner/name")
    (tmp_path / "x.parquet").write_text("")
    with pytest.raises(UserError, match="parquet file, which needs the pyarrow package"):
        read(tmp_path / "x.parquet")


def test_the_hub_out_of_reach_is_one_message(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def fail(*_, **__):
        raise ConnectionError("Couldn't reach 'owner/name' on the Hub\nand more lines")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(
        UserError, match="could not be loaded from the Hugging Face hub .ConnectionError: Couldn't"
    ) as caught:
        read("owner/name")
    assert "\n" not in str(caught.value)


def test_the_hubs_arguments_reach_its_library(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = {}

    def load(path, **values):
        asked.update(values, path=path)
        return datasets.Dataset.from_list(RECORDS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read("owner/name", name="en", split="train[:5%]", revision="v1", data_files="a.parquet") == RECORDS
    assert asked == {
        "path": "owner/name",
        "name": "en",
        "split": "train[:5%]",
        "revision": "v1",
        "data_files": "a.parquet",
    }


def test_what_the_library_saved(tmp_path):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list(RECORDS)
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": data, "test": data.select([0])}).save_to_disk(tmp_path / "two")
    assert read(tmp_path / "one", split="train[8:]") == RECORDS[8:]
    assert read(tmp_path / "two") == RECORDS
    assert read(tmp_path / "two", split="test") == RECORDS[:1]


def test_stamps_change_with_the_files(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", RECORDS)
    before = stamp(source(path))
    assert stamp(source(path)) == before
    assert stamp(source(path, split="train[:3]")) != before
    write_lines(path, RECORDS[:9])
    assert stamp(source(path)) != before
    json.dumps(before)


def test_a_single_file_is_train_as_a_whole(tmp_path):
    write_lines(tmp_path / "a.jsonl", RECORDS)
    for more in ({}, {"data_files": "a.jsonl"}):
        path = tmp_path if more else tmp_path / "a.jsonl"
        with pytest.raises(UserError, match="split 'test': of single files every record is train"):
            read(path, split="test", **more)


def test_json_that_is_no_utf8_is_refused_by_its_line(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "good"}\n{"text": "caf\xe9"}\n')
    with pytest.raises(UserError, match="line 2: not UTF-8"):
        list(iter_documents(tmp_path / "a.jsonl"))


#: two calls with different arguments, a schema with a null of its own, and messages that do not name the same fields
AGENT = [
    {
        "messages": [
            {"role": "user", "content": "Weather and time?", "weight": 2.5},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [
                    {"function": {"name": "weather", "arguments": {"city": "Paris", "unit": None}}},
                    {"function": {"name": "clock", "arguments": {"zone": "CET", "days": [1, None, 3]}}},
                ],
            },
            {"role": "tool", "content": "12", "name": "weather"},
            {"role": "assistant", "content": "Twelve."},
        ],
        "tools": [{"name": "weather", "default": None}, {"name": "clock", "strict": True}],
        "conversations": None,
    },
    {
        "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}],
        "conversations": None,
    },
    {
        "messages": None,
        "conversations": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b", "train": True},
        ],
    },
]


@pytest.mark.parametrize("kind", ["parquet", "arrow", "library"])
def test_a_record_gives_one_sample_from_every_kind_of_file(tmp_path, kind):
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.Table.from_pylist(AGENT)
    if kind == "parquet":
        import pyarrow.parquet

        path = tmp_path / "a.parquet"
        pyarrow.parquet.write_table(table, path)
    elif kind == "arrow":
        path = tmp_path / "a.arrow"
        with pyarrow.ipc.new_stream(str(path), table.schema) as writer:
            writer.write_table(table)
    else:
        path = tmp_path / "saved"
        pytest.importorskip("datasets").Dataset.from_list(AGENT).save_to_disk(path)
    lines = write_lines(tmp_path / "a.jsonl", AGENT)
    template = "{% for m in messages %}{{ m | tojson(sort_keys=true) }}\n{% endfor %}{{ tools | tojson(sort_keys=true) }}"
    folder = write_tokenizer(tmp_path / "tokenizer")
    values = {"type": "chat_template", "chat_template_jinja": template, "message_field_training": "train"}

    def samples(path):
        given = source(path, **values)
        encode = Encoder(Recipe.make(given, folder))
        return encode.tokenizer, [encode(*record) for record in iter_records(given)]

    tokenizer, of_lines = samples(lines)
    _, of_table = samples(path)
    assert len(of_lines) == 3
    for (tokens, mask), (other, other_mask) in zip(of_lines, of_table, strict=True):
        assert other.tolist() == tokens.tolist()
        assert other_mask.tolist() == mask.tolist()
    calls, tools = tokenizer.decode(of_lines[0][0].tolist()).split("\n")[1::3]
    assert json.loads(calls)["tool_calls"] == [
        {"function": {"name": "weather", "arguments": {"city": "Paris"}}},
        {"function": {"name": "clock", "arguments": {"zone": "CET", "days": [1, None, 3]}}},
    ]
    assert json.loads(tools) == [{"name": "weather"}, {"name": "clock", "strict": True}]


def test_plain_takes_out_nulls_of_objects_and_half_a_surrogate_pair():
    assert plain({"a": None, "b": {"c": None}, "d": [None, {"e": None, "f": 0}]}) == {
        "b": {},
        "d": [None, {"f": 0}],
    }
    assert plain(["x\ud800y", {"\udc00": "😀"}]) == ["x?y", {"?": "😀"}]


def test_a_record_nested_too_deeply_is_refused(tmp_path):
    encode = Encoder(Recipe.make(source("x", type="chat_template"), write_tokenizer(tmp_path, begin=False,
        chat_template="{% for m in messages %}{{ m.role + m.content }}{% endfor %}")))  # fmt: skip
    for depth, found in ((90, None), (200, "more than 100 deep")):
        deep = json.loads("[" * depth + "]" * depth)
        record = {
            "messages": [
                {"role": "user", "content": "a", "more": deep},
                {"role": "assistant", "content": "b"},
            ]
        }
        if found is None:
            assert len(encode("here", record)[0])
            continue
        with pytest.raises(UserError, match=f"here: .*{found}"):
            encode("here", record)
    deep = "[" * 100_000
    for name in ("messages", "tools"):
        with pytest.raises(UserError, match="no JSON list"):
            encode("here", {"messages": [{"role": "user", "content": "a"}], name: deep})
    (tmp_path / "deep.jsonl").write_text('{"a": ' + deep + "\n")
    with pytest.raises(UserError, match="line 1: not JSON .nested too deeply"):
        read(tmp_path / "deep.jsonl")


def test_files_of_one_name_size_and_time_in_two_folders_are_two_sources(tmp_path):
    stamps = []
    for folder, record in (("one", {"a": 1}), ("two", {"a": 2})):
        path = write_lines(tmp_path / folder / "a.jsonl", [record])
        os.utime(path, ns=(1, 1))
        stamps.append(
            [
                stamp(source(path)),
                stamp(source(path.parent)),
                stamp(source(path.parent, data_files="a.jsonl")),
            ]
        )
    for first, second in zip(*stamps):
        assert first != second


def test_a_csv_holds_long_fields(tmp_path):
    text = "word, " * 40_000
    (tmp_path / "a.csv").write_text(f'instruction,output\n"{text}",b\n')
    assert read(tmp_path / "a.csv") == [{"instruction": text, "output": "b"}]


@pytest.mark.parametrize(("mark", "name"), [(";", "semicolons"), ("\t", "tabs"), ("|", "bars")])
def test_a_csv_without_commas_is_refused_by_its_cause(tmp_path, mark, name):
    (tmp_path / "a.csv").write_text(f"instruction{mark}output\nq{mark}a\n")
    with pytest.raises(UserError, match=f"a.csv: the first line.* has {name} and no comma"):
        read(tmp_path / "a.csv")
    (tmp_path / "a.csv").write_text(f"text\none{mark}two\n")
    assert read(tmp_path / "a.csv") == [{"text": f"one{mark}two"}]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("a.json", {"data": RECORDS}, "line 1: a JSON object that goes on over several lines.*jq -c [.]"),
        ("a.jsonl", RECORDS[0], "line 1: a JSON object that goes on over several lines"),
        ("a.jsonl", RECORDS, "line 1: a JSON list that goes on over several lines.*name the file .json"),
    ],
)
def test_pretty_printed_json_is_refused_by_its_cause(tmp_path, name, value, message):
    (tmp_path / name).write_text(json.dumps(value, indent=2))
    with pytest.raises(UserError, match=message):
        read(tmp_path / name)
    with pytest.raises(UserError, match=message):
        list(iter_documents(tmp_path / name))
    (tmp_path / "b.json").write_text(json.dumps(RECORDS, indent=2))
    assert read(tmp_path / "b.json") == RECORDS
