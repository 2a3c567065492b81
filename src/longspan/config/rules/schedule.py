"""The rules between the keys of steps, the learning rate, evaluations and checkpoints."""

from __future__ import annotations

from collections.abc import Iterator

from longspan.config.data import evaluates
from longspan.config.schema import TrainConfig
from longspan.errors import Problem


def _warms_up(config: TrainConfig) -> bool:
    given = config.warmup_ratio if config.warmup_steps is None else config.warmup_steps
    return config.lr_scheduler != "constant" if given is None else given > 0


def schedule_problems(config: TrainConfig) -> list[Problem]:
    """(keys, message) for each broken rule between these keys."""
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
    if config.nan_policy == "roll_back" and not (config.save_steps or config.saves_per_epoch):
        yield (
            ("nan_policy", "save_steps"),
            "nan_policy: roll_back goes back to the last checkpoint, and none is saved on the way. Set save_steps, or use skip.",
        )
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
