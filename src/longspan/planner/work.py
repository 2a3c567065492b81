"""What a step computes and sends: floating-point operations, bytes that kernels read and write, and collectives."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten

#: collectives by the names of their operators; a message counts where it is received
COLLECTIVES = {
    "c10d._allgather_base_.default": "all-gather",
    "c10d.allgather_.default": "all-gather",
    "c10d._reduce_scatter_base_.default": "reduce-scatter",
    "c10d.reduce_scatter_.default": "reduce-scatter",
    "c10d.allreduce_.default": "all-reduce",
    "c10d.alltoall_base_.default": "all-to-all",
    "c10d.alltoall_.default": "all-to-all",
    "c10d.broadcast_.default": "broadcast",
    "c10d.recv_.default": "message",
}


#: operations that write nothing into what they give
_WITHOUT_TRAFFIC = {
    aten._unsafe_view.default,
    aten.empty.memory_format,
    aten.empty_strided.default,
    aten.empty_like.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
}


@cache
def name_of(func: Any) -> str:
    """The name of an operator, such as ``aten.mm.default``."""
    return str(func)


@dataclass
class Work:
    """Sums over a step on one rank.

    Attributes:
        groups: process group -> the axis that it belongs to.
        flops: (component, kind) -> floating-point operations; kind is ``matmul``, ``attention`` or
            ``attention backward``.
        moved: component -> bytes that all other kernels read and write.
        sent: (axis, collective) -> (number of calls, bytes). Bytes are those of the whole buffer: what an all-gather
            gives, what a reduce-scatter or an all-reduce takes, what an all-to-all or a message sends.
    """

    groups: Mapping[str, str] = field(default_factory=dict)
    flops: dict[tuple[str, str], float] = field(default_factory=lambda: defaultdict(float))
    moved: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    sent: dict[tuple[str, str], tuple[float, float]] = field(default_factory=dict)

    def begin(self, groups: Mapping[str, str]) -> None:
        """Forgets what was recorded, and names the groups."""
        self.groups = groups
        self.flops.clear()
        self.moved.clear()
        self.sent.clear()

    def record(self, func: Any, args: tuple, kwargs: dict, result: Any, component: str) -> None:
        """Adds one operation."""
        name = name_of(func)
        if name in COLLECTIVES:
            self._send(COLLECTIVES[name], args, kwargs)
            return
        if name.startswith("c10d."):
            return
        kind, flops = _flops(func, args, kwargs, result)
        if flops:
            self.flops[component, kind] += flops
        elif not _is_view(func) and func not in _WITHOUT_TRAFFIC:
            given = tree_leaves((args, kwargs))
            self.moved[component] += _bytes_of(given) + _bytes_of(tree_leaves(result))

    def _send(self, collective: str, args: tuple, kwargs: dict) -> None:
        leaves = [*args, *kwargs.values()]
        # Operators take groups as script objects.
        name = next((n for leaf in leaves if (n := _group_name(leaf)) is not None), None)
        axis = self.groups.get(name or "", "other")
        tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
        size = max((t.nbytes for t in tensors), default=0)
        if collective in ("all-gather", "reduce-scatter") and len(tensors) > 2:
            size = sum(t.nbytes for t in tensors) - min(t.nbytes for t in tensors)
        elif collective == "all-to-all" and len(tensors) > 2:
            size = sum(t.nbytes for t in tensors) // 2
        calls, total = self.sent.get((axis, collective), (0.0, 0.0))
        self.sent[axis, collective] = calls + 1, total + size


def _group_name(value: Any) -> str | None:
    if not isinstance(value, torch.ScriptObject):
        return None
    try:
        return dist.ProcessGroup.unbox(value).group_name
    except (RuntimeError, TypeError):
        return None


def _flops(func: Any, args: tuple, kwargs: dict, result: Any) -> tuple[str, float]:
    """(kind, floating-point operations) of an operation; 0 for one that is not a product of matrices."""
    if func is aten._scaled_dot_product_flash_attention_for_cpu.default:
        q, k, v = args[:3]
        return "attention", _attention(q, k, v, _causal(args, kwargs, 4), 1.0)
    if func is aten._scaled_dot_product_flash_attention_for_cpu_backward.default:
        q, k, v = args[1:4]
        # Five products instead of two: the scores are computed again.
        return "attention backward", _attention(q, k, v, _causal(args, kwargs, 7), 2.5)
    if func is aten._grouped_mm.default:
        a, b = args[:2]
        return "matmul", 2.0 * a.shape[-2] * a.shape[-1] * b.shape[-1]
    packet = func._overloadpacket
    if packet in flop_registry:
        return "matmul", float(flop_registry[packet](*args, **kwargs, out_val=result))
    return "", 0.0


def _causal(args: tuple, kwargs: dict, place: int) -> bool:
    return bool(kwargs.get("is_causal", args[place] if len(args) > place else False))


def _attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, passes: float) -> float:
    """Operations of attention q [b, h, s_q, d], k [b, h, s_k, d]; a causal mask leaves the half of a square."""
    b, h, rows, d = q.shape
    keys = k.shape[2]
    pairs = rows * keys - (min(rows, keys) * (min(rows, keys) - 1) / 2 if causal else 0)
    return passes * 2.0 * b * h * pairs * (d + v.shape[3])


@cache
def _is_view(func: Any) -> bool:
    returns = func._schema.returns
    return any(one.alias_info is not None and not one.alias_info.is_write for one in returns)


def _bytes_of(leaves: Iterable[Any]) -> int:
    return sum(leaf.nbytes for leaf in leaves if isinstance(leaf, Tensor))
