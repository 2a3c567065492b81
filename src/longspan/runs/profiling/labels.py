"""Labels in the profiler's trace: which axis an exchange belongs to, and which work is a tile of attention.

Training itself has no labels, so that it pays nothing for them. Only the process of a profile adds them: around the
methods of ``dist.ProcessGroup``, through which all exchanges pass (the ones here, FSDP's and the pipeline's), and
around the attention kernel, which the attention modules accept as an argument.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

from longspan.context_parallel.attention import DotProductAttention
from longspan.context_parallel.calls import VarlenCall
from longspan.context_parallel.kernels.protocol import Kernel
from longspan.context_parallel.tiles import Mask
from longspan.runs.profiling.trace import EXCHANGE, TILE

#: method of a process group -> the exchange's usual name; versions of torch have one of the names each
METHODS = {
    "allreduce": "all_reduce",
    "allreduce_coalesced": "all_reduce",
    "broadcast": "broadcast",
    "reduce": "reduce",
    "allgather": "all_gather",
    "_allgather_base": "all_gather",
    "all_gather_single": "all_gather",
    "all_gather_single_coalesced": "all_gather",
    "allgather_into_tensor_coalesced": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "_reduce_scatter_base": "reduce_scatter",
    "reduce_scatter_single": "reduce_scatter",
    "reduce_scatter_single_coalesced": "reduce_scatter",
    "reduce_scatter_tensor_coalesced": "reduce_scatter",
    "alltoall": "all_to_all",
    "alltoall_base": "all_to_all",
    "all_to_all_single": "all_to_all",
    "send": "send",
    "recv": "recv",
    "barrier": "barrier",
}


@dataclass(frozen=True)
class Call:
    """An exchange that this rank has begun: its axis, operation, and the bytes of its largest tensor."""

    axis: str
    operation: str
    size: int


@contextmanager
def labelled_exchanges(axes: dict[str, str], calls: list[Call]) -> Iterator[None]:
    """A context in which every exchange has a label ``exchange AXIS/OPERATION`` in the trace.

    Args:
        axes: the result of :func:`longspan.mesh.axes.axes_of_groups`.
        calls: is extended by each exchange.
    """
    # From the class's dict come the descriptors, which bind to a group when they are put back.
    kept = {name: found for name, found in vars(dist.ProcessGroup).items() if name in METHODS}

    def labelled(method: Callable, operation: str) -> Callable:
        def call(group: dist.ProcessGroup, *arguments: Any, **more: Any) -> Any:
            axis = axes.get(group.group_name, group.group_desc or "other")
            calls.append(Call(axis, operation, _largest((*arguments, *more.values()))))
            with record_function(f"{EXCHANGE}{axis}/{operation}"):
                return method(group, *arguments, **more)

        return call

    try:
        for name in kept:
            setattr(dist.ProcessGroup, name, labelled(getattr(dist.ProcessGroup, name), METHODS[name]))
        yield
    finally:
        for name, found in kept.items():
            setattr(dist.ProcessGroup, name, found)


def _largest(arguments: Any) -> int:
    """The bytes of the largest tensor in arguments and in lists of them."""
    if isinstance(arguments, Tensor):
        return arguments.numel() * arguments.element_size()
    if isinstance(arguments, list | tuple):
        return max(map(_largest, arguments), default=0)
    return 0


# --- tiles ------------------------------------------------------------------------------------

#: floating-point operations for each (query, key) pair, head and head dim: two products forward, five backward
FORWARD, BACKWARD = 4, 10


class LabelledKernel:
    """A kernel of attention with a label around each call, whose work is counted.

    Attributes:
        tiles: of each call so far: the operations for each pair (n d times 4 or 10), and the tile (a VarlenCall,
            or (queries, keys, causal)).
    """

    def __init__(self, kernel: Kernel):
        self.kernel, self.name, self.varlen = kernel, kernel.name, kernel.varlen
        self.deterministic = getattr(kernel, "deterministic", False)
        self.tiles: list[tuple[int, VarlenCall | tuple[int, int, bool]]] = []

    def _count(self, q: Tensor, each: int, tile: Any) -> None:
        # A pair of a varlen call is one of its heads, into which the batch is flattened.
        self.tiles.append((each * q.shape[1:].numel(), tile))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        self._count(q, FORWARD, (q.shape[0], k.shape[0], causal))
        with record_function(f"{TILE}forward"):
            return self.kernel.forward(q, k, v, causal, scale)

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        causal: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        self._count(q, BACKWARD, (q.shape[0], k.shape[0], causal))
        with record_function(f"{TILE}backward"):
            return self.kernel.backward(dout, q, k, v, out, lse, causal, scale)

    def forward_varlen(self, q: Tensor, k: Tensor, v: Tensor, call: VarlenCall, scale: float) -> Any:
        self._count(q, FORWARD, call)
        with record_function(f"{TILE}forward"):
            return self.kernel.forward_varlen(q, k, v, call, scale)  # type: ignore[attr-defined]

    def backward_varlen(self, dout, q, k, v, out, lse, call: VarlenCall, scale: float) -> Any:
        self._count(q, BACKWARD, call)
        with record_function(f"{TILE}backward"):
            return self.kernel.backward_varlen(dout, q, k, v, out, lse, call, scale)  # type: ignore[attr-defined]

    def take_flops(self) -> int:
        """The operations of the calls since this was last called."""
        tiles, self.tiles = self.tiles, []
        return sum(each * pairs(tile) for each, tile in tiles)


def pairs(tile: VarlenCall | tuple[int, int, bool]) -> int:
    """The (query, key) pairs of a tile that are not masked.

    A causal tile is aligned at the bottom right: its last query attends to all of its keys.
    """
    if isinstance(tile, tuple):
        queries, keys, causal = tile
        return queries * keys - (queries * (queries - 1) // 2 if causal else 0)
    lengths = zip(tile.cu_q.diff().tolist(), tile.cu_k.diff().tolist())
    if tile.mask is Mask.ANTI:
        return sum(pairs((queries, keys, True)) for queries, keys in lengths)
    return sum(pairs((queries, keys, tile.mask is Mask.CAUSAL)) for queries, keys in lengths)


def label_tiles(model: torch.nn.Module, kernel: Kernel) -> LabelledKernel:
    """Makes all attention modules of a model compute with a labelled kernel, which is returned."""
    labelled = LabelledKernel(kernel)
    for module in model.modules():
        if isinstance(module, DotProductAttention):
            module.backend = labelled  # type: ignore[assignment]
    return labelled
