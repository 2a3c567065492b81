"""Hugging Face Llama in and out: one table of names, nothing is transposed or fused.

    ours                                                    Hugging Face
    embedding.word_embeddings.weight  [v padded, h]         model.embed_tokens.weight  [v, h]
    decoder.layers.I.input_layernorm.weight                 model.layers.I.input_layernorm.weight
    decoder.layers.I.self_attention.linear_{q,k,v}.weight   model.layers.I.self_attn.{q,k,v}_proj.weight
    decoder.layers.I.self_attention.linear_proj.weight      model.layers.I.self_attn.o_proj.weight
    decoder.layers.I.pre_mlp_layernorm.weight               model.layers.I.post_attention_layernorm.weight
    decoder.layers.I.mlp.linear_{gate,up,down}.weight       model.layers.I.mlp.{gate,up,down}_proj.weight
    decoder.final_layernorm.weight                          model.norm.weight
    output_layer.weight               [v padded, h]         lm_head.weight  [v, h]

Import reads from safetensors only the rows and columns a rank holds. Export takes the
vocabulary's padding off and writes one tensor after another.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from longspan.errors import UserError

_OUTSIDE = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "output_layer.weight": "lm_head.weight",
}
_INSIDE = {
    "input_layernorm": "input_layernorm",
    "self_attention.linear_q": "self_attn.q_proj",
    "self_attention.linear_k": "self_attn.k_proj",
    "self_attention.linear_v": "self_attn.v_proj",
    "self_attention.linear_proj": "self_attn.o_proj",
    "pre_mlp_layernorm": "post_attention_layernorm",
    "mlp.linear_gate": "mlp.gate_proj",
    "mlp.linear_up": "mlp.up_proj",
    "mlp.linear_down": "mlp.down_proj",
}
#: parameters whose dim 0 is the vocabulary
VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")

SHARD_BYTES = 4 * 2**30


def hugging_face_name(name: str) -> str:
    """Our parameter name -> Hugging Face's."""
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)\.weight", name)
    if match is None or match[2] not in _INSIDE:
        raise ValueError(f"{name} has no counterpart in a Hugging Face Llama.")
    return f"model.layers.{match[1]}.{_INSIDE[match[2]]}.weight"


# --- in -------------------------------------------------------------------------------------


