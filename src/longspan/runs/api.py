"""Training from Python: ``longspan.load``, ``train``, ``verify`` and ``evaluate``.

    run = longspan.load("config.yaml", context_parallel_size=2)
    longspan.verify(run)["passed"]
    longspan.train(run)["loss"]
    longspan.evaluate(run)["positions"]

The commands ``train``, ``verify`` and ``eval`` parse options, call the same functions as these, and print.
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
    """Reads a config, checks every rule, tokenises its datasets and fills in every open value.

    Args:
        path: a YAML file; None reads no file.
        keys: config keys, by any of their names; they replace the keys of the file.

    Raises:
        UserError: rules are broken, with all problems at once; or the data cannot be prepared.
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
    """Trains like ``longspan train``. Returns the last summary record of ``metrics.jsonl``.

    Starts the processes that the run's layout needs. A process that torchrun has started joins the other
    processes instead, and a run of one process trains in this process.

    Raises:
        UserError: something does not fit, found before the first step.
        RuntimeError: the training failed or was stopped; its messages are on stderr.
    """
    code = start_or_join(Checked.of(run.config), Launch(processes=run.sizes.world_size))
    if code:
        raise RuntimeError(f"the training ended with exit code {code}; its messages are above.")
    return records_of_kind(Path(run.config.output_dir) / "metrics.jsonl", "summary")[-1]


def verify(run: Run, steps: int = 2, dtype: str = "float64") -> dict[str, Any]:
    """Compares the first steps at the run's layout with those of one process, like ``longspan verify``.

    Args:
        steps: number of training steps to compare.
        dtype: precision of both runs, float64 or float32.

    Returns:
        A dict of layout, reference, dtype, tolerance, loss_error, grad_norm_error, max_gradient_error,
        worst_parameter, passed, the compared losses and more; see :func:`longspan.runs.verify.errors`.

    Raises:
        UserError: something does not fit.
        ProcessesFailed: the layout's processes failed; their messages are on stderr.
    """
    _refuse_torchrun("verify")
    return verify_run(run, Launch(), steps, dtype)[0]


def evaluate(run: Run, checkpoint: str | Path | None = None, needles: int = 2) -> dict[str, Any]:
    """Measures a trained model's loss by position and runs a needle test, like ``longspan eval``.

    Args:
        checkpoint: a checkpoint or a folder of checkpoints; None takes the newest one in output_dir, or else
            base_model.
        needles: number of texts for each length and depth; 0 omits the needle test.

    Returns:
        A dict of checkpoint, step, layout, loss (nats), tokens, positions and needles.

    Raises:
        UserError: nothing is held out to evaluate on, or there are no weights that fit.
        ProcessesFailed: a process failed; its message is on stderr.
    """
    _refuse_torchrun("evaluate")
    return evaluate_run(run, Launch(), None if checkpoint is None else str(checkpoint), needles)


def _refuse_torchrun(name: str) -> None:
    if under_torchrun():
        raise UserError(f"longspan.{name} starts its processes itself: call it without torchrun.")
