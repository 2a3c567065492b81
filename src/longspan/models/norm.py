"""Norms of the residual stream, and of the heads of query and key."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from longspan.compiled import Compilable
from longspan.config.model import TransformerConfig
from longspan.mesh.mesh import ProcessGroupCollection
from longspan.recomputed import rms_norm
from longspan.tensor_parallel.layers import TensorParallelModule
from longspan.tensor_parallel.random import Constant


def normalised(x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float) -> Tensor:
    """RMSNorm, or LayerNorm if there is a bias."""
    if bias is None:
        return rms_norm(x, weight, epsilon)
    return F.layer_norm(x, weight.shape, weight, bias, epsilon)


def added_and_normalised(
    x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float
) -> tuple[Tensor, Tensor]:
    """x + y, and its norm."""
    x = x + y
    return x, normalised(x, weight, bias, epsilon)


class Norm(TensorParallelModule, Compilable):
    """RMSNorm or LayerNorm over the last dim.

    Args:
        heads: the input is [s, b, n, d], and each head's features are normalised. A tensor parallel rank has
            its own heads only, and all heads share one weight. If False, the input is the stream [s, b, h].
    """

    def __init__(
        self, config: TransformerConfig, pg_collection: ProcessGroupCollection, *, heads: bool = False
    ):
        super().__init__(config, pg_collection.tp_mesh)
        size = config.kv_channels if heads else config.hidden_size
        self.heads, self.epsilon = heads, config.layernorm_epsilon
        self.zero_centered = config.layernorm_zero_centered_gamma
        self.weight = self._parameter("weight", (size,), None, Constant(0.0 if self.zero_centered else 1.0))
        has_bias = config.normalization == "LayerNorm"
        self.bias = self._parameter("bias", (size,), None, Constant(0.0)) if has_bias else None

    def operands(self) -> tuple[Tensor, Tensor | None, float]:
        """The weight, bias and epsilon that :func:`normalised` takes."""
        weight = self.replicated(self.weight, self.heads)
        if self.zero_centered:
            weight = weight + 1
        bias = None if self.bias is None else self.replicated(self.bias, self.heads)
        return weight, bias, self.epsilon

    def forward(self, x: Tensor) -> Tensor:
        """The norm of x, over its last dim."""
        return self.part(normalised)(x, *self.operands())

    def after_adding(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """x + y, and its norm, in one kernel if the parts are compiled."""
        if not self.compiled:
            x = x + y
            return x, self(x)
        return self.part(added_and_normalised)(x, y, *self.operands())
