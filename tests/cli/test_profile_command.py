"""``longspan profile``: real steps on one and two processes; its figures, files, page; and what it refuses."""

import json
import re
import sys
from html.parser import HTMLParser

import pytest
import yaml

import command
import tiny
from longspan.cli.main import main

VOID = {"meta", "br", "img", "hr", "link", "input"}


def write(folder, **changes):
    values = tiny.values(tiny.write_data(folder), **changes)
    (folder / "config.yaml").write_text(yaml.safe_dump(values))


class Page(HTMLParser):
    """Checks that tags are balanced; collects the text outside of styles, and all attributes."""

    def __init__(self, text):
        super().__init__()
        self.open, self.words, self.attributes = [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)


def numbers_of(value):
    """All numbers of a JSON value, those inside texts too."""
    if isinstance(value, dict):
        return [n for part in value.values() for n in numbers_of(part)]
    if isinstance(value, list):
        return [n for part in value for n in numbers_of(part)]
    if isinstance(value, str):
        return [float(n) for n in re.findall(r"\d+(?:\.\d+)?", value)]
    return [float(value)] if isinstance(value, int | float) else []


def as_shown(result):
    """The numbers of a result as a page may show them: in ms, MiB, GFLOP/s, per cent, and as they are."""
    found = numbers_of(result)
    shares = [
        100 * size / rank["memory"]["peak_bytes"]
        for rank in result["ranks"]
        for size in rank["memory"]["at_peak"].values()
    ]
    shown = {f"{n * scale:,.2f}" for n in found for scale in (1, 1e3, 2.0**-20)}
    shown |= {f"{n:,.1f}" for n in [*found, *shares, *(100 * n for n in found)]}
    return shown | {f"{int(n):,}" for n in found if n == int(n)}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """(folder, result, its page) of a profile on two context parallel ranks, with everything that it writes."""
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("two")
    write(
        folder,
        context_parallel_size=2,
        sequence_len=48,
        sample_packing=False,
        resume="auto",
        use_tensorboard=True,
    )
    done = command.run("profile", "config.yaml", "--steps", "2", "--png", "--html", "--json", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout)
    return folder, result, (folder / "model-out/profile/report.html").read_text()


def test_nothing_is_written_but_the_profiles_own_folder(two):
    folder, result, _ = two
    assert [p.name for p in (folder / "model-out").iterdir()] == ["profile"]
    names = sorted(p.name for p in (folder / "model-out/profile").iterdir())
    pictures = ["attention.png", "memory.png", "timeline.png"]
    assert names == sorted(
        ["profile.json", "report.html", "trace-rank-0.json.gz", "trace-rank-1.json.gz", *pictures]
    )
    for name in pictures:
        assert (folder / "model-out/profile" / name).read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    kept = json.loads((folder / "model-out/profile/profile.json").read_text())
    assert kept == {name: value for name, value in result.items() if name not in ("png", "html")}


def test_a_step_is_computation_exposed_exchanges_and_idle_time(two):
    _, result, _ = two
    assert [rank["rank"] for rank in result["ranks"]] == [0, 1]
    for rank in result["ranks"]:
        assert len(rank["steps"]) == 2
        for step in rank["steps"]:
            assert step["compute"] + step["exposed"] + step["idle"] == pytest.approx(step["step"])
            assert min(step["compute"], step["exposed"], step["idle"]) > 0
            # Every exchange is one of a known group; without tensor parallelism that one has none.
            assert step["axes"].keys() == {"cp", "fsdp"}
            for axis in step["axes"].values():
                assert axis["exposed"] + axis["hidden"] == pytest.approx(axis["seconds"])
                assert axis["exposed"] <= step["exposed"] * (1 + 1e-9)
    assert result["step_without_profiler"] > 0
    balance = result["balance"]["compute"]
    means = [rank["mean"]["compute"] for rank in result["ranks"]]
    assert (balance["min"], balance["max"]) == (min(means), max(means))


def test_the_exchanges_are_those_of_the_layers(two):
    """Zigzag of 48 tokens over two ranks: four micro-batches, two layers; keys and values there, in backward again."""
    _, result, _ = two
    received = {0: 2 * 12, 1: 12}  # rank 1 has the two chunks in the middle, and needs the first one only
    for rank in result["ranks"]:
        # float64 keys and values of 2 heads of 8; forward, backward, and gradients home from the other rank.
        row = 2 * 2 * 8 * 8
        own, other = received[rank["rank"]], received[1 - rank["rank"]]
        rows = 4 * 2 * (2 * own + 2 * other + own + other) * row
        small = rank["mean"]["axes"]["cp"]["bytes"] - rows
        assert 0 <= small <= 64, "counts and the sum of losses"
        operations = rank["mean"]["axes"]["fsdp"]["operations"]
        assert {"all_gather", "reduce_scatter"} <= operations.keys()


