"""Adapters on a model, and reading and writing PEFT's files.

    name in longspan, after           name in PEFT (adapter_model.safetensors), after       shape
    decoder.layers.I.                 base_model.model.model.layers.I.
    self_attention.linear_q.lora.A    self_attn.q_proj.lora_A.weight                        [r, input]
    self_attention.linear_q.lora.B    self_attn.q_proj.lora_B.weight                        [output, r]

The other targets follow the same pattern; ``models.hf_weights`` has the layers' names.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from longspan.config.families.qwen import Qwen2Moe
from longspan.config.lora import CONFIG_FILE, WEIGHTS_FILE, Lora, read_peft_config
from longspan.errors import UserError
from longspan.files import begin_folder, name_folder
from longspan.models.embedding import OutputLayer
from longspan.models.gpt import GPTModel
from longspan.models.hf_weights import (
    WEIGHT_DTYPES,
    FolderWriter,
    SafetensorsFolder,
    check_finite,
    write_files,
)
from longspan.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from longspan.tensor_parallel.lora import Adapter

_MARK = ".lora."
_PREFIX = "base_model.model."
#: adapters are on linear layers of attention and MLP, which all families that have adapters name as a Llama does
_NAMES = Qwen2Moe()


def is_adapter(name: str) -> bool:
    """Whether ``name`` is the name of an adapter's parameter."""
    return _MARK in name


def peft_name(name: str) -> str:
    """longspan's name of an adapter's parameter -> PEFT's name."""
    layer, _, part = name.partition(_MARK)
    return f"{_PREFIX}{_NAMES.tensor_name(layer + '.weight').removesuffix('weight')}lora_{part}.weight"


# --- on a model -----------------------------------------------------------------------------


def attach(model: GPTModel, lora: Lora, frozen_dtype: torch.dtype | None = None) -> None:
    """Freezes a model on the ``meta`` device and adds adapters to the target layers, still without values.

    Args:
        frozen_dtype: dtype of the frozen weights; None keeps it. A model that computes in bfloat16 may store
            them in bfloat16: every product casts them anyway, and no small update is ever added to them.

    Raises:
        UserError: the model lacks a target.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if frozen_dtype is not None:
        _cast(model, frozen_dtype)
    missing = set(lora.targets)
    for name, layer in list(model.named_modules()):
        if not isinstance(layer, ColumnParallelLinear | RowParallelLinear) or isinstance(layer, OutputLayer):
            continue
        target = _NAMES.tensor_name(f"{name}.weight").split(".")[-2]
        if target in lora.targets:
            # The adapter is made on meta like the model; its weights are drawn later.
            with torch.device("meta"):
                layer.lora = Adapter(layer, lora.rank, lora.scale, model.config)
            missing.discard(target)
    if missing:
        raise UserError(
            f"lora_target_modules: the model has no {', '.join(sorted(missing))}. Leave them out (and lora_target_linear "
            "with them)."
        )


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Casts frozen parameters to another dtype; tied parameters stay tied."""
    cast: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in cast:
                cast[id(parameter)] = nn.Parameter(parameter.detach().to(dtype), requires_grad=False)
            setattr(module, name, cast[id(parameter)])


# --- reading --------------------------------------------------------------------------------


@contextlib.contextmanager
def open_adapters(folder: str | Path, names: Iterable[str]) -> Iterator[Any]:
    """Opens PEFT's weights, which are then read slice by slice.

    Args:
        names: PEFT's names of all expected tensors.

    Raises:
        UserError: the file is missing or broken, or its tensors are not the expected ones.
    """
    path = Path(folder) / WEIGHTS_FILE
    if not path.is_file():
        pickled = path.with_suffix(".bin")
        found = (
            f" ({pickled.name} is a pickle, which may run code: it is not opened)"
            if pickled.is_file()
            else ""
        )
        raise UserError(
            f"{folder}: there is no {WEIGHTS_FILE} in it{found}. Only safetensors are read: save the adapters again with PEFT."
        )
    try:
        source = safe_open(path, "pt")
    # safetensors has its own error class, which does not derive from OSError or ValueError.
    except Exception as error:
        raise UserError(f"{path} cannot be read ({error}).") from None
    with source:
        there, expected = set(source.keys()), set(names)
        for what, odd in (("lacks", expected - there), ("holds also", there - expected)):
            if odd:
                raise UserError(
                    f"{path} {what} {min(odd)} ({len(odd)} such tensors): its adapters are of another model or of other "
                    "targets. Give the base model and the targets they were trained with."
                )
        yield source


