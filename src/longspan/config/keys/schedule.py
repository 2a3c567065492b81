"""Batch sizes, steps and the learning rate's course."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

from longspan.config.keys.declare import key


class ScheduleKeys(BaseModel):
    """Batch sizes, steps and the learning rate's course."""

    micro_batch_size: int | None = key(
        None,
        "Sequences a data parallel rank takes at a time; default 1.",
        unit="sequences",
        ge=1,
    )
    gradient_accumulation_steps: int | None = key(
        None,
        "Micro-batches a rank takes a step; default 1.",
        unit="micro-batches",
        ge=1,
    )
    global_batch_size: int | None = key(
        None,
        "Sequences of a step over all ranks = micro_batch_size x gradient_accumulation_steps x dp. Any two give the third.",
        unit="sequences",
        aliases=("batch_size",),
        ge=1,
    )
    num_epochs: float = key(1.0, "Passes over the data, unless max_steps is set.", unit="epochs", gt=0)
    max_steps: int | None = key(
        None,
        "Optimizer steps; wins over num_epochs.",
        unit="steps",
        flag="--train-iters",
        gt=0,
    )
    lr_scheduler: Literal["cosine", "linear", "constant", "constant_with_warmup"] = key(
        "cosine",
        "Shape of the learning rate after warm-up.",
        flag="--lr-decay-style",
        megatron_default="linear",
    )
    warmup_steps: int | None = key(
        None,
        "Steps of linear warm-up; default: 3 % of the steps, at most 100, and none for constant.",
        unit="steps",
        flag="--lr-warmup-iters",
        megatron_default=0,
        ge=0,
    )
    warmup_ratio: float | None = key(
        None,
        "Warm-up as a share of the steps, or of lr_decay_iters where that is given.",
        unit="share",
        flag="--lr-warmup-fraction",
        ge=0,
        le=1,
    )
    lr_warmup_init: float = key(0.0, "Learning rate of a warm-up's first step.", ge=0)
    cosine_min_lr_ratio: float = key(
        0.0,
        "Learning rate at the end as a share of its peak (cosine and linear).",
        unit="share",
        ge=0,
        le=1,
    )
    min_lr: float | None = key(
        None, "Learning rate at the end, as a number: the other way to say cosine_min_lr_ratio.", ge=0
    )
    lr_decay_iters: int | None = key(
        None, "Steps after which the learning rate has reached its end; default: all.", unit="steps", gt=0
    )
    exit_interval: int | None = key(None, "Save and stop at a multiple of so many steps.", unit="steps", gt=0)
    exit_duration_in_mins: float | None = key(
        None, "Save and stop after so many minutes.", unit="minutes", gt=0
    )
    seed: int = key(42, "Of initial weights and data order.", megatron_default=1234, ge=0)
