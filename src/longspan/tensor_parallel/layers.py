"""Linear layers and the embedding, cut over the tensor parallel group.

    Y = X A^T, A [output, input]

    ColumnParallelLinear   A cut by rows     A = [A_1; A_2]   Y = [Y_1, Y_2]        Shard(0)
    RowParallelLinear      A cut by columns  A = [A_1, A_2]   Y = Y_1 + Y_2         Shard(1)
    VocabParallelEmbedding rows of the table cut by vocabulary                       Shard(0)

("Column" and "row" are Megatron's names, after the transposed weight.)

Weights are DTensors on the tensor parallel axis. FSDP2 adds its own axis, and a distributed
checkpoint loads them at any other layout. Computation uses ``.to_local()`` and the explicit
mappings, so all communication is visible in this file.

Activations are [s, b, h], where s is the number of local rows; with sequence parallelism they
are [s/tp, b, h] between the layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from longspan.config.model import ModelParallelConfig
from longspan.matmul import linear
from longspan.mesh import collectives
from longspan.mesh.default_groups import tensor_parallel_mesh
from longspan.tensor_parallel import mappings
from longspan.tensor_parallel.random import Constant, FilledWhole, Initial, Normal, fill, lone_seed

InitMethod = Callable[[Tensor], Any]


class ParallelModule(nn.Module):
    """Shared ground: parameters as DTensors, and how they are first filled.

    A layer that is made by itself fills them at once (see ``random.lone_seed``); one on ``meta`` draws nothing.

    Args:
        parts: ranks that hold different parts of the weights.

    Attributes:
        initial: for each parameter and buffer how it is first filled; ``longspan.tensor_parallel.init_weights``
            reads it.
    """

    def __init__(self, config: ModelParallelConfig, parts: int):
        super().__init__()
        self.parts = parts
        self.dtype = config.params_dtype or (torch.bfloat16 if config.bf16 else torch.float32)
        self.perform_initialization = config.perform_initialization
        self.initial: dict[str, Initial | FilledWhole] = {}

    def _place(
        self,
        name: str,
        shape: Sequence[int],
        mesh: DeviceMesh,
        dims: Sequence[int | None],
        initial: Initial | FilledWhole,
        dtype: torch.dtype,
    ) -> DTensor:
        """A tensor of global ``shape``, cut over each axis of ``mesh`` along one of ``dims`` (None: copied).

        Raises:
            ValueError: initial values have no seed where there are copies.
        """
        shape, held = tuple(shape), list(shape)
        for axis, dim in enumerate(dims):
            if dim is not None:
                held[dim] //= mesh.size(axis)
        data = torch.empty(held, dtype=dtype)
        placements = [Replicate() if dim is None else Shard(dim) for dim in dims]
        tensor = DTensor.from_local(data, mesh, placements, run_check=False)
        self.initial[name] = initial
        if self.perform_initialization and not data.is_meta:
            seed, prefix = (0, "") if isinstance(initial, Constant) else lone_seed(self.parts)
            fill(tensor, initial, seed, prefix + name)
        return tensor


class TensorParallelModule(ParallelModule):
    """A module on the tensor parallel group.

    A subclass makes its parameters with :meth:`_parameter` and its buffers with :meth:`_buffer`.
    """

    def __init__(self, config: ModelParallelConfig, tp_group: dist.ProcessGroup | DeviceMesh | None):
        mesh = tensor_parallel_mesh(tp_group)
        super().__init__(config, mesh.size())
        self.tp_mesh = mesh
        self.tp_group = self.tp_mesh.get_group()
        self.tp_size = dist.get_world_size(self.tp_group)
        self.tp_rank = dist.get_rank(self.tp_group)
        self.sequence_parallel = config.sequence_parallel
        if config.tensor_model_parallel_size > self.tp_size:
            raise ValueError(
                f"config.tensor_model_parallel_size is {config.tensor_model_parallel_size}, the tensor parallel group has "
                f"{self.tp_size} ranks. Initialise with the same sizes."
            )

    def _parameter(
        self, name: str, shape: Sequence[int], dim: int | None, initial: Initial | FilledWhole
    ) -> nn.Parameter:
        """Makes a parameter of global ``shape``, cut over tensor parallel ranks along ``dim`` (None: copied).

        Raises:
            ValueError: the tensor parallel size does not divide the dim, or there is no seed although other
                ranks hold copies of the parameter.
        """
        return nn.Parameter(self._tensor(name, shape, dim, initial, self.dtype))

    def _buffer(
        self,
        name: str,
        shape: Sequence[int],
        dim: int | None,
        initial: Initial | FilledWhole,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Registers a buffer, made as :meth:`_parameter` makes a parameter; it is part of checkpoints."""
        self.register_buffer(name, self._tensor(name, shape, dim, initial, dtype or self.dtype))

    def _tensor(
        self,
        name: str,
        shape: Sequence[int],
        dim: int | None,
        initial: Initial | FilledWhole,
        dtype: torch.dtype,
    ) -> DTensor:
        if dim is not None and shape[dim] % self.tp_size:
            raise ValueError(
                f"{type(self).__name__}: {name} has size {shape[dim]} along dim {dim}, not divisible by the "
                f"tensor parallel size {self.tp_size}. Choose a multiple of it."
            )
        return self._place(name, shape, self.tp_mesh, [dim], initial, dtype)

    def replicated(self, parameter: Tensor, over_heads: bool = False) -> Tensor:
        """A copied parameter for computation: if ranks compute parts with it, its gradient is summed over tp.

        The parts are rows of the sequence with sequence parallelism, and heads with ``over_heads``.
        """
        return self.summed(parameter) if self.sequence_parallel or over_heads else local(parameter)

    def summed(self, parameter: Tensor) -> Tensor:
        """A copied parameter that each rank uses differently: its gradient is summed over tp.

        The sum is in at least float32, because it is a reduction like FSDP's.
        """
        held = local(parameter)
        if self.tp_size == 1:
            return held
        wide = held.to(torch.promote_types(held.dtype, torch.float32))
        return collectives.copy(wide, self.tp_group).to(held.dtype)


