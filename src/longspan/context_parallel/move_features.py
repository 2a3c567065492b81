"""Move features: an all-to-all turns "some tokens, all heads" of a recurrent layer into "all tokens, some heads".

    to heads     [s, b, G w] -> [P s, b, f]        the features of the heads that the rank computes
    to tokens    [P s, b, n p / P] -> [s, b, n p]  the heads' outputs back to the tokens' ranks

(Jacobs et al. 2023, DeepSpeed Ulysses.) The features of a layer lie in G groups of heads. If P divides G, each rank
gets whole groups. If G divides P, a rank gets a part of one group's heads, and what the group's heads share (B and C
of Mamba-2, query and key of the delta rule) goes to every rank that needs it; backward adds up its gradients. With a
contiguous layout, rows that arrive rank after rank are in the order of the sequence.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from longspan.config.recurrent import heads_problem
from longspan.mesh import collectives


@dataclass(frozen=True)
class FeatureMove:
    """Which features each of P ranks gets.

    Attributes:
        columns: for each rank the columns of [.., G w] that it gets, in order.
        groups, heads: those of each rank; a rank with a part of a group has one group.
        repeated: whether a column goes to several ranks.
    """

    columns: tuple[Tensor, ...]
    groups: int
    heads: int
    repeated: bool

    @classmethod
    def of(cls, groups: int, parts: Sequence[tuple[int, bool]], each: int, ranks: int) -> FeatureMove:
        """The move of a layer whose features are ``groups`` times the same parts, one after another.

        Args:
            groups: groups of heads.
            parts: (width, shared) of each part of a group. A shared part serves all heads of the group. Another one
                has a run of features for each head.
            each: heads of a group.

        Raises:
            ValueError: the ranks cannot share the heads.
        """
        if problem := heads_problem(groups, groups * each, ranks):
            raise ValueError(f"ssm_cp_type a2a: {groups} groups and {groups * each} heads {problem}")
        width = sum(size for size, _ in parts)
        whole = max(1, groups // ranks)
        share = max(1, ranks // groups)
        columns = []
        for rank in range(ranks):
            numbers = []
            for group in range(whole):
                at = (rank // share * whole + group) * width
                for size, shared in parts:
                    taken, offset = size, 0
                    if not shared:
                        taken = size // share
                        offset = rank % share * taken
                    numbers.append(torch.arange(at + offset, at + offset + taken))
                    at += size
            columns.append(torch.cat(numbers))
        return cls(tuple(columns), whole, groups * each // ranks, share > 1)

    def on(self, device: torch.device) -> FeatureMove:
        """The same move with its columns on a device."""
        return dataclasses.replace(
            self, columns=tuple(one.to(device, non_blocking=True) for one in self.columns)
        )


def to_heads(x: Tensor, move: FeatureMove, group: dist.ProcessGroup) -> Tensor:
    """[s, b, G w] -> [P s, b, f]: all tokens of the features that this rank gets."""
    # Where a column goes to several ranks, its gradients are added up in at least float32.
    wide = x.to(torch.promote_types(x.dtype, torch.float32)) if move.repeated else x
    parts = [wide.index_select(-1, columns).to(x.dtype) for columns in move.columns]
    return collectives.all_to_all(torch.cat(parts), group)


def to_tokens(y: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[P s, b, f] -> [s, b, P f]: this rank's tokens of all ranks' features."""
    ranks = dist.get_world_size(group)
    if ranks == 1:
        return y
    return collectives.all_to_all(y, group).unflatten(0, (ranks, -1)).permute(1, 2, 0, 3).flatten(2)
