"""RMSNorm of features that are cut over the tensor parallel group.

x [.., f/tp] -> the same shape; the sum of squares of all f features is added up over the ranks
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from longspan.config.model import TransformerConfig
from longspan.mesh import collectives
from longspan.mesh.mesh import ProcessGroupCollection
from longspan.recomputed import rms_norm
from longspan.tensor_parallel.layers import TensorParallelModule, local
from longspan.tensor_parallel.random import Constant


def rms_norm_over_ranks(
    x: Tensor, weight: Tensor, size: int, epsilon: float, group: dist.ProcessGroup
) -> Tensor:
    """[.., f/tp] -> the same shape and dtype, times this rank's weights [f/tp].

    Args:
        size: features of all ranks, f.
    """
    if dist.get_world_size(group) == 1:
        return rms_norm(x, weight, epsilon)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    squares = collectives.reduce(wide.square().sum(-1, keepdim=True), group)
    # Every rank scales its own features by the sum, so the sum's gradient is added up too.
    mean = collectives.copy(squares, group) / size
    return (wide * (mean + epsilon).rsqrt() * weight).to(x.dtype)


class NormOverHeads(TensorParallelModule):
    """RMSNorm of all heads of query or key together: [s, b, n, d], this rank's heads -> the same shape.

    Args:
        heads: the number of heads of the whole layer.
    """

    def __init__(self, config: TransformerConfig, pg_collection: ProcessGroupCollection, heads: int):
        super().__init__(config, pg_collection.tp_mesh)
        self.size, self.epsilon = heads * config.kv_channels, config.layernorm_epsilon
        self.zero_centered = config.layernorm_zero_centered_gamma
        self.weight = self._parameter("weight", (self.size,), 0, Constant(0.0 if self.zero_centered else 1.0))

    def forward(self, x: Tensor) -> Tensor:
        weight = local(self.weight)
        if self.zero_centered:
            weight = weight + 1
        return rms_norm_over_ranks(x.flatten(2), weight, self.size, self.epsilon, self.tp_group).view_as(x)
