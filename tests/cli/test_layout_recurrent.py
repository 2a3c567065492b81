"""``longspan layout`` of models with recurrent layers: the stream, attention's layout, what moves and what is sent."""

import itertools
import json

import pytest
import torch
import yaml

import tiny
from longspan.cli import layout as command
from longspan.cli.layout_recurrent import size_text
from longspan.cli.main import main
from longspan.context_parallel import SequenceLayout
from longspan.context_parallel import recurrent_costs as costs
from longspan.context_parallel.move_rows import change_of_layout, tails
from longspan.context_parallel.two_layouts import attention_layout

DOCUMENTS = [188, 8, 81, 409, 72, 1, 311, 75, 409, 23, 279]
HYBRID = {
    "export_hf": False,
    "num_layers": 5,
    "layer_types": ["gated_delta", "mamba", "gated_delta", "attention", "attention"],
    "mamba_num_heads": 8, "mamba_head_dim": 4, "mamba_num_groups": 4, "mamba_state_dim": 6,
    "linear_num_key_heads": 4, "linear_num_value_heads": 8, "linear_key_head_dim": 6, "linear_value_head_dim": 4,
    "sequence_len": sum(DOCUMENTS),
}  # fmt: skip
PURE = HYBRID | {"num_layers": 2, "layer_types": ["mamba", "mamba"]}
PURE = {name: value for name, value in PURE.items() if not name.startswith("linear")}
CPU = torch.device("cpu")


def config(tmp_path, values, **changes):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tiny.values("nowhere", **(values | changes))))
    return str(path)


def ask(capsys, path, lengths=DOCUMENTS, *more):
    code = main(["layout", path, "--lengths", ",".join(map(str, lengths)), *more, "--json"])
    out, err = capsys.readouterr()
    assert code == 0, err
    return json.loads(out)


def cut(lengths, ranks):
    cu = [0, *itertools.accumulate(lengths)]
    return SequenceLayout.contiguous(cu[-1], ranks, cu_seqlens=cu)


@pytest.mark.parametrize("ranks", [2, 3, 8])
@pytest.mark.parametrize("asked", ["auto", "zigzag", "contiguous"])
def test_both_layouts_and_the_rows_between_them(tmp_path, capsys, ranks, asked):
    path = config(tmp_path, HYBRID, context_parallel_size=ranks, attention_cp_layout=asked)
    result = ask(capsys, path)
    stream = cut(DOCUMENTS, ranks)
    assert result["stream"]["layout"] == "contiguous"
    for rank, line in enumerate(result["stream"]["per_rank"]):
        assert [tuple(span) for span in line["spans"]] == stream.spans(rank)
    assert sum(line["padding"] for line in result["stream"]["per_rank"]) == result["stream"]["padding"]

    run = tiny.checked("nowhere", ranks, **HYBRID, context_parallel_size=ranks, attention_cp_layout=asked)
    other = attention_layout(run.transformer_config(), stream)
    assert (result["key"], result["asked"], result["layout"]) == ("attention_cp_layout", asked, other.name)
    areas = [other.area(rank) for rank in range(ranks)]
    assert result["imbalance"] == pytest.approx(max(areas) * ranks / sum(areas), abs=1e-4)
    for rank, line in enumerate(result["per_rank"]):
        assert [tuple(span) for span in line["spans"]] == other.spans(rank)
        assert line["pairs"] == areas[rank]
    # Both attention layers are alike, and no recurrent layer is counted.
    assert result["layers"] == [{"comm_type": "p2p", "window": None, "together": 1, "count": 1}]
    assert [line["layout"] for line in result["layouts"]] == [
        "contiguous",
        "zigzag",
        "per_document_zigzag",
        "balanced",
    ]
    if asked == "contiguous":
        assert result["moved_rows"] is None
        return
    sent = {"there": [], "back": []}
    for way, pair in (("there", (stream, other)), ("back", (other, stream))):
        for rank in range(ranks):
            move = change_of_layout(*pair, rank, CPU)
            sent[way].append(sum(move.sent) - move.sent[rank])
    moved = result["moved_rows"]
    assert (moved["there"], moved["back"]) == (sum(sent["there"]), sum(sent["back"]))
    assert (moved["most_there"], moved["most_back"]) == (max(sent["there"]), max(sent["back"]))
    assert moved["share"] == pytest.approx(sum(sent["there"]) / sum(DOCUMENTS), abs=1e-4)


