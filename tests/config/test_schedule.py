"""When things happen: the learning rate, intervals, and the rules between their keys."""

import math

import pytest

import tiny
from longspan.config.load import make_config
from longspan.config.rules.schedule import schedule_problems
from longspan.training.schedule import evaluation_limit, interval, learning_rate, warmup_steps


def config_of(**changes):
    reading = make_config(tiny.values("prefix", **changes))
    assert not reading.problems, reading.problems
    return reading.config


STEPS, WARMUP, PEAK = 20, 5, 1e-3


def rates(steps=STEPS, warmup=None, **changes):
    """The rates applied in steps 1 to ``steps``."""
    config = config_of(learning_rate=PEAK, **changes)
    warmup = warmup_steps(config, steps) if warmup is None else warmup
    return [learning_rate(config, step, steps, warmup) for step in range(1, steps + 1)]


def of_transformers(name, warmup=WARMUP, **more):
    """The rates that transformers' schedule of this name applies."""
    import torch
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    schedule = get_scheduler(name, optimizer, warmup, STEPS, **more)
    applied = []
    for _ in range(STEPS):
        applied.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return applied


@pytest.mark.parametrize(
    ("name", "theirs", "changes"),
    [
        ("cosine", {}, {}),
        ("linear", {}, {}),
        ("constant_with_warmup", {}, {}),
        ("cosine_with_min_lr", {"min_lr_rate": 0.1}, {"cosine_min_lr_ratio": 0.1}),
        ("cosine_with_min_lr", {"min_lr": 2e-4}, {"min_lr": 2e-4}),
    ],
)
@pytest.mark.parametrize("warmup", [0, WARMUP, STEPS, 2 * STEPS])
def test_applied_rates_are_those_of_transformers(name, theirs, changes, warmup):
    kind = name.removesuffix("_with_min_lr")
    expected = of_transformers(name, warmup, **({"scheduler_specific_kwargs": theirs} if theirs else {}))
    assert rates(lr_scheduler=kind, warmup_steps=warmup, **changes) == pytest.approx(expected, rel=1e-12)
    assert expected[-1] > 0


def test_constant_has_no_warm_up_unless_given():
    assert rates(lr_scheduler="constant") == of_transformers("constant") == [PEAK] * STEPS
    given = rates(lr_scheduler="constant", warmup_steps=WARMUP)
    assert given == pytest.approx(of_transformers("constant_with_warmup"))


def of_megatron(style, warmup, decay=STEPS, least=0.0, init=0.0, batch=4):
    """The rates that Megatron-LM applies: its scheduler counts samples, and is stepped after the optimizer."""
    applied = []
    for samples in range(0, STEPS * batch, batch):
        rising, falling = warmup * batch, decay * batch
        if rising > 0 and samples <= rising:
            rate = init + (PEAK - init) * samples / rising
        elif style == "constant":
            rate = PEAK
        elif samples > falling:
            rate = least
        else:
            share = (samples - rising) / (falling - rising)
            shape = 1.0 - share if style == "linear" else 0.5 * (math.cos(math.pi * share) + 1.0)
            rate = least + shape * (PEAK - least)
        applied.append(rate)
    return applied


@pytest.mark.parametrize("style", ["cosine", "linear", "constant"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"warmup": 5},
        {"warmup": 5, "init": 1e-4},
        {"warmup": 3, "decay": 10, "least": 1e-5},
        {"warmup": 0, "decay": 30, "least": 1e-5},
    ],
)
def test_applied_rates_are_those_of_megatron(style, changes):
    warmup, init = changes.get("warmup", 0), changes.get("init", 0.0)
    keys = {"warmup_steps": warmup, "lr_warmup_init": init, "min_lr": changes.get("least", 0.0)}
    if "decay" in changes and style != "constant":
        keys["lr_decay_iters"] = changes["decay"]
    expected = of_megatron(style, **({"warmup": 0} | changes))
    assert rates(lr_scheduler=style, **keys) == pytest.approx(expected, rel=1e-12)


def test_values_written_out():
    assert rates(4, lr_scheduler="linear", warmup_steps=0) == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])
    assert rates(4, lr_scheduler="linear", warmup_steps=2) == pytest.approx([0, 5e-4, 1e-3, 5e-4])
    assert rates(4, lr_scheduler="cosine", warmup_steps=0) == pytest.approx(
        [1e-3, 0.5e-3 * (1 + 0.5**0.5), 5e-4, 0.5e-3 * (1 - 0.5**0.5)]
    )


@pytest.mark.parametrize(
    ("changes", "steps", "expected"),
    [
        ({}, 1, 0),  # the only step trains
        ({}, 2, 1),
        ({}, 200, 6),
        ({}, 10000, 100),
        ({"lr_scheduler": "constant"}, 200, 0),
        ({"lr_scheduler": "constant_with_warmup"}, 200, 6),
        ({"warmup_ratio": 0.1}, 25, 3),
        ({"warmup_ratio": 0.1, "lr_decay_iters": 50}, 25, 5),
        ({"warmup_steps": 7}, 5, 7),
    ],
)
def test_warm_up_is_given_or_a_share(changes, steps, expected):
    assert warmup_steps(config_of(**changes), steps) == expected


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
        ({"lr_warmup_init": 1.0}, "lr_warmup_init 1 is above learning_rate 0.01"),
        ({"lr_warmup_init": 1e-4, "warmup_steps": 0}, "lr_warmup_init 0.0001 has no effect without warm-up"),
        ({"lr_warmup_init": 1e-4, "lr_scheduler": "constant"}, "has no effect without warm-up"),
        ({"lr_scheduler": "constant", "lr_decay_iters": 5}, "lr_decay_iters has no effect"),
    ],
)
def test_rules(changes, message):
    found = [text for _, text in schedule_problems(config_of(**changes))]
    assert any(message in text for text in found), found
