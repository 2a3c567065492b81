"""The trainer: a model, its optimizer, its data, and one training step, the same at every layout.

A step, on every rank:

    micro-batches -> count of valid tokens (summed over dp)
    each micro-batch: shard by the layout -> model -> sum of losses / global count -> backward
    gradient norm over all axes -> clip -> AdamW

Each rank's loss is already its share of the global mean, and FSDP sums gradients (it does not
average them), so the loss and its gradient are those of one process (invariant I1).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from longspan.config.run import Run
from longspan.config.stages import Stage
from longspan.context_parallel import SequenceLayout
from longspan.data import Prefetcher, TokenDataset
from longspan.data.splits import open_datasets
from longspan.mesh.mesh import ParallelMesh, hold_waiting_time
from longspan.models import GPTModel
from longspan.training.adapters import parameter_counts
from longspan.training.build import build_model, groups_of, make_pipeline, make_sharder
from longspan.training.checkpoint import check_fits, load
from longspan.training.description import describe_run
from longspan.training.experts import Experts, num_tokens, of_step
from longspan.training.metrics import Metrics, peak_memory_gib
from longspan.training.nonfinite import MOST_IN_A_ROW, Finding, NotFinite, documents_of, find, some
from longspan.training.optimizer import (
    clip_gradients,
    gradient_norm,
    make_optimizer,
    parameter_norm,
    set_learning_rate,
)
from longspan.training.schedule import learning_rate, training_steps, warmup_steps
from longspan.training.sharding import LocalBatch
from longspan.training.spikes import LossSpikes
from longspan.training.stragglers import Stragglers, probe
from longspan.values import known_number, known_numbers

if TYPE_CHECKING:
    from longspan.integrations.causal_lm import CausalLM


class Trainer:
    """A model, its optimizer and its data on this rank of a mesh.

    Args:
        run: the resolved config, with ``vocab_size`` filled in.
        device: the device on which this rank computes.
        metrics: takes the records; only rank 0 has sinks.
        mesh: a mesh of the run's sizes; None makes one.
        filled: whether the weights get their first values; a plan reads none.
        train_data: training samples in the place of those of the config.

    Attributes:
        step: optimizer steps done, including those without a target.
        steps: optimizer steps of the whole run.
        tokens: valid tokens trained on so far, over all ranks.
        skipped: steps, from 1, that changed nothing because their loss or gradients were not finite.
        passed_over: global batches, by their numbers from 0, that no step trains on any more, in order.
    """

    run: Run
    mesh: ParallelMesh
    model: GPTModel | CausalLM
    optimizer: torch.optim.AdamW
    step: int
    steps: int
    tokens: int

    def __init__(
        self,
        run: Run,
        device: torch.device,
        metrics: Metrics | None = None,
        mesh: ParallelMesh | None = None,
        filled: bool = True,
        train_data: TokenDataset | None = None,
    ):
        config = run.config
        self.run, self.device, self.metrics = run, device, metrics or Metrics([])
        self.train_data, self.valid_data, self.test_data = (
            open_datasets(run) if train_data is None else (train_data, None, None)
        )
        self.steps = training_steps(run, len(self.train_data))
        self.warmup = warmup_steps(config, self.steps)
        self.step = self.tokens = 0
        self.skipped: list[int] = []
        self.passed_over: list[int] = []
        # This rank's part of the last step's loss.
        self._own_loss = torch.zeros(())
        # True if this rank was asked to stop; a signal may set it at any moment.
        self.signalled = False
        # True if this rank was asked to save and go on; a signal may set it at any moment.
        self.save_signalled = False
        # True if some rank was asked to save and go on, after this step.
        self.save_asked = False
        # True if some rank was asked to stop. In each step all ranks agree on this and on ``ran_out``.
        self.asked = False
        # True if it is time to stop, by exit_interval or exit_duration_in_mins.
        self.ran_out = False
        # True if the evaluation of this step is due and not done, so that a resumed run does it.
        self.owed = False
        self.begun = time.perf_counter()
        self.spikes = LossSpikes(config.loss_spike_sigma)
        self.stragglers = Stragglers(config.straggler_interval, lambda: probe(device))

        self.mesh = mesh or ParallelMesh.build(run.sizes, device.type)
        self.groups = groups_of(run, self.mesh)
        self.model = build_model(run, self.mesh, self.groups, device, filled)
        self.parameter_counts = parameter_counts(self.model)
        self.optimizer = make_optimizer(self.model, config)
        self.pipeline = make_pipeline(run, self.model, self.groups, device, self._compute)
        self.experts = Experts(self.model, self.groups, run.model)
        self.shard = make_sharder(run, self.groups, self._plan)
        hold_waiting_time()

    # --- resuming -------------------------------------------------------------------------

    def description(self) -> dict:
        """The description for a checkpoint: the position in the run, and the run that it fits."""
        where: dict = {"step": self.step, "tokens": self.tokens, "evaluation_due": self.owed}
        where |= {"skipped": self.skipped, "passed_over": self.passed_over}
        where |= {"last_losses": list(self.spikes.losses), "idle_experts": self.experts.idle_counts()}
        return describe_run(self.run, self.train_data) | where

    def resume(self, path: Path, option: str = "resume", weights_only: bool | None = None) -> None:
        """Continues from a checkpoint made at any layout: loads weights, optimizer and position. Collective.

        If the checkpoint is of the last step or a later one, nothing is left to do, and ``step`` is at least
        ``steps``.

        Args:
            option: the option that named the checkpoint, for messages.
            weights_only: leave the optimizer and the position; None is as ``no_load_optim``.

        Raises:
            UserError: the checkpoint is damaged, or does not fit the run (``checkpoint.check_fits``).
        """
        config = self.run.config
        if weights_only is None:
            weights_only = config.no_load_optim
        then = check_fits(path, self.description(), weights_only=weights_only, option=option)
        optimizer = None if weights_only else self.optimizer
        load(path, self.model, optimizer, not config.no_load_rng, config.verify_checkpoint, option)
        if weights_only:
            self.experts.forget_counts()
            return
        self.step, self.tokens = then["step"], then["tokens"]
        self.owed = bool(then.get("evaluation_due"))
        self.skipped = list(then.get("skipped") or [])
        self.passed_over = list(then.get("passed_over") or [])
        self.spikes.restart(then.get("last_losses") or [])
        self.experts.restart_idle(then.get("idle_experts"))

    # --- one micro-batch ------------------------------------------------------------------

    def _plan(self, layout: SequenceLayout) -> None:
        self.model.plan(layout)

    def losses(self, batch: LocalBatch) -> Tensor:
        """The loss (nats) of each of this rank's tokens of a micro-batch, [b, rows]; 0 without a target."""
        if self.pipeline is None:
            return self._compute(batch)
        return self.pipeline.losses(batch, batch.labels.shape)

    def _compute(self, batch: LocalBatch, x: Tensor | None = None, stage: Stage | None = None) -> Tensor:
        """The model, or a stage of it, which takes activations ``x`` unless it is the first."""
        last = stage is None or stage.last
        positions = None if batch.positions is None else batch.positions.to(self.device)
        more = {} if batch.sequences is None else {"sequences": batch.sequences}
        return self.model(
            batch.tokens.to(self.device) if x is None else x,
            position_ids=positions,
            labels=batch.labels.to(self.device) if last else None,
            layout=batch.layout,
            stage=stage,
            **more,
        )

    # --- one step -------------------------------------------------------------------------

    def micro_batches(self, step: int) -> list[LocalBatch]:
        """This rank's part of the micro-batches of training step ``step`` (from 0)."""
        return self.shard.training(self.train_data, self.batch_of_step(step))

    def batch_of_step(self, step: int) -> int:
        """The number of the global batch that a step (from 0) trains on: the step's own, without those passed over."""
        number = step
        for passed in self.passed_over:
            number += passed <= number
        return number

    def compute_gradients(self, batches: list[LocalBatch]) -> tuple[float | None, int]:
        """Computes forward and backward of a global batch. Collective.

        Returns:
            The mean loss (nats) and the number of valid tokens, over all ranks. If no token counts on any
            rank, the loss is None and no gradient is made.
        """
        counts = torch.tensor([sum(b.num_valid for b in batches), num_tokens(batches)], dtype=torch.int64)
        dist.all_reduce(counts, group=self.groups.dp_cp)
        count, all_tokens = counts
        if not count:
            return None, 0
        batches = of_step(batches, int(all_tokens))
        self.experts.start_step()
        self.model.train()
        self.optimizer.zero_grad()
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        if self.pipeline is not None:
            total += self.pipeline.step(batches, int(count)) * count
            batches = []
        for i, batch in enumerate(batches):
            # The copies of HSDP sum their gradients once a step, in the last micro-batch.
            self.model.set_requires_all_reduce(i == len(batches) - 1)
            loss = self.losses(batch).sum()
            (loss / count.item()).backward()
            total += loss.detach()
        self._own_loss = total.clone()
        if self.pipeline is not None:
            dist.all_reduce(total, group=self.groups.pp)
        dist.all_reduce(total, group=self.groups.dp_cp)
        return known_number(total / count, 0.0), int(count)

    def apply_gradients(self, rate: float) -> float:
        """Clips the gradients and updates the weights. Returns the gradient norm before clipping. Collective.

        Args:
            rate: the learning rate.

        Raises:
            NotFinite: the gradient norm is infinite or NaN; the weights are not updated.
        """
        norm = gradient_norm(self.model, self.run.sizes.pp)
        value = known_number(norm, 1.0)
        if not math.isfinite(value):
            raise NotFinite(
                f"the gradient norm is {value} in step {self.step + 1}; the weights were not updated. Lower learning_rate, "
                "or look at the data of this step."
            )
        clip_gradients(self.model, norm, self.run.config.max_grad_norm)
        self.experts.end_step()
        set_learning_rate(self.optimizer, rate)
        self.optimizer.step()
        return value

    def _parameter_norm(self) -> dict[str, float]:
        if not self.run.config.log_params_norm:
            return {}
        return {"params_norm": known_number(parameter_norm(self.model, self.run.sizes.pp), 1.0)}

    def stop(self) -> str:
        """Requests a stop after this step; a signal may do so at any moment. Returns the effect as text."""
        self.signalled = True
        if self.step >= self.steps:
            return "the last step is done, and the run goes on to its end"
        most = self.run.config.stop_timeout
        return f"step {self.step + 1} is finished and saved (within {most:g} s: stop_timeout), then the run stops"

    def save(self) -> str:
        """Requests a checkpoint after this step; a signal may do so at any moment. Returns the effect as text."""
        if self.step >= self.steps:
            return "the last step is done, and the run goes on to its end"
        self.save_signalled = True
        return f"step {self.step + 1} is finished and saved, and the run goes on"

    def stops(self) -> bool:
        """Whether a signal that comes now has something to save and to stop."""
        return self.step < self.steps

    @property
    def stop_asked(self) -> bool:
        """Whether all ranks stop after this step. After the last step there is nothing to stop."""
        return (self.asked or self.ran_out) and self.step < self.steps

    def run_out(self, now: float) -> bool:
        """Whether exit_interval or exit_duration_in_mins requires to save and stop before the last step.

        Args:
            now: the time by ``time.perf_counter``, in seconds.
        """
        config = self.run.config
        minutes = (now - self.begun) / 60
        due = config.exit_interval is not None and self.step % config.exit_interval == 0
        due |= config.exit_duration_in_mins is not None and minutes >= config.exit_duration_in_mins
        return due and self.step < self.steps

    def _update(self, loss: float, rate: float) -> float:
        if not math.isfinite(loss):
            raise NotFinite(
                f"the loss is {loss} in step {self.step + 1}; the weights were not updated. Lower learning_rate, or look at "
                "the data of this step."
            )
        return self.apply_gradients(rate)

    def _skip(self, error: NotFinite) -> Finding:
        """Leaves a step out that is not finite; collective.

        Raises:
            NotFinite: the run's ``nan_policy`` is another, or too many steps in a row were skipped.
        """
        samples = self.train_data.global_batch(self.batch_of_step(self.step), self.run.batch.global_size)
        error.finding = find(self.model, self._own_loss, self.train_data, samples)
        if self.run.config.nan_policy != "skip":
            raise error
        self.skipped.append(self.step + 1)
        last = range(self.step + 2 - MOST_IN_A_ROW, self.step + 2)
        if set(last) <= set(self.skipped):
            raise error
        return error.finding

    def train_step(self, batches: list[LocalBatch]) -> dict:
        """Does one optimizer step. Returns its record. Collective.

        If no token counts on any rank, the loss and the gradient norm are None, and neither the weights nor
        the optimizer state change (otherwise weight decay would act on the weights). The step number and the
        schedule of the learning rate go on.

        Nor do they change in a step whose loss or gradients are not finite, where ``nan_policy`` is ``skip``.

        Raises:
            NotFinite: the loss or the gradient norm is infinite or NaN; the weights are not updated.
        """
        start = time.perf_counter()
        loss, count = self.compute_gradients(batches)
        rate = learning_rate(self.run.config, self.step + 1, self.steps, self.warmup)
        norm, finding = None, None
        if loss is not None:
            try:
                norm = self._update(loss, rate)
            except NotFinite as error:
                finding = self._skip(error)
                loss, count = None, 0
        self.step += 1
        self.tokens += count
        # One small message holds a rank's largest memory, whether a rank was asked to stop, and whether it is
        # time to stop.
        to_save, self.save_signalled = self.save_signalled, False
        asked = [float(self.signalled), float(self.run_out(time.perf_counter())), float(to_save)]
        shared = torch.tensor([peak_memory_gib(self.device), *asked], dtype=torch.float64)
        dist.all_reduce(shared, op=dist.ReduceOp.MAX)
        peak, *flags = known_numbers(shared, [0.0, *asked])
        self.asked, self.ran_out, self.save_asked = map(bool, flags)
        elapsed = time.perf_counter() - start
        return self.metrics.write(
            "train",
            self.step,
            loss=loss,
            grad_norm=norm,
            **({} if finding is None else {"skipped": True, "not_finite": finding.record()}),
            **self._parameter_norm(),
            **({} if norm is None else self.experts.record()),
            learning_rate=rate,
            tokens=self.tokens,
            step_time=elapsed,
            tokens_per_second=count / elapsed,
            peak_memory_gib=peak,
        )

    # --- all steps -------------------------------------------------------------------------

    def steps_ahead(self) -> Iterator[list[LocalBatch]]:
        """Yields the micro-batches of each remaining step, which a thread reads ahead."""
        with Prefetcher(self.micro_batches, self.step, self.steps) as prefetcher:
            ahead = iter(prefetcher)
            while True:
                begin = time.perf_counter()
                batches = next(ahead, None)
                self.stragglers.waited += time.perf_counter() - begin
                if batches is None:
                    return
                yield batches

    def remarks(self, record: dict) -> list[str]:
        """What is unusual about the last step, a text each, for the user; records of it are written. Collective.

        Args:
            record: the record of the step.
        """
        texts = []
        loss = record["loss"]
        if loss is not None and (mean := self.spikes.add(loss)) is not None:
            samples = self.train_data.global_batch(
                self.batch_of_step(self.step - 1), self.run.batch.global_size
            )
            documents = documents_of(self.train_data, samples)
            self.metrics.write("loss_spike", self.step, loss=loss, mean=mean, documents=documents)
            texts.append(
                f"the loss of step {self.step} is {loss:.4g}, far above the {mean:.4g} of the steps before. The step's documents: "
                f"{some(documents)}."
            )
        if found := self.stragglers.look(self.step):
            numbers, lines = found
            self.metrics.write("ranks", self.step, **numbers)
            texts += lines
        return texts

    @torch.no_grad()
    def evaluate(self, data: TokenDataset | None = None, **more: str) -> dict:
        """Computes the mean loss (nats) over the valid tokens of the held-out set or of ``data``. Collective.

        Args:
            more: further fields of the record.

        Returns:
            The record; its loss is NaN if there are no valid tokens.
        """
        data = self.valid_data if data is None else data
        assert data is not None
        self.model.eval()
        # the sum of losses, and the number of tokens
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        for batch in self.shard.evaluation(data):
            sums[0] += self.losses(batch).sum()
            sums[1] += batch.num_valid
        dist.all_reduce(sums, group=self.groups.dp_cp)
        loss, count = sums.tolist()
        return self.metrics.write(
            "eval", self.step, loss=loss / count if count else math.nan, tokens=int(count), **more
        )
