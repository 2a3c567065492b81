"""What a recurrent layer sends over context parallel ranks: from integers alone, without tensors.

    state    the most that a rank sends in a forward pass: ceil(log2 P) + 1 states, and a map with all but the last
    a2a      (P - 1) / P of the features of its rows, and of the outputs

Backward sends the same again. ``auto`` takes what sends fewer bytes.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from longspan.config.architecture import Architecture
from longspan.config.recurrent import heads_problem, mixer_sizes
from longspan.context_parallel.layout import SequenceLayout
from longspan.context_parallel.runs_of_tokens import borders
from longspan.context_parallel.state import plan_scan


class RecurrentSizes(NamedTuple):
    """The sizes of a recurrent layer on a tensor parallel rank, in elements.

    Attributes:
        state, map: of one sequence: what a span hands on.
        features: of a row: what travels to the ranks that compute heads.
        outputs: of a row: what comes back.
        tail: of a row: what the convolution reads of rows before.
        kernel: rows that the convolution reads.
        groups, heads: groups of heads and heads.
    """

    state: int
    map: int
    features: int
    outputs: int
    tail: int
    kernel: int
    groups: int
    heads: int


def recurrent_sizes(model: Architecture, mixer: str, tp: int) -> RecurrentSizes:
    """The sizes of a mixer of ``config.recurrent.RECURRENT`` on one of ``tp`` tensor parallel ranks."""
    sizes = mixer_sizes(model, mixer)
    groups, heads = sizes.groups // tp, sizes.heads // tp
    each = sizes.heads // sizes.groups
    if mixer == "mamba":
        state, map_ = heads * sizes.head_dim * model.mamba_state_dim, heads
        numbers = each
    else:
        d_k = model.linear_key_head_dim
        state, map_ = heads * d_k * sizes.head_dim, heads * d_k * d_k
        numbers = 2 * each
    return RecurrentSizes(
        state,
        map_,
        features=groups * (sizes.channels + numbers),
        outputs=heads * sizes.head_dim,
        tail=groups * sizes.channels,
        kernel=sizes.kernel,
        groups=groups,
        heads=heads,
    )


def state_bytes(sizes: RecurrentSizes, batch: int, ranks: int, wide: int = 4) -> int:
    """The most bytes that a rank sends in a forward pass to hand states on.

    Args:
        wide: bytes of an element of a state.
    """
    if ranks == 1:
        return 0
    rounds = math.ceil(math.log2(ranks - 1)) if ranks > 2 else 0
    return wide * batch * (rounds * (sizes.state + sizes.map) + sizes.state)


def planned_state_bytes(
    sizes: RecurrentSizes, batch: int, layout: SequenceLayout, wide: int = 4
) -> list[int]:
    """The bytes that each rank sends in a forward pass to hand states on, for the documents of a layout.

    Args:
        layout: contiguous.
        wide: bytes of an element of a state.
    """
    return [
        wide * batch * sum(sizes.state + sizes.map * hop.with_map for hop in hops if hop.to is not None)
        for hops in plan_scan(*borders(layout))
    ]


def a2a_bytes(sizes: RecurrentSizes, rows: int, batch: int, ranks: int, element: int) -> int:
    """The bytes that a rank sends in a forward pass to move features to heads, and outputs back.

    Args:
        rows: rows of a rank; batch: its sequences.
        element: bytes of an element of the activations.
    """
    # A group of fewer than one group a rank goes to several: what its heads share travels again and again.
    features = sizes.features
    if ranks > sizes.groups:
        shared = sizes.tail - sizes.outputs
        features += shared * (ranks // sizes.groups - 1)
    return element * rows * batch * (features + sizes.outputs) * (ranks - 1) // ranks


def chosen_way(asked: str, sizes: RecurrentSizes, rows: int, batch: int, ranks: int, element: int) -> str:
    """``state`` or ``a2a``: what ``ssm_cp_type`` names, or for ``auto`` what sends fewer bytes."""
    if asked != "auto":
        return asked
    if heads_problem(sizes.groups, sizes.heads, ranks):
        return "state"
    wide = max(4, element)
    few = state_bytes(sizes, batch, ranks, wide) <= a2a_bytes(sizes, rows, batch, ranks, element)
    return "state" if few else "a2a"
