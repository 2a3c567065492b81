"""Rotary position embeddings (Su et al. 2021): each pair of features turned by its position.

Halves are paired, (i, i + d/2), as Llama checkpoints on Hugging Face have them. Angles are
computed in float64: at a million tokens a float32 angle is wrong in the second digit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def frequencies(head_dim: int, base: float, scaling: Mapping[str, Any] | None = None) -> Tensor:
    """Radians a token for each pair, float64 [d/2].

    Args:
        scaling: Hugging Face's ``rope_scaling``: ``linear`` (all frequencies divided by
            ``factor``) or ``llama3`` (only those with wavelengths beyond the original
            context, with a smooth passage between).
    """
    freqs = base ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    kind = (scaling or {}).get("rope_type", (scaling or {}).get("type", "default"))
    if scaling is None or kind == "default":
        return freqs
    factor = float(scaling["factor"])
    if kind == "linear":
        return freqs / factor
    if kind == "llama3":
        context = float(scaling["original_max_position_embeddings"])
        low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
        turns = context * freqs / (2 * math.pi)  # full turns within the original context
        smooth = ((turns - low) / (high - low)).clamp(0, 1)  # 0: scaled, 1: as it was
        return freqs / factor * (1 - smooth) + freqs * smooth
    raise ValueError(f"rope_scaling type {kind!r}: default, linear or llama3.")


def rotary_table(positions: Tensor, freqs: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin for positions [s] or [b, s] -> [s, 1 or b, 1, d/2], at least float32."""
    if positions.dim() == 1:
        positions = positions.unsqueeze(0)
    angles = positions.t().to(freqs.device, torch.float64)[:, :, None, None] * freqs
    wide = torch.promote_types(dtype, torch.float32)
    return angles.cos().to(wide), angles.sin().to(wide)


def apply_rotary(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Turns x [s, b, n, d] by a table of its rows' positions; computed in the table's precision."""
    cos, sin = table
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
