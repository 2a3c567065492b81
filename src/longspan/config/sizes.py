"""MeshSizes: how many ranks each axis has, and the equation that these numbers must satisfy."""

from __future__ import annotations

import math
from dataclasses import dataclass

DEFAULT_ORDER = "tp-cp-ep-dp-pp"


def equation(sizes: dict[str, int], world_size: int) -> str:
    """A product as text: ``tp 2 x cp 2 x pp 1 = 4``, with ``world_size`` added if the two differ."""
    product = math.prod(sizes.values())
    text = " x ".join(f"{axis} {size}" for axis, size in sizes.items()) + f" = {product}"
    return text if product == world_size else f"{text}, but there are {world_size} processes"


#: Megatron's other order: the stages of a pipeline are neighbours, the data parallel copies are far apart
PIPELINE_FIRST = "tp-cp-ep-pp-dp"


@dataclass(frozen=True)
class MeshSizes:
    """The sizes of all axes, in ranks. ``dp`` is dp_shard x dp_replicate; ``etp`` None means as ``tp``."""

    tp: int = 1
    cp: int = 1
    pp: int = 1
    dp_shard: int = 1
    dp_replicate: int = 1
    ep: int = 1
    etp: int | None = None
    hierarchical_cp: tuple[int, ...] = ()
    order: str = DEFAULT_ORDER

    @property
    def dp(self) -> int:
        return self.dp_shard * self.dp_replicate

    @property
    def world_size(self) -> int:
        return self.tp * self.cp * self.pp * self.dp

    def equation(self, world_size: int | None = None) -> str:
        """``tp 2 x cp 2 x dp_shard 1 x dp_replicate 1 x pp 1 = 4``"""
        names = ("tp", "cp", "dp_shard", "dp_replicate", "pp")
        return equation({name: getattr(self, name) for name in names}, world_size or self.world_size)
