"""examples/scenarios: every YAML of the users' quick reference, completed, is valid without data, weights or a network."""

import json
from pathlib import Path

import pytest
import yaml

from longspan.cli import main
from longspan.config.architecture import architecture_of
from longspan.config.load import make_config
from longspan.errors import UserError

FOLDER = Path(__file__).parents[2] / "examples" / "scenarios"
#: file -> (processes, global batch in sequences)
SCENARIOS = {
    "minimal": (2, 1),
    "recommended": (8, 32),
    "scenario-1a": (8, 4),
    "scenario-1b": (8, 2),
    "scenario-2": (8, 64),
    "scenario-3": (16, 4),
    "scenario-4": (2, 1),
    "oom-before": (8, 32),
    "oom-after": (8, 64),
    "oom-shorter": (8, 64),
    "performance": (8, 2),
    "nan": (2, 1),
    "divisible": (4, 1),
    "not-divisible": (3, 1),
    "16k-8-gpus": (8, 32),
    "32k-8-gpus": (8, 64),
    "64k-16-gpus": (16, 256),
}
MODEL = "meta-llama/Llama-3.1-8B"


def not_built_yet(monkeypatch) -> tuple[list[str], bool]:
    """Options that stand for what is not built yet, and whether the model is known without its files."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    alpaca = make_config({"datasets": [{"path": "x", "type": "alpaca"}]}).problems
    try:
        known = bool(architecture_of(MODEL))
    except UserError:
        known = False
    return ["--datasets", "[{path: tatsu-lab/alpaca}]"] if alpaca else [], known


def test_every_file_is_listed():
    assert {path.stem for path in FOLDER.glob("*")} == set(SCENARIOS)


@pytest.mark.parametrize("name", SCENARIOS)
def test_scenario_is_valid(name, monkeypatch, capsys):
    instead, known = not_built_yet(monkeypatch)
    path, (processes, batch) = FOLDER / f"{name}.yaml", SCENARIOS[name]
    text = path.read_text(encoding="utf-8")
    assert f"longspan train {name}.yaml --num-processes {processes}" in text
    values = yaml.safe_load(text)
    assert values["base_model"] == MODEL
    assert values["datasets"] == [{"path": "tatsu-lab/alpaca", "type": "alpaca"}]
    code = main.main(["validate", str(path), *instead, "--num-processes", str(processes), "--json"])
    shown = json.loads(capsys.readouterr().out)
    (result,) = shown["configs"]
    assert code == 0, result["problems"]
    assert result["mesh"]["processes"] == processes
    assert result["batch"]["global_batch_size"] == batch
    assert ("base_model" in " ".join(result["not_checked"])) is not known
    if known:
        assert (result["model"]["num_layers"], result["model"]["num_query_groups"]) == (32, 8)


def test_the_wrong_number_of_processes_is_refused(capsys, monkeypatch):
    instead, _ = not_built_yet(monkeypatch)
    path = str(FOLDER / "recommended.yaml")
    assert main.main(["validate", path, *instead, "--num-processes", "6"]) == 2
    assert "= 8, but there are 6 processes" in capsys.readouterr().err
