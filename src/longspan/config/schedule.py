"""When things happen: steps, warm-up, evaluations and checkpoints, and the rules between their keys."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from longspan.config.data_rules import has_validation
from longspan.config.schema import TrainConfig
from longspan.errors import Problem

if TYPE_CHECKING:
    from longspan.config.resolve import Run


def training_steps(run: Run, samples: int) -> int:
    """Optimizer steps: max_steps, or the epochs' samples over the global batch, rounded up."""
    config = run.config
    return config.max_steps or max(1, math.ceil(samples * config.num_epochs / run.global_batch_size))


def warmup_steps(config: TrainConfig, steps: int) -> int:
    """Steps of linear warm-up: as given, as a share of the course, or by default 3 % of the steps, at most 100.

    The default leaves a step behind the warm-up, and is 0 for ``constant``, as in transformers.
    """
    if config.warmup_steps is not None:
        return config.warmup_steps
    if config.warmup_ratio is not None:
        return math.ceil(config.warmup_ratio * (config.lr_decay_iters or steps))
    if config.lr_scheduler == "constant":
        return 0
    return min(math.ceil(0.03 * steps), 100, steps - 1)


def _warms_up(config: TrainConfig) -> bool:
    given = config.warmup_ratio if config.warmup_steps is None else config.warmup_steps
    return config.lr_scheduler != "constant" if given is None else given > 0


def interval(every: float | None, per_epoch: int | None, steps: int, steps_an_epoch: float) -> int | None:
    """Steps between two evaluations or two checkpoints; None for none on the way.

    Args:
        every: steps, or below 1 a share of all ``steps``.
        per_epoch: how many an epoch.
    """
    if per_epoch is not None:
        return max(1, round(steps_an_epoch / per_epoch))
    if every is None:
        return None
    return int(every) if every >= 1 else max(1, round(every * steps))


def learning_rate(config: TrainConfig, step: int, steps: int, warmup: int) -> float:
    """The learning rate applied in step ``step`` (from 1) of ``steps``.

    It depends on the steps done before, step - 1, as in Megatron-LM and in transformers: warm-up
    begins at ``lr_warmup_init`` (0) and has reached the peak after ``warmup`` steps; then cosine or
    linear decay reaches its end (``min_lr``, or ``cosine_min_lr_ratio`` x peak) after
    ``lr_decay_iters`` steps, by default all, and stays there; constant stays at the peak. So the
    last step of a run trains, and only the first one of a warm-up may have a rate of 0.
    """
    peak, last, done = config.learning_rate, config.lr_decay_iters or steps, step - 1
    assert peak is not None
    if done < warmup:
        return config.lr_warmup_init + (peak - config.lr_warmup_init) * done / warmup
    if config.lr_scheduler.startswith("constant"):
        return peak
    if done >= last:
        return _lowest(config, peak) * peak
    share = (done - warmup) / (last - warmup)
    shape = 0.5 * (1 + math.cos(math.pi * share)) if config.lr_scheduler == "cosine" else 1 - share
    low = _lowest(config, peak)
    return peak * (low + (1 - low) * shape)


def _lowest(config: TrainConfig, peak: float) -> float:
    """The learning rate's end as a share of its peak."""
    if config.min_lr is None:
        return config.cosine_min_lr_ratio
    return config.min_lr / peak if peak else 0.0


def evaluation_limit(run: Run) -> int | None:
    """Sequences of an evaluation at most; None for all of them."""
    config = run.config
    return config.eval_iters * run.global_batch_size if config.eval_iters else config.eval_max_samples


def evaluates(config: TrainConfig) -> bool:
    """Is anything held out to evaluate on?"""
    return has_validation(config) and config.eval_iters != 0


def schedule_problems(config: TrainConfig) -> list[Problem]:
    """All broken rules between these keys, as (keys involved, message)."""
    return list(_problems(config))


def _problems(config: TrainConfig) -> Iterator[Problem]:
    for one, other in (
        ("warmup_steps", "warmup_ratio"),
        ("eval_steps", "evals_per_epoch"),
        ("save_steps", "saves_per_epoch"),
        ("eval_iters", "eval_max_samples"),
    ):
        if getattr(config, one) is not None and getattr(config, other) is not None:
            yield (one, other), f"{one} and {other} are both given. Keep one."
    for name in ("eval_steps", "save_steps"):
        value = getattr(config, name)
        if value is not None and value > 1 and value != int(value):
            yield (name,), f"{name} {value}: from 1 on a whole number of steps, below 1 a share of them."
    for name in ("eval_steps", "evals_per_epoch"):
        if getattr(config, name) is not None and not evaluates(config) and config.eval_iters != 0:
            by_split = config.data_path or config.train_data_path or config.mock_data
            what = "nothing is held out" if by_split else "val_set_size is 0"
            remedy = (
                "split 99,1,0, or valid_data_path beside train_data_path"
                if by_split
                else "val_set_size: 0.02, or give test_datasets"
            )
            yield (name, "val_set_size"), f"{name} is given but {what}. Hold documents out, e.g. {remedy}."
    if config.min_lr is not None:
        if config.cosine_min_lr_ratio:
            yield (
                ("min_lr", "cosine_min_lr_ratio"),
                "min_lr and cosine_min_lr_ratio both say the learning rate's end. Keep one.",
            )
        if config.learning_rate is not None and config.min_lr > config.learning_rate:
            yield (
                ("min_lr", "learning_rate"),
                f"min_lr {config.min_lr:g} is above learning_rate {config.learning_rate:g}, the peak. Lower it.",
            )
    if config.learning_rate is not None and config.lr_warmup_init > config.learning_rate:
        yield (
            ("lr_warmup_init", "learning_rate"),
            f"lr_warmup_init {config.lr_warmup_init:g} is above learning_rate {config.learning_rate:g}, which warm-up rises "
            "to. Lower it.",
        )
    if config.lr_warmup_init and not _warms_up(config):
        yield (
            ("lr_warmup_init", "warmup_steps"),
            f"lr_warmup_init {config.lr_warmup_init:g} has no effect without warm-up. Give warmup_steps, or leave it out.",
        )
    if config.lr_decay_iters is not None and config.lr_scheduler.startswith("constant"):
        yield (
            ("lr_decay_iters", "lr_scheduler"),
            "lr_decay_iters has no effect with a constant learning rate. Leave it out, or use cosine or linear.",
        )
