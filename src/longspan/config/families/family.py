"""What longspan needs of one model type of Hugging Face: its fields and its tensors. Needs no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

from longspan.config.architecture import Architecture
from longspan.config.recurrent import LayerParts
from longspan.errors import UserError


class Place(NamedTuple):
    """A tensor in Hugging Face's files that holds a parameter of longspan, or rows of it.

    Attributes:
        name: of Hugging Face's tensor.
        rows: the rows of longspan's parameter that it holds, as an index of dim 0: a slice, or a number if
            the tensor is one row without that dim.
        first: the place of the first of these rows in the tensor, counted from 0: along its dim 0, or along its
            last dim if it is transposed.
        total: number of rows of the tensor; None if it holds these rows alone.
        transposed: whether the tensor's last two dims are in the opposite order.
        thin: whether the tensor has a dim of size 1 behind its first, as the weight of a convolution has.
        shift: Hugging Face's values are longspan's values plus this number.
        turn: (i, n): along dim 1 of longspan's parameter the tensor has n times as many rows, those of n parameters
            in turn, of which this parameter's come at i, i + n, and so on.
        scales: name of the tensor with the scales, if this one holds numbers of 4 bits in blocks (``models.mxfp4``).
    """

    name: str
    rows: slice | int = slice(None)
    first: int = 0
    total: int | None = None
    transposed: bool = False
    thin: bool = False
    shift: float = 0.0
    turn: tuple[int, int] = (0, 1)
    scales: str | None = None


#: fields of Architecture that only some types have -> their value in all others
IN_FEW_TYPES = {
    "softmax_type": "vanilla",
    "activation_func_clamp_value": None,
    "glu_linear_offset": 0.0,
    "moe_router_bias": False,
    "softmax_scale": None,
    "attention_output_gate": False,
    "attention_post_norm": False,
    "qk_layernorm_over_heads": False,
    "rotary_percent": 1.0,
}


class Family:
    """One model type. A subclass gives the attributes and extends the methods where its type differs.

    Attributes:
        model_type: as in config.json.
        architecture: transformers' class.
        keys: field of config.json -> longspan's key.
        defaults: field of config.json -> transformers' value if the file does not have the field.
        required: fields of ``defaults`` in which null stands for the default.
        nothing: field -> a value by which transformers writes that the model does not have it.
        activation: the field that names the activation.
        supported: field -> the values that longspan has; a model with another value is refused.
        needs: field of Architecture -> the value that a model of this type has.
        expert_needs: the same, of a model with experts.
        free: fields of ``IN_FEW_TYPES`` that may have any value.
        kinds: the kinds of layers that a model of this type may have.
        sparse: whether a model of this type has experts: True, False, or both are possible.
        zero_centered: whether files hold the norms' weights minus 1.
        layers: the prefix of the names of a layer's tensors.
        outside, inside: longspan's module -> transformers' module, outside of the layers and inside a layer.
        left_out: the beginnings of the names of tensors that are not read, as transformers does not read them.
        rope_fields: fields of rope_parameters that have no effect on a text.
        quantised: the quant_method of quantised weights that are read.
    """

    model_type: ClassVar[str]
    architecture: ClassVar[str]
    keys: ClassVar[Mapping[str, str]]
    defaults: ClassVar[Mapping[str, Any]]
    nothing: ClassVar[Mapping[str, Any]] = {}
    required: ClassVar[tuple[str, ...]] = ()
    activation: ClassVar[str] = "hidden_act"
    supported: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    kinds: ClassVar[tuple[LayerParts, ...]] = (
        LayerParts("attention", "dense"),
        LayerParts("attention", "experts"),
    )
    sparse: ClassVar[tuple[bool, ...]] = (False,)
    zero_centered: ClassVar[bool] = False
    left_out: ClassVar[tuple[str, ...]] = ()
    rope_fields: ClassVar[tuple[str, ...]] = ()
    quantised: ClassVar[tuple[str, ...]] = ()
    needs: ClassVar[Mapping[str, Any]]
    expert_needs: ClassVar[Mapping[str, Any]] = {}
    free: ClassVar[tuple[str, ...]] = ()
    layers: ClassVar[str]
    outside: ClassVar[Mapping[str, str]]
    inside: ClassVar[Mapping[str, str]]

    # --- reading config.json

    def renamed(self, data: Mapping[str, Any]) -> Mapping[str, Any]:
        """The fields of a config.json, with today's names instead of those of older files."""
        return data

    def read(self, data: Mapping[str, Any], where: str) -> dict[str, Any]:
        """longspan's keys for the fields of a config.json that are neither in ``keys`` nor the activation.

        Args:
            data: the file's fields, with ``defaults``.
            where: the file's name, for messages.

        Raises:
            UserError: a field requests a feature of the type that longspan does not have.
        """
        raise NotImplementedError

    # --- writing config.json

    def holds(self, model: Architecture) -> bool:
        """Whether a model is of this type, so that it can be written as one."""
        return not self.missing(model)

    def missing(self, model: Architecture) -> list[str]:
        """Our fields of another value than the type has, each with both values."""
        sparse = model.num_moe_experts is not None
        if not sparse and False not in self.sparse:
            return ["num_moe_experts null"]
        wanted = {**IN_FEW_TYPES, **self.needs}
        if True not in self.sparse:
            wanted["num_moe_experts"] = None
        elif sparse:
            wanted |= self.expert_needs
        wanted = {name: value for name, value in wanted.items() if name not in self.free}
        return self.differences(model, wanted) + self.odd_layers(model)

    def odd_layers(self, model: Architecture) -> list[str]:
        """The kinds of the model's layers that this type does not have."""
        kinds = dict.fromkeys(model.parts_of_layer(number) for number in range(1, model.num_layers + 1))
        return [f"layers of {_layer(kind)}" for kind in kinds if kind not in self.kinds]

    def names(self, model: Architecture) -> bool:
        """Whether this type has names for the tensors of a model's layers."""
        return (model.num_moe_experts is not None) in self.sparse and not self.odd_layers(model)

    def differences(self, model: Architecture, needs: Mapping[str, Any]) -> list[str]:
        """The fields that do not have the values needed, each with both values."""
        return [
            f"{name} {_shown(getattr(model, name))} (needs {_shown(value)})"
            for name, value in needs.items()
            if getattr(model, name) != value
        ]

    def fields(self, model: Architecture, positions: int) -> dict[str, Any]:
        """The architecture's fields in a config.json, without the fields that all types have.

        Args:
            positions: the longest sequence that the model is made for, in tokens.
        """
        raise NotImplementedError

    def plain_fields(self, model: Architecture) -> dict[str, Any]:
        """The fields in ``keys``, without those that all types have."""
        return {field: getattr(model, ours) for field, ours in self.keys.items() if hasattr(model, ours)}

    # --- tensors

    def tensor_name(self, name: str) -> str:
        """longspan's name of a parameter -> Hugging Face's name.

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
        """longspan's name of a parameter -> the tensors that hold its rows, in the order of the rows.

        Raises:
            ValueError: as :meth:`tensor_name`.
        """
        if not name.endswith("layernorm.weight"):
            return [Place(self.tensor_name(name))]
        shift = float(model.layernorm_zero_centered_gamma) - float(self.zero_centered)
        return [Place(self.tensor_name(name), shift=shift)]

    def module_name(self, tensor: str) -> str:
        """The name of a tensor in files -> its name in transformers' model, which PEFT takes."""
        return tensor

    def adapter_modules(self, target: str) -> tuple[str, ...]:
        """The modules, by the ends of their names, that a target of adapters consists of."""
        return (target,)

    def ways(self, name: str, model: Architecture) -> list[list[Place]]:
        """As :meth:`places`, in all ways that files have; the first way is the one that is written."""
        return [self.places(name, model)]


