"""When things happen: the learning rate, intervals, and the rules between their keys."""

import math

import pytest

import tiny
from longspan.config.load import make_config
from longspan.config.schedule import evaluation_limit, interval, learning_rate, schedule_problems


def config_of(**changes):
    reading = make_config(tiny.values("prefix", **changes))
    assert not reading.problems, reading.problems
    return reading.config


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant", "constant_with_warmup"])
def test_learning_rate_rises_then_follows_its_shape(kind):
    config = config_of(lr_scheduler=kind, learning_rate=1.0, cosine_min_lr_ratio=0.1)
    rates = [learning_rate(config, step, 20, 5) for step in range(1, 21)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    flat = kind.startswith("constant")
    middle = {"cosine": 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 10 / 15)), "linear": 0.1 + 0.9 / 3}
    assert rates[14] == pytest.approx(1.0 if flat else middle[kind])
    assert rates[-1] == pytest.approx(1.0 if flat else 0.1)


def test_the_end_may_be_a_number_and_come_before_the_last_step():
    config = config_of(lr_scheduler="cosine", learning_rate=1e-4, min_lr=1e-5, lr_decay_iters=10)
    rates = [learning_rate(config, step, 20, 0) for step in range(1, 21)]
    assert rates[9:] == pytest.approx([1e-5] * 11)
    assert rates[4] == pytest.approx((1e-4 + 1e-5) / 2)


@pytest.mark.parametrize(
    ("every", "per_epoch", "expected"),
    [(None, None, None), (7, None, 7), (0.1, None, 10), (0.001, None, 1), (None, 4, 5), (None, 100, 1)],
)
def test_intervals_are_steps_shares_or_times_an_epoch(every, per_epoch, expected):
    assert interval(every, per_epoch, 100, 20.0) == expected


def test_evaluation_takes_so_many_global_batches():
    assert evaluation_limit(tiny.tiny_run("prefix", 1, eval_iters=3)) == 12  # of 4 sequences
    assert evaluation_limit(tiny.tiny_run("prefix", 1, eval_max_samples=5)) == 5
    assert evaluation_limit(tiny.tiny_run("prefix", 1)) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"min_lr": 1e-5, "cosine_min_lr_ratio": 0.1}, "min_lr and cosine_min_lr_ratio both say"),
        ({"min_lr": 1.0}, "min_lr 1 is above learning_rate 0.01"),
        ({"save_steps": 2.5}, "save_steps 2.5: from 1 on a whole number"),
        ({"save_steps": 2, "saves_per_epoch": 1}, "save_steps and saves_per_epoch are both given"),
        ({"eval_iters": 2, "eval_max_samples": 2}, "eval_iters and eval_max_samples are both given"),
        ({"evals_per_epoch": 2, "val_set_size": 0.0}, "evals_per_epoch is given but val_set_size is 0"),
        ({"lr_scheduler": "constant", "lr_decay_iters": 5}, "lr_decay_iters has no effect"),
    ],
)
def test_rules(changes, message):
    found = [text for _, text in schedule_problems(config_of(**changes))]
    assert any(message in text for text in found), found
