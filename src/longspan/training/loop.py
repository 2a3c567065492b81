"""The trainer: one loop, the same at every layout.

A step, on every rank:

    micro-batches -> count of valid tokens (summed over dp)
    each micro-batch: shard by the layout -> model -> sum of losses / global count -> backward
    gradient norm over all axes -> clip -> AdamW

Each rank's loss is its share of the global mean already, and gradients are summed (not
averaged) by FSDP, so the loss and its gradient are those of one process (invariant I1).
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from longspan import __version__
from longspan.config.architecture import model_folder
from longspan.config.data_rules import STREAM_KEYS
from longspan.config.hugging_face import PIECES
from longspan.config.resolve import Run
from longspan.config.schedule import interval, learning_rate, training_steps, warmup_steps
from longspan.context_parallel import SequenceLayout
from longspan.data import Prefetcher, TokenDataset
from longspan.data.blend import BlendedDataset
from longspan.data.splits import PARTS, named_files, open_parts
from longspan.errors import UserError
from longspan.mesh.mesh import ParallelMesh, hold_waiting_time
from longspan.models import GPTModel
from longspan.models.adapters import attach
from longspan.models.huggingface import SafetensorsFolder
from longspan.parallelize import gradient_norm, load_pretrained, parallelize, parameter_norm
from longspan.training.adapters import adapter_description, fill_adapters
from longspan.training.checkpoint import Checkpointer, SaveError, check_fits, load
from longspan.training.metrics import Metrics, evaluated, peak_memory_gib
from longspan.training.optimizer import clip_gradients, make_optimizer, set_learning_rate
from longspan.training.progress import Progress
from longspan.training.sharding import HybridSharder, LocalBatch, Sharder


def open_datasets(run: Run) -> tuple[TokenDataset, TokenDataset | None, TokenDataset | None]:
    """The training set, the held-out set and the test set of a prepared config; None for one there is not."""
    train, valid, test = open_parts(run.config)
    return (train, None, None) if run.config.eval_iters == 0 else (train, valid, test)


#: what must be the same for weights to fit
MODEL_KEYS = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "ffn_hidden_size",
    *PIECES,
)
#: what must be the same for a run to go on as if it had not stopped
SETTINGS = (
    "sequence_len",
    "sample_packing",
    "seed",
    "val_set_size",
    "rotary_base",
    "rope_scaling",
    "sliding_window",
    "layernorm_epsilon",
)


#: what must be the same too where samples are trained on
SAMPLE_SETTINGS = ("train_on_inputs", "excess_length_strategy")

#: steps in a row without a target that are warned of
IDLE_STEPS = 4

#: how many tokens are looked at before a run; the rest are as they come
SCANNED_TOKENS = 1 << 28


def check_data(run: Run) -> TokenDataset:
    """Opens a prepared config's data and refuses what would fail or teach nothing; before any process starts.

    Raises:
        UserError: no document on one side of the split, no token with a next one, or a token beyond the vocabulary.
    """
    train, *others = open_datasets(run)
    names, sources = zip(*named_files(run.config))
    for data, name in zip((train, *others), PARTS):
        if data is not None and not data.has_targets(SCANNED_TOKENS):
            raise UserError(_nothing_counts(run, data, name))
    if run.config.hybrid_context_parallel:
        ranks, most = run.sizes.dp * run.sizes.cp, run.config.max_seqlen_per_dp_cp_rank
        assert most is not None
        tokens = max(data.longest_document for data in (train, *others) if data is not None)
        if tokens > ranks * most:
            number = max(range(len(sources)), key=lambda i: int(sources[i].document_lengths.max(initial=0)))
            document = int(sources[number].document_lengths.argmax())
            raise UserError(
                f"hybrid_context_parallel: document {document} of {names[number]} makes a sample of "
                f"{tokens} tokens, but {ranks} ranks x max_seqlen_per_dp_cp_rank {most} hold {ranks * most}. "
                "Raise max_seqlen_per_dp_cp_rank, lower sequence_len, or use more ranks."
            )
    vocab, left = run.config.vocab_size, SCANNED_TOKENS
    assert vocab is not None
    for source, name in zip(sources, names):
        smallest, largest = source.token_range(left)
        left = max(0, left - source.num_tokens)
        if largest >= vocab or smallest < 0:
            raise UserError(
                f"{name} holds token {largest if largest >= vocab else smallest}, but vocab_size is {vocab}. "
                "It was made with another tokenizer: give that tokenizer (tokenizer_config), or its vocab_size."
            )
    return train


def _nothing_counts(run: Run, data: TokenDataset, name: str) -> str:
    """Why no token of the training, evaluation or test set is a target, and what to do."""
    text = f"{name} data: no token counts in the loss"
    if not data.has_samples:
        return (
            f"{text}: no document has two tokens, so no token has a next one to learn. Look at the data, or tokenise it "
            "again."
        )
    if data.num_excess and run.config.excess_length_strategy == "truncate":
        return (
            f"{text}: {data.num_excess} of {data.num_documents} samples are longer than sequence_len {run.config.sequence_len}, and "
            "what is left of them after truncation holds no answer. Raise sequence_len, or shorten the prompts."
        )
    return f"{text}: no sample has an answer to learn. Look at the data, roles_to_train and message_field_training."


def describe_model(run: Run) -> dict:
    """The part of a checkpoint's description that follows from the config alone."""
    model, config = run.transformer_config(), run.config
    learned = model.position_embedding_type == "learned_absolute"
    return {
        "model": {name: getattr(model, name) for name in MODEL_KEYS}
        | {"vocab_size": config.vocab_size, "tie_word_embeddings": config.tie_word_embeddings}
        | ({"max_position_embeddings": model.max_position_embeddings} if learned else {}),
        "settings": {name: getattr(config, name) for name in SETTINGS},
        "init_method_std": config.init_method_std,
        "max_position_embeddings": model.max_position_embeddings,
    }


