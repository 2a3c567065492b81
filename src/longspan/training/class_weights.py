"""The weights of transformers' class in and out of files: each rank reads only what it holds.

A tensor of a file is a parameter of the class, under the same or another name, or several make one (the experts of a
layer). Which is which, transformers' own table of conversions says. A parameter that has its tensor is read row by
row; one that is made of several is made whole, one after another. Buffers that no file holds (tables of rotary
angles, scales of embeddings) are computed by the class.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from longspan.errors import UserError
from longspan.mesh.whole import whole_tensors
from longspan.models.hf_weights import SafetensorsFolder, check_finite
from longspan.tensor_parallel.random import hash_seed, local_ranges
from longspan.weights import agree

#: what a whole number in a buffer begins as, so that one that nobody computes is found
_UNSET = -(1 << 30)


def is_adapter(name: str) -> bool:
    """Whether a parameter of the class is one of PEFT's adapters."""
    return ".lora_A." in name or ".lora_B." in name


def own_name(name: str) -> str:
    """The name of a parameter without what PEFT's layers put into it."""
    return name.replace(".base_layer.", ".")


def state_of(hf: nn.Module) -> dict[str, Tensor]:
    """Name -> tensor of all that lies in files: parameters and persistent buffers; tied ones under each name."""
    return {
        own_name(name): tensor
        for name, tensor in hf.state_dict(keep_vars=True).items()
        if not is_adapter(name)
    }


# --- names ----------------------------------------------------------------------------------


@dataclass
class Piece:
    """What makes one parameter, or several at once: tensors of files.

    Attributes:
        sources: (the name in files, the pattern of the conversion that it matches; None without a conversion).
        converter: transformers' conversion; None for a tensor that is the parameter.
        shapes: the class's name -> its shape by the files.
    """

    sources: list[tuple[str, str | None]] = field(default_factory=list)
    converter: Any = None
    shapes: dict[str, list[int]] = field(default_factory=dict)

    def convert(self, hf: Any, name: str, tensors: list[Tensor]) -> dict[str, Tensor]:
        """The class's parameters of the tensors of the sources."""
        if self.converter is None:
            return {name: tensors[0]}
        converter = copy.deepcopy(self.converter)
        for (source, pattern), tensor in zip(self.sources, tensors):
            converter.add_tensor(name, source, pattern, tensor)
        made = converter.convert(name, model=hf, config=hf.config)
        return {key: value[0] if isinstance(value, list) else value for key, value in made.items()}


def pieces_of(hf: Any, source: SafetensorsFolder) -> dict[str, Piece]:
    """The class's name (of the first parameter) -> what makes it, by transformers' conversions.

    Raises:
        UserError: the installed transformers has no conversions.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    except ImportError:
        raise UserError(
            "model_implementation: transformers needs transformers 5 or newer, which describes how files become parameters: pip "
            "install -U transformers."
        ) from None
    mapping = get_model_conversion_mapping(hf)
    renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
    converters = [one for one in mapping if isinstance(one, WeightConverter)]
    by_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
    state = state_of(hf)
    pieces: dict[str, Piece] = {}
    for key in sorted(source.files, key=_natural):
        name, pattern = rename_source_key(key, renamings, converters, hf.base_model_prefix, state)
        if name not in state and key in state:
            name, pattern = key, None
        piece = pieces.setdefault(name, Piece())
        piece.sources.append((key, pattern))
        if pattern is not None:
            piece.converter = by_pattern[pattern]
    for name, piece in pieces.items():
        on_meta = [
            torch.empty(source.slice(key).get_shape(), device="meta", dtype=torch.float32)
            for key, _ in piece.sources
        ]
        try:
            made = piece.convert(hf, name, on_meta)
            piece.shapes = {key: list(tensor.shape) for key, tensor in made.items()}
        # A conversion that lacks a tensor, or has one of another shape, fails in its own way.
        except Exception:
            piece.shapes = {}
    return pieces


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Sorts ``experts.10`` behind ``experts.9``."""
    return [(1, int(part), "") if part.isdigit() else (0, 0, part) for part in name.split(".")]


