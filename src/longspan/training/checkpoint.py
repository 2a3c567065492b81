"""Checkpoints by torch's distributed checkpoint (DCP): whole or absent, loadable at any layout.

    checkpoints/step_00000100/   .metadata and one .distcp file a rank (DCP), longspan.json, checksums.json
    checkpoints/latest           one line: the newest name

A checkpoint is written under a hidden name beside and renamed when it is whole, so a kill
at any moment leaves it whole or absent. Writing goes on in a thread while training does: the
step waits only for a copy of the state in memory. Weights and optimizer state are DTensors,
so DCP reshards them to whatever layout loads them; ``longspan.json`` says what was trained. ``checkpoint_files`` has the
files' format, ``checkpoint_folder`` finds a checkpoint, ``description`` compares it with a run.
Frozen weights stay out: of a run with adapters a checkpoint holds the adapters and names the base model.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.utils._pytree import tree_map

from longspan.files import write_whole
from longspan.training.adapters import trained_state
from longspan.training.checkpoint_files import (
    DESCRIPTION,
    METADATA,
    SummingWriter,
    cause,
    read_metadata,
    read_tensors,
)
from longspan.training.checkpoint_folder import (
    changed,
    find,
    newest,
    not_whole,
    refuse_megatron,
    small_files_changed,
)
from longspan.training.checksums import CHECKSUMS, Manifest
from longspan.training.description import check_fits, describe

__all__ = [
    "DESCRIPTION",
    "Checkpointer",
    "SaveError",
    "check_fits",
    "describe",
    "find",
    "load",
    "newest",
    "refuse_megatron",
    "verify",
]


class SaveError(RuntimeError):
    """A checkpoint could not be written; earlier ones are as they were."""


# --- reading --------------------------------------------------------------------------------


def verify(path: Path, checksums: bool = True, option: str = "resume") -> Metadata:
    """Refuses a checkpoint whose files are not as they were written; collective where there is a process group.

    The ranks share the reading, so that it costs one parallel read of the checkpoint.

    Args:
        checksums: False looks at DCP's metadata alone (``verify_checkpoint: false``).
        option: what named the checkpoint, for messages.

    Returns:
        DCP's metadata, for ``read_tensors``.

    Raises:
        UserError: with the files' names, the same on all ranks.
    """
    together = dist.is_initialized()
    rank, world = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)
    unreadable: dict[str, str] = {}
    differing: list[str] = []
    metadata = Metadata({})
    try:
        metadata = read_metadata(path)
        if checksums and (path / CHECKSUMS).is_file():
            differing = small_files_changed(path, metadata) or Manifest(path).damaged(
                share=rank, shares=world
            )
    except OSError as error:
        unreadable = {Path(error.filename or path).name: error.strerror or str(error)}
    except ValueError as error:
        unreadable = {METADATA: str(error)}
    found: list = [(unreadable, differing)]
    if together:
        found = [None] * world
        dist.all_gather_object(found, (unreadable, differing))
    if broken := {name: why for of_rank, _ in found for name, why in of_rank.items()}:
        raise not_whole(path, broken, option)
    if names := sorted({name for _, of_rank in found for name in of_rank}):
        raise changed(path, names, option)
    return metadata


def load(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    rng: bool,
    checksums: bool = True,
    option: str = "resume",
) -> None:
    """Loads weights, optimizer state (unless None) and random number states; collective, from any layout.

    Args:
        checksums: compare the files with their checksums first.
        option: what named the checkpoint, for messages.

    Raises:
        UserError: the files are damaged or hold something else; the same on all ranks.
    """
    metadata = verify(path, checksums, option)
    state: dict[str, Any] = {"model": trained_state(model)}
    own_optimizer: dict[str, Any] = {}
    if optimizer is not None:
        own_optimizer = optimizer_state(model, optimizer)
        # without the groups' settings, which older checkpoints hold as pickles: they are the config's
        state["optimizer"] = _tensors(own_optimizer)
    own = f"rng.{dist.get_rank()}"
    if rng and own in metadata.state_dict_metadata:  # at another number of ranks each starts from its seed
        state[own] = torch.get_rng_state()
    read_tensors(path, state, metadata, option)
    # frozen weights are missing there
    set_model_state_dict(model, state["model"], options=StateDictOptions(strict=False))
    if optimizer is not None:
        # the moments are the checkpoint's; weight decay, betas and the like are the config's, as the learning rate is
        set_optimizer_state_dict(model, optimizer, own_optimizer | state["optimizer"], options=FLAT)
    if own in state:
        torch.set_rng_state(state[own])


#: Optimizer state has one level of names, so that the stages of a pipeline add theirs to one checkpoint without a clash.
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's tensors as ``state.NAME.exp_avg``, by the parameters' names, and the groups' settings.

    An optimizer that has not stepped is left as if it had not.
    """
    if not optimizer.state:
        # torch makes the missing state by a step with learning rate and gradients of zero, which Adam counts
        get_optimizer_state_dict(model, optimizer)
        for held in optimizer.state.values():
            held["step"].zero_()
    return get_optimizer_state_dict(model, optimizer, options=FLAT)


