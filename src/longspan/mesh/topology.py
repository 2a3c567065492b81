"""The ranks of each group, computed with integers only, without process groups and torch.

A *grid* arranges the ranks of a world along axes, e.g. ``tp x cp x dp x pp``. In an *order*
such as ``"tp-cp-ep-dp-pp"`` the leftmost axis varies fastest. A *group* of an axis (or of
several axes joined by ``-``) holds the ranks that differ in that axis only.

The names follow Megatron-LM; ``RankGenerator`` has the interface of Megatron-LM's class.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def grid_groups(sizes: dict[str, int], axes: Sequence[str], offset: int = 0) -> list[list[int]]:
    """Splits the ranks of a grid into the groups of some of its axes.

    Args:
        sizes: axis -> size, fastest varying axis first.
        axes: the axes that vary inside a group.
        offset: the first rank of the grid.

    Returns:
        The groups in order of their first rank, each an ascending list of ranks.

    Example:
        ``grid_groups({"tp": 2, "cp": 2}, ["cp"]) == [[0, 2], [1, 3]]``
    """
    strides, stride = {}, 1
    for axis, size in sizes.items():
        strides[axis] = stride
        stride *= size

    def ranks_of(chosen: list[str]) -> list[int]:
        ranks = [0]
        # The slowest axis comes last, so that the list is ascending.
        for axis in chosen:
            ranks = [rank + i * strides[axis] for i in range(sizes[axis]) for rank in ranks]
        return ranks

    inside = ranks_of([axis for axis in sizes if axis in axes])
    starts = ranks_of([axis for axis in sizes if axis not in axes])
    return [[offset + start + rank for rank in inside] for start in starts]


class RankGenerator:
    """Lists of ranks in one grid, with Megatron's names.

    Args:
        tp, ep, dp, pp, cp: sizes of the axes (ranks).
        order: axes joined by ``-``, the fastest varying first. An axis that it leaves out
            must have size 1.
        rank_offset: the first rank of the grid.

    Raises:
        RuntimeError: an axis larger than 1 is missing from ``order``, or a name in ``order``
            is not an axis.
        ValueError: ``ep > 1`` together with ``cp > 1``: the dense grid (tp x cp x dp x
            pp) and the expert grid (etp x ep x edp x pp) are two grids.
    """

    def __init__(self, tp: int, ep: int, dp: int, pp: int, cp: int, order: str, rank_offset: int = 0):
        if ep > 1 and cp > 1:
            raise ValueError(
                f"ep={ep} and cp={cp} in one grid: experts and context parallelism live in two grids over "
                "the same ranks. Make one RankGenerator with ep=1 (dense) and one with cp=1 (experts)."
            )
        given = {"tp": tp, "ep": ep, "dp": dp, "pp": pp, "cp": cp}
        for axis, size in given.items():
            if size < 1:
                raise ValueError(f"{axis}={size}: the size of an axis is at least 1.")
        names = order.lower().split("-")
        unknown = [name for name in names if name not in given]
        if unknown or len(set(names)) != len(names):
            raise RuntimeError(f"order {order!r}: each of tp, cp, ep, dp, pp at most once, joined by '-'.")
        for axis, size in given.items():
            if axis not in names:
                if size != 1:
                    raise RuntimeError(
                        f"{axis} has size {size} but order {order!r} does not name it. Add {axis!r} to the order."
                    )
                names.append(axis)
        self.tp, self.ep, self.dp, self.pp, self.cp = tp, ep, dp, pp, cp
        self.rank_offset = rank_offset
        self.order = "-".join(names)
        self.sizes = {name: given[name] for name in names}
        self.world_size = math.prod(given.values())
        #: the rank at each place of the grid
        self.numbers: Sequence[int] = range(rank_offset, rank_offset + self.world_size)

    def get_ranks(self, token: str) -> list[list[int]]:
        """Groups of the axes in ``token``, e.g. ``"tp"`` or ``"tp-cp"`` -> lists of ranks."""
        axes = token.split("-")
        unknown = [axis for axis in axes if axis not in self.sizes]
        if unknown:
            raise ValueError(
                f"{token!r}: {unknown[0]!r} is not an axis; the axes are {', '.join(self.sizes)}."
            )
        return grid_groups(self.sizes, axes, self.rank_offset)


class ExpertGrid(RankGenerator):
    """The grid of experts, laid out within the ranks of each stage of a dense grid.

    So the pipeline groups of the two grids coincide at every order. (Megatron-LM refuses orders with pp before
    dp where tp x cp and etp x ep differ.)

    Args:
        dense: the dense grid.
        etp, ep, edp: sizes of the axes; their product is that of tp, cp and dp.
        order: as of the dense grid.
    """

    def __init__(self, dense: RankGenerator, etp: int, ep: int, edp: int, order: str):
        within = [axis for axis in order.lower().split("-") if axis != "pp"]
        super().__init__(etp, ep, edp, dense.pp, 1, "-".join([*within, "pp"]))
        stages = dense.get_ranks("-".join(axis for axis in dense.sizes if axis != "pp"))
        self.numbers = [rank for ranks in stages for rank in ranks]

    def get_ranks(self, token: str) -> list[list[int]]:
        return [[self.numbers[place] for place in places] for places in super().get_ranks(token)]


def hierarchical_groups(ranks: Sequence[int], sizes: Sequence[int]) -> list[list[list[int]]]:
    """Splits one group into levels: neighbours at the innermost level, strides at the outer levels.

    Args:
        ranks: the ranks of one (context parallel) group, in order.
        sizes: number of ranks of each level, innermost first; their product is ``len(ranks)``.

    Returns:
        For each level its list of groups, innermost first.

    Example:
        ``hierarchical_groups([0, 1, 2, 3], [2, 2]) == [[[0, 1], [2, 3]], [[0, 2], [1, 3]]]``

    Raises:
        ValueError: the product of the sizes is not the number of ranks, or a size is below 1.
    """
    if any(size < 1 for size in sizes):
        raise ValueError(f"hierarchical sizes {list(sizes)}: the size of a level is at least 1.")
    if math.prod(sizes) != len(ranks):
        equation = " x ".join(map(str, sizes))
        raise ValueError(
            f"hierarchical sizes {equation} = {math.prod(sizes)}, but the group has {len(ranks)} ranks. "
            "Choose sizes whose product is the group's size."
        )
    levels = {f"level{i}": size for i, size in enumerate(sizes)}
    return [[[ranks[i] for i in group] for group in grid_groups(levels, [level])] for level in levels]


def data_parallel_size(world_size: int, tp: int, cp: int, pp: int) -> int:
    """The data parallel size that follows from the world size and the other sizes.

    Raises:
        ValueError: tp x cp x pp does not divide the world size (the message has the equation), or a size is
            below 1.
    """
    model = tp * cp * pp
    if min(tp, cp, pp) < 1:
        raise ValueError(f"tensor {tp} x context {cp} x pipeline {pp}: a parallel size is at least 1.")
    if world_size % model:
        raise ValueError(
            f"tensor {tp} x context {cp} x pipeline {pp} = {model} does not divide {world_size} processes. "
            f"The product of all parallel sizes is the number of processes: use a multiple of {model}, "
            "or smaller sizes."
        )
    return world_size // model
