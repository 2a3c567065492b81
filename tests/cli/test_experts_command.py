"""``longspan experts``: the load of experts as a run recorded it, as a table, JSON and a picture."""

import json

import pytest

from longspan.cli import main


@pytest.fixture
def output(tmp_path):
    """A run of 40 steps: layer 1 even, in layer 2 expert 3 is chosen less and less."""
    lines = []
    for step in range(1, 41):
        idle = 0.25 * (40 - step) / 40
        load = [[0.25] * 4, [*[(1 - idle) / 3] * 3, idle]]
        record = {"kind": "train", "step": step, "loss": 1.0, "moe_load": load, "moe_dropped_tokens": 2}
        lines.append(json.dumps(record) + "\n")
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    return tmp_path


def test_table_json_and_picture(output, tmp_path, capsys):
    assert main.main(["experts", str(output)]) == 0
    text = capsys.readouterr().out
    assert "steps 37 to 40" in text
    assert "1.00 x" in text
    assert "expert 3" in text
    assert "dropped in all: 80 choices" in text
    pytest.importorskip("matplotlib")
    picture = tmp_path / "load.png"
    assert main.main(["experts", str(output), "--png", str(picture), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [row["layer"] for row in result["layers"]] == [1, 2]
    assert result["layers"][0]["busiest"] == pytest.approx(1.0)
    assert result["layers"][1]["idlest"] < 0.05
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere does not exist"),
        ([], "takes one output_dir; found 0"),
        (["x", "--pgn", "a.png"], "Did you mean --png"),
        (["x", "--png", "a.jpg"], "ends with .png"),
    ],
)
def test_what_is_refused(arguments, message, capsys):
    assert main.main(["experts", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_run_without_experts(output, capsys):
    (output / "metrics.jsonl").write_text('{"kind": "train", "step": 1, "loss": 1.0}\n')
    assert main.main(["experts", str(output)]) == 2
    assert "records no load of experts" in capsys.readouterr().err
