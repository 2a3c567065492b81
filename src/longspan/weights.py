"""Where the first values of weights come from: drawn by (seed, name, shape), a pretrained model, adapters.

Each rank fills what it holds and reads no more than that. Drawing is ``tensor_parallel.initial``'s.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from longspan.config.families.hub import model_folder
from longspan.config.run import Run
from longspan.errors import UserError
from longspan.models.gpt import GPTModel
from longspan.models.hf_weights import Names, SafetensorsFolder, read_part
from longspan.models.peft import is_adapter, open_adapters, peft_name, read_adapter
from longspan.tensor_parallel.initial import init_weights
from longspan.tensor_parallel.lora import Adapter
from longspan.tensor_parallel.random import local_ranges


def fill(model: GPTModel, run: Run) -> None:
    """What ``parallelize`` leaves open: the weights of ``base_model``, and adapters. Collective.

    Raises:
        UserError: as :func:`load_pretrained` and :func:`load_adapters`.
    """
    if run.pretrained is not None:
        load_pretrained(model, SafetensorsFolder(model_folder(run.pretrained)))
    if run.lora is not None:
        fill_adapters(model, run)


@torch.no_grad()
def load_pretrained(model: GPTModel, source: SafetensorsFolder) -> None:
    """Fills every parameter but adapters from a Hugging Face model; each rank reads only what it holds. Collective.

    Raises:
        UserError: on all ranks, with what any of them found: a tensor of another shape, or one with NaN or infinity.
    """
    names = Names(model.config, model.vocab_size)
    problems: list[str] = []
    for name, parameter in model.named_parameters():
        if is_adapter(name):
            continue
        try:
            part = read_part(source, names, name, parameter.shape, local_ranges(parameter))
        except UserError as error:
            problems += error.problems
        else:
            parameter.to_local().copy_(part)
    _agree(problems)


def _agree(problems: list[str]) -> None:
    """Raises UserError on all ranks with the problems of any, so that none waits for one that has stopped."""
    found: list = [None] * dist.get_world_size()
    dist.all_gather_object(found, problems)
    if together := list(dict.fromkeys(problem for each in found for problem in each)):
        more = [f"... and {len(together) - 3} more tensors."] if len(together) > 4 else []
        raise UserError([*together[: 3 if more else 4], *more])


@torch.no_grad()
def load_adapters(model: GPTModel, folder: str | Path) -> None:
    """Fills every adapter from a folder in PEFT's format; each rank reads only what it holds.

    Raises:
        UserError: on all ranks: the folder's adapters are of another model, or hold NaN or infinity.
    """
    adapters = {name: p for name, p in model.named_parameters() if is_adapter(name)}
    problems: list[str] = []
    try:
        with open_adapters(folder, map(peft_name, adapters)) as source:
            for name, parameter in adapters.items():
                part = read_adapter(source, name, parameter.shape, local_ranges(parameter))
                parameter.to_local().copy_(part)
    except UserError as error:
        problems = error.problems
    _agree(problems)


def fill_adapters(model: GPTModel, run: Run) -> None:
    """First values: those of ``lora_model_dir``, or drawn by (seed, name, shape), whatever the layout."""
    if run.config.lora_model_dir is not None:
        load_adapters(model, run.config.lora_model_dir)
    else:
        init_weights(model, run.config.seed, Adapter)
