"""Runs code on tensors without data, and keeps a ledger of the memory that the code would take.

    floating-point tensors    fake: shape, dtype, device and storage, but no bytes (FakeTensorMode)
    integers on the CPU       real, because code reads their values: tokens, layouts, the rows of experts

Collectives send nothing. For integers that would arrive, and whose values decide sizes, the other ranks are taken to
send what this rank sends.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from longspan.planner.components import component_of_caller
from longspan.planner.ledger import Ledger
from longspan.planner.scratch import scratch_bytes
from longspan.planner.work import Work, name_of

aten = torch.ops.aten


class _Recording(TorchDispatchMode):
    """Sees every operation first: integers are computed, everything else is faked, and all results are recorded."""

    def __init__(self, ledger: Ledger, fake: FakeTensorMode, work: Work | None):
        super().__init__()
        self.ledger, self.fake, self.work = ledger, fake, work

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            # FakeTensor asks for its device as an operation.
            return args[0].fake_device if isinstance(args[0], FakeTensor) else args[0].device
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        self.ledger.settle()
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if _is_meta(given, kwargs):
            # The model is made and cut on this device; FSDP makes a view there for each rank of its group.
            return func(*args, **kwargs)
        if _is_real(func, given, kwargs):
            result = func(*args, **kwargs)
            _arrive(func, args)
        else:
            with self.fake:
                result = _grouped(*args) if func is aten._grouped_mm.default else func(*args, **kwargs)
        component = component_of_caller(2)
        later = func is aten.add.Tensor and len(given) == 2 and _called_by_autograd()
        name = name_of(func)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.ledger.add(tensor, component, name, later)
        if self.work is not None:
            self.work.record(func, args, kwargs, result, component)
        scratch = scratch_bytes(func, args, self.ledger.device_type)
        self.ledger.passing(scratch, "scratch of kernels", name)
        return result


#: operations that make integers unless a dtype is given
_INTEGER_FACTORIES = {aten.arange.default, aten.arange.start, aten.arange.start_step, aten.randperm.default}


def _is_meta(given: list[Tensor], kwargs: dict) -> bool:
    """Whether an operation stays on the meta device, where nothing takes memory."""
    device = kwargs.get("device")
    if device is not None:
        return torch.device(device).type == "meta"
    return bool(given) and all(not isinstance(t, FakeTensor) and t.device.type == "meta" for t in given)


def _is_real(func: Any, given: list[Tensor], kwargs: dict) -> bool:
    """Whether an operation is computed: all of its tensors are integers with values on the CPU, or it makes such."""
    device, dtype = kwargs.get("device"), kwargs.get("dtype")
    if device is not None and torch.device(device).type != "cpu":
        return False
    if dtype is not None and (dtype.is_floating_point or dtype.is_complex):
        return False
    if given:
        return not any(
            isinstance(t, FakeTensor) or t.dtype.is_floating_point or t.device.type != "cpu" for t in given
        )
    return dtype is not None or func in _INTEGER_FACTORIES


def _arrive(func: Any, args: tuple) -> None:
    """Fills the integers that a collective would have received."""
    name = name_of(func)
    if name == "c10d.recv_.default":
        # The stages of a pipeline agree by a message of one number, 1, that all of them have given shapes.
        for tensor in args[0]:
            tensor.fill_(1)
    elif name == "c10d._allgather_base_.default":
        out, own = args[:2]
        out.copy_(own.repeat(out.numel() // max(own.numel(), 1), *[1] * (own.dim() - 1)).view_as(out))
    elif name == "c10d.alltoall_base_.default":
        out, given, group, coming, going = args[:5]
        rank, ranks = (ask := dist.ProcessGroup.unbox(group)).rank(), ask.size()
        going = list(going) or [len(given) // ranks] * ranks
        first = sum(going[:rank])
        # Each rank sends what this rank keeps for itself.
        own = given[first : first + going[rank]]
        if len(own) and len(out):
            out.copy_(own[torch.arange(len(out)) % len(own)])


def _grouped(a: Tensor, b: Tensor, offs: Tensor | None = None, *_: Any) -> Tensor:
    """The result of ``grouped_mm`` in every dtype; FakeTensor has it for bfloat16 only."""
    if a.dim() == 2 and b.dim() == 2:
        assert offs is not None
        return a.new_empty(len(offs), a.shape[0], b.shape[1])
    return a.new_empty(*a.shape[:-1], b.shape[-1])


def _called_by_autograd() -> bool:
    """Whether autograd's engine itself calls, to add up two gradients, and no code of a Python function."""
    return sys._getframe(2).f_code.co_name == "_engine_run_backward"


@contextlib.contextmanager
def tracing(ledger: Ledger, work: Work | None = None) -> Iterator[None]:
    """A context in which floating-point tensors have no data. The ledger records every tensor, ``work`` every operation."""
    resize = torch.UntypedStorage.resize_

    def resized(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
        result = resize(storage, size)
        ledger.settle()
        if storage.device.type in (ledger.device_type, "meta"):
            ledger.resize(storage, component_of_caller(2))
        return result

    # FSDP frees and refills the storages of gathered weights by a method, which no dispatch mode sees.
    torch.UntypedStorage.resize_ = resized  # type: ignore[method-assign, assignment]
    try:
        with _Recording(ledger, FakeTensorMode(allow_non_fake_inputs=True), work):
            yield
    finally:
        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign]
        ledger.settle()
