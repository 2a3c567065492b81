"""Hugging Face models in and out: each rank reads only what it holds.

``config.families`` has the names of the tensors. A norm that keeps its weight minus 1 does so in longspan
only. Import reads from safetensors the rows and columns that a rank holds. Export takes the vocabulary's
padding off and writes one tensor after another.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from longspan.config.architecture import Architecture
from longspan.config.families.config_json import family_of_tensors
from longspan.config.families.family import Family, Place
from longspan.config.json_text import read_object
from longspan.config.parameters import POSITIONS, VOCABULARY, buffer_shapes, parameter_shapes
from longspan.errors import UserError
from longspan.files import begin_folder, name_folder
from longspan.mesh.whole import whole_tensors
from longspan.models.mxfp4 import read_blocks

SHARD_BYTES = 4 * 2**30


@dataclass(frozen=True)
class Names:
    """Where the parameters of one model lie in Hugging Face's files.

    Args:
        model: its architecture.
        vocab_size: real tokens; tables of ours are padded.
        model_type: of the config.json that stands or will stand beside these files; None if there is none.
    """

    model: Architecture
    vocab_size: int
    model_type: str | None = None

    @cached_property
    def family(self) -> Family:
        return family_of_tensors(self.model, self.model_type)

    def places(self, name: str, source: SafetensorsFolder | None = None) -> list[Place]:
        """Our parameter name -> where its rows lie, in their order.

        Args:
            source: files that there are. Some types have several ways to write them; the way of these files is taken,
                or else that of an export.

        Raises:
            ValueError: it has none.
        """
        ways = self.family.ways(name, self.model)
        if source is None or len(ways) == 1:
            return ways[0]
        return next((way for way in ways if all(map(source.holds, way))), ways[0])

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> whole shape of all that lies in files: the parameters, and biases of experts, which are buffers."""
        buffers = buffer_shapes(self.model).items()
        biases = {name: shape for name, shape in buffers if lies_in_files(name)}
        return parameter_shapes(self.model, self.vocab_size) | biases

    def rows(self, name: str) -> int | None:
        """Real rows of a table of ours that is padded; None for any other parameter."""
        if name in VOCABULARY:
            return self.vocab_size
        return self.model.max_position_embeddings if name == POSITIONS else None


def lies_in_files(name: str) -> bool:
    """Whether a buffer of ours is one of Hugging Face's tensors."""
    return name.endswith(".router.expert_bias")


# --- in -------------------------------------------------------------------------------------


