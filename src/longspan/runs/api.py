"""Training from Python: ``longspan.load``, ``train``, ``verify`` and ``evaluate``.

    run = longspan.load("config.yaml", context_parallel_size=2)
    longspan.verify(run)["passed"]
    longspan.train(run)["loss"]
    longspan.evaluate(run)["positions"]

The commands of the same names parse their options, call what these call, and print.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from longspan.config.load import make_config
from longspan.config.run import Checked, Run
from longspan.config.schema import names
from longspan.config.yaml_file import read_yaml
from longspan.errors import UserError
from longspan.runs.check import checked
from longspan.runs.evaluate import evaluate_run
from longspan.runs.prepare import prepare_data
from longspan.runs.start import Launch, quiet_logs, under_torchrun
from longspan.runs.train import start_or_join
from longspan.runs.verify import verify_run
from longspan.training.metrics import records_of_kind


def load(path: str | Path | None = None, **keys: Any) -> Run:
    """A config as it will be run: every rule checked, its datasets tokenised, every open value decided.

    Args:
        path: a YAML file; None takes the keys alone.
        keys: keys of a config by any of their names; they replace those of the file.

    Raises:
        UserError: with all problems at once.
    """
    values, table = (read_yaml(str(path)) if path is not None else {}), names()
    known = {table[name]: value for name, value in keys.items() if name in table}
    unknown = {name: value for name, value in keys.items() if name not in table}
    reading = make_config({**values, **unknown}, known)
    if reading.config is None:
        raise UserError(reading.problems)
    quiet_logs()
    return prepare_data(checked(reading, Launch())[0], show=False)


def train(run: Run) -> dict[str, Any]:
    """Trains as ``longspan train`` does, and returns the summary's record of ``metrics.jsonl``.

    It starts the processes that the run's layout needs. A process that torchrun has started joins the others instead,
    and a run of one process trains here.

    Raises:
        UserError: something does not fit, found before the first step.
        RuntimeError: the training failed or was stopped; its messages are on stderr.
    """
    code = start_or_join(Checked.of(run.config), Launch(processes=run.sizes.world_size))
    if code:
        raise RuntimeError(f"the training ended with exit code {code}; its messages are above.")
    return records_of_kind(Path(run.config.output_dir) / "metrics.jsonl", "summary")[-1]


def verify(run: Run, steps: int = 2, dtype: str = "float64") -> dict[str, Any]:
    """Compares the first steps at the run's layout with those of one process, as ``longspan verify`` does.

    Args:
        steps: training steps to compare.
        dtype: precision of both runs, float64 or float32.

    Returns:
        layout, reference, dtype, tolerance, loss_error, grad_norm_error, max_gradient_error, worst_parameter, passed,
        and the compared losses.

    Raises:
        UserError: something does not fit, or the layout's processes failed.
    """
    _refuse_torchrun("verify")
    return verify_run(run, Launch(), steps, dtype)[0]


def evaluate(run: Run, checkpoint: str | Path | None = None, needles: int = 2) -> dict[str, Any]:
    """Loss by position and a needle test of a trained model, as ``longspan eval`` does.

    Args:
        checkpoint: a checkpoint or a folder of them; None takes the newest in output_dir, else base_model.
        needles: texts for each length and depth; 0 leaves the test out.

    Returns:
        checkpoint, step, layout, loss (nats), tokens, positions and needles.

    Raises:
        UserError: there is nothing to evaluate on, or no weights that fit.
    """
    _refuse_torchrun("evaluate")
    return evaluate_run(run, Launch(), None if checkpoint is None else str(checkpoint), needles)


def _refuse_torchrun(name: str) -> None:
    if under_torchrun():
        raise UserError(f"longspan.{name} starts its processes itself: call it without torchrun.")