def read_adapter(source: Any, name: str, shape: Iterable[int], ranges: list[tuple[int, int]]) -> Tensor:
    """This rank's part of an adapter's parameter.

    Args:
        name: longspan's name of the parameter.
        shape: shape of the whole parameter.
        ranges: (start, stop) of this rank's part along each dim.

    Raises:
        UserError: the file's tensor has another shape, a dtype that weights do not have, or values that are
            not finite.
    """
    lazy = source.get_slice(peft_name(name))
    if list(lazy.get_shape()) != list(shape):
        raise UserError(
            f"{WEIGHTS_FILE}: {peft_name(name)} has shape {list(lazy.get_shape())}, this model needs {list(shape)}. "
            "The adapters are of another base model."
        )
    if (kind := lazy.get_dtype()) not in WEIGHT_DTYPES:
        raise UserError(
            f"{WEIGHTS_FILE}: {peft_name(name)} is of type {kind}; adapters are F32, BF16, F16 or F64."
        )
    rows, columns = (slice(*edges) for edges in ranges)
    part = lazy[rows, columns]
    check_finite(part, "the adapters", peft_name(name), WEIGHTS_FILE)
    return part


# --- writing --------------------------------------------------------------------------------


def write_adapters(
    folder: Path, weights: Mapping[str, Tensor], config: dict[str, Any], files: Mapping[str, bytes]
) -> None:
    """Writes a folder in PEFT's format; if that fails, the earlier folder stays.

    Args:
        weights: whole tensors by longspan's names.
        config: content of PEFT's config file; see ``Lora.peft_config``.
        files: further files of the folder: name -> content.
    """
    partial = begin_folder(folder)
    named = {peft_name(name): tensor.contiguous() for name, tensor in weights.items()}
    save_file(named, partial / WEIGHTS_FILE, metadata={"format": "pt"})
    (partial / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    write_files(files, partial)
    name_folder(partial, folder)


#: parts of the names of experts' tensors, which get no adapters though their last parts are those of dense layers
_EXPERTS = (".mlp.experts.", ".block_sparse_moe.experts.")


@torch.no_grad()
def merge(base: SafetensorsFolder, adapters: Path, writer: FolderWriter) -> None:
    """Writes a base model's weights with the adapters added: W + scale B A, tensor by tensor.

    The sum is computed in at least float32 and rounded once, to the writer's dtype (None: the base's dtype).

    Raises:
        UserError: the adapters do not fit the base model, or a weight is not finite.
    """
    lora, _ = read_peft_config(adapters)
    ends = tuple(f".{target}.weight" for target in lora.targets)
    parts = {
        name: [f"{_PREFIX}{name.removesuffix('weight')}lora_{part}.weight" for part in "AB"]
        for name in base.files
        if name.endswith(ends) and not any(part in name for part in _EXPERTS)
    }
    with open_adapters(adapters, [part for pair in parts.values() for part in pair]) as source:
        for name in base.files:
            weight = merged = base.slice(name)[:]
            check_finite(weight, f"the base model {base.folder}", name, base.files[name])
            if name in parts:
                a, b = (source.get_tensor(part) for part in parts[name])
                for tensor, part in zip((weight, a, b), (name, *parts[name])):
                    if tensor.dtype not in WEIGHT_DTYPES.values():
                        raise UserError(f"{part} is of type {tensor.dtype}, which holds no weights to merge.")
                wide = torch.promote_types(torch.promote_types(weight.dtype, a.dtype), torch.float32)
                if (b.shape[0], a.shape[1]) != tuple(weight.shape) or a.shape[0] != b.shape[1]:
                    raise UserError(
                        f"{WEIGHTS_FILE}: the adapters of {name} are {list(a.shape)} and {list(b.shape)}, the base's weight "
                        f"is {list(weight.shape)}. The adapters are of another base model."
                    )
                merged = weight.to(wide) + lora.scale * (b.to(wide) @ a.to(wide))
                check_finite(merged, f"the adapters {adapters}", parts[name][0], WEIGHTS_FILE)
            # writer.keep rounds to the writer's dtype, if there is one.
            writer.keep(name, merged.to(weight.dtype) if writer.dtype is None else merged)
