"""The schedule of a run: its steps, warm-up, learning rates, evaluations and checkpoints."""

from __future__ import annotations

import math

from longspan.config.run import Run
from longspan.config.schema import TrainConfig


def training_steps(run: Run, samples: int) -> int:
    """Optimizer steps: max_steps, or the epochs' samples divided by the global batch, rounded up."""
    config = run.config
    return config.max_steps or max(1, math.ceil(samples * config.num_epochs / run.batch.global_size))


def warmup_steps(config: TrainConfig, steps: int) -> int:
    """Steps of linear warm-up: as given, or a share of the steps, or by default 3 % of them, at most 100.

    The default leaves at least one step after the warm-up, and is 0 for ``constant``, as in transformers.
    """
    if config.warmup_steps is not None:
        return config.warmup_steps
    if config.warmup_ratio is not None:
        return math.ceil(config.warmup_ratio * (config.lr_decay_iters or steps))
    if config.lr_scheduler == "constant":
        return 0
    return min(math.ceil(0.03 * steps), 100, steps - 1)


def interval(every: float | None, per_epoch: int | None, steps: int, steps_an_epoch: float) -> int | None:
    """Steps between two evaluations or two checkpoints; None for none during training.

    Args:
        every: a number of steps, or below 1 a share of all ``steps``.
        per_epoch: how many there are in an epoch.
    """
    if per_epoch is not None:
        return max(1, round(steps_an_epoch / per_epoch))
    if every is None:
        return None
    return int(every) if every >= 1 else max(1, round(every * steps))


def learning_rate(config: TrainConfig, step: int, steps: int, warmup: int) -> float:
    """The learning rate applied in step ``step`` (from 1) of ``steps``.

    It depends on the number of steps done before, step - 1, as in Megatron-LM and in transformers.
    Warm-up begins at ``lr_warmup_init`` (0) and reaches the peak after ``warmup`` steps. Then cosine
    or linear decay reaches its end (``min_lr``, or ``cosine_min_lr_ratio`` x peak) after
    ``lr_decay_iters`` steps, by default all, and stays there; constant stays at the peak. So the
    last step of a run still trains, and only the first step of a warm-up may have a rate of 0.
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
    """The lowest learning rate of the decay as a share of its peak."""
    if config.min_lr is None:
        return config.cosine_min_lr_ratio
    return config.min_lr / peak if peak else 0.0


def evaluation_limit(run: Run) -> int | None:
    """The largest number of sequences of an evaluation; None for all."""
    config = run.config
    return config.eval_iters * run.batch.global_size if config.eval_iters else config.eval_max_samples
