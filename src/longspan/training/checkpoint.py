"""Checkpoints by torch's distributed checkpoint (DCP): whole or absent, loadable at any layout.

    checkpoints/step_00000100/   .metadata and one .distcp file a rank (DCP), longspan.json
    checkpoints/latest           one line: the newest name

A checkpoint is written under a hidden name beside and renamed when it is whole, so a kill
at any moment leaves it whole or absent. Writing goes on in a thread while training does: the
step waits only for a copy of the state in memory. Weights and optimizer state are DTensors,
so DCP reshards them to whatever layout loads them; ``longspan.json`` says what was trained.
Frozen weights stay out: of a run with adapters a checkpoint holds the adapters and names the base model.
"""

from __future__ import annotations

import contextlib
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
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.utils._pytree import tree_map

from longspan.errors import UserError, did_you_mean
from longspan.training.adapters import adapter_problems, trained_state

DESCRIPTION = "longspan.json"


class SaveError(RuntimeError):
    """A checkpoint could not be written; earlier ones are as they were."""


# --- reading --------------------------------------------------------------------------------


def find(path: Path, option: str = "resume") -> Path:
    """The checkpoint a path stands for: itself, or the newest of a run's folder.

    Args:
        option: what named the path, for messages.

    Raises:
        UserError: nothing there, a half-written or damaged one, or one of Megatron-LM.
    """
    refuse_megatron(path, option)
    for folder in (path, path / "checkpoints"):
        if (folder / "latest").is_file():
            path = folder / (folder / "latest").read_text(encoding="utf-8").strip()
            break
    if not path.is_dir():
        siblings = [p.name for p in path.parent.glob("step_*")] if path.parent.is_dir() else []
        near = did_you_mean(path.name, siblings)
        raise UserError(
            f"{option}: there is no checkpoint at {path}.{near} Give a folder step_NNNNNNNN, or a run's."
        )
    missing = [name for name in (".metadata", DESCRIPTION) if not (path / name).is_file()] or _damaged(path)
    if missing:
        others = sorted(
            p.name for p in path.parent.glob("step_*") if (p / ".metadata").is_file() and p != path
        )
        remedy = f"Use {others[-1]}, which is whole." if others else "There is no other one beside it."
        raise UserError(
            f"{option}: {path} is not a whole checkpoint: {', '.join(missing)} missing or damaged. {remedy}"
        )
    return path


def _damaged(path: Path) -> list[str]:
    """Files of a checkpoint that are not there, or not as long as its metadata says."""
    try:
        metadata = dcp.FileSystemReader(str(path)).read_metadata()
        ends: dict[str, int] = {}
        for part in metadata.storage_data.values():
            ends[part.relative_path] = max(ends.get(part.relative_path, 0), part.offset + part.length)
    except Exception:  # a pickle that is none can raise anything
        return [".metadata"]
    bad = [n for n, end in ends.items() if not (path / n).is_file() or (path / n).stat().st_size < end]
    try:
        said = json.loads((path / DESCRIPTION).read_text(encoding="utf-8"))
        whole = isinstance(said, dict) and {"model", "settings", "global_batch_size", "step"} <= said.keys()
    except (OSError, ValueError):
        whole = False
    return sorted(bad) + ([] if whole else [DESCRIPTION])


#: the file Megatron-LM writes beside its checkpoints
MEGATRON = "latest_checkpointed_iteration.txt"


def refuse_megatron(path: Path, option: str = "resume") -> None:
    """Refuses a folder of Megatron-LM's checkpoints, with the way round (UserError)."""
    if (path / MEGATRON).is_file() or any(path.glob("iter_*/mp_rank_*")) or any(path.glob("mp_rank_*")):
        raise UserError(
            f"{option}: {path} holds a checkpoint of Megatron-LM, whose format depends on the layout and the version it was "
            "written with. Convert it to Hugging Face with Megatron-LM's own tools (Megatron Bridge's export, or "
            "tools/checkpoint/convert.py), then start from it with base_model (--base-model FOLDER)."
        )


def newest(folder: Path) -> Path | None:
    """The checkpoint ``latest`` names, or None where none was saved yet."""
    return find(folder) if (folder / "latest").is_file() else None


