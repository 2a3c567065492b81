"""Rotary position embeddings (Su et al. 2021): each pair of features is rotated by its position's angle.

Feature i is paired with i + d/2, as in Llama checkpoints on Hugging Face. Angles are
computed in float64, because at a million tokens a float32 angle is wrong in the second digit.
With ``rotary_percent`` below 1, d is that share of a head: its first features are rotated and the others stay.

For contexts longer than those that a model was first trained with, ``rope_scaling`` lowers the
frequencies in one of Hugging Face's ways (``config.rope`` lists their fields):

    linear    divides all frequencies by ``factor`` (Chen et al. 2023)
    llama3    divides frequencies whose wavelength exceeds the original context, with a smooth transition
    yarn      the same with another transition; cos and sin times an attention factor (Peng et al. 2023)
    dynamic   takes a larger base ("NTK"), if the sequence is longer than max_position_embeddings

Hugging Face's ``dynamic`` depends on the length of each call. Here it depends, in every call and on
every rank, on the length that the model is made for (``sequence_len``). So neither a rank's rows nor
a document's length matter, and the way a sequence is cut changes nothing. transformers computes the
same for one sequence of that length.
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


def frequencies(size: int, base: float, scaling: Mapping[str, Any] | None = None) -> Tensor:
    """The frequency of each pair in radians per token, float64 [d/2].

    Args:
        size: d, the number of rotated features of a head (``Architecture.rotary_channels``).
        scaling: Hugging Face's ``rope_scaling``. :func:`at_length` replaces the type ``dynamic`` beforehand.

    Raises:
        ValueError: the scaling is ``dynamic``.
    """
    freqs = base ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
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
        # turns: full turns of each pair within the original context.
        # kept: 0 where a frequency is divided, 1 where it stays, between them in the transition.
        turns = context * freqs / (2 * math.pi)
        kept = ((turns - low) / (high - low)).clamp(0, 1)
    else:
        kept = 1 - _yarn_ramp(size, base, context, scaling)
    return freqs / factor * (1 - kept) + freqs * kept


def _yarn_ramp(head_dim: int, base: float, context: float, scaling: Mapping[str, Any]) -> Tensor:
    """The divided share of each pair's frequency, float64 [d/2].

    It is 0 above beta_fast turns and 1 below beta_slow turns. Between them it rises with the pair's number.
    """

    def pair_of(turns: float) -> float:
        # The number (with a fraction) of the pair that makes ``turns`` turns within the original context.
        return head_dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = pair_of(scaling.get("beta_fast") or 32), pair_of(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    # The upper bound follows the reference code, which counts features here, not pairs.
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low or 0.001
    return ((torch.arange(head_dim // 2, dtype=torch.float64) - low) / width).clamp(0, 1)


def attention_factor(scaling: Mapping[str, Any] | None) -> float:
    """The factor on cos and sin, whose square scales attention logits: YaRN's temperature, otherwise 1."""
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
    """The config for sequences of ``length`` tokens: ``dynamic`` scaling is replaced by a larger base."""
    if rope_type(config.rope_scaling) != "dynamic" or config.position_embedding_type != "rope":
        return config
    assert config.rope_scaling is not None
    assert config.max_position_embeddings is not None
    factor, limit, d = config.rope_scaling["factor"], config.max_position_embeddings, config.rotary_channels
    stretch = factor * max(length, limit) / limit - (factor - 1)
    return dataclasses.replace(
        config, rotary_base=config.rotary_base * stretch ** (d / (d - 2)), rope_scaling=None
    )


def rotary_table(positions: Tensor, freqs: Tensor, dtype: torch.dtype, scale: float = 1.0) -> RotaryTable:
    """Positions [s] or [b, s] -> cos and sin times ``scale``, [s, 1 or b, 1, d/2], in at least float32."""
    if positions.dim() == 1:
        positions = positions.unsqueeze(0)
    angles = positions.t().to(freqs.device, torch.float64)[:, :, None, None] * freqs
    wide = torch.promote_types(dtype, torch.float32)
    return (angles.cos() * scale).to(wide), (angles.sin() * scale).to(wide)


def apply_rotary(x: Tensor, table: RotaryTable) -> Tensor:
    """Rotates x [s, b, n, d] by the table of its rows' positions; computed in the table's precision.

    A table of fewer features than d rotates the first ones.
    """
    cos, sin = table
    turned = 2 * cos.shape[-1]
    first, second = x[..., :turned].to(cos.dtype).chunk(2, dim=-1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
    return rotated if turned == x.shape[-1] else torch.cat((rotated, x[..., turned:]), dim=-1)