class SafetensorsFolder:
    """The tensors of a model folder, one file or several with an index; read slice by slice.

    Raises:
        UserError: no safetensors there, a broken index, or a broken file.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._open: dict[str, Any] = {}
        index = self.folder / "model.safetensors.index.json"
        try:
            if index.is_file():
                self.files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            elif (self.folder / "model.safetensors").is_file():
                with safe_open(self.folder / "model.safetensors", "pt") as file:
                    self.files = dict.fromkeys(file.keys(), "model.safetensors")
            else:
                pickled = next((p.name for p in sorted(self.folder.glob("*.bin"))), None)
                found = f" ({pickled} is a pickle, which may run code: it is not opened)" if pickled else ""
                raise UserError(
                    f"base_model {self.folder}: there is no model.safetensors in it{found}. Only safetensors are read; convert "
                    "the weights, or set reinit_weights: true to start from random ones."
                )
        except UserError:
            raise
        except Exception as error:  # safetensors' own error class, JSON, KeyError
            raise UserError(f"base_model {self.folder}: its weights cannot be read ({error}).") from None
        if not isinstance(self.files, dict):
            raise UserError(
                f"base_model {self.folder}: weight_map of {index.name} is no object of tensor names and files."
            )
        for name, file in self.files.items():
            # a link may lead elsewhere, as in the hub's own cache; a name may not
            if (
                not isinstance(file, str)
                or not file
                or "\0" in file
                or Path(file).name != file
                or file == ".."
            ):
                raise UserError(
                    f"base_model {self.folder}: {index.name} places {name} in {file!r}, which is no file of this folder. Only "
                    "files beside the index are read. Download the model again, or put its index right."
                )

    @property
    def model_type(self) -> str | None:
        """As in the config.json beside the weights; None without one."""
        kind = read_object(self.folder / "config.json").get("model_type")
        return kind if isinstance(kind, str) else None

    def holds(self, place: Place) -> bool:
        """Whether there is a tensor of this name, and of this number of rows if the place gives it."""
        if place.name not in self.files:
            return False
        return place.total is None or self.slice(place.name).get_shape()[0] == place.total

    def slice(self, name: str):
        """A lazily read tensor: ``get_shape()`` and ``[rows, columns]``."""
        if name not in self.files:
            raise UserError(f"base_model {self.folder}: tensor {name} is missing from its safetensors.")
        file = self.files[name]
        try:
            if file not in self._open:
                self._open[file] = safe_open(self.folder / file, "pt")
            return self._open[file].get_slice(name)
        except Exception as error:
            raise UserError(f"base_model {self.folder}: {file} cannot be read ({error}).") from None

    def weights(self, name: str):
        """As ``slice``, of a tensor that must hold weights.

        Raises:
            UserError: it holds other numbers.
        """
        lazy = self.slice(name)
        if (kind := lazy.get_dtype()) not in WEIGHT_DTYPES:
            raise UserError(
                f"base_model {self.folder}: {name} in {self.files[name]} is of type {kind}; weights are numbers of type F32, "
                "BF16, F16 or F64. If they are quantised, give the model they were made of."
            )
        return lazy

    @property
    def dtype(self) -> torch.dtype:
        """Of the first weights; what transformers takes where a config.json names none."""
        found = (WEIGHT_DTYPES.get(self.slice(name).get_dtype()) for name in self.files)
        return next((dtype for dtype in found if dtype is not None), torch.float32)

    def fingerprint(self) -> str:
        """Tells other weights apart by the first row of every tensor; hexadecimal digits."""
        digest = hashlib.blake2b(digest_size=8)
        for name in sorted(self.files):
            lazy = self.slice(name)
            if not lazy.get_shape():
                continue
            row = lazy[:1].contiguous()
            digest.update(name.encode() + row.view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


#: what weights may be in, by safetensors' names
WEIGHT_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}

#: tensors that files hold beside weights: what is computed from the config anyway
_COMPUTED = ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")
_FUSED = ("qkv_proj", "gate_up_proj", "query_key_value", "W_pack", "Wqkv")
_QUANTISED = ("qweight", "qzeros", "weight_scale", "absmax", "quant_state", "weight_packed")


def check_tensors(source: SafetensorsFolder, names: Names) -> None:
    """Refuses a folder whose tensors are not those of the model, before anything is read.

    Raises:
        UserError: fused or quantised weights, missing tensors, or some that the model has no place for.
    """
    places = [place for name in names.shapes() for place in names.places(name, source)]
    blocks = {name for place in places if place.scales for name in (place.name, place.scales)}
    expected = {place.name for place in places} | blocks
    head, table = (names.places(name, source)[0].name for name in reversed(VOCABULARY))
    tied = names.model.share_embeddings_and_output_weights
    others = [
        name
        for name in source.files
        if name not in expected
        and not name.endswith(_COMPUTED)
        and not name.startswith(names.family.left_out)
        and not (tied and name == head)
    ]
    where = f"base_model {source.folder}"
    for words, what in ((_FUSED, "fused"), (_QUANTISED, "quantised")):
        if named := next((name for name in others if any(word in name for word in words)), None):
            raise UserError(
                f"{where}: {named} holds {what} weights; only separate, whole ones are read (q_proj, k_proj, v_proj, gate_proj, "
                "up_proj). Convert the model, or give the one it was made of."
            )
    problems = []
    if missing := sorted(expected - set(source.files)):
        problems.append(f"{where}: {_some(missing)} missing from its safetensors, which the config needs.")
    if others:
        problems.append(
            f"{where}: its safetensors hold {_some(sorted(others))}, for which the config has no place."
        )
    if problems:
        problems[-1] += " Leave the architecture to base_model, or set reinit_weights: true."
        raise UserError(problems)
    for name in sorted(expected - blocks):
        source.weights(name)
    if tied and head in source.files:
        first = [source.slice(name)[0:8] for name in (head, table)]
        if not torch.equal(*first):
            raise UserError(
                f"{where}: {head} and {table} differ, but tie_word_embeddings is true. Set tie_word_embeddings: false."
            )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more tensors" if len(names) > 3 else "")


def read_part(source: SafetensorsFolder, names: Names, name: str, shape, ranges) -> Tensor:
    """This rank's part of a parameter; rows of a table's padding are zero.

    Args:
        shape: of our whole parameter; ranges: (start, stop) along each dim of it.

    Raises:
        UserError: the file's tensor has another shape, or a value in this part is infinite or no number.
    """
    real = names.rows(name) or shape[0]
    start, stop = (min(edge, real) for edge in ranges[0])
    whole, part = [real, *shape[1:]], [(start, stop), *ranges[1:]]
    parts = [_read_place(source, place, whole, part) for place in names.places(name, source)]
    missing = (ranges[0][1] - ranges[0][0]) - (stop - start)
    if missing:
        parts.append(parts[0].new_zeros(missing, *parts[0].shape[1:]))
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _read_place(source: SafetensorsFolder, place: Place, whole: list[int], ranges) -> Tensor:
    """What one tensor there holds of a part of our parameter; no rows where it holds others.

    Args:
        whole: the shape of our parameter without padding; ranges: the part, (start, stop) along each dim of it.
    """
    expected, index, single, empty = place_in_tensor(place, whole, ranges)
    if place.scales:
        blocks, scales = source.slice(place.name), source.slice(place.scales)
        where = f"base_model {source.folder}: {place.name}"
        part = read_blocks(blocks, scales, expected, index, place.turn, where)
        check_finite(part, f"base_model {source.folder}", place.name, source.files[place.name])
        return part
    lazy = source.weights(place.name)
    if list(lazy.get_shape()) != expected:
        raise UserError(
            f"base_model {source.folder}: {place.name} has shape {list(lazy.get_shape())}, the config needs {expected}. "
            "Leave the architecture to base_model, or set reinit_weights: true."
        )
    if single and empty:
        sizes = [stop - start for start, stop in ranges[1:]]
        return torch.empty(0, *sizes, dtype=WEIGHT_DTYPES[lazy.get_dtype()])
    part = lazy[tuple(index)] if len(index) > 1 else lazy[index[0]]
    if place.transposed:
        part = part.mT
    if place.turn[1] > 1:
        part = part[:, place.turn[0] :: place.turn[1]]
    if place.thin:
        part = part.squeeze(1)
    if place.shift:
        part = part.to(torch.promote_types(part.dtype, torch.float32)) - place.shift
    check_finite(part, f"base_model {source.folder}", place.name, source.files[place.name])
    return part.unsqueeze(0) if single else part


def place_in_tensor(
    place: Place, whole: Sequence[int], ranges: Sequence[tuple[int, int]]
) -> tuple[list[int], list[slice], bool, bool]:
    """(shape of the tensor, index of a part in it, whether it has no dim 0, whether the part has no rows in it).

    Args:
        whole, ranges: as for :func:`_read_place`.
    """
    held = range(whole[0])[place.rows]
    single = isinstance(held, int)
    held = range(held, held + 1) if isinstance(held, int) else held
    first, last = (min(max(edge, held.start), held.stop) - held.start for edge in ranges[0])
    expected = [len(held) if place.total is None else place.total, *whole[1:]]
    index = [slice(place.first + first, place.first + last), *(slice(*edges) for edges in ranges[1:])]
    if (times := place.turn[1]) > 1:
        expected[1] *= times
        index[1] = slice(index[1].start * times, index[1].stop * times)
    if place.thin:
        expected.insert(1, 1)
        index.insert(1, slice(0, 1))
    if single:
        expected, index = expected[1:], index[1:]
    if place.transposed:
        expected[-2:], index[-2:] = expected[:-3:-1], index[:-3:-1]
    return expected, index, single, first == last


def check_finite(part: Tensor, where: str, name: str, file: str) -> None:
    """Refuses weights that are infinite or no number (UserError), by the tensor's name and its file."""
    if part.is_floating_point() and not torch.isfinite(part).all():
        what = "NaN" if torch.isnan(part).any() else "infinity"
        raise UserError(
            f"{where}: {name} in {file} holds {what}: with it every loss is no number. The file is damaged, or what wrote it "
            "failed: download or make it again."
        )


