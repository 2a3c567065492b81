"""Adapters on a model, and reading and writing PEFT's files.

    name in longspan, after           name in PEFT (adapter_model.safetensors), after       shape
    decoder.layers.I.                 base_model.model.model.layers.I.
    self_attention.linear_q.lora.A    self_attn.q_proj.lora_A.weight                        [r, input]
    self_attention.linear_q.lora.B    self_attn.q_proj.lora_B.weight                        [output, r]

The other targets follow the same pattern; ``models.hf_weights`` has the layers' names. Where Hugging Face has a layer
of ours as several modules, each of them gets the same A and its rows of B; they are one layer here, so only such
adapters can be read.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from longspan.config.families.config_json import FAMILIES, TEXT_MODELS
from longspan.config.families.family import Family, Place
from longspan.config.lora import CONFIG_FILE, WEIGHTS_FILE, Lora, read_peft_config
from longspan.config.parameters import parameter_shapes
from longspan.errors import UserError
from longspan.files import begin_folder, name_folder
from longspan.models.embedding import OutputLayer
from longspan.models.gpt import GPTModel
from longspan.models.hf_weights import (
    WEIGHT_DTYPES,
    FolderWriter,
    Names,
    SafetensorsFolder,
    check_finite,
    place_in_tensor,
    write_files,
)
from longspan.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from longspan.tensor_parallel.lora import Adapter

_MARK = ".lora."
_PREFIX = "base_model.model."
#: our layer -> the target that it belongs to
_TARGET_OF = {
    "linear_q": "q_proj",
    "linear_k": "k_proj",
    "linear_v": "v_proj",
    "linear_proj": "o_proj",
    "linear_gate": "gate_proj",
    "linear_up": "up_proj",
    "linear_down": "down_proj",
    "in_proj": "in_proj",
    "out_proj": "out_proj",
}
_ATTENTION_GATE = ".self_attention.linear_gate"


def is_adapter(name: str) -> bool:
    """Whether ``name`` is the name of an adapter's parameter."""
    return _MARK in name


def adapter_places(names: Names, name: str) -> list[Place]:
    """longspan's name of an adapter's parameter -> PEFT's tensors: each holds A as it is, or rows of B."""
    layer, _, part = name.partition(_MARK)
    places = [
        Place(_adapter_name(names.family, place.name, part), place.rows, place.first, place.total)
        for place in names.places(f"{layer}.weight")
    ]
    return places if part == "B" else [Place(tensor) for tensor in dict.fromkeys(p.name for p in places)]


def _adapter_name(family: Family, weight: str, part: str) -> str:
    """PEFT's name of A or B beside a weight in Hugging Face's files."""
    return f"{_PREFIX}{family.module_name(weight).removesuffix('weight')}lora_{part}.weight"


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
    # In a pipeline, this rank may have no layer of a target that others have.
    modules = (name.rpartition(".")[0] for name in parameter_shapes(model.config, model.vocab_size))
    if missing := set(lora.targets) - set(map(_target, modules)):
        raise UserError(
            f"lora_target_modules: the model has no {', '.join(sorted(missing))}. Leave them out (and lora_target_linear "
            "with them)."
        )
    for name, layer in list(model.named_modules()):
        if not isinstance(layer, ColumnParallelLinear | RowParallelLinear) or isinstance(layer, OutputLayer):
            continue
        beside = None
        if name.endswith(_ATTENTION_GATE):
            query = model.get_submodule(name.replace(_ATTENTION_GATE, ".self_attention.linear_q"))
            assert isinstance(query, ColumnParallelLinear)
            beside = query
        if _target(name) in lora.targets:
            # The adapter is made on meta like the model; its weights are drawn later.
            with torch.device("meta"):
                layer.lora = Adapter(layer, lora.rank, lora.scale, model.config, beside)


def _target(module: str) -> str | None:
    """longspan's name of a module -> the target that it belongs to, if any."""
    # Hugging Face has the query and its gate in one layer.
    return "q_proj" if module.endswith(_ATTENTION_GATE) else _TARGET_OF.get(module.rpartition(".")[2])


