"""The rules between keys, one file for each kind. ``config.resolve`` checks all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from longspan.config.rules.data import data_problems
from longspan.config.rules.implementation import implementation_problems
from longspan.config.rules.lora import lora_problems
from longspan.config.rules.memory import memory_problems
from longspan.config.rules.model import model_problems, position_problems
from longspan.config.rules.output import output_problems
from longspan.config.rules.parallel import parallel_problems
from longspan.config.rules.pipeline import pipeline_problems
from longspan.config.rules.required import missing_keys
from longspan.config.rules.schedule import schedule_problems
from longspan.config.schema import TrainConfig
from longspan.errors import Problem

#: Each function returns (keys, message) for every rule that a config breaks.
RULES: tuple[Callable[[TrainConfig], Iterable[Problem]], ...] = (
    missing_keys,
    data_problems,
    parallel_problems,
    pipeline_problems,
    output_problems,
    position_problems,
    lora_problems,
    memory_problems,
    schedule_problems,
    model_problems,
    implementation_problems,
)