def describe_run(run: Run, data: TokenDataset) -> dict:
    """The part of a checkpoint's description that follows from the config and the data."""
    about, config = describe_model(run), run.config
    weights = data.counts if isinstance(data, BlendedDataset) else None
    about["settings"] |= {"weights": list(weights) if weights else None, "split": config.split}
    about["settings"]["training tokens"] = data.num_tokens
    # null where they are off: checkpoints that do not name them were made without
    about["settings"] |= {name: getattr(config, name) or None for name in (*STREAM_KEYS, "eod_token_id")}
    about["settings"] |= {name: getattr(config, name) for name in SAMPLE_SETTINGS if data.has_samples}
    return about | {
        "longspan": __version__,
        "torch": torch.__version__,
        "layout": run.sizes.equation(),
        "global_batch_size": run.global_batch_size,
        "adapter": adapter_description(run),
    }


class NotFinite(RuntimeError):
    """The loss or the gradient is infinite or no number."""


class Trainer:
    """A model, its optimizer and its data on this rank of a mesh.

    Args:
        run: the resolved config, with ``vocab_size`` filled in.
        device: where this rank computes.
        metrics: where records go; rank 0 has sinks.
        mesh: of the run's sizes; None makes one.
    """

    run: Run
    mesh: ParallelMesh
    model: GPTModel
    optimizer: torch.optim.AdamW
    step: int  # optimizer steps done, those without a target included
    steps: int  # optimizer steps in all
    tokens: int  # valid tokens trained on so far

    def __init__(
        self,
        run: Run,
        device: torch.device,
        metrics: Metrics | None = None,
        mesh: ParallelMesh | None = None,
    ):
        config = run.config
        self.run, self.device, self.metrics = run, device, metrics or Metrics([])
        self.train_data, self.valid_data, self.test_data = open_datasets(run)
        self.steps = training_steps(run, len(self.train_data))
        self.warmup = warmup_steps(config, self.steps)
        self.step = self.tokens = 0
        self.signalled = False  # this rank alone was asked to stop; a signal sets it at any moment
        self.asked = False  # some rank was asked to stop; agreed in each step, as what follows
        self.ran_out = False  # it is time to stop: exit_interval or exit_duration_in_mins
        self.owed = False  # the evaluation of this step is due and not done: a resume makes up for it
        self.told: Path | None = None  # the last checkpoint that was told to be whole
        self.begun = time.perf_counter()

        self.mesh = mesh or ParallelMesh.build(run.sizes, device.type)
        self.groups = self.mesh.groups
        if config.hybrid_context_parallel:  # a sample is cut over as many of all these ranks as it needs
            self.groups = dataclasses.replace(self.groups, cp=self.groups.dp_cp, hcp=())
        if device.type == "cuda":  # for the whole process, as PyTorch has it
            torch.set_float32_matmul_precision("high" if config.tf32 is True else "highest")
        self.dtype = getattr(torch, config.params_dtype)
        self.compute_dtype = torch.bfloat16 if config.bf16 is True else None
        assert config.vocab_size is not None
        with torch.device("meta"):
            model = GPTModel(
                run.transformer_config(self.dtype),
                config.vocab_size,
                config.sequence_len,
                pg_collection=self.groups,
            )
        if run.lora is not None:
            attach(model, run.lora, frozen_dtype=self.compute_dtype)
        self.model = parallelize(
            model,
            self.mesh,
            seed=None if run.pretrained else config.seed,
            device=device,
            compute_dtype=self.compute_dtype,
            recompute=run.recompute,
            reshard_after_forward=config.reshard_after_forward,
            activation_offloading=config.activation_offloading,
            mlp_tiles=run.mlp_tiles,
            offload_params=config.offload_params,
            torch_compile=config.torch_compile is True,
        )
        if run.pretrained:
            assert config.base_model is not None
            load_pretrained(self.model, SafetensorsFolder(model_folder(config.base_model)))
        if run.lora is not None:
            fill_adapters(self.model, run)
        self.optimizer = make_optimizer(self.model, config)
        cp = self.groups.cp  # of a hybrid run all of dp x cp
        self.shard: Sharder | HybridSharder = (
            HybridSharder(run, dist.get_rank(cp), dist.get_world_size(cp), self._plan)
            if config.hybrid_context_parallel
            else Sharder(run, dist.get_rank(self.groups.dp), dist.get_rank(cp), self._plan)
        )
        hold_waiting_time()

    # --- resuming -------------------------------------------------------------------------

    def description(self) -> dict:
        """What a checkpoint says of itself: where it stands and what it fits."""
        where = {"step": self.step, "tokens": self.tokens, "evaluation_due": self.owed}
        return describe_run(self.run, self.train_data) | where

    def resume(self, path: Path, option: str = "resume") -> None:
        """Goes on from a checkpoint made at any layout: weights, optimizer, position; see ``checkpoint.check_fits``.

        A checkpoint of the last step or beyond leaves nothing to do: ``step`` is then ``steps`` or more.

        Args:
            option: what named the checkpoint, for messages.
        """
        config = self.run.config
        then = check_fits(path, self.description(), weights_only=config.no_load_optim)
        optimizer = None if config.no_load_optim else self.optimizer
        load(path, self.model, optimizer, not config.no_load_rng, config.verify_checkpoint, option)
        if config.no_load_optim:
            return
        self.step, self.tokens = then["step"], then["tokens"]
        self.owed = bool(then.get("evaluation_due"))

    # --- one micro-batch ------------------------------------------------------------------

    def _plan(self, layout: SequenceLayout) -> None:
        for layer in self.model.decoder.layers:
            layer.self_attention.core_attention.plan(layout)

    def losses(self, batch: LocalBatch) -> Tensor:
        """The loss of each of this rank's tokens of a micro-batch, [b, rows]; 0 where there is no target."""
        tokens, labels = batch.tokens.to(self.device), batch.labels.to(self.device)
        positions = None if batch.positions is None else batch.positions.to(self.device)
        return self.model(tokens, position_ids=positions, labels=labels, layout=batch.layout)

    # --- one step -------------------------------------------------------------------------

    def micro_batches(self, step: int) -> list[LocalBatch]:
        """This rank's part of the micro-batches of training step ``step`` (from 0)."""
        return self.shard.training(self.train_data, step)

    def compute_gradients(self, batches: list[LocalBatch]) -> tuple[float | None, int]:
        """Forward and backward of a global batch. Returns (loss, valid tokens) of all ranks.

        Where no token counts on any rank there is nothing to compute: the loss is None, and no gradient is made.
        """
        count = torch.tensor(sum(batch.num_valid for batch in batches), dtype=torch.int64)
        dist.all_reduce(count, group=self.groups.dp_cp)
        if not count:
            return None, 0
        self.model.train()
        self.optimizer.zero_grad()
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for i, batch in enumerate(batches):
            self.model.set_requires_all_reduce(i == len(batches) - 1)  # copies (HSDP) agree once a step
            loss = self.losses(batch).sum()
            (loss / count.item()).backward()
            total += loss.detach()
        dist.all_reduce(total, group=self.groups.dp_cp)
        return (total / count).item(), int(count)

    def apply_gradients(self, rate: float) -> float:
        """Clips and updates the weights. Returns the gradient norm before clipping.

        Args:
            rate: the learning rate.
        """
        norm = gradient_norm(self.model)
        if not torch.isfinite(norm):
            raise NotFinite(
                f"the gradient norm is {norm.item()} in step {self.step + 1}; the weights were not updated. Lower learning_rate, "
                "or look at the data of this step."
            )
        clip_gradients(self.model, norm, self.run.config.max_grad_norm)
        set_learning_rate(self.optimizer, rate)
        self.optimizer.step()
        return norm.item()

    def _parameter_norm(self) -> dict[str, float]:
        if not self.run.config.log_params_norm:
            return {}
        return {"params_norm": parameter_norm(self.model).item()}

    def stop(self) -> str:
        """Asks this rank to stop at the end of the step; a signal may at any moment. Returns what comes of it."""
        self.signalled = True
        if self.step >= self.steps:
            return "the last step is done, and the run goes on to its end"
        return f"step {self.step + 1} is finished and saved, however long it takes, then the run stops"

    @property
    def stop_asked(self) -> bool:
        """Do all ranks stop after this step? After the last one there is nothing to stop."""
        return (self.asked or self.ran_out) and self.step < self.steps

    def run_out(self, now: float) -> bool:
        """Is it time to save and stop before the last step: exit_interval, exit_duration_in_mins?"""
        config = self.run.config
        minutes = (now - self.begun) / 60
        due = config.exit_interval is not None and self.step % config.exit_interval == 0
        due |= config.exit_duration_in_mins is not None and minutes >= config.exit_duration_in_mins
        return due and self.step < self.steps

    def train_step(self, batches: list[LocalBatch]) -> dict:
        """One optimizer step; returns its record.

        A step in which no token counts on any rank has loss and gradient norm None. It changes neither weights nor
        optimizer state (weight decay would act on the weights otherwise); the step number and the schedule go on.
        """
        start = time.perf_counter()
        loss, count = self.compute_gradients(batches)
        if loss is not None and not math.isfinite(loss):
            raise NotFinite(
                f"the loss is {loss} in step {self.step + 1}; the weights were not updated. Lower learning_rate, or look at "
                "the data of this step."
            )
        rate = learning_rate(self.run.config, self.step + 1, self.steps, self.warmup)
        norm = None if loss is None else self.apply_gradients(rate)
        self.step += 1
        self.tokens += count
        # one small message: the largest memory of a rank, whether any was asked to stop, and whether it is time to
        asked = [float(self.signalled), float(self.run_out(time.perf_counter()))]
        shared = torch.tensor([peak_memory_gib(self.device), *asked], dtype=torch.float64)
        dist.all_reduce(shared, op=dist.ReduceOp.MAX)
        peak, self.asked, self.ran_out = shared[0], bool(shared[1]), bool(shared[2])
        elapsed = time.perf_counter() - start
        return self.metrics.write(
            "train",
            self.step,
            loss=loss,
            grad_norm=norm,
            **self._parameter_norm(),
            learning_rate=rate,
            tokens=self.tokens,
            step_time=elapsed,
            tokens_per_second=count / elapsed,
            peak_memory_gib=peak.item(),
        )

    # --- the loop -------------------------------------------------------------------------

    def steps_ahead(self) -> Iterator[list[LocalBatch]]:
        """The micro-batches of each step that is left, read ahead in a thread."""
        with Prefetcher(self.micro_batches, self.step, self.steps) as ahead:
            yield from ahead

    def train(self, output: Path, progress: Progress, started: Callable[[], None] = lambda: None) -> dict:
        """Runs the steps that are left, evaluating and saving on the way; returns the summary's record.

        A run that is asked to stop (``signalled``) finishes its step, saves and returns.

        Args:
            started: called once, after the first step.

        Raises:
            SaveError: the last checkpoint could not be written. A failed earlier one is reported and training goes on.
        """
        config = self.run.config
        saves = Checkpointer(output / "checkpoints", config.save_total_limit, config.async_save)
        hold_waiting_time()
        begun, tokens = time.perf_counter(), self.tokens
        record = learned = evaluation = None
        idle = 0  # steps in a row in which nothing counted
        an_epoch = len(self.train_data) / self.run.global_batch_size
        eval_every = interval(config.eval_steps, config.evals_per_epoch, self.steps, an_epoch)
        save_every = interval(config.save_steps, config.saves_per_epoch, self.steps, an_epoch)
        every = config.logging_steps or min(10, max(1, self.steps // 200))
        if config.torch_compile is True:
            progress.compiling()
        if self._still_owed(output):
            evaluation = self.evaluate()
            progress.evaluation(evaluation)
        for batches in self.steps_ahead():
            try:
                first, record = record is None, self.train_step(batches)
            except NotFinite:  # on all ranks at once
                self._finish(saves, progress)  # the last good checkpoint may be on its way
                raise
            if first:
                started()
            learned, idle = (record, 0) if record["loss"] is not None else (learned, idle + 1)
            if idle == IDLE_STEPS:
                progress.warn(
                    f"no token has counted in the loss for {idle} steps, so they changed nothing. Look at the samples: "
                    "longspan prepare CONFIG --show 3 prints what is learned."
                )
            last = self.step == self.steps or self.stop_asked
            progress.step(record, show=last or self.step == 1 or self.step % every == 0)
            saves.settle()
            self._tell_saved(saves, progress)
            scheduled = bool(eval_every) and self.step % eval_every == 0
            self.owed = self.stop_asked and scheduled and self.valid_data is not None
            # save_last is of the last step; a run that stops earlier is to go on
            to_save = self.stop_asked or (config.save_last and last)
            to_save = to_save or bool(save_every and self.step % save_every == 0)
            if to_save and self.asked:  # who asked may not wait for an evaluation
                self._save(saves, progress, last)
            if self.valid_data is not None and (last or scheduled) and not self.stop_asked:
                evaluation = self.evaluate()
                progress.evaluation(evaluation)
            if to_save and not self.asked:
                self._save(saves, progress, last)
            if self.stop_asked:
                break
        saves.finish()
        self._tell_saved(saves, progress)
        assert record is not None
        elapsed = time.perf_counter() - begun
        if self.test_data is not None and self.step == self.steps and not self.stop_asked:
            progress.evaluation(self.evaluate(self.test_data, split="test"))
        return self.metrics.write(
            "summary",
            self.step,
            loss=learned["loss"] if learned else None,
            eval_loss=evaluation["loss"] if evaluation else None,
            tokens=self.tokens,
            train_time=elapsed,
            tokens_per_second=(self.tokens - tokens) / elapsed,
            peak_memory_gib=record["peak_memory_gib"],
        )

    def _finish(self, saves: Checkpointer, progress: Progress) -> None:
        """Waits for the save on its way; tells what went wrong with it."""
        try:
            saves.finish()
        except SaveError as error:
            progress.warn(f"{error}. Earlier checkpoints are as they were.")
        self._tell_saved(saves, progress)

    def _tell_saved(self, saves: Checkpointer, progress: Progress) -> None:
        """Tells of a checkpoint that has become whole since the last look; the first rank names them."""
        if saves.named is not None and saves.named != self.told:
            self.told = saves.named
            progress.saved(saves.named)

    def _still_owed(self, output: Path) -> bool:
        """Was an evaluation due where the run stopped, and is it not recorded yet? Collective."""
        if not self.owed or self.valid_data is None:
            return False
        self.owed = False
        recorded = [dist.get_rank() == 0 and evaluated(output / "metrics.jsonl", self.step)]
        dist.broadcast_object_list(recorded, src=0)
        return not recorded[0]

    def _save(self, saves: Checkpointer, progress: Progress, last: bool) -> None:
        """Saves; an earlier failure is told and does not stand in the way."""
        self._finish(saves, progress)
        try:
            progress.saving(saves.save(self.step, self.model, self.optimizer, self.description()))
            self._tell_saved(saves, progress)
        except SaveError as error:
            if last:
                raise
            progress.warn(f"{error}. Training goes on; earlier checkpoints are as they were.")

    @torch.no_grad()
    def evaluate(self, data: TokenDataset | None = None, **more: str) -> dict:
        """The mean loss over all valid tokens of the held-out set, or of ``data``; returns its record, with ``more`` in it."""
        data = self.valid_data if data is None else data
        assert data is not None
        self.model.eval()
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)  # loss, tokens
        for batch in self.shard.evaluation(data):
            sums[0] += self.losses(batch).sum()
            sums[1] += batch.num_valid
        dist.all_reduce(sums, group=self.groups.dp_cp)
        loss, count = sums.tolist()
        return self.metrics.write(
            "eval", self.step, loss=loss / count if count else math.nan, tokens=int(count), **more
        )