def test_the_work_inside_tiles_is_that_of_the_causal_pairs(two):
    """4 sequences of 48 tokens, 2 layers of 4 heads of 8: two products forward and five backward."""
    _, result, _ = two
    assert result["documents"] == [48]
    work = sum(rank["mean"]["attention_flops"] for rank in result["ranks"])
    assert work == 4 * (48 * 49 // 2) * 2 * 4 * 8 * 14
    for rank in result["ranks"]:
        inside = sum(rank["mean"]["attention"].values())
        assert 0 < inside < rank["mean"]["step"]
        expected = rank["mean"]["attention_flops"] / inside / 1e12
        assert rank["attention_tflop_per_s"] == pytest.approx(expected)
        assert rank["attention_share_of_matmul"] == pytest.approx(expected / rank["matmul_tflop_per_s"])


def test_the_peak_of_memory_is_explained(two):
    _, result, _ = two
    for rank in result["ranks"]:
        memory = rank["memory"]
        assert sum(memory["at_peak"].values()) == memory["peak_bytes"]
        # AdamW has two numbers for each weight, and a step count (float32) for each tensor.
        state, weights = memory["at_peak"]["optimizer state"], memory["at_peak"]["parameters"]
        assert 0 < state - 2 * weights <= 4 * 30
        assert memory["at_peak"]["gathered weights"] > 0
        assert memory["at_peak"].get("other", 0) < 0.02 * memory["peak_bytes"]
        points = memory["points"]
        totals = [sum(sizes) for sizes in zip(*points["components"].values())]
        assert len(points["ms"]) == len(totals) < 1000
        assert max(totals) == memory["peak_bytes"]
        assert max(points["components"]["kept for backward"]) > 0


def test_the_page_is_whole_and_needs_nothing_else(two):
    _, result, text = two
    page = Page(text)
    assert text.startswith("<!DOCTYPE html>")
    assert not re.search(r"https?:|//|url\(|@import|<script|<link|<img", text)
    assert not {"src", "href"} & {name for name, _ in page.attributes}
    shown = as_shown(result)
    words = " ".join(page.words).replace(text[text.rindex("<p>longspan") + 3 : -20], "")
    numbers = re.findall(r"(?<![\w.])\d[\d,]*(?:\.\d+)?(?![\w.])", words)
    assert len(numbers) > 60
    assert not [number for number in numbers if number not in shown]


def test_a_trace_has_the_steps_and_the_axes(two):
    folder, _, _ = two
    from longspan.runs.profiling.trace import read_events

    names = [e["name"] for e in read_events(folder / "model-out/profile/trace-rank-1.json.gz")]
    assert [name for name in names if name.startswith("longspan step")] == [
        f"longspan step {i}" for i in range(3)
    ]
    assert "exchange cp/send" in names
    assert "attention tile backward" in names


def test_a_run_that_is_there_is_profiled_from_its_checkpoint_and_stays_as_it_is(tmp_path):
    write(tmp_path, sample_packing=True, max_steps=2, export_hf=False)
    assert command.run("train", "config.yaml", cwd=tmp_path).returncode == 0

    def contents():
        return {p: p.read_bytes() for p in (tmp_path / "model-out").rglob("*") if p.is_file()}

    before = contents()
    (tmp_path / "mine").mkdir()
    for name in ("trace-rank-7.json.gz", "report.html", "notes.txt"):
        (tmp_path / "mine" / name).write_text("an earlier one")
    arguments = ["--steps", "1", "--warmup", "1", "--out", "mine", "--resume", "auto"]
    done = command.run("profile", "config.yaml", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert contents() == before
    names = sorted(p.name for p in (tmp_path / "mine").iterdir())
    assert names == ["notes.txt", "profile.json", "trace-rank-0.json.gz"]
    result = json.loads((tmp_path / "mine/profile.json").read_text())
    assert result["first_step"] == 5
    assert result["step_without_profiler"] is None  # the one before is the first one
    assert result["axes"].keys() <= {"alone"}
    for text in (
        "time of a step",
        "exchanges, exposed",
        "the peak of memory, on rank 0",
        "kept for backward",
    ):
        assert text in done.stdout
    assert "USDT" not in done.stderr


# --- mistakes ---------------------------------------------------------------------------------


def test_mistakes_are_shown_before_any_step(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(tmp_path)
    (tmp_path / "file").write_text("")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    wrong = ["--steps", "0", "--warmup", "x", "--out", "file/profile", "--png"]
    assert main(["profile", "config.yaml", *wrong]) == 2
    errors = capsys.readouterr().err
    for text in (
        "--steps '0': a whole number from 1 to 100",
        "--warmup 'x'",
        "--out file/profile: file is not a folder",
        "pip install 'longspan[plot]'",
    ):
        assert text in errors
    assert main(["profile", "config.yaml", "--stepz", "1"]) == 2
    assert "--stepz" in capsys.readouterr().err
    assert not (tmp_path / "model-out").exists()


def test_a_rank_of_torchrun_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(tmp_path)
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    assert main(["profile", "config.yaml"]) == 2
    assert "starts its processes itself" in capsys.readouterr().err