def _tensors(optimizer: dict[str, Any]) -> dict[str, Any]:
    """The tensors of an optimizer's flat state; the groups' settings are the config's and no part of a checkpoint."""
    return {name: value for name, value in optimizer.items() if name.startswith("state.")}


# --- writing --------------------------------------------------------------------------------


def to_text(description: dict[str, Any]) -> str:
    """The text of ``longspan.json``, for a checkpoint that has checksums."""
    return json.dumps(description | {"checksums": CHECKSUMS}, indent=2)


class Checkpointer:
    """Saves into a run's ``checkpoints/``; collective.

    Args:
        folder: ``output_dir/checkpoints``.
        keep: how many of the newest stay; None keeps all.
        background: write in a thread while training goes on.
    """

    def __init__(self, folder: Path, keep: int | None = None, background: bool = True):
        self.folder, self.keep, self.background = folder, keep, background
        self.first = dist.get_rank() == 0
        # of its own: the writing thread's messages must not meet the training's
        self.group = dist.new_group(backend="gloo") if background else None
        self.pending: tuple[Path, Future] | None = None
        self.named: Path | None = None  # what was last given its name, on the first rank
        if self.first:  # what a kill left behind
            for leftover in [*folder.glob(".step_*.partial"), *folder.glob(".step_*.removed")]:
                shutil.rmtree(leftover, ignore_errors=True)

    def save(
        self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, description: dict[str, Any]
    ) -> Path:
        """Starts writing the state of a step. Returns where it will be.

        Raises:
            SaveError: an earlier save failed, or this one could not start.
        """
        self.finish()
        self.named = None
        final = self.folder / f"step_{step:08d}"
        partial = self._partial(final)
        trouble = None
        if self.first:
            try:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
            except OSError as error:
                trouble = str(error)
        told = [trouble]
        dist.broadcast_object_list(told, src=0)
        if told[0]:
            raise SaveError(f"cannot write {partial}: {told[0]}")
        state: dict[str, Any] = {
            "model": trained_state(model),
            "optimizer": _tensors(optimizer_state(model, optimizer)),
            f"rng.{dist.get_rank()}": torch.get_rng_state(),
        }
        writer = SummingWriter(partial, to_text(description))
        if self.background:
            # a copy of our own: tensors that are on the CPU already would be written while they change; DCP copies the
            # others to the CPU itself before it returns
            future = dcp.async_save(tree_map(_copy, state), storage_writer=writer, process_group=self.group)
            self.pending = (final, future)
        else:
            future = Future()
            try:
                future.set_result(dcp.save(state, storage_writer=writer))
            except (Exception, CheckpointException) as error:
                future.set_exception(error)
            self.pending = (final, future)
            self.finish()
        return final

    def finish(self) -> Path | None:
        """Waits until the last save is whole and named. Returns it.

        Raises:
            SaveError: it could not be written; what was there before is untouched.
        """
        if self.pending is None:
            return None
        (final, future), self.pending = self.pending, None
        trouble = None
        try:
            future.result()
            if self.first and self.named != final:
                self._name(final)
        except (Exception, CheckpointException) as error:
            trouble = cause(error)
        told: list = [None] * dist.get_world_size()
        dist.all_gather_object(told, trouble)
        found = next((text for text in told if text), None)
        if found:
            there = next(parent for parent in final.parents if parent.exists())
            free = shutil.disk_usage(there).free / 2**20  # PyTorch does not say that a disk is full
            if self.first:
                shutil.rmtree(self._partial(final), ignore_errors=True)
            raise SaveError(f"cannot write {final}: {found} ({free:,.0f} MiB were free there)")
        return final

    def settle(self) -> None:
        """Names a save whose writing has ended; cheap, no communication. ``finish`` reports what went wrong."""
        if self.first and self.pending and self.pending[1].done() and not self.pending[1].exception():
            final = self.pending[0]
            if self.named != final:
                with contextlib.suppress(OSError):  # finish tries again
                    self._name(final)

    def _name(self, final: Path) -> None:
        # the checksums are written last, after all ranks' files: what the first rank sees done is whole
        if self._partial(final).is_dir():
            shutil.rmtree(final, ignore_errors=True)  # the same step of an earlier run
            os.rename(self._partial(final), final)
        elif not final.is_dir():
            raise FileNotFoundError(errno.ENOENT, "it was removed or moved while it was written", str(final))
        write_whole(self.folder / "latest", final.name + "\n")
        self.named = final
        self._prune(final)

    def _partial(self, final: Path) -> Path:
        return final.with_name(f".{final.name}.partial")

    def _prune(self, newest: Path) -> None:
        """Removes all but the newest checkpoints; each loses its name before its files.

        Those of later steps stay until this run comes to them: it went on from an earlier one, and may be the worse try.
        """
        if self.keep is None:
            return
        upto = [path for path in sorted(self.folder.glob("step_*")) if path.name <= newest.name]
        for old in upto[: -self.keep]:
            gone = old.with_name(f".{old.name}.removed")
            os.rename(old, gone)
            shutil.rmtree(gone, ignore_errors=True)


def _copy(value: Any) -> Any:
    if not isinstance(value, torch.Tensor) or value.device.type != "cpu":
        return value
    return value.detach().clone()