@pytest.mark.parametrize(
    ("ranks", "asked"), [(1, "auto"), (4, "auto"), (4, "a2a"), (3, "auto"), (2, "state")]
)
def test_each_kind_of_recurrent_layer_and_its_way(tmp_path, capsys, ranks, asked):
    path = config(tmp_path, HYBRID, context_parallel_size=ranks, ssm_cp_type=asked)
    result = ask(capsys, path)
    run = tiny.checked("nowhere", ranks, **HYBRID, context_parallel_size=ranks, ssm_cp_type=asked)
    stream = cut(DOCUMENTS, ranks)
    assert [(kind["mixer"], kind["count"]) for kind in result["recurrent"]] == [
        ("gated_delta", 2),
        ("mamba", 1),
    ]
    for kind in result["recurrent"]:
        sizes = costs.recurrent_sizes(run.model, kind["mixer"], 1)
        assert kind["state_bytes"] == costs.state_bytes(sizes, 1, ranks, 8)
        assert kind["pack_state_bytes"] == max(costs.planned_state_bytes(sizes, 1, stream, 8))
        assert kind["pack_state_bytes"] <= kind["state_bytes"]
        moves = [tails(stream, 3, rank, CPU) for rank in range(ranks)]
        assert kind["tail_rows"] == max(sum(move.sent) for move in moves)
        rows = stream.local_length
        if ranks == 3:
            assert (kind["way"], kind["a2a_bytes"]) == ("state", None)
            assert kind["why"] == "3 ranks cannot share 8 heads in 4 groups"
            continue
        assert kind["a2a_bytes"] == costs.a2a_bytes(sizes, rows, 1, ranks, 8)
        way = None if ranks == 1 else costs.chosen_way(asked, sizes, rows, 1, ranks, 8)
        why = (
            "one rank holds everything"
            if ranks == 1
            else "fewer bytes"
            if asked == "auto"
            else f"ssm_cp_type {asked}"
        )
        assert (kind["way"], kind["why"]) == (way, why)


def test_the_table_of_a_hybrid(tmp_path, capsys):
    path = config(tmp_path, HYBRID, context_parallel_size=3)
    assert main(["layout", path, "--lengths", ",".join(map(str, DOCUMENTS))]) == 0
    out = capsys.readouterr().out
    assert "balanced layout: 1,856 tokens" in out
    assert "attention_cp_layout auto: runs of equal length would be uneven" in out
    assert "stream: contiguous, 619 rows a rank and 1 of padding" in out
    assert "around each attention layer" in out
    assert "0:619" in out
    assert "1238:1856" in out
    assert "2 x gated_delta" in out


def test_what_is_better_names_the_key_of_attention(tmp_path, capsys):
    path = config(tmp_path, HYBRID, context_parallel_size=8, attention_cp_layout="zigzag", sequence_len=4800)
    (note,) = ask(capsys, path, [600] * 8)["notes"]
    assert note.startswith("contiguous would be better for this pack (busiest / mean 1.00, 0% of a ring)")
    assert note.endswith("set attention_cp_layout: contiguous")


@pytest.mark.parametrize("ranks", [1, 4])
def test_a_model_without_attention(tmp_path, capsys, ranks):
    path = config(tmp_path, PURE, context_parallel_size=ranks)
    result = ask(capsys, path)
    assert (result["layout"], result["key"], result["layers"], result["layouts"]) == (
        "contiguous",
        "cp_layout",
        [],
        [],
    )
    assert result["imbalance"] is result["of_ring"] is result["moved_rows"] is None
    assert all(line["share"] is None and line["pairs"] == 0 for line in result["per_rank"])
    assert [kind["count"] for kind in result["recurrent"]] == [2]
    assert result["notes"] == []
    assert main(["layout", path, "--lengths", "7,9"]) == 0
    out = capsys.readouterr().out
    assert "no layer has attention" in out
    assert "nobody" not in out


def test_a_model_of_attention_alone_has_no_second_layout(tmp_path, capsys):
    result = ask(capsys, config(tmp_path, {"context_parallel_size": 2}))
    assert (result["key"], result["stream"], result["moved_rows"], result["recurrent"]) == (
        "cp_layout",
        None,
        None,
        [],
    )


def test_every_key_is_in_the_usage(tmp_path, capsys):
    result = ask(capsys, config(tmp_path, HYBRID, context_parallel_size=2))
    parts = [result["stream"], result["stream"]["per_rank"][0], result["moved_rows"], result["recurrent"][0]]
    for name in (*result, *itertools.chain(*parts)):
        assert name in command.USAGE, name


@pytest.mark.parametrize("values", [HYBRID, PURE])
def test_the_picture(tmp_path, capsys, values):
    pytest.importorskip("matplotlib")
    path = config(tmp_path, values, context_parallel_size=4)
    ask(capsys, path, DOCUMENTS, "--png", str(tmp_path / "a.png"))
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_sizes_as_text():
    sizes = [None, 0, 1023, 1024, 5 << 19, 3 << 40]
    assert [size_text(size) for size in sizes] == [
        "-",
        "0 bytes",
        "1023 bytes",
        "1.0 KiB",
        "2.5 MiB",
        "3,072.0 GiB",
    ]
