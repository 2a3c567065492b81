"""TrainConfig: every key once, with its type, unit, default and Megatron flag.

The keys are declared in ``config.keys``, a file for each group. Key names are axolotl's
where axolotl has the key, and TransformerConfig's for the architecture. Everything else
that needs to know the keys reads them here: the YAML loader, the command line, the
Megatron flags, ``longspan config --schema`` and the documentation.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
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

#: what a group of keys is called -> where they are declared
GROUPS: dict[str, type[BaseModel]] = {
    "model": ModelKeys,
    "data": DataKeys,
    "parallelism": ParallelKeys,
    "batch and schedule": ScheduleKeys,
    "optimizer": OptimizerKeys,
    "precision and memory": MemoryKeys,
    "logging, evaluation, saving": OutputKeys,
}


# Pydantic takes the fields of the last base first: this is the order of GROUPS.
class TrainConfig(OutputKeys, MemoryKeys, OptimizerKeys, ScheduleKeys, ParallelKeys, DataKeys, ModelKeys):
    """What ``longspan train`` is told."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _number(cls, value: Any, info: ValidationInfo) -> Any:
        """What is given for a number: text that is one counts (YAML takes 1e3 for text), unless it has two readings."""
        annotation = cls.model_fields[info.field_name or ""].annotation
        kinds = (annotation, *get_args(annotation))
        if int not in kinds and float not in kinds:
            return value
        if isinstance(value, bool) and bool not in kinds:
            raise ValueError("must be a number, not true or false")
        if not isinstance(value, str):
            return value
        if re.fullmatch(r"[+-]?0[0-9_]+", value):
            raise ValueError(
                "is ambiguous: YAML takes it for an octal number. Write it without the zero in front"
            )
        if re.fullmatch(r"[+-]?[0-9]+(:[0-9.]+)+", value):
            raise ValueError(
                "is ambiguous: YAML takes it for a number to the base 60. Write the number itself"
            )
        if re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+", value) and float(value).is_integer():
            return int(float(value))
        return value

    @field_validator("*", mode="before")
    @classmethod
    def _no_number_beyond_reason(cls, value: Any, info: ValidationInfo) -> Any:
        extra = cls.model_fields[info.field_name or ""].json_schema_extra
        unit = extra.get("unit") if isinstance(extra, dict) else None
        most = LARGEST.get(unit, LARGEST_INTEGER)  # type: ignore[arg-type]
        for number in value if isinstance(value, list) else [value]:
            if (isinstance(number, int) and abs(number) > most) or (
                isinstance(number, float) and unit in LARGEST and number > most
            ):
                raise ValueError(f"must be at most {most:,}" + (f" {unit}" if unit else ""))
        return value

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


@dataclass(frozen=True)
class Key:
    """What is known of one key, for parsers and documentation."""

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
    def default_at_megatron_door(self) -> Any:
        return self.default if self.megatron_default is UNSET else self.megatron_default


def keys() -> Iterator[Key]:
    """All keys, group by group."""
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


def names() -> dict[str, str]:
    """Every accepted spelling of a key in YAML -> the key: itself, aliases and Megatron's name."""
    table: dict[str, str] = {}
    for k in keys():
        for spelling in (k.name, *k.aliases, k.flag[2:].replace("-", "_")):
            assert table.setdefault(spelling, k.name) == k.name, f"{spelling} names two keys"
    return table
