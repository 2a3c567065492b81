"""What longspan needs of one model type of Hugging Face: its fields, its pieces, its tensors. Needs no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

from longspan.config.architecture import Architecture
from longspan.errors import UserError


class Place(NamedTuple):
    """A tensor in Hugging Face's files that holds a parameter of ours, or rows of it.

    Attributes:
        name: of the tensor there.
        rows: which of our dim 0 it holds, as an index: a slice, or a number where it is one row without that dim.
        part, parts: those rows are block ``part`` of ``parts`` equal ones along the tensor's own dim 0.
        transposed: its dims are in the opposite order.
        shift: the tensor there is larger by this number.
    """

    name: str
    rows: slice | int = slice(None)
    part: int = 0
    parts: int = 1
    transposed: bool = False
    shift: float = 0.0


class Family:
    """One model type. A subclass gives the attributes and extends the methods where its type differs.

    Attributes:
        model_type: as in config.json.
        architecture: transformers' class.
        keys: field of config.json -> our key.
        defaults: what transformers takes where a config.json does not name a field.
        activation: the field that names the activation.
        needs: our field -> the value that a model of this type has.
        layers: the prefix of a layer's tensors.
        outside, inside: our module -> theirs, outside of the layers and inside one.
    """

    model_type: ClassVar[str]
    architecture: ClassVar[str]
    keys: ClassVar[Mapping[str, str]]
    defaults: ClassVar[Mapping[str, Any]]
    activation: ClassVar[str] = "hidden_act"
    needs: ClassVar[Mapping[str, Any]]
    layers: ClassVar[str]
    outside: ClassVar[Mapping[str, str]]
    inside: ClassVar[Mapping[str, str]]

    # --- config.json in

    def read(self, data: Mapping[str, Any], where: str) -> dict[str, Any]:
        """Our keys for what a config.json asks for beside ``keys`` and the activation.

        Args:
            data: the file's fields, with ``defaults``; where: the file's name, for messages.

        Raises:
            UserError: it asks for what the type has and longspan does not.
        """
        raise NotImplementedError

    # --- config.json out

    def holds(self, model: Architecture) -> bool:
        """Whether a model is of this type, so that it can be written as one."""
        return not self.missing(model)

    def missing(self, model: Architecture) -> list[str]:
        """Our fields of another value than the type has, each with both values."""
        return [
            f"{name} {_shown(getattr(model, name))} (needs {_shown(value)})"
            for name, value in {"softmax_scale": None, **self.needs}.items()
            if getattr(model, name) != value
        ]

    def fields(self, model: Architecture, positions: int) -> dict[str, Any]:
        """The fields of the architecture in a config.json, but for those that all types have.

        Args:
            positions: the longest sequence that the model is made for.
        """
        raise NotImplementedError

    # --- tensors

    def tensor_name(self, name: str) -> str:
        """Our parameter name -> theirs.

        Raises:
            ValueError: a model of this type has no such parameter.
        """
        module, kind = name.rsplit(".", 1)
        if module in self.outside:
            return f"{self.outside[module]}.{kind}"
        match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", module)
        if match is None or match[2] not in self.inside:
            raise ValueError(f"{name} has no counterpart in a Hugging Face model.")
        return f"{self.layers}.{match[1]}.{self.inside[match[2]]}.{kind}"

    def places(self, name: str, model: Architecture) -> list[Place]:
        """Our parameter name -> the tensors that hold its rows, in the order of the rows.

        Raises:
            ValueError: as :meth:`tensor_name`.
        """
        shifted = name.endswith("layernorm.weight") and model.layernorm_zero_centered_gamma
        return [Place(self.tensor_name(name), shift=1.0 if shifted else 0.0)]


def windows_of(model: Architecture) -> list[int | None]:
    """The sliding window of each layer."""
    return [model.window_of_layer(number) for number in range(1, model.num_layers + 1)]


def one_window(model: Architecture) -> int | None:
    """The size of the windows, of a model whose layers have one size or none."""
    return next((window for window in windows_of(model) if window is not None), None)


def windows_by_type(types: list[str], window: int, where: str) -> int | list[int | None] | None:
    """``layer_types`` of a config.json -> our ``sliding_window``.

    Raises:
        UserError: a layer of another type.
    """
    if others := sorted(set(types) - {"full_attention", "sliding_attention"}):
        raise UserError(
            f"base_model: {where} has layers of type {', '.join(others)}; only full_attention and sliding_attention are "
            "supported."
        )
    windows = [window if each == "sliding_attention" else None for each in types]
    return windows if len(set(windows)) > 1 else windows[0] if windows else None


def layer_types(model: Architecture) -> list[str]:
    """Our ``sliding_window`` -> ``layer_types`` of a config.json."""
    return ["full_attention" if window is None else "sliding_attention" for window in windows_of(model)]


def _shown(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
