"""Norms: of the residual stream, and of each head of query and key."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from longspan.config.model import TransformerConfig
from longspan.mesh.mesh import ProcessGroupCollection
from longspan.models.lean import rms_norm
from longspan.tensor_parallel.layers import TensorParallelModule


class Norm(TensorParallelModule):
    """RMSNorm or LayerNorm over the last dim.

    Args:
        heads: of [s, b, n, d], over each head's features: a tensor parallel rank sees its own heads only, and
            all share one weight. Else of the residual stream [s, b, h].
    """

    def __init__(
        self, config: TransformerConfig, pg_collection: ProcessGroupCollection, *, heads: bool = False
    ):
        super().__init__(config, pg_collection.tp_mesh)
        size = config.kv_channels if heads else config.hidden_size
        self.heads, self.epsilon = heads, config.layernorm_epsilon
        self.zero_centered = config.layernorm_zero_centered_gamma
        self.weight = self._parameter("weight", (size,), None, 0.0 if self.zero_centered else None)
        self.bias = (
            self._parameter("bias", (size,), None, 0.0) if config.normalization == "LayerNorm" else None
        )

    def forward(self, x: Tensor) -> Tensor:
        weight = self.replicated(self.weight, self.heads)
        if self.zero_centered:
            weight = weight + 1
        if self.bias is None:
            return rms_norm(x, weight, self.epsilon)
        return F.layer_norm(x, weight.shape, weight, self.replicated(self.bias, self.heads), self.epsilon)