#: Hugging Face's name of an activation -> longspan's name
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "relu2": "squared_relu",
}


def activation_name(ours: Any) -> Any:
    """longspan's name of an activation -> Hugging Face's name."""
    return next((theirs for theirs, name in ACTIVATIONS.items() if name == ours), ours)


def windows_of(model: Architecture) -> list[int | None]:
    """The sliding window of each layer."""
    return [model.window_of_layer(number) for number in range(1, model.num_layers + 1)]


def one_window(model: Architecture) -> int | None:
    """The size of the windows, if all windows of the model have one size; None if no layer has a window."""
    return next((window for window in windows_of(model) if window is not None), None)


def windows_by_type(types: list[str], window: int, where: str) -> int | list[int | None] | None:
    """``layer_types`` of a config.json -> longspan's ``sliding_window``.

    Raises:
        UserError: a layer has another type.
    """
    if others := sorted(set(types) - {"full_attention", "sliding_attention"}):
        raise UserError(
            f"base_model: {where} has layers of type {', '.join(others)}; only full_attention and sliding_attention are "
            "supported."
        )
    windows = [window if each == "sliding_attention" else None for each in types]
    return windows if len(set(windows)) > 1 else windows[0] if windows else None


def layer_types(model: Architecture) -> list[str]:
    """longspan's ``sliding_window`` -> ``layer_types`` of a config.json."""
    return ["full_attention" if window is None else "sliding_attention" for window in windows_of(model)]


def _layer(kind: LayerParts) -> str:
    return " and ".join(part for part in kind if part is not None)


def _shown(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