def weights(std: float, init_method: InitMethod | None) -> Initial | FilledWhole:
    """A matrix's kind of initial values: ``init_method``, or a normal distribution if that is None."""
    return Normal(std) if init_method is None else FilledWhole(init_method)


def local(parameter: Tensor) -> Tensor:
    """This rank's part of a parameter."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


class LowRank(NamedTuple):
    """An adapter's tensors on this rank (``lora.Adapter``): ``X -> scale (X A^T) B^T``."""

    a: Tensor
    b: Tensor
    scale: float

    def expand(self, z: Tensor) -> Tensor:
        """z = X A^T [.., rank] -> the adapter's output, for callers that compute z themselves."""
        return linear(z * self.scale, self.b)

    def of(self, x: Tensor) -> Tensor:
        return self.expand(linear(x, self.a))


class Operands(NamedTuple):
    """The plain tensors of a linear layer's product on this rank."""

    weight: Tensor
    bias: Tensor | None
    lora: LowRank | None


def projected(x: Tensor, operands: Operands) -> Tensor:
    """``x W^T + bias``, plus the adapter's output if there is an adapter."""
    y = linear(x, operands.weight, operands.bias)
    return y if operands.lora is None else y + operands.lora.of(x)


class ColumnParallelLinear(TensorParallelModule):
    """``[s, b, input] -> [s, b, output/tp]`` (the whole output with ``gather_output``).

    With sequence parallelism the input is [s/tp, b, input] and is gathered first.

    Args:
        input_size, output_size: number of features of the whole layer.
        init_method: fills the whole weight; None draws from a normal distribution whose standard deviation is
            config.init_method_std.
        skip_bias_add: returns ``(tensor, bias)``, and the caller adds the bias.
        tp_group: the tensor parallel group (or its 1-D DeviceMesh); None takes the installed group.

    Raises:
        ValueError: the sizes do not fit the group, or ``gather_output`` with sequence parallelism.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        config: ModelParallelConfig,
        init_method: InitMethod | None = None,
        bias: bool = True,
        gather_output: bool = False,
        skip_bias_add: bool = False,
        tp_group: dist.ProcessGroup | DeviceMesh | None = None,
    ):
        super().__init__(config, tp_group)
        if gather_output and config.sequence_parallel and self.tp_size > 1:
            raise ValueError(
                "gather_output=True with sequence_parallel=True: the gathered output would be held twice. Use one."
            )
        self.input_size, self.output_size = input_size, output_size
        self.gather_output, self.skip_bias_add = gather_output, skip_bias_add
        self.weight = self._parameter(
            "weight", (output_size, input_size), 0, weights(config.init_method_std, init_method)
        )
        self.bias = self._parameter("bias", (output_size,), 0, Constant(0.0)) if bias else None
        # The layer's Adapter (tensor_parallel.lora), which is set after the layer is made.
        self.lora: Any = None

    def enter(self, x: Tensor) -> Tensor:
        """The whole input ``[s, b, h]`` on every tensor parallel rank, gathered with sequence parallelism."""
        if self.sequence_parallel:
            return mappings.gather_from_sequence_parallel_region(x, group=self.tp_group)
        return mappings.copy_to_tensor_model_parallel_region(x, self.tp_group)

    def operands(self) -> Operands:
        """This rank's tensors of the product, without the bias if ``skip_bias_add`` is set."""
        bias = None if self.bias is None or self.skip_bias_add else local(self.bias)
        return Operands(local(self.weight), bias, None if self.lora is None else self.lora.operands())

    def project(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor | None]:
        """The local product, for the result of :meth:`enter`, which several layers may share."""
        y = projected(x, self.operands())
        bias = local(self.bias) if self.bias is not None else None
        if self.gather_output:
            y = mappings.gather_from_tensor_model_parallel_region(y, self.tp_group)
            if self.skip_bias_add and bias is not None:
                bias = mappings.gather_from_tensor_model_parallel_region(bias, self.tp_group)
        return (y, bias) if self.skip_bias_add else y

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor | None]:
        return self.project(self.enter(x))


