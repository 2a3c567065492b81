"""examples/scenarios: every YAML of the users' quick reference, completed, is valid without data, weights or a network."""

import json
from pathlib import Path

import pytest
import yaml

from longspan.cli import main

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


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # validate sets it: put back afterwards


def test_every_file_is_listed():
    assert {path.stem for path in FOLDER.glob("*")} == set(SCENARIOS)


@pytest.mark.parametrize("name", SCENARIOS)
def test_scenario_is_valid(name, capsys):
    path, (processes, batch) = FOLDER / f"{name}.yaml", SCENARIOS[name]
    text = path.read_text(encoding="utf-8")
    assert f"longspan train {name}.yaml --num-processes {processes}" in text
    values = yaml.safe_load(text)
    assert values["base_model"] == MODEL
    assert values["datasets"] == [{"path": "tatsu-lab/alpaca", "type": "alpaca"}]
    code = main.main(["validate", str(path), "--num-processes", str(processes), "--json"])
    shown = json.loads(capsys.readouterr().out)
    (result,) = shown["configs"]
    assert code == 0, result["problems"]
    assert result["mesh"]["processes"] == processes
    assert result["batch"]["global_batch_size"] == batch
    assert result["not_checked"] == ["datasets: tatsu-lab/alpaca is not on this machine"]
    assert (result["model"]["num_layers"], result["model"]["num_query_groups"]) == (32, 8)


def test_the_wrong_number_of_processes_is_refused(capsys):
    path = str(FOLDER / "recommended.yaml")
    assert main.main(["validate", path, "--num-processes", "6"]) == 2
    assert "= 8, but there are 6 processes" in capsys.readouterr().err
