"""Where records go: the lines of a log, and Weights & Biases."""

import re
import sys
import types

import pytest

import tiny
from longspan.errors import UserError
from longspan.training.banner import megatron_line
from longspan.training.metrics import JsonLines, Metrics, TensorBoard, Wandb, evaluated, keep_until
from longspan.training.progress import MegatronLines, make_progress
from longspan.training.sinks import open_sinks

RECORD = {"step": 2, "loss": 1.5, "grad_norm": 0.25, "learning_rate": 1e-4, "step_time": 0.5}


def test_megatron_log_parsers_read_our_lines(capsys):
    lines = make_progress(500, megatron_batch=64)
    assert isinstance(lines, MegatronLines)
    lines.step(RECORD | {"step": 1, "step_time": 1.5}, show=False)
    lines.step(RECORD, show=True)
    lines.evaluation({"step": 2, "loss": 2.0, "tokens": 10})
    out = capsys.readouterr().out
    found = re.search(
        r"^ \[[\d-]+ [\d:.]+\] iteration +(\d+)/ +(\d+) \| consumed samples: +(\d+) \| elapsed time per iteration \(ms\): "
        r"([\d.]+) \| learning rate: (\S+) \| global batch size: +(\d+) \| lm loss: (\S+) \| loss scale: ([\d.]+) \| "
        r"grad norm: ([\d.]+) \| number of skipped iterations: +(\d+) \| number of nan iterations: +(\d+) \|$",
        out,
        re.MULTILINE,
    )
    assert found, out
    assert [float(x) for x in found.groups()] == [2, 500, 128, 1000.0, 1e-4, 64, 1.5, 1.0, 0.25, 0, 0]
    assert "validation loss at iteration 2 | lm loss value: 2.000000E+00 | lm loss PPL: 7.389056E+00 |" in out


def test_megatrons_first_line_names_the_sizes():
    run = tiny.tiny_run("prefix", 8, tensor_parallel_size=2, context_parallel_size=2)
    assert megatron_line(run) == (
        "using world size: 8, data-parallel size: 2, context-parallel size: 2, tensor-model-parallel size: 2, "
        "pipeline-model-parallel size: 1"
    )


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for the package that notes what it is told."""
    told = types.SimpleNamespace(init=[], log=[], finished=0)

    class Run:
        def log(self, values, step):
            told.log.append((step, values))

        def finish(self):
            told.finished += 1

    module = types.ModuleType("wandb")
    module.init = lambda **options: (told.init.append(options), Run())[1]
    module.Error = type("Error", (Exception,), {})
    module.__spec__ = types.SimpleNamespace(name="wandb", origin="wandb.py")
    monkeypatch.setitem(sys.modules, "wandb", module)
    return told


def test_wandb_gets_every_record_by_kind_and_step(wandb, tmp_path):
    metrics = Metrics(
        [Wandb({"project": "p", "name": "n", "entity": None}, "offline", {"seed": 3}, tmp_path)]
    )
    metrics.write("train", 1, loss=1.5, grad_norm=0.1)
    metrics.write("eval", 1, loss=1.25, tokens=7)
    metrics.close()
    assert wandb.init == [
        {
            "project": "p",
            "name": "n",
            "entity": None,
            "mode": "offline",
            "config": {"seed": 3},
            "dir": str(tmp_path),
        }
    ]
    assert wandb.log == [
        (1, {"train/loss": 1.5, "train/grad_norm": 0.1}),
        (1, {"eval/loss": 1.25, "eval/tokens": 7}),
    ]
    assert wandb.finished == 1


def test_a_run_that_asks_for_wandb_opens_it_with_its_config(wandb, tmp_path):
    run = tiny.tiny_run(
        "prefix", 1, use_wandb=True, wandb_project="long", wandb_name="first", wandb_mode="offline"
    )
    metrics, _ = open_sinks(run, tmp_path, 0, None)
    metrics.write("train", 1, loss=1.0)
    metrics.close()
    assert wandb.init[0]["project"] == "long"
    assert wandb.init[0]["config"]["wandb_name"] == "first"
    assert wandb.log == [(1, {"train/loss": 1.0})]


def test_weights_and_biases_that_refuses_is_a_mistake_told_before_anything_is_moved(
    wandb, tmp_path, monkeypatch
):
    """Without a login it once was a traceback, with the earlier run's files set aside already."""

    def refuse(**_):
        raise sys.modules["wandb"].Error("No API key configured.")

    monkeypatch.setattr(sys.modules["wandb"], "init", refuse)
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="No API key configured. .*wandb_mode: offline"):
        open_sinks(tiny.tiny_run("prefix", 1, use_wandb=True), tmp_path, 0, None)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_tensorboard_shows_the_load_of_every_expert(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    load = [[0.25, 0.5, 0.25], [0.0, 0.125, 0.875]]
    board = TensorBoard(tmp_path)
    board.write({"kind": "train", "step": 3, "loss": 1.5, "moe_load": load, "moe_layers": [2, 4]})
    board.close()
    found = accumulator.EventAccumulator(str(tmp_path))
    found.Reload()
    for layer, shares in zip((2, 4), load):
        (event,) = found.Histograms(f"train/moe_load/layer_{layer}")
        assert event.step == 3
        assert list(event.histogram_value.bucket) == shares
        assert list(event.histogram_value.bucket_limit) == [1, 2, 3]
        (busiest,) = found.Scalars(f"train/moe_busiest_expert/layer_{layer}")
        assert busiest.value == max(shares)


def test_a_full_disk_does_not_end_training_and_is_told_at_its_end(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")  # every write there finds no space
    good = JsonLines(tmp_path / "other.jsonl")
    metrics = Metrics([JsonLines(tmp_path / "metrics.jsonl"), good])
    for step in range(3):
        metrics.write("train", step, loss=1.0)
    metrics.close()
    assert len((tmp_path / "other.jsonl").read_text().splitlines()) == 3
    assert len(metrics.trouble) == 1
    assert "No space left on device" in metrics.trouble[0]
    assert "metrics.jsonl" in metrics.trouble[0]
    assert capsys.readouterr().err.count("Training goes on") == 1


def test_a_file_that_was_moved_away_is_told(tmp_path):
    moved, kept = JsonLines(tmp_path / "moved"), JsonLines(tmp_path / "kept")
    metrics = Metrics([moved, kept])
    (tmp_path / "moved").rename(tmp_path / "elsewhere")
    metrics.write("train", 1, loss=1.0)
    metrics.close()
    (text,) = metrics.trouble
    assert text == f"{tmp_path / 'moved'}: was removed or moved while the run wrote to it"


def test_what_was_evaluated_is_found(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert not evaluated(path, 2)
    metrics = Metrics([JsonLines(path)])
    metrics.write("eval", 2, loss=1.0, tokens=3)
    metrics.write("train", 3, loss=1.0)
    metrics.write("eval", 4, loss=1.0, tokens=3, split="test")
    assert [evaluated(path, step) for step in (2, 20, 3, 4)] == [True, False, False, False]


def test_half_a_line_is_no_record(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "eval", "step": 2, "loss": 1.0}\n[1]\n{"kind": "eval", "step": 4, "lo')
    assert [evaluated(path, step) for step in (2, 4)] == [True, False]
    keep_until(path, 4)
    assert path.read_text() == '{"kind": "eval", "step": 2, "loss": 1.0}\n'
