"""What model types with recurrent layers have in common: where the features of their mixers lie in the files.

longspan's projections have their rows in groups of heads (``config.recurrent.MixerSizes``), because tensor parallel
ranks hold whole groups. Files have them in one of two orders, in one tensor or in several:

    by part     all groups' x, then all groups' B, ...       (Mamba-2, Nemotron-H, Qwen3.5, OLMo Hybrid)
    by group    as longspan                                  (Qwen3-Next's projections)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

from longspan.config.architecture import Architecture
from longspan.config.families.family import Family, Place
from longspan.errors import UserError


class Part(NamedTuple):
    """Rows of each group of heads of a mixer.

    Attributes:
        name: of the part: x, B, C and so on.
        size: number of rows of a group.
    """

    name: str
    size: int


def mamba_parts(model: Architecture) -> list[Part]:
    """The parts of a group of Mamba-2's input projection, in order."""
    each, d = model.mamba_num_heads // model.mamba_num_groups, model.mamba_state_dim
    inner = each * model.mamba_head_dim
    return [Part("z", inner), Part("x", inner), Part("B", d), Part("C", d), Part("dt", each)]


def delta_parts(model: Architecture) -> list[Part]:
    """The parts of a group of the gated delta rule's input projection, in order."""
    each, d_k = model.linear_num_value_heads // model.linear_num_key_heads, model.linear_key_head_dim
    values = each * model.linear_value_head_dim
    sizes = {"q": d_k, "k": d_k, "v": values, "z": values, "b": each, "a": each}
    return [Part(name, size) for name, size in sizes.items()]


def spread(
    parts: Sequence[Part], tensors: Mapping[str, str], groups: int, by_group: bool = False, thin: bool = False
) -> list[Place]:
    """The places of a parameter whose rows are ``parts`` of each group, group after group.

    Args:
        tensors: name of a part -> the tensor that holds it.
        by_group: whether a tensor has its rows group after group, instead of part after part.
        thin: as in :class:`Place`.
    """
    width = sum(part.size for part in parts)
    totals = {tensor: sum(p.size for p in parts if tensors[p.name] == tensor) for tensor in tensors.values()}
    found = []
    for group in range(groups):
        row = group * width
        filled = dict.fromkeys(totals, 0)
        for name, size in parts:
            tensor = tensors[name]
            before = filled[tensor]
            first = group * totals[tensor] + before if by_group else groups * before + group * size
            total = groups * totals[tensor]
            found.append(Place(tensor, slice(row, row + size), first, total, thin=thin))
            filled[tensor] += size
            row += size
    return found


class WithMixers(Family):
    """To be mixed in before another family: the input projection and the convolution of recurrent layers.

    A type gives ``projections`` and, if its files group the rows as longspan does, ``by_group``.

    Attributes:
        mixer: the prefix of a mixer's tensors, after the layer's.
        projections: part of the input projection -> the module that holds it.
        by_group: as in :func:`spread`, for the input projection.
    """

    mixer: ClassVar[str]
    projections: ClassVar[Mapping[str, str]]
    by_group: ClassVar[bool] = False

    def parts(self, model: Architecture) -> tuple[list[Part], int]:
        """(the parts of a group of the input projection, number of groups)."""
        raise NotImplementedError

    def adapter_modules(self, target: str) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.projections.values())) if target == "in_proj" else (target,)

    def places(self, name: str, model: Architecture) -> list[Place]:
        module, _, kind = name.rpartition(".")
        if not module.endswith((".mixer.in_proj", ".mixer.conv1d")):
            return super().places(name, model)
        stem = f"{self.layers}.{module.split('.')[2]}.{self.mixer}"
        parts, groups = self.parts(model)
        if module.endswith(".in_proj"):
            tensors = {part: f"{stem}.{theirs}.{kind}" for part, theirs in self.projections.items()}
            return spread(parts, tensors, groups, self.by_group)
        parts = [part for part in parts if part.name in ("x", "B", "C", "q", "k", "v")]
        tensors = dict.fromkeys((part.name for part in parts), f"{stem}.conv1d.{kind}")
        return spread(parts, tensors, groups, thin=kind == "weight")


class WithMamba(WithMixers):
    """Mamba-2 in the form that its authors, Hugging Face and Megatron-LM write."""

    projections = dict.fromkeys(("z", "x", "B", "C", "dt"), "in_proj")
    of_mixer: ClassVar[dict[str, str]] = {
        "mixer": "mixer",
        "mixer.norm": "mixer.norm",
        "mixer.out_proj": "mixer.out_proj",
    }
    mixer = "mixer"

    def parts(self, model: Architecture) -> tuple[list[Part], int]:
        return mamba_parts(model), model.mamba_num_groups


class WithGatedDelta(WithMixers):
    """The gated delta rule, in one layer or another beside attention; every layer has an MLP."""

    mixer = "linear_attn"
    of_mixer: ClassVar[dict[str, str]] = {
        "mixer": "linear_attn",
        "mixer.norm": "linear_attn.norm",
        "mixer.out_proj": "linear_attn.out_proj",
    }
    delta_keys: ClassVar[dict[str, str]] = {
        name: name
        for name in (
            "linear_num_key_heads",
            "linear_num_value_heads",
            "linear_key_head_dim",
            "linear_value_head_dim",
            "linear_conv_kernel_dim",
        )
    }

    def parts(self, model: Architecture) -> tuple[list[Part], int]:
        return delta_parts(model), model.linear_num_key_heads

    def delta_fields(self, model: Architecture) -> dict[str, Any]:
        """The fields of the mixers in a config.json."""
        mixers = [model.parts_of_layer(number).mixer for number in range(1, model.num_layers + 1)]
        names = {"attention": "full_attention", "gated_delta": "linear_attention"}
        return {
            **{field: getattr(model, field) for field in self.delta_keys},
            "layer_types": [names[str(mixer)] for mixer in mixers],
        }


def read_layer_types(data: Mapping[str, Any], default: list[str], where: str) -> list[str]:
    """``layer_types`` of a config.json -> longspan's key.

    Args:
        default: the types if the file has none, as transformers computes them.

    Raises:
        UserError: a layer has another type.
    """
    types = data.get("layer_types") or default
    names = {"full_attention": "attention", "linear_attention": "gated_delta"}
    if others := sorted(set(types) - set(names)):
        raise UserError(
            f"base_model: {where} has layer_types {', '.join(others)}; only full_attention and linear_attention are supported."
        )
    return [names[one] for one in types]
