"""TrainConfig: every key once, with its type, unit, default and Megatron flag.

The keys are declared in ``config.keys``, in one file for each group. Key names are axolotl's
if axolotl has the key, and TransformerConfig's for the architecture. All other code reads the
keys from here: the YAML loader, the command line, the Megatron flags, ``longspan config --schema``
and the documentation.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator

from longspan.config.keys.data import DataKeys, DatasetConfig
from longspan.config.keys.declare import LARGEST, LARGEST_INTEGER, UNSET
from longspan.config.keys.memory import MemoryKeys
from longspan.config.keys.model import ModelKeys
from longspan.config.keys.optimizer import OptimizerKeys
from longspan.config.keys.output import OutputKeys
from longspan.config.keys.parallelism import ParallelKeys
from longspan.config.keys.schedule import ScheduleKeys

__all__ = ["GROUPS", "DatasetConfig", "Key", "TrainConfig", "keys", "names"]

#: the name of a group of keys -> the class that declares them
GROUPS: dict[str, type[BaseModel]] = {
    "model": ModelKeys,
    "data": DataKeys,
    "parallelism": ParallelKeys,
    "batch and schedule": ScheduleKeys,
    "optimizer": OptimizerKeys,
    "precision and memory": MemoryKeys,
    "logging, evaluation, saving": OutputKeys,
}


# Pydantic takes the fields of the last base class first, so the fields have the order of GROUPS.
class TrainConfig(OutputKeys, MemoryKeys, OptimizerKeys, ScheduleKeys, ParallelKeys, DataKeys, ModelKeys):
    """The config of ``longspan train``."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True)

    # One validator converts a number and checks its limit. Pydantic runs the last validator first, so a
    # second validator for the limit would get the text.
    @field_validator("*", mode="before")
    @classmethod
    def _number(cls, value: Any, info: ValidationInfo) -> Any:
        """The value of a key for a number or a list of numbers, within the limit of its unit.

        :func:`number_in` reads a number from text.
        """
        field = cls.model_fields[info.field_name or ""]
        annotation: Any = field.annotation
        kinds = _kinds(annotation)
        if not {int, float} & kinds:
            return value
        unit = field.json_schema_extra.get("unit") if isinstance(field.json_schema_extra, dict) else None
        most = LARGEST.get(unit, LARGEST_INTEGER)  # type: ignore[arg-type]
        numbers = []
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, bool) and bool not in kinds:
                raise ValueError("must be a number, not true or false")
            number = number_in(one) if isinstance(one, str) else one
            limited = int in kinds or isinstance(number, int) or unit in LARGEST
            if limited and isinstance(number, int | float) and abs(number) > most:
                raise ValueError(f"must be at most {most:,}" + (f" {unit}" if unit else ""))
            numbers.append(number)
        return numbers if isinstance(value, list) else numbers[0]

    @field_validator(
        "base_model",
        "tokenizer_config",
        "dataset_prepared_path",
        "output_dir",
        "resume",
        "lora_model_dir",
        "vocab_file",
        "merge_file",
        "tensorboard_dir",
    )
    @classmethod
    def _path(cls, value: str | None) -> str | None:
        if value == "":
            raise ValueError("must not be empty")
        return None if value is None else os.path.expanduser(value)


@cache
def _kinds(annotation: Any) -> frozenset[Any]:
    """The types in an annotation, including the types of a list's members."""
    return frozenset({annotation}).union(*map(_kinds, get_args(annotation)))


def number_in(text: str) -> int | float | str:
    """The number in a text such as ``1e3``, which YAML reads as text; any other text is returned unchanged.

    Raises:
        ValueError: the text can be read as two different numbers.
    """
    if re.fullmatch(r"[+-]?0[0-9_]+", text):
        raise ValueError(
            "is ambiguous: it can be read as octal and as decimal. Write it without the zero in front"
        )
    if re.fullmatch(r"[+-]?[0-9]+(:[0-9.]+)+", text):
        raise ValueError("is ambiguous: it can be read as a number to the base 60. Write the number itself")
    for kind in (int, float):
        try:
            number = kind(text)
        except ValueError:
            continue
        # 1e3 is the whole number 1000, because keys for steps read a float as a share.
        return int(number) if "e" in text.lower() and float(number).is_integer() else number
    return text


@dataclass(frozen=True)
class Key:
    """The declaration of one key, for parsers and documentation."""

    name: str
    group: str
    text: str
    annotation: Any
    default: Any
    unit: str | None
    flag: str
    switches: dict[str, Any]
    aliases: tuple[str, ...]
    megatron_default: Any

    @property
    def default_of_megatron(self) -> Any:
        return self.default if self.megatron_default is UNSET else self.megatron_default


@cache
def keys() -> tuple[Key, ...]:
    """All keys, group by group."""
    return tuple(_keys())


def _keys() -> Iterator[Key]:
    for group, section in GROUPS.items():
        for name, info in section.model_fields.items():
            extra = info.json_schema_extra
            assert isinstance(extra, dict)
            yield Key(
                name=name,
                group=group,
                text=info.description or "",
                annotation=info.annotation,
                default=info.get_default(call_default_factory=True),
                unit=extra.get("unit"),  # type: ignore[arg-type]
                flag=str(extra.get("megatron_flag", "--" + name.replace("_", "-"))),
                switches=extra.get("megatron_switches", {}),  # type: ignore[arg-type]
                aliases=tuple(extra.get("aliases", ())),  # type: ignore[arg-type]
                megatron_default=extra.get("megatron_default", UNSET),
            )


@cache
def names() -> Mapping[str, str]:
    """Every accepted spelling of a key in YAML (its name, its aliases, Megatron's name) -> the key's name."""
    table: dict[str, str] = {}
    for k in keys():
        for spelling in (k.name, *k.aliases, k.flag[2:].replace("-", "_")):
            assert table.setdefault(spelling, k.name) == k.name, f"{spelling} names two keys"
    return MappingProxyType(table)
