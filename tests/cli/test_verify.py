"""``longspan verify`` without its processes: which steps it looks at, and what counts as an error."""

import math

import numpy as np
import pytest
import torch

import pool
import tiny
from longspan.cli.verify import report
from longspan.data import IndexedDatasetWriter
from longspan.errors import UserError
from longspan.runs import verify

NAN = math.nan


def measured(prefix, steps, max_steps):
    got = verify.measure(
        tiny.tiny_run(prefix, 1, max_steps=max_steps, global_batch_size=1), torch.device("cpu"), steps
    )
    return got["losses"], got["evaluation_tokens"]


def test_a_run_of_fewer_steps_than_are_compared_is_verified(prefix):
    (short, tokens), (long, _) = (pool.run(1, measured, prefix, 3, steps)[0] for steps in (1, 30))
    assert len(set(short)) == 3  # the weights change
    assert short[0] == long[0]
    assert tokens > 0


def steps_without_a_token(prefix):
    with pytest.raises(UserError, match="only 0 of the first 102 steps have a token"):
        verify.measure(tiny.tiny_run(prefix, 1, max_steps=1), torch.device("cpu"), 2)


def test_steps_in_which_no_token_counts_are_looked_through_to_a_bound(tmp_path):
    """Documents of one token have nothing to predict."""
    with IndexedDatasetWriter(tmp_path / "ones", np.uint16) as writer:
        for number in range(600):
            writer.add_document(np.array([number % tiny.VOCAB]))
    pool.run(1, steps_without_a_token, str(tmp_path / "ones"))


def record(**changes):
    plain = {"losses": [2.0], "norms": [1.0], "gradients": {"a": torch.ones(2), "b": torch.ones(2)},
             "evaluation": 3.0, "evaluation_tokens": 40}  # fmt: skip
    return plain | changes


def result(got, expected, prefix):
    return verify.errors(tiny.tiny_run(prefix, 1), 1, got, expected)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"evaluation": NAN}, "loss_error"),
        ({"losses": [2.0, NAN]}, "loss_error"),
        ({"norms": [1.0, NAN]}, "grad_norm_error"),
        ({"gradients": {"a": torch.ones(2), "b": torch.tensor([1.0, NAN])}}, "max_gradient_error"),
    ],
)
def test_a_nan_on_either_side_or_both_never_passes(prefix, changes, name):
    two = {"losses": [2.0, 2.0], "norms": [1.0, 1.0]}
    for got, expected in ((changes, {}), ({}, changes), (changes, changes)):
        found = result(record(**two | got), record(**two | expected), prefix)
        assert math.isnan(found[name])
        assert not found["passed"]
    assert result(record(**two), record(**two), prefix)["passed"]


def test_the_parameter_with_a_nan_is_the_worst_one(prefix):
    wrong = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([1.0, NAN]), "c": torch.tensor([1.0, 3.0])}
    whole = dict.fromkeys(wrong, torch.ones(2))
    assert result(record(gradients=wrong), record(gradients=whole), prefix)["worst_parameter"] == "b"


def test_an_evaluation_without_a_token_on_both_sides_is_left_out_and_said(prefix, capsys):
    nothing = record(evaluation=NAN, evaluation_tokens=0)
    found = result(nothing, nothing, prefix)
    assert found["passed"]
    assert found["eval_loss"] is None
    assert report(found, as_json=False) == 0
    assert "no token of what is held out counts" in capsys.readouterr().out
    assert not result(nothing, record(), prefix)["passed"]
