"""The rules between the keys of a run's output."""

from __future__ import annotations

from longspan.config.packages import has_package
from longspan.config.schema import TrainConfig
from longspan.errors import Problem


def output_problems(config: TrainConfig) -> list[Problem]:
    """(keys, message) for keys of a service that is not switched on, or not installed."""
    found: list[Problem] = []
    if config.use_wandb and not has_package("wandb"):
        found.append(
            (
                ("use_wandb",),
                "use_wandb: true needs the wandb package, which is not installed. pip install 'longspan[wandb]'.",
            )
        )
    if not config.use_wandb and (config.wandb_project or config.wandb_name or config.wandb_entity):
        found.append(
            (
                ("use_wandb",),
                "wandb_project, wandb_name and wandb_entity have no effect without use_wandb: true. Set it, or leave them out.",
            )
        )
    return found
