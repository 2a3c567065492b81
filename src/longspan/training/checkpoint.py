"""Checkpoints by torch's distributed checkpoint (DCP): complete or absent, loadable at any layout.

    checkpoints/step_00000100/   .metadata and one .distcp file a rank (DCP), longspan.json, checksums.json
    checkpoints/latest           one line: the newest name

A checkpoint is written under a hidden name in the same folder and renamed when it is complete, so a
kill at any moment leaves it complete or absent. A thread writes it while training goes on: the step
waits only for a copy of the state in memory. Weights and optimizer state are DTensors, so DCP reshards
them to the layout that loads them; ``longspan.json`` describes what was trained. ``checkpoint_files``
has the files' format, ``checkpoint_folder`` finds a checkpoint, ``description`` compares it with a run.
Frozen weights are left out: if a run trains adapters, its checkpoints hold the adapters and name the
base model.
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

from longspan.files import remove_partial, write_whole
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
    """A checkpoint could not be written; earlier checkpoints are unchanged."""


# --- reading --------------------------------------------------------------------------------


def verify(path: Path, checksums: bool = True, option: str = "resume") -> Metadata:
    """Refuses a checkpoint whose files have changed; collective if there is a process group.

    The ranks share the reading, so that the checkpoint is read once, in parallel.

    Args:
        checksums: False checks only DCP's metadata (``verify_checkpoint: false``).
        option: the option that named the checkpoint, for messages.

    Returns:
        DCP's metadata, for ``read_tensors``.

    Raises:
        UserError: files have changed or cannot be read; with their names, the same on all ranks.
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
    """Loads a checkpoint that was made at any layout; collective.

    Args:
        optimizer: receives the optimizer state; None does not load it.
        rng: load the state of the random numbers.
        checksums: compare the files with their checksums first.
        option: the option that named the checkpoint, for messages.

    Raises:
        UserError: the files are damaged or hold other tensors; the same on all ranks.
    """
    metadata = verify(path, checksums, option)
    state: dict[str, Any] = {"model": trained_state(model)}
    own_optimizer: dict[str, Any] = {}
    if optimizer is not None:
        own_optimizer = optimizer_state(model, optimizer)
        # The groups' settings are not read: they follow from the config, and older checkpoints pickled them.
        state["optimizer"] = _tensors(own_optimizer)
    own = f"rng.{dist.get_rank()}"
    # A rank that the checkpoint does not have starts from its seed.
    if rng and own in metadata.state_dict_metadata:
        state[own] = torch.get_rng_state()
    read_tensors(path, state, metadata, option)
    # The load is not strict, because frozen weights are not in the checkpoint.
    set_model_state_dict(model, state["model"], options=StateDictOptions(strict=False))
    if optimizer is not None and own_optimizer:
        # The moments come from the checkpoint; learning rate, weight decay, betas and so on from the config.
        set_optimizer_state_dict(model, optimizer, own_optimizer | state["optimizer"], options=FLAT)
    if own in state:
        torch.set_rng_state(state[own])


#: Optimizer state has one level of names, so that pipeline stages can share a checkpoint without a clash.
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's tensors as ``state.NAME.exp_avg``, by the parameters' names, and the groups' settings.

    An optimizer without a step still counts no step afterwards.
    """
    if not any(group["params"] for group in optimizer.param_groups):
        # A stage of a pipeline without an adapter: torch takes an empty state for a mistake.
        return {}
    if not optimizer.state:
        # torch makes missing state by a step with learning rate and gradients of zero. Adam counts this step,
        # so the count is set back.
        get_optimizer_state_dict(model, optimizer)
        for held in optimizer.state.values():
            held["step"].zero_()
    return get_optimizer_state_dict(model, optimizer, options=FLAT)


def _tensors(optimizer: dict[str, Any]) -> dict[str, Any]:
    """The tensors of an optimizer's flat state, without the groups' settings, which come from the config."""
    return {name: value for name, value in optimizer.items() if name.startswith("state.")}


# --- writing --------------------------------------------------------------------------------


def to_text(description: dict[str, Any]) -> str:
    """The text of ``longspan.json`` for a checkpoint with checksums."""
    return json.dumps(description | {"checksums": CHECKSUMS}, indent=2)


class Checkpointer:
    """Saves into a run's ``checkpoints/``; collective.

    Args:
        folder: ``output_dir/checkpoints``.
        keep: number of newest checkpoints that are kept; None keeps all.
        background: write in a thread while training goes on.
    """

    def __init__(self, folder: Path, keep: int | None = None, background: bool = True):
        self.folder, self.keep, self.background = folder, keep, background
        self.first = dist.get_rank() == 0
        # The writing thread has its own group, because its messages must not mix with those of training.
        self.group = dist.new_group(backend="gloo") if background else None
        self.pending: tuple[Path, Future] | None = None
        # the checkpoint that was last given its final name; only on the first rank
        self.named: Path | None = None
        if self.first:
            remove_partial(folder)

    def save(
        self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, description: dict[str, Any]
    ) -> Path:
        """Starts writing the state of a step. Returns the path that the checkpoint will have.

        Raises:
            SaveError: an earlier save failed, or this one could not start or, without ``background``, failed.
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
            # Tensors on the CPU are copied here, because otherwise they would change while they are written.
            # DCP itself copies the other tensors to the CPU before it returns.
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
        """Waits until the last save is complete and has its final name. Returns its path, or None.

        Raises:
            SaveError: it could not be written; earlier checkpoints are unchanged.
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
            # The message names the free space, because PyTorch does not report that a disk is full.
            free = shutil.disk_usage(there).free / 2**20
            if self.first:
                shutil.rmtree(self._partial(final), ignore_errors=True)
            raise SaveError(f"cannot write {final}: {found} ({free:,.0f} MiB were free there)")
        return final

    def settle(self) -> None:
        """Gives a save whose writing has ended its final name; cheap, without communication.

        Errors are left to ``finish``, which reports them.
        """
        if self.first and self.pending and self.pending[1].done() and not self.pending[1].exception():
            final = self.pending[0]
            if self.named != final:
                # After an error ``finish`` tries again.
                with contextlib.suppress(OSError):
                    self._name(final)

    def _name(self, final: Path) -> None:
        # The checksums are written last, after the files of all ranks, so a finished save is complete.
        if self._partial(final).is_dir():
            # An earlier run may have saved the same step.
            shutil.rmtree(final, ignore_errors=True)
            os.rename(self._partial(final), final)
        elif not final.is_dir():
            raise FileNotFoundError(errno.ENOENT, "it was removed or moved while it was written", str(final))
        write_whole(self.folder / "latest", final.name + "\n")
        self.named = final
        self._prune(final)

    def _partial(self, final: Path) -> Path:
        return final.with_name(f".{final.name}.partial")

    def _prune(self, newest: Path) -> None:
        """Removes all but the newest checkpoints; each loses its name before its files are removed.

        Checkpoints of later steps are kept until this run reaches these steps: it has continued from an
        earlier checkpoint, and may turn out to be worse than the run that wrote them.
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