#: parameters of recurrent layers that no product reads: exponentials are computed from them in float32
_WIDE = ("A_log", "dt_bias", "D")


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Casts frozen parameters to another dtype, except those in ``_WIDE``; tied parameters stay tied."""
    cast: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if name in _WIDE:
                continue
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


def read_adapter(
    source: Any, places: list[Place], shape: Sequence[int], ranges: list[tuple[int, int]]
) -> Tensor:
    """This rank's part of an adapter's parameter.

    Args:
        places: of :func:`adapter_places`.
        shape: shape of the whole parameter.
        ranges: (start, stop) of this rank's part along each dim.

    Raises:
        UserError: the file's tensors have other shapes, a dtype that weights do not have, or values that are
            not finite; or several modules that are one layer here have different A.
    """
    parts = [_read_place(source, place, shape, ranges) for place in places]
    if places[0].rows != slice(None):
        return torch.cat(parts)
    for place, part in zip(places, parts):
        if not torch.equal(part, parts[0]):
            raise UserError(
                f"{WEIGHTS_FILE}: {places[0].name} and {place.name} differ, and here the two modules are one layer with one A. Such "
                "adapters cannot be trained on; merge them with PEFT (merge_and_unload)."
            )
    return parts[0]


def _read_place(source: Any, place: Place, whole: Sequence[int], ranges: list[tuple[int, int]]) -> Tensor:
    """What one of PEFT's tensors holds of a part of an adapter's parameter."""
    lazy = source.get_slice(place.name)
    expected, index, _, _ = place_in_tensor(place, whole, ranges)
    if list(lazy.get_shape()) != expected:
        raise UserError(
            f"{WEIGHTS_FILE}: {place.name} has shape {list(lazy.get_shape())}, this model needs {expected}. "
            "The adapters are of another base model."
        )
    if (kind := lazy.get_dtype()) not in WEIGHT_DTYPES:
        raise UserError(
            f"{WEIGHTS_FILE}: {place.name} is of type {kind}; adapters are F32, BF16, F16 or F64."
        )
    part = lazy[tuple(index)]
    check_finite(part, "the adapters", place.name, WEIGHTS_FILE)
    return part


# --- writing --------------------------------------------------------------------------------


def write_adapters(
    folder: Path,
    names: Names,
    weights: Mapping[str, Tensor],
    config: dict[str, Any],
    files: Mapping[str, bytes],
) -> None:
    """Writes a folder in PEFT's format; if that fails, the earlier folder stays.

    Args:
        names: of the base model.
        weights: whole tensors by longspan's names.
        config: content of PEFT's config file; see ``Lora.peft_config``.
        files: further files of the folder: name -> content.
    """
    named: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        for place in adapter_places(names, name):
            rows = tensor[place.rows]
            if place.total is None:
                named[place.name] = rows.clone()
                continue
            whole = named.setdefault(place.name, tensor.new_zeros(place.total, tensor.shape[1]))
            whole[place.first : place.first + len(rows)] = rows
    write_folder(folder, named, config, files)


def write_folder(
    folder: Path, weights: Mapping[str, Tensor], config: dict[str, Any], files: Mapping[str, bytes]
) -> None:
    """Writes a folder in PEFT's format, as :func:`write_adapters`, from tensors by PEFT's names."""
    partial = begin_folder(folder)
    named = {name: tensor.contiguous() for name, tensor in weights.items()}
    save_file(named, partial / WEIGHTS_FILE, metadata={"format": "pt"})
    (partial / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    write_files(files, partial)
    name_folder(partial, folder)


#: parts of the names of experts' tensors, which get no adapters though their last parts are those of dense layers
_EXPERTS = (".mlp.experts.", ".block_sparse_moe.experts.", ".mixer.experts.")


@torch.no_grad()
def merge(base: SafetensorsFolder, adapters: Path, writer: FolderWriter) -> None:
    """Writes a base model's weights with the adapters added: W + scale B A, tensor by tensor.

    The sum is computed in at least float32 and rounded once, to the writer's dtype (None: the base's dtype).

    Raises:
        UserError: the adapters do not fit the base model, or a weight is not finite.
    """
    lora, _ = read_peft_config(adapters)
    kind = base.model_type or ""
    family = FAMILIES.get(TEXT_MODELS.get(kind, kind), FAMILIES["llama"])
    ends = tuple(f".{module}.weight" for target in lora.targets for module in family.adapter_modules(target))
    parts = {
        name: [_adapter_name(family, name, part) for part in "AB"]
        for name in base.files
        if name.endswith(ends)
        and not any(part in name for part in _EXPERTS)
        and not name.startswith(family.left_out)
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
