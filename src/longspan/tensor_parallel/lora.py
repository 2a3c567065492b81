"""A low-rank adapter (LoRA, Hu et al. 2021) beside a linear layer that is cut over the tensor parallel group.

    Y = X W^T + scale (X A^T) B^T        W [output, input] frozen, A [rank, input], B [output, rank]

    beside a ColumnParallelLinear   A copied, B cut by rows     z = X A^T on every rank     Y_i += z B_i^T
    beside a RowParallelLinear      A cut by columns, B copied  z_i = X_i A_i^T in part     Y_i += z_i B^T

An adapter needs no communication for activations, because the layer's own gather, sum or
reduce-scatter serves both products. Each rank's copy of the copied factor gets only a part of its
gradient (from a part of the output's gradient, or a part of z), so this gradient is summed over the
group, with or without sequence parallelism.
"""

from __future__ import annotations

from torch import Tensor

from longspan.config.model import ModelParallelConfig
from longspan.tensor_parallel.layers import (
    ColumnParallelLinear,
    LowRank,
    RowParallelLinear,
    TensorParallelModule,
    local,
)
from longspan.tensor_parallel.random import Constant, Uniform


class Adapter(TensorParallelModule):
    """This rank's part of one layer's adapter, ``X -> scale (X A^T) B^T``.

    As in PEFT, A starts with a uniform distribution in +-1/sqrt(input) (Kaiming's with a = sqrt(5)),
    and B at zero, so that training starts from the frozen layer's output.

    Args:
        layer: the frozen layer; the adapter is added to it by ``layer.lora = Adapter(...)``.
        scale: factor of the product.
        beside: a column parallel layer with the same input, whose adapter's A serves this adapter too, so that the two
            are one adapter of the two layers together.
    """

    def __init__(
        self,
        layer: ColumnParallelLinear | RowParallelLinear,
        rank: int,
        scale: float,
        config: ModelParallelConfig,
        beside: ColumnParallelLinear | None = None,
    ):
        super().__init__(config, layer.tp_mesh)
        self.scale, self.column = scale, isinstance(layer, ColumnParallelLinear)
        # In a tuple, the other layer is no part of this module.
        self.beside = (beside,)
        if beside is None:
            initial = Uniform((3 * layer.input_size) ** -0.5)
            self.A = self._parameter("A", (rank, layer.input_size), None if self.column else 1, initial)
        self.B = self._parameter("B", (layer.output_size, rank), 0 if self.column else None, Constant(0.0))

    def operands(self) -> LowRank:
        """The factors A and B, and the scale."""
        if self.column:
            (beside,) = self.beside
            a = self.A if beside is None else beside.lora.A
            return LowRank(self.summed(a), local(self.B), self.scale)
        return LowRank(local(self.A), self.summed(self.B), self.scale)

    def forward(self, x: Tensor) -> Tensor:
        return self.operands().of(x)