def _ignored(hf: Any, name: str, attribute: str) -> bool:
    """Whether the class says that a tensor may be missing, or left over."""
    return any(re.search(pattern, name) for pattern in getattr(hf, attribute, None) or ())


def check_names(hf: Any, source: SafetensorsFolder, pieces: dict[str, Piece]) -> None:
    """Refuses a folder whose tensors are not those of the class, by name and shape.

    Raises:
        UserError: tensors are missing, left over, or of another shape; or their types hold no weights.
    """
    state, where = state_of(hf), f"base_model {source.folder}"
    found = {name for piece in pieces.values() for name in piece.shapes}
    tied = {id(state[name]) for name in found if name in state}
    missing = sorted(
        name
        for name, tensor in state.items()
        if name not in found
        and id(tensor) not in tied
        and not _ignored(hf, name, "_keys_to_ignore_on_load_missing")
    )
    left = sorted(
        key
        for name, piece in pieces.items()
        for key, _ in piece.sources
        if not set(piece.shapes or {name: []}) <= state.keys()
        and not _ignored(hf, key, "_keys_to_ignore_on_load_unexpected")
        and not key.endswith(("rotary_emb.inv_freq", "masked_bias", ".attn.bias"))
    )
    problems = []
    if missing:
        problems.append(
            f"{where}: {_some(missing)} missing from its safetensors, which {type(hf).__name__} needs."
        )
    if left:
        problems.append(
            f"{where}: its safetensors hold {_some(left)}, for which {type(hf).__name__} has no place."
        )
    odd = [
        f"{name} has shape {shape}, and the class {list(state[name].shape)}"
        for piece in pieces.values()
        for name, shape in piece.shapes.items()
        if name in state and list(state[name].shape) != shape
    ]
    if odd:
        problems.append(f"{where}: {_some(odd)}. Its config.json and its weights do not belong together.")
    if problems:
        raise UserError(problems)
    for piece in pieces.values():
        if set(piece.shapes) <= state.keys():
            for key, _ in piece.sources:
                source.weights(key)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more tensors" if len(names) > 3 else "")


# --- in -------------------------------------------------------------------------------------


@torch.no_grad()
def read(hf: Any, source: SafetensorsFolder) -> None:
    """Fills all but adapters from files; collective. Each rank reads only the parts it holds.

    Raises:
        UserError: as :func:`check_names`, or for a value that is infinite or no number; on all ranks.
    """
    problems: list[str] = []
    try:
        pieces = pieces_of(hf, source)
        check_names(hf, source, pieces)
        state = state_of(hf)
        done: set[int] = set()
        for name, piece in pieces.items():
            targets = {key: state[key] for key in piece.shapes if key in state}
            # A tied parameter is read once.
            if not targets or all(id(tensor) in done for tensor in targets.values()):
                continue
            done |= {id(tensor) for tensor in targets.values()}
            _read_piece(hf, source, name, piece, targets)
    except UserError as error:
        problems = error.problems
    agree(problems)


def _read_piece(
    hf: Any, source: SafetensorsFolder, name: str, piece: Piece, targets: dict[str, Tensor]
) -> None:
    where = f"base_model {source.folder}"
    if piece.converter is None:
        (key, _), tensor = piece.sources[0], targets[name]
        part = source.weights(key)[_index(tensor)]
        check_finite(part, where, key, source.files[key])
        _local(tensor).copy_(part)
        return
    tensors = []
    for key, _ in piece.sources:
        tensors.append(source.weights(key)[...])
        check_finite(tensors[-1], where, key, source.files[key])
    for key, whole in piece.convert(hf, name, tensors).items():
        _local(targets[key]).copy_(whole[_index(targets[key])])


def _index(tensor: Tensor) -> Any:
    """The index of this rank's part in the whole tensor."""
    if not isinstance(tensor, DTensor) or not tensor.shape:
        return ...
    return tuple(slice(*edges) for edges in local_ranges(tensor))


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