def describe(path: Path) -> dict[str, Any]:
    """What ``longspan.json`` says of a checkpoint.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return json.loads((path / DESCRIPTION).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"resume: {path / DESCRIPTION} cannot be read ({error}). Use another checkpoint."
        ) from None


def check_fits(path: Path, now: dict[str, Any], weights_only: bool) -> dict[str, Any]:
    """Refuses a checkpoint of another model, and (unless only weights are taken) of another batch or data.

    Args:
        now: what this run would write as its own description.

    Returns:
        The checkpoint's description.

    Raises:
        UserError: with every difference.
    """
    then = describe(path)
    problems = [
        f"resume: {path.name} is a checkpoint of another model: {name} was {then['model'][name]!r}, the config says "
        f"{value!r}. Give the model's own value, or start without resume."
        for name, value in now["model"].items()
        if then["model"].get(name, value) != value  # an older checkpoint does not name all
    ]
    problems += adapter_problems(path.name, then.get("adapter"), now["adapter"])
    if not weights_only:
        if then["global_batch_size"] != now["global_batch_size"]:
            problems.append(
                f"resume: {path.name} was trained with global_batch_size {then['global_batch_size']}, the config gives "
                f"{now['global_batch_size']}. A resume keeps the global batch: change micro_batch_size or "
                "gradient_accumulation_steps, or take only the weights with no_load_optim: true."
            )
        problems += [
            f"resume: {path.name} was trained with {name} {then['settings'].get(name)!r}, the config gives {value!r}. Keep it, "
            "or take only the weights with no_load_optim: true."
            for name, value in now["settings"].items()
            if then["settings"].get(name) != value
        ]
    if problems:
        raise UserError(problems)
    return then


def load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None, rng: bool) -> None:
    """Loads weights, optimizer state (unless None) and random number states; collective, from any layout."""
    state: dict[str, Any] = {"model": trained_state(model)}
    if optimizer is not None:
        state["optimizer"] = get_optimizer_state_dict(model, optimizer)
    written = dcp.FileSystemReader(str(path)).read_metadata().state_dict_metadata
    own = f"rng.{dist.get_rank()}"
    if rng and own in written:  # at another number of ranks each starts from its seed
        state[own] = torch.get_rng_state()
    dcp.load(state, checkpoint_id=str(path))
    # frozen weights are missing there
    set_model_state_dict(model, state["model"], options=StateDictOptions(strict=False))
    if optimizer is not None:
        # the moments are the checkpoint's; weight decay, betas and the like are the config's, as the learning rate is
        own_settings = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        set_optimizer_state_dict(model, optimizer, state["optimizer"])
        for group, settings in zip(optimizer.param_groups, own_settings, strict=True):
            group.update(settings)
    if own in state:
        torch.set_rng_state(state[own])


# --- writing --------------------------------------------------------------------------------


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
                (partial / DESCRIPTION).write_text(json.dumps(description, indent=2), encoding="utf-8")
            except OSError as error:
                trouble = str(error)
        told = [trouble]
        dist.broadcast_object_list(told, src=0)
        if told[0]:
            raise SaveError(f"cannot write {partial}: {told[0]}")
        state: dict[str, Any] = {
            "model": trained_state(model),
            "optimizer": get_optimizer_state_dict(model, optimizer),
            f"rng.{dist.get_rank()}": torch.get_rng_state(),
        }
        if self.background:
            # a copy of our own: tensors that are on the CPU already would be written while they change; DCP copies the
            # others to the CPU itself before it returns
            future = dcp.async_save(
                tree_map(_copy, state), checkpoint_id=str(partial), process_group=self.group
            )
            self.pending = (final, future)
        else:
            future = Future()
            try:
                future.set_result(dcp.save(state, checkpoint_id=str(partial)))
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
            # DCP's exception (no Exception by its class) holds each failed rank's own
            failures = getattr(error, "failures", None) or {0: (error,)}
            cause = next(iter(failures.values()))[0]
            trouble = f"{type(cause).__name__}: {cause}"
        told: list = [None] * dist.get_world_size()
        dist.all_gather_object(told, trouble)
        found = next((text for text in told if text), None)
        if found:
            free = shutil.disk_usage(final.parent).free / 2**20  # PyTorch does not say that a disk is full
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
        # DCP's metadata is written last, after all ranks' files: what the first rank sees done is whole
        if self._partial(final).is_dir():
            shutil.rmtree(final, ignore_errors=True)  # the same step of an earlier run
            os.rename(self._partial(final), final)
        write_atomically(self.folder / "latest", final.name + "\n")
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


def write_atomically(path: Path, text: str) -> None:
    """Writes a small text file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
