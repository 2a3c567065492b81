"""Rotary position embeddings (Su et al. 2021): each pair of features turned by its position.

Halves are paired, (i, i + d/2), as Llama checkpoints on Hugging Face have them. Angles are
computed in float64: at a million tokens a float32 angle is wrong in the second digit.

For contexts longer than a model was first trained at, ``rope_scaling`` slows the frequencies
down, in one of Hugging Face's ways (``config.rope`` has their fields):

    linear    all by ``factor`` (Chen et al. 2023)
    llama3    those with wavelengths beyond the original context, with a smooth passage between
    yarn      likewise, by ramps of its own, and cos and sin times an attention factor (Peng et al. 2023)
    dynamic   by a larger base ("NTK"), once the sequence is longer than max_position_embeddings

Hugging Face's ``dynamic`` follows the length of each call. Here it is the length of the whole
sequence that the model is made for (``sequence_len``), in every call and on every rank: never the
rows that a rank holds, never a document's, so the cut changes nothing. That is what transformers
computes for one sequence of that length.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from longspan.config.model import TransformerConfig
from longspan.config.rope import rope_type

#: cos and sin of :func:`rotary_table`
RotaryTable = tuple[Tensor, Tensor]


def frequencies(head_dim: int, base: float, scaling: Mapping[str, Any] | None = None) -> Tensor:
    """Radians a token for each pair, float64 [d/2].

    Args:
        scaling: Hugging Face's ``rope_scaling``; a ``dynamic`` one goes through :func:`at_length` first.
    """
    freqs = base ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    kind = rope_type(scaling)
    if scaling is None or kind == "default":
        return freqs
    if kind == "dynamic":
        raise ValueError(
            "rope_scaling of type dynamic depends on the sequence's length, which GPTModel knows (max_sequence_length) and a "
            "layer alone does not. Use GPTModel, or another type."
        )
    factor = float(scaling["factor"])
    if kind == "linear":
        return freqs / factor
    context = float(scaling["original_max_position_embeddings"])
    if kind == "llama3":
        low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
        turns = context * freqs / (2 * math.pi)  # full turns within the original context
        kept = ((turns - low) / (high - low)).clamp(0, 1)  # 0: scaled, 1: as it was
    else:
        kept = 1 - _yarn_ramp(head_dim, base, context, scaling)
    return freqs / factor * (1 - kept) + freqs * kept


def _yarn_ramp(head_dim: int, base: float, context: float, scaling: Mapping[str, Any]) -> Tensor:
    """How much of each pair is scaled, float64 [d/2]: 0 for those that turn more than beta_fast times, 1 below beta_slow."""

    def pair_of(
        turns: float,
    ) -> float:  # the (broken) number of the pair that turns so often in the original context
        return head_dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = pair_of(scaling.get("beta_fast") or 32), pair_of(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    # the upper bound is that of the reference code, which counts features here, not pairs
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low or 0.001
    return ((torch.arange(head_dim // 2, dtype=torch.float64) - low) / width).clamp(0, 1)


def attention_factor(scaling: Mapping[str, Any] | None) -> float:
    """What cos and sin are multiplied by, so that attention logits grow by its square: YaRN's temperature, else 1."""
    if scaling is None or rope_type(scaling) != "yarn":
        return 1.0
    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])
    factor = float(scaling["factor"])

    def growth(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0

    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return growth(scaling["mscale"]) / growth(scaling["mscale_all_dim"])
    return growth(1)


def at_length(config: TransformerConfig, length: int) -> TransformerConfig:
    """A config whose ``dynamic`` scaling is worked out for sequences of ``length`` tokens: a larger base."""
    if rope_type(config.rope_scaling) != "dynamic" or config.position_embedding_type != "rope":
        return config
    assert config.rope_scaling is not None
    assert config.max_position_embeddings is not None
    factor, limit, d = config.rope_scaling["factor"], config.max_position_embeddings, config.kv_channels
    stretch = factor * max(length, limit) / limit - (factor - 1)
    return dataclasses.replace(
        config, rotary_base=config.rotary_base * stretch ** (d / (d - 2)), rope_scaling=None
    )


def rotary_table(positions: Tensor, freqs: Tensor, dtype: torch.dtype, scale: float = 1.0) -> RotaryTable:
    """cos and sin (times ``scale``) for positions [s] or [b, s] -> [s, 1 or b, 1, d/2], at least float32."""
    if positions.dim() == 1:
        positions = positions.unsqueeze(0)
    angles = positions.t().to(freqs.device, torch.float64)[:, :, None, None] * freqs
    wide = torch.promote_types(dtype, torch.float32)
    return (angles.cos() * scale).to(wide), (angles.sin() * scale).to(wide)


def apply_rotary(x: Tensor, table: RotaryTable) -> Tensor:
    """Turns x [s, b, n, d] by a table of its rows' positions; computed in the table's precision."""
    cos, sin = table
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
