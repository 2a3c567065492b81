"""Adapters (LoRA) of a training run: counted, described in checkpoints, and exported in PEFT's format."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict

from longspan.config.families.hub import model_folder
from longspan.config.run import Run
from longspan.models import GPTModel
from longspan.models.hf_weights import Names, SafetensorsFolder, whole_parameters
from longspan.models.peft import is_adapter, write_adapters

if TYPE_CHECKING:
    from longspan.integrations.causal_lm import CausalLM


def parameter_counts(model: GPTModel | CausalLM) -> tuple[int, int]:
    """(number of all parameters, number of trained parameters) of the whole model; tied parameters count once.

    Collective in a pipeline, whose stages are added up.
    """
    counts = [(p.numel(), p.requires_grad) for p in model.own_parameters()]
    sums = torch.tensor([sum(n for n, _ in counts), sum(n for n, trained in counts if trained)])
    if dist.get_world_size(model.groups.pp) > 1:
        dist.all_reduce(sums, group=model.groups.pp)
    return int(sums[0]), int(sums[1])


# --- checkpoints ----------------------------------------------------------------------------


def adapter_description(run: Run) -> dict[str, Any] | None:
    """A checkpoint's description of its adapters and their base model; None for full training."""
    lora, base = run.lora, run.pretrained
    if lora is None or base is None:
        return None
    return lora.description() | {
        "base_model": base,
        "base_fingerprint": _fingerprint(base),
    }


@functools.cache
def _fingerprint(base_model: str) -> str:
    return SafetensorsFolder(model_folder(base_model)).fingerprint()


def adapter_problems(
    option: str, name: str, then: dict[str, Any] | None, now: dict[str, Any] | None
) -> list[str]:
    """The differences between a checkpoint's adapters and those of this run, one message each.

    Args:
        option: the option that named the checkpoint, for messages.
        name: the name of the checkpoint.
        then, now: the adapters' descriptions in the checkpoint and in this run; None without adapters.
    """
    if now is None and then is None:
        return []
    if now is None:
        assert then is not None
        return [
            f"{option}: {name} holds adapters only (adapter: lora, lora_r {then['rank']}, on {', '.join(then['targets'])} of "
            f"{then['base_model']}), and the config trains all weights. Give the same adapter keys, or make a model of it: "
            "longspan convert --checkpoint, then longspan convert --lora."
        ]
    if then is None:
        return [
            f"{option}: {name} holds a whole model, and the config trains adapters (adapter: lora). Make a model of it with "
            "longspan convert --checkpoint and give that as base_model, without resume; or drop adapter."
        ]
    names = {"rank": "lora_r", "alpha": "lora_alpha", "targets": "targets", "rslora": "peft_use_rslora"}
    found = [
        f"{option}: {name} was trained with {key} {then.get(field)!r}, the config says {now[field]!r}. Keep it, or start without "
        "resume."
        for field, key in names.items()
        if then.get(field) != now[field]
    ]
    if then["base_fingerprint"] != now["base_fingerprint"]:
        found.append(
            f"{option}: the adapters of {name} were trained beside the weights of {then['base_model']}, and base_model "
            f"{now['base_model']} has others. Give the base model they belong to."
        )
    return found


def trained_state(model: nn.Module) -> dict[str, Any]:
    """The state of the trained parameters; frozen weights are left out, because the base model has them."""
    frozen = {n for n, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}
    return {name: value for name, value in get_model_state_dict(model).items() if name not in frozen}


# --- export ---------------------------------------------------------------------------------


def export_adapters(
    model: nn.Module,
    names: Names,
    config: dict[str, Any],
    folder: Path,
    dtype: torch.dtype,
    files: Mapping[str, bytes],
) -> None:
    """Writes the adapters in PEFT's format, with the files beside them; collective.

    Args:
        names: of the base model.
        config: PEFT's, see ``Lora.peft_config``.
        dtype: dtype of the written weights; only the first rank's value counts.
        files: further files of the folder; only the first rank's value counts.
    """
    weights = {
        name: whole.to(dtype)
        for name, whole in whole_parameters(model, only=is_adapter)
        if dist.get_rank() == 0
    }
    if dist.get_rank() == 0:
        write_adapters(folder, names, weights, config, files)
    dist.barrier()