# --- out ------------------------------------------------------------------------------------


def whole_parameters(
    model: nn.Module, only: Callable[[str], bool] = lambda name: True
) -> Iterator[tuple[str, Tensor]]:
    """Each parameter whole (of those ``only`` picks by name), by our name; collective. Tied ones come once.

    Buffers that lie in files follow.

    In a pipeline the first stage's ranks get all of them, in the order of the whole model, and others their own.
    """
    buffers = ((name, buffer) for name, buffer in model.named_buffers() if lies_in_files(name))
    named = {name: tensor for name, tensor in (*model.named_parameters(), *buffers) if only(name)}
    groups = getattr(model, "groups", None)
    yield from whole_tensors(named, groups and groups.pp, _place_in_model)


def _place_in_model(name: str) -> tuple[int, int]:
    """What sorts parameters as a whole model lists them; within a layer the order stays."""
    if name.startswith("decoder.layers."):
        return 1, int(name.split(".")[2])
    return {"embedding": 0, "decoder": 2}.get(name.split(".")[0], 3), 0


class FolderWriter:
    """Writes a model folder beside its final place and renames it when it is whole.

    Args:
        folder: where the model will be; what is there is replaced at the end.
        names: where the model's parameters go; None takes tensors by the names they are written under (``keep``).
        dtype: of the written weights; None writes each as it is given.
    """

    def __init__(self, folder: Path, names: Names | None, dtype: torch.dtype | None):
        self.folder, self.names, self.dtype = folder, names, dtype
        self.partial = begin_folder(folder)
        self.held: dict[str, Tensor] = {}
        # Tensors whose rows have not all come yet: name -> first row -> rows.
        self.pieces: dict[str, dict[int, Tensor]] = {}
        self.bytes = 0
        self.shards: list[list[str]] = []

    def add(self, name: str, whole: Tensor) -> None:
        """Takes a whole parameter, by our name."""
        assert self.names is not None
        whole = whole[: self.names.rows(name)]
        for place in self.names.places(name):
            self._add(place, whole[place.rows])

    def _add(self, place: Place, whole: Tensor) -> None:
        if place.shift:
            whole = whole + place.shift
        if place.total is not None:
            pieces = self.pieces.setdefault(place.name, {})
            pieces[place.first] = whole
            if sum(map(len, pieces.values())) < place.total:
                return
            whole = torch.cat([rows for _, rows in sorted(self.pieces.pop(place.name).items())])
        if place.turn[1] > 1:
            pieces = self.pieces.setdefault(place.name, {})
            pieces[place.turn[0]] = whole
            if len(pieces) < place.turn[1]:
                return
            whole = torch.stack([rows for _, rows in sorted(self.pieces.pop(place.name).items())], dim=2)
            whole = whole.flatten(1, 2)
        if place.transposed:
            whole = whole.mT
        if place.thin:
            whole = whole.unsqueeze(1)
        self.keep(place.name, whole)

    def keep(self, name: str, whole: Tensor) -> None:
        """Takes a tensor by the name it is written under."""
        dtype = self.dtype if self.dtype and whole.is_floating_point() else whole.dtype
        tensor = whole.to(dtype).contiguous().clone()
        self.held[name] = tensor
        self.bytes += tensor.nbytes
        if self.bytes > SHARD_BYTES:
            self._flush()

    def _flush(self) -> None:
        if self.held:
            save_file(self.held, self.partial / f"shard-{len(self.shards)}", metadata={"format": "pt"})
            self.shards.append(list(self.held))
            self.held, self.bytes = {}, 0

    def discard(self) -> None:
        """Leaves nothing behind."""
        shutil.rmtree(self.partial, ignore_errors=True)

    def finish(self, files: Mapping[str, bytes]) -> Path:
        """Writes config, tokenizer and the like (name -> content) beside the weights and gives the folder its name."""
        assert not self.pieces, f"rows of {', '.join(self.pieces)} are missing"
        self._flush()
        count = len(self.shards)
        weight_map: dict[str, str] = {}
        for i, names in enumerate(self.shards):
            file = "model.safetensors" if count == 1 else f"model-{i + 1:05d}-of-{count:05d}.safetensors"
            os.rename(self.partial / f"shard-{i}", self.partial / file)
            weight_map |= dict.fromkeys(names, file)
        if count > 1:
            size = sum((self.partial / file).stat().st_size for file in set(weight_map.values()))
            index = {"metadata": {"total_size": size}, "weight_map": weight_map}
            (self.partial / "model.safetensors.index.json").write_text(
                json.dumps(index, indent=2), encoding="utf-8"
            )
        write_files(files, self.partial)
        name_folder(self.partial, self.folder)
        return self.folder


def write_files(files: Mapping[str, bytes], folder: Path) -> None:
    """Writes files, some of them in a folder of their own."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