class SafetensorsFolder:
    """The tensors of a model folder, one file or several with an index; read slice by slice.

    Raises:
        UserError: no safetensors there, a broken index, or a broken file.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        index = self.folder / "model.safetensors.index.json"
        try:
            if index.is_file():
                self.files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            elif (self.folder / "model.safetensors").is_file():
                with safe_open(self.folder / "model.safetensors", "pt") as file:
                    self.files = dict.fromkeys(file.keys(), "model.safetensors")
            else:
                raise UserError(
                    f"base_model {self.folder}: there is no model.safetensors in it. Only safetensors are read; convert the "
                    "weights, or set reinit_weights: true to start from random ones."
                )
        except UserError:
            raise
        except Exception as error:  # safetensors' own error class, JSON, KeyError
            raise UserError(f"base_model {self.folder}: its weights cannot be read ({error}).") from None
        self._open: dict[str, Any] = {}

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


def expected_shape(name: str, shape: Iterable[int], vocab_size: int) -> list[int]:
    """The shape of a parameter in Hugging Face's files: without the vocabulary's padding."""
    first, *rest = shape
    return [vocab_size if name in VOCABULARY else first, *rest]


def read_part(source: SafetensorsFolder, name: str, shape, ranges, vocab_size: int) -> Tensor:
    """This rank's part of a parameter; rows of the vocabulary's padding are zero.

    Args:
        shape: of our whole parameter; ranges: (start, stop) along each dim of it.

    Raises:
        UserError: the file's tensor has another shape.
    """
    theirs = hugging_face_name(name)
    lazy = source.slice(theirs)
    expected = expected_shape(name, shape, vocab_size)
    if list(lazy.get_shape()) != expected:
        raise UserError(
            f"base_model {source.folder}: {theirs} has shape {list(lazy.get_shape())}, the config needs {expected}. "
            "Leave the architecture to base_model, or set reinit_weights: true."
        )
    rows = [min(edge, expected[0]) for edge in ranges[0]]
    part = lazy[rows[0] : rows[1]] if len(ranges) == 1 else lazy[rows[0] : rows[1], slice(*ranges[1])]
    missing = (ranges[0][1] - ranges[0][0]) - (rows[1] - rows[0])
    return torch.cat([part, part.new_zeros(missing, *part.shape[1:])]) if missing else part


# --- out ------------------------------------------------------------------------------------


def whole_parameters(
    model: nn.Module, only: Callable[[str], bool] = lambda name: True
) -> Iterator[tuple[str, Tensor]]:
    """Each parameter whole (of those ``only`` picks by name), by our name; collective. Tied ones come once."""
    for name, parameter in model.named_parameters():
        if not only(name):
            continue
        whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        yield name, whole.detach().cpu()


class FolderWriter:
    """Writes a model folder beside its final place and renames it when it is whole.

    Args:
        folder: where the model will be; what is there is replaced at the end.
        dtype: of the written weights; None writes each as it is given.
    """

    def __init__(self, folder: Path, vocab_size: int, dtype: torch.dtype | None):
        self.folder, self.vocab_size, self.dtype = folder, vocab_size, dtype
        self.partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir(parents=True)
        self.held: dict[str, Tensor] = {}
        self.bytes = 0
        self.shards: list[list[str]] = []

    def add(self, name: str, whole: Tensor) -> None:
        """Takes one of our parameters, whole, by our name."""
        self.keep(hugging_face_name(name), whole[: self.vocab_size] if name in VOCABULARY else whole)

    def keep(self, name: str, whole: Tensor) -> None:
        """Takes a tensor by the name it is written under."""
        tensor = whole.to(self.dtype or whole.dtype).contiguous().clone()
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

    def finish(self, config: dict[str, Any], tokenizer: Path | None) -> Path:
        """Writes config and tokenizer beside the weights and gives the folder its name."""
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
        (self.partial / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        copy_tokenizer(tokenizer, self.partial)
        if self.folder.exists():
            shutil.rmtree(self.folder)
        os.rename(self.partial, self.folder)
        return self.folder


TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "tokenizer.model",
    "generation_config.json",
)


def copy_tokenizer(source: Path | None, folder: Path) -> None:
    """Copies a tokenizer's files beside the weights."""
    if source is None:
        return
    source = source if source.is_dir() else source.parent
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def _kind(model: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    """The architecture's name: Mistral where all layers have one sliding window, Ministral where some have it."""
    given = model.get("sliding_window")
    windows = given if isinstance(given, list) else [given]
    sizes = {w for w in windows if w is not None}
    if len(sizes) > 1:
        raise UserError(
            f"sliding_window {given}: windows of different sizes have no Hugging Face architecture to leave as."
        )
    if None in windows and sizes:
        (size,) = sizes
        kinds = ["full_attention" if w is None else "sliding_attention" for w in windows]
        return {
            "architectures": ["MinistralForCausalLM"],
            "model_type": "ministral",
            "sliding_window": size,
            "layer_types": [kinds[i % len(kinds)] for i in range(model["num_layers"])],
        }
    if sizes or base.get("model_type") == "mistral":
        return {
            "architectures": ["MistralForCausalLM"],
            "model_type": "mistral",
            "sliding_window": next(iter(sizes), None),
        }
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}


def hugging_face_config(
    model: dict[str, Any], dtype: torch.dtype, base: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The ``config.json`` of a Llama, or with sliding windows of a Mistral or Ministral.

    Args:
        model: num_layers, hidden_size, num_attention_heads, num_query_groups, kv_channels, ffn_hidden_size, vocab_size,
            tie_word_embeddings, layernorm_epsilon, rotary_base, rope_scaling, init_method_std, sliding_window, sequence_len.
        base: a config.json to start from; its other fields are kept.
    """
    base = {k: v for k, v in (base or {}).items() if k not in ("sliding_window", "layer_types")}  # see _kind
    # transformers 5 reads rope_parameters, 4 reads the other two; both are written
    rope = {k: v for k, v in (model["rope_scaling"] or {}).items() if k != "type"}
    rope.setdefault("rope_type", (model["rope_scaling"] or {}).get("type", "default"))
    return (
        base
        | _kind(model, base)
        | {
            "num_hidden_layers": model["num_layers"],
            "hidden_size": model["hidden_size"],
            "num_attention_heads": model["num_attention_heads"],
            "num_key_value_heads": model["num_query_groups"],
            "head_dim": model["kv_channels"],
            "intermediate_size": model["ffn_hidden_size"],
            "vocab_size": model["vocab_size"],
            "tie_word_embeddings": model["tie_word_embeddings"],
            "rms_norm_eps": model["layernorm_epsilon"],
            "rope_theta": model["rotary_base"],
            "rope_scaling": model["rope_scaling"],
            "rope_parameters": {"rope_theta": model["rotary_base"], **rope},
            "max_position_embeddings": max(base.get("max_position_embeddings", 0), model["sequence_len"]),
            "initializer_range": model["init_method_std"],
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "torch_dtype": str(dtype).removeprefix("torch."),
        }
    )