# --- by the class ---------------------------------------------------------------------------


@contextmanager
def _parameters_kept(module: nn.Module) -> Iterator[None]:
    """A context in which the class's way to initialise a module leaves its parameters as they are."""
    from transformers import initialization

    flagged = [p for p in module.parameters() if not hasattr(p, "_is_hf_initialized")]
    for parameter in flagged:
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]
    try:
        with initialization.guard_torch_init_functions():
            yield
    finally:
        for parameter in flagged:
            del parameter._is_hf_initialized  # type: ignore[attr-defined]


@torch.no_grad()
def compute_buffers(hf: Any) -> None:
    """Fills the buffers that no file holds, by the class's own code.

    Raises:
        UserError: the class computes one of them elsewhere, so that it would be left at random.
    """
    held = [
        (path, module)
        for path, module in hf.named_modules()
        if any(b is not None for b in module._buffers.values())
    ]
    for _, module in held:
        for buffer in module.buffers(recurse=False):
            buffer.fill_(
                float("nan") if buffer.is_floating_point() else 0 if buffer.dtype == torch.bool else _UNSET
            )
    for _, module in held:
        with _parameters_kept(module):
            hf._init_weights(module)
    empty = []
    for path, module in held:
        for name, buffer in module.named_buffers(recurse=False):
            unset = torch.isnan(buffer) if buffer.is_floating_point() else buffer == _UNSET
            if name in module._non_persistent_buffers_set and bool(unset.any()):
                empty.append(f"{path}.{name}")
    if empty:
        raise UserError(
            f"base_model: {type(hf).__name__} computes {_some(sorted(empty))} only while it is made, so that they cannot be computed "
            "again after it was sharded. It cannot be trained here."
        )


@torch.no_grad()
def draw(hf: Any, seed: int) -> None:
    """Fills all weights as the class initialises them, by random numbers that depend on (seed, name) alone.

    One module after another is made whole, so that every layout draws the same numbers.

    Raises:
        UserError: the class leaves a weight as it is.
    """
    done: set[int] = set()
    unfilled = []
    for path, module in hf.named_modules():
        own = {name: p for name, p in module._parameters.items() if p is not None}
        if not own or is_adapter(f"{path}.") or all(id(p) in done for p in own.values()):
            continue
        wholes = {name: nn.Parameter(torch.full(p.shape, float("nan"))) for name, p in own.items()}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(hash_seed(seed, path))
            module._parameters.update(wholes)
            try:
                hf._init_weights(module)
            finally:
                module._parameters.update(own)
        for name, parameter in own.items():
            whole = wholes[name].detach()
            if bool(torch.isnan(whole).any()):
                unfilled.append(f"{path}.{name}")
            if id(parameter) not in done:
                done.add(id(parameter))
                _local(parameter).copy_(whole[_index(parameter)])
    if unfilled:
        raise UserError(
            f"reinit_weights: {type(hf).__name__} does not initialise {_some(sorted(unfilled))} by itself. Start from weights: leave "
            "reinit_weights out."
        )


# --- out ------------------------------------------------------------------------------------


def whole_for_files(hf: Any) -> Iterator[tuple[str, Tensor]]:
    """All tensors of the class whole, by their names in files, on every rank; collective. Tied ones come once.

    One layer after another is gathered, because some tensors of files are parts of a parameter.
    """
    from transformers.core_model_loading import revert_weight_conversion

    seen: set[int] = set()
    layers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state_of(hf).items():
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        found = re.match(r"(.*\.\d+)\.", name)
        layer = re.match(r"(.*?\.\d+)\.", name)[1] if found else name  # type: ignore[index]
        layers.setdefault(layer, {})[name] = tensor
    for tensors in layers.values():
        wholes = dict(whole_tensors({name: tensor.detach() for name, tensor in tensors.items()}, None))
        yield from revert_weight_conversion(hf, wholes).items()
