"""Logging, evaluation, checkpoints and exports."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, field_validator

from longspan.config.keys.declare import key


class OutputKeys(BaseModel):
    """Logging, evaluation, checkpoints and exports."""

    output_dir: str = key("./model-out", "Where a run writes.", flag="--save")
    logging_steps: int | None = key(
        None,
        "Print a line every so many steps; default: 0.5 % of the steps, from 1 to 10.",
        unit="steps",
        flag="--log-interval",
        ge=1,
    )
    eval_steps: int | float | None = key(
        None,
        "Evaluate every so many steps (below 1: at every such share of them), and at the end; default: at the end, if "
        "documents are held out.",
        unit="steps or share",
        flag="--eval-interval",
        megatron_default=1000,
        gt=0,
    )
    eval_max_samples: int | None = key(
        None,
        "Sequences of an evaluation at most; default: all.",
        unit="sequences",
        ge=1,
    )
    eval_iters: int | None = key(
        None,
        "Global batches of an evaluation at most: the other way to say eval_max_samples.",
        unit="batches",
        megatron_default=100,
        ge=0,
    )
    evals_per_epoch: int | None = key(
        None, "Evaluate so many times an epoch: the other way to say eval_steps.", unit="evaluations", ge=1
    )
    saves_per_epoch: int | None = key(
        None, "Save so many times an epoch: the other way to say save_steps.", unit="checkpoints", ge=1
    )
    log_format: Literal["longspan", "megatron"] = key(
        "longspan",
        "megatron: start-up and iteration lines as Megatron-LM prints them, for its log parsers.",
        megatron_default="megatron",
    )
    log_params_norm: bool = key(False, "Log the norm of all weights after each step, as params_norm.")
    loss_spike_sigma: float = key(
        6.0,
        "A loss so many standard deviations above the last 128 is reported with the documents of its step; 0 reports none.",
        unit="standard deviations",
        ge=0,
    )
    straggler_interval: int = key(
        100,
        "Compare the ranks' speed every so many steps, and report those that are slow; 0 never does.",
        unit="steps",
        ge=0,
    )
    save_steps: int | float | None = key(
        None,
        "Save a checkpoint every so many steps (below 1: at every such share of them), and at the end; default: at the end.",
        unit="steps or share",
        flag="--save-interval",
        gt=0,
    )
    save_last: bool = key(True, "Save a checkpoint at the end.")
    save_total_limit: int | None = key(
        None,
        "How many of the newest checkpoints to keep; default: all.",
        unit="checkpoints",
        ge=1,
    )
    async_save: bool = key(True, "Write checkpoints in a thread while training goes on.")
    resume: str | None = key(
        None,
        "Go on from a checkpoint: a path, or auto for the newest in output_dir, if there is one.",
        flag="--load",
        aliases=("resume_from_checkpoint",),
    )
    no_load_optim: bool = key(
        False,
        "Take only the weights of the checkpoint and start at step 0.",
    )
    verify_checkpoint: bool = key(
        True,
        "Compare a checkpoint's files with their checksums before it is used: one read of it, shared by the ranks.",
    )
    no_load_rng: bool = key(False, "Do not take the checkpoint's random number states.")
    exit_on_missing_checkpoint: bool = key(
        True,
        "Refuse to start when resume names a place without a checkpoint, instead of starting anew.",
        megatron_default=False,
    )
    export_hf: bool = key(
        True,
        "Write the trained model for Hugging Face into output_dir/hf at the end.",
        megatron_default=False,
    )
    export_dtype: Literal["auto", "float32", "bfloat16"] = key(
        "auto",
        "Of the exported weights; auto: base_model's, else bfloat16 when trained in it, else float32.",
    )
    use_wandb: bool = key(False, "Log to Weights & Biases (pip install 'longspan[wandb]').")
    wandb_project: str | None = key(None, "Project of the run.")
    wandb_name: str | None = key(None, "Name of the run.", flag="--wandb-exp-name")
    wandb_mode: Literal["online", "offline", "disabled"] = key(
        "online", "offline keeps the run on this machine."
    )

    @field_validator("wandb_mode", mode="before")
    @classmethod
    def _off(cls, value: Any) -> Any:
        # YAML reads off and no as false.
        return "disabled" if value is False else value

    wandb_entity: str | None = key(None, "Team of the run.")
    use_tensorboard: bool = key(True, "Write TensorBoard files.")
    tensorboard_dir: str | None = key(None, "Where TensorBoard files go; default: output_dir/tensorboard.")
