"""Weights in MXFP4 (OCP Microscaling Formats 1.0, 2023), in which gpt-oss is published: read, never written.

    blocks  uint8 [E, rows, columns / 32, 16]     two numbers of 4 bits a byte, the earlier in the lower half
    scales  uint8 [E, rows, columns / 32]         32 neighbours of a row share a factor 2 ** (scale - 127)

A number of 4 bits has a sign, 2 bits of exponent and 1 of mantissa (E2M1). Every product with a scale that trained weights
have is exact in bfloat16.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from longspan.errors import UserError

#: the values of 4 bits, by their number; the highest bit is the sign
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
#: numbers that share a scale
BLOCK = 32
#: the scale that stands for no number
_NAN = 255


def dequantise(blocks: Tensor, scales: Tensor) -> Tensor:
    """Blocks [.., g, 16] and scales [.., g], uint8 -> bfloat16 [.., 32 g]."""
    values = torch.tensor(VALUES, dtype=torch.bfloat16)
    pairs = torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(-2)
    exponents = (scales.to(torch.int32) - 127).unsqueeze(-1)
    numbers = torch.ldexp(values[pairs.to(torch.int32)].float(), exponents)
    numbers = numbers.masked_fill((scales == _NAN).unsqueeze(-1), torch.nan)
    return numbers.to(torch.bfloat16).flatten(-2)


def read_blocks(
    blocks: Any, scales: Any, shape: Sequence[int], index: Sequence[slice], turn: tuple[int, int], where: str
) -> Tensor:
    """Part of a tensor that files hold as blocks and scales, in bfloat16; one expert after another is read.

    Args:
        blocks, scales: lazily read tensors.
        shape: [E, rows, columns] of the whole tensor.
        index: the part, a slice of each dim.
        turn: (i, n): of the part's rows, those at i, i + n, and so on.
        where: the names of folder and tensor, for messages.

    Raises:
        UserError: the tensors are not those of this shape.
    """
    groups = -(-shape[2] // BLOCK)
    found = [(list(lazy.get_shape()), lazy.get_dtype()) for lazy in (blocks, scales)]
    wanted = [([*shape[:2], groups, BLOCK // 2], "U8"), ([*shape[:2], groups], "U8")]
    if found != wanted or shape[2] % BLOCK:
        raise UserError(
            f"{where} and its scales are {found[0][1]} {found[0][0]} and {found[1][1]} {found[1][0]}; the config needs U8 "
            f"{wanted[0][0]} and {wanted[1][0]}, {shape[2]} columns in blocks of {BLOCK}. Leave the architecture to base_model."
        )
    experts, rows, columns = index
    first, last = columns.start // BLOCK, -(-columns.stop // BLOCK)
    sizes = experts.stop - experts.start, (rows.stop - rows.start) // turn[1], columns.stop - columns.start
    out = torch.empty(sizes, dtype=torch.bfloat16)
    for number, expert in enumerate(range(experts.start, experts.stop)):
        part = slice(expert, expert + 1), rows, slice(first, last)
        held = (lazy[part][0, turn[0] :: turn[1]] for lazy in (blocks, scales))
        out[number] = dequantise(*held)[:, columns.start - first * BLOCK : columns.stop - first * BLOCK]
    return out
