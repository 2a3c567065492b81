"""The commands that measure: verify, eval, prepare."""

import json
import re
from pathlib import Path

import pytest

import tiny
from cli_folder import records, write_folder
from command import run as longspan


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("cli"))


def test_verify_compares_a_layout_with_one_process(folder):
    args = ["config.yaml", "--tensor-parallel-size", 2, "--context-parallel-size", 2]
    args += ["--global-batch-size", 2]
    done = longspan("verify", *args, "--json", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout)
    for name in ("layout", "reference", "dtype", "tolerance", "loss_error", "grad_norm_error", "max_gradient_error",
                 "worst_parameter", "passed"):  # fmt: skip
        assert name in result
    assert result["passed"] is True
    assert result["dtype"] == "float64"
    assert max(result["loss_error"], result["grad_norm_error"], result["max_gradient_error"]) <= 1e-10
    assert result["eval_loss"] is not None


@pytest.mark.slow
def test_verify_all_goes_through_every_type_and_layout(folder):
    args = [
        "config.yaml",
        "--context-parallel-size",
        4,
        "--global-batch-size",
        2,
        "--eval-max-samples",
        1,
        "--steps",
        1,
        "--sliding-window",
        "[null, 9]",
        "--all",
    ]
    done = longspan("verify", *args, "--json", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout)
    assert result["passed"] is True
    combinations = {(run["cp_comm_type"], run["cp_layout"]) for run in result["runs"]}
    assert len(combinations) == len(result["runs"]) == 4 * 4
    assert max(run["max_gradient_error"] for run in result["runs"]) <= 1e-10
    done = longspan("verify", "config.yaml", "--all", cwd=folder)
    assert done.returncode == 2
    assert "context_parallel_size is 1" in done.stderr


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, (2, 4)), ({"cp_comm_type": "a2a+p2p", "hierarchical_context_parallel_sizes": [4, 2]}, (4, 2))],
)
def test_verify_all_takes_the_hierarchy_given_or_proposes_one(given, expected):
    from longspan.runs import verify

    run = tiny.tiny_run("prefix", 8, context_parallel_size=8, **given)
    found = verify.variants(run, everything=True)
    sizes = {
        tuple(r.config.hierarchical_context_parallel_sizes or ())
        for r in found
        if r.config.cp_comm_type == "a2a+p2p"
    }
    assert sizes == {expected}


def test_eval_gives_one_answer_at_every_layout(folder):
    trained = longspan("train", "config.yaml", "--output-dir", "evaluated", "--sequence-len", 96, cwd=folder)
    assert trained.returncode == 0, trained.stderr
    found = []
    for layout in ([], ["--context-parallel-size", 2, "--tensor-parallel-size", 2]):
        args = ["config.yaml", "--output-dir", "evaluated", "--sequence-len", 96, *layout, "--needles", 1]
        done = longspan("eval", *args, "--json", cwd=folder)
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout))
    one, cut = found
    assert one["checkpoint"].endswith("step_00000003")
    assert one["step"] == 3
    assert one["loss"] == pytest.approx(records(folder / "evaluated", "eval")[-1]["loss"], rel=1e-9)
    assert cut["loss"] == pytest.approx(one["loss"], rel=1e-9)
    assert sum(p["tokens"] for p in one["positions"]) == one["tokens"] == cut["tokens"]
    for a, b in zip(one["positions"], cut["positions"]):
        assert a["tokens"] == b["tokens"]
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-9)
    assert [n["depth"] for n in one["needles"]] == [0.0, 0.25, 0.5, 0.75, 1.0]
    for a, b in zip(one["needles"], cut["needles"]):
        assert a["probability"] == pytest.approx(b["probability"], rel=1e-9)
    other = longspan("eval", *args, "--hidden-size", 64, cwd=folder)
    assert "--checkpoint: step_00000003 is a checkpoint of another model: hidden_size" in other.stderr
    shown = longspan("eval", *args[:-2], "--needles", 0, cwd=folder)
    assert "loss by position" in shown.stdout


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--output-dir", "nowhere"], "there is no checkpoint in nowhere/checkpoints. Train first"),
        (["--val-set-size", 0], "needs held-out documents"),
        (["--eval-iters", 0], "eval_iters is 0, which switches evaluation off"),
        (["--needels", 3], "Did you mean --needles"),
        (["--checkpoint", "nowhere"], "nowhere"),
    ],
)
def test_eval_says_what_is_missing(folder, more, message):
    done = longspan("eval", "config.yaml", *more, cwd=folder)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_eval_shows_numbers_that_are_none(capsys):
    """Weights that are no numbers, and held-out documents without a token to predict."""
    from longspan.cli import evaluate

    nan = float("nan")
    position = {"from": 0, "to": 8, "tokens": 8, "loss": nan, "right": 0.0}
    needle = {"length": 64, "depth": 0.5, "right": 0.0, "probability": nan}
    found = {
        "checkpoint": "x",
        "layout": "",
        "tokens": 8,
        "loss": nan,
        "positions": [position],
        "needles": [needle],
    }
    shown = json.loads(evaluate.as_json(found))
    assert shown["loss"] is shown["positions"][0]["loss"] is shown["needles"][0]["probability"] is None
    assert shown["tokens"] == 8
    evaluate.report(found)
    nothing = {"tokens": 0, "loss": None, "right": None}
    evaluate.report(found | {"tokens": 0, "loss": None, "positions": [position | nothing], "needles": []})
    assert "loss none over 0 held-out tokens" in capsys.readouterr().out


HYBRID = ["--hybrid-context-parallel", "true", "--max-seqlen-per-dp-cp-rank"]


def test_verify_of_hybrid_context_parallelism(folder):
    done = longspan("verify", "config.yaml", "--dp-shard-size", 2, *HYBRID, 30, "--json", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["max_gradient_error"] <= 1e-10


def test_a_sample_that_all_ranks_together_cannot_hold_is_refused_by_name(folder):
    here = ["--output-dir", "never-made"]
    done = longspan("train", "config.yaml", "--dp-shard-size", 2, *HYBRID, 20, *here, cwd=folder)
    assert done.returncode == 2
    assert re.search(
        r"document \d+ of tiny makes a sample of 50 tokens, but 2 ranks x .* 20 hold 40", done.stderr
    )
    assert not (folder / "never-made").exists()


def test_verify_can_say_no(folder):
    """A layout that computes something else fails: float32 rounding is far outside float64's tolerance."""
    from longspan.cli import verify

    result = {
        "layout": "cp 2", "reference": "one", "dtype": "float64", "tolerance": 1e-10, "loss_error": 1e-3,
        "grad_norm_error": 0.0, "max_gradient_error": float("nan"), "worst_parameter": "w", "losses": [1.001],
        "reference_losses": [1.0], "eval_loss": None, "reference_eval_loss": None, "eval_tokens": None, "passed": False,
    }  # fmt: skip
    assert verify.report(result, as_json=True) == 1
    assert verify.report(result, as_json=False) == 1


def test_prepare_writes_an_indexed_dataset(folder):
    args = ["--input", "texts", "--output-prefix", "made/set", "--train-vocab-size", 300]
    done = longspan("prepare", *args, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "30 documents" in done.stdout
    from longspan.data import IndexedDataset

    assert len(IndexedDataset(folder / "made" / "set_text_document")) == 30
    wrong = longspan("prepare", "--input", "texts", "--outptu-prefix", "x", cwd=folder)
    assert wrong.returncode == 2
    assert "Did you mean --output-prefix?" in wrong.stderr
    assert Path(folder / "x").exists() is False