class RowParallelLinear(TensorParallelModule):
    """``[s, b, input/tp] -> [s, b, output]``, summed over the group.

    With sequence parallelism the sum is reduce-scattered: ``-> [s/tp, b, output]``.

    Args:
        input_is_parallel: False takes a whole input and cuts it first.
        init_std: standard deviation of the weight's initial values; None takes config.init_method_std.
        Other arguments are those of :class:`ColumnParallelLinear`.

    Raises:
        ValueError: the sizes do not fit the group, or a whole input with sequence parallelism.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        config: ModelParallelConfig,
        init_method: InitMethod | None = None,
        bias: bool = True,
        input_is_parallel: bool = True,
        skip_bias_add: bool = False,
        tp_group: dist.ProcessGroup | DeviceMesh | None = None,
        *,
        init_std: float | None = None,
    ):
        super().__init__(config, tp_group)
        if config.sequence_parallel and not input_is_parallel:
            raise ValueError("sequence_parallel needs input_is_parallel=True: the input is cut by features.")
        self.input_size, self.output_size = input_size, output_size
        self.input_is_parallel, self.skip_bias_add = input_is_parallel, skip_bias_add
        initial = weights(init_std or config.init_method_std, init_method)
        self.weight = self._parameter("weight", (output_size, input_size), 1, initial)
        self.bias = self._parameter("bias", (output_size,), None, Constant(0.0)) if bias else None
        # The layer's Adapter, as in ColumnParallelLinear.
        self.lora: Any = None

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor | None]:
        if not self.input_is_parallel:
            x = mappings.scatter_to_tensor_model_parallel_region(x, self.tp_group)
        return self.leave(self.project(x))

    def operands(self) -> Operands:
        """This rank's tensors of the product; the bias is added in :meth:`leave`."""
        return Operands(local(self.weight), None, None if self.lora is None else self.lora.operands())

    def project(self, x: Tensor) -> Tensor:
        """This rank's part of the product, which :meth:`leave` sums."""
        return projected(x, self.operands())

    def leave(self, y: Tensor) -> Any:
        """This rank's part of the product -> the layer's output: the sum over the group, plus the bias."""
        if self.sequence_parallel:
            y = mappings.reduce_scatter_to_sequence_parallel_region(y, self.tp_group)
        else:
            y = mappings.reduce_from_tensor_model_parallel_region(y, self.tp_group)
        bias = self.replicated(self.bias) if self.bias is not None else None
        if self.skip_bias_add:
            return y, bias
        return y if bias is None else y + bias


class VocabParallelEmbedding(TensorParallelModule):
    """Token ids ``[b, s] -> [b, s, h]``; each rank looks up its own rows, which are summed over the group.

    Args:
        num_embeddings: number of rows of the table; the caller pads it (``padded_vocab_size``).
        reduce_scatter_embeddings: returns ``[s/tp, b, h]`` instead, for sequence parallelism.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        config: ModelParallelConfig,
        init_method: InitMethod | None = None,
        reduce_scatter_embeddings: bool = False,
        tp_group: dist.ProcessGroup | DeviceMesh | None = None,
    ):
        super().__init__(config, tp_group)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.reduce_scatter_embeddings = reduce_scatter_embeddings
        self.weight = self._parameter(
            "weight", (num_embeddings, embedding_dim), 0, weights(config.init_method_std, init_method)
        )

    def forward(self, ids: Tensor) -> Tensor:
        return self.leave(self.look_up(ids))

    def look_up(self, ids: Tensor) -> Tensor:
        """This rank's part of the sum over the group [b, s, h]: rows that it holds, zeros for other ids."""
        weight = local(self.weight)
        if self.tp_size == 1:
            return F.embedding(ids, weight)
        rows = self.num_embeddings // self.tp_size
        shifted = ids - self.tp_rank * rows
        mine = (shifted >= 0) & (shifted < rows)
        # An id that no rank holds stays out of range, so that its lookup fails as at tp 1.
        elsewhere = (ids >= 0) & (ids < self.num_embeddings) & ~mine
        return F.embedding(shifted.masked_fill(elsewhere, 0), weight) * mine.unsqueeze(-1)

    def leave(self, out: Tensor) -> Tensor:
        """The sum of :meth:`look_up`'s results over the group (of several tables, if they were added)."""
        if self.reduce_scatter_embeddings:
            return mappings.reduce_scatter_to_sequence_parallel_region(
                out.transpose(0, 1).contiguous(), self.tp_group
            )
        return mappings.reduce_from_tensor_model_parallel_region(out, self.tp_group)
