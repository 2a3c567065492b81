"""The first values of weights: drawn by (seed, name, shape), or read from a pretrained model or adapters.

Each rank fills only the parts that it holds, and reads only these. ``tensor_parallel.initial`` draws.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from longspan.config.families.hub import model_folder
from longspan.config.run import Run
from longspan.errors import UserError
from longspan.models.gpt import GPTModel
from longspan.models.hf_weights import Names, SafetensorsFolder, lies_in_files, read_part
from longspan.models.peft import adapter_places, is_adapter, open_adapters, read_adapter
from longspan.tensor_parallel.initial import init_weights
from longspan.tensor_parallel.lora import Adapter
from longspan.tensor_parallel.random import local_ranges


def fill(model: GPTModel, run: Run) -> None:
    """Fills what ``parallelize`` leaves unfilled: the weights of ``base_model``, and adapters. Collective.

    Raises:
        UserError: as :func:`load_pretrained` and :func:`load_adapters`.
    """
    if run.pretrained is not None:
        load_pretrained(model, SafetensorsFolder(model_folder(run.pretrained)))
    if run.lora is not None:
        fill_adapters(model, run)


@torch.no_grad()
def load_pretrained(model: GPTModel, source: SafetensorsFolder) -> None:
    """Fills all but adapters from a Hugging Face model; collective. Each rank reads only its parts.

    Raises:
        UserError: on all ranks, with the problems of all: a tensor of another shape, or with NaN or infinity.
    """
    names = Names(model.config, model.vocab_size, source.model_type)
    problems: list[str] = []
    buffers = [(name, buffer) for name, buffer in model.named_buffers() if lies_in_files(name)]
    for name, parameter in (*model.named_parameters(), *buffers):
        if is_adapter(name):
            continue
        try:
            part = read_part(source, names, name, parameter.shape, local_ranges(parameter))
        except UserError as error:
            problems += error.problems
        else:
            parameter.to_local().copy_(part)
    agree(problems)


def agree(problems: list[str]) -> None:
    """Raises a UserError on all ranks if any rank has problems, so that no rank waits for a stopped one."""
    found: list = [None] * dist.get_world_size()
    dist.all_gather_object(found, problems)
    if together := list(dict.fromkeys(problem for each in found for problem in each)):
        more = [f"... and {len(together) - 3} more tensors."] if len(together) > 4 else []
        raise UserError([*together[: 3 if more else 4], *more])


@torch.no_grad()
def load_adapters(model: GPTModel, folder: str | Path, model_type: str | None) -> None:
    """Fills every adapter from a folder in PEFT's format; collective. Each rank reads only its parts.

    Args:
        model_type: of the base model's config.json.

    Raises:
        UserError: the adapters belong to another model, or hold NaN or infinity; raised on all ranks.
    """
    adapters = {name: p for name, p in model.named_parameters() if is_adapter(name)}
    names = Names(model.config, model.vocab_size, model_type)
    places = {name: adapter_places(names, name) for name in adapters}
    problems: list[str] = []
    try:
        with open_adapters(folder, [place.name for each in places.values() for place in each]) as source:
            for name, parameter in adapters.items():
                part = read_adapter(source, places[name], parameter.shape, local_ranges(parameter))
                parameter.to_local().copy_(part)
    except UserError as error:
        problems = error.problems
    agree(problems)


def fill_adapters(model: GPTModel, run: Run) -> None:
    """Fills adapters from ``lora_model_dir``, or draws them by (seed, name, shape), whatever the layout."""
    if run.config.lora_model_dir is not None:
        assert run.pretrained is not None
        model_type = SafetensorsFolder(model_folder(run.pretrained)).model_type
        load_adapters(model, run.config.lora_model_dir, model_type)
    else:
        init_weights(model, run.config.seed, Adapter)
