"""What the layers keep for backward, kept in the CPU's memory.

    forward    layer i computes; what it saves is copied to pinned memory by a stream of its own, while it goes on.
               When layer i + 1 has ended, layer i's copies are waited for and its tensors on the device let go.
    backward   layer i computes; what layer i - 1 saved is copied back meanwhile.

So at most two layers' saved tensors are on the device at a time. A layer is one group: what it saves
several times (the input of three projections) is copied once. Weights stay where they are, and so does what
is small, or shared by all layers (the rotary table).

With full recomputation a layer saves its input alone, with selective also what attention needs; without any, everything.

PyTorch's own ``torch.autograd.graph.save_on_cpu`` waits for each copy and copies weights too; torchtune and TRL
(``OffloadActivations``) overlap copies tensor by tensor. This one goes by layers, since layers are what is alike.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

#: smaller tensors stay on the device, in bytes
MINIMUM_BYTES = 1 << 16


class _Group:
    """What one layer saved in one forward pass: copies on the CPU, and the tensors while they are on the device.

    The autograd graph holds the groups (by its handles), nobody else does: a graph that is freed frees them.
    """

    def __init__(self, before: weakref.ref[_Group] | None):
        self.before = before  # the layer before
        self.host: list[Tensor] = []
        self.here: list[Tensor] | None = []
        self.ready: torch.cuda.Event | None = None  # the last copy, there or back


#: what autograd keeps instead of a tensor: its group, its number there, its shape
_Handle = tuple[_Group, int, torch.Size]


class Offload:
    """One for all layers of a model; see the module's docstring.

    Attributes:
        moved: bytes copied to the CPU so far.
    """

    def __init__(self, device: torch.device, minimum: int = MINIMUM_BYTES):
        self.device, self.minimum = device, minimum
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.on_device: deque[weakref.ref[_Group]] = deque()
        self.last: weakref.ref[_Group] | None = None
        self.asked: weakref.ref[_Group] | None = None  # the group backward is at
        self.reached: torch.cuda.Event | None = None  # where backward came to it
        self.moved = 0

    @contextmanager
    def layer(self, stay: Iterable[Tensor]) -> Iterator[None]:
        """Around the forward pass of a layer.

        Args:
            stay: tensors that are never moved, whatever view of them is saved.
        """
        group = _Group(self.last)
        staying = {t.untyped_storage().data_ptr() for t in stay}
        known: dict[tuple, int] = {}

        def pack(t: Tensor) -> Tensor | _Handle:
            if self._stays(t, staying):
                return t
            assert group.here is not None
            shape, t = t.shape, t.detach()
            if t.is_contiguous():  # attention's output is saved by heads, and as one row a token
                t = t.view(-1)
            # group.here keeps the address from being given anew
            key = (t.data_ptr(), t.shape, t.stride(), t.dtype, t._version)
            if key not in known:
                known[key] = len(group.here)
                group.here.append(t)
                group.host.append(self._to_host(t))
                self.moved += t.nbytes
            return group, known[key], shape

        with torch.autograd.graph.saved_tensors_hooks(pack, self._unpack):
            yield
        if self.stream is not None:
            group.ready = self.stream.record_event()
        self.last = weakref.ref(group)
        self.on_device.append(self.last)
        while len(self.on_device) > 2:  # this layer and the one before
            self._let_go(self.on_device.popleft()())

    def _stays(self, t: Tensor, staying: set[int]) -> bool:
        return (
            isinstance(t, DTensor)
            or t.device.type != self.device.type
            or t.nbytes < self.minimum
            or t.untyped_storage().data_ptr() in staying
            or 0 in t.stride()  # expanded: its memory is less than its size
        )

    def _to_host(self, t: Tensor) -> Tensor:
        if self.stream is None:
            return t.clone()
        host = torch.empty_like(t, device="cpu", pin_memory=True)
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            host.copy_(t, non_blocking=True)
        return host

    def _let_go(self, group: _Group | None) -> None:
        """Frees a layer's tensors on the device; what computes next may have their memory once they are copied."""
        if group is not None:
            if group.ready is not None:
                torch.cuda.current_stream(self.device).wait_event(group.ready)
            group.here = None

    def _bring(self, group: _Group | None) -> None:
        """Starts copying a layer's tensors back, unless they are here."""
        if group is None or group.here is not None:
            return
        if self.stream is None:
            group.here = [t.clone() for t in group.host]
            return
        with torch.cuda.stream(self.stream):  # after the copies to the CPU: they went by the same stream
            group.here = [t.to(self.device, non_blocking=True) for t in group.host]
            group.ready = self.stream.record_event()

    def _unpack(self, saved: Tensor | _Handle) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        group, index, shape = saved
        if self.asked is None or self.asked() is not group:  # backward comes to this layer
            self.asked = weakref.ref(group)
            if self.stream is not None:
                # the CPU may run far ahead: it must not bring layers back whose turn is long to come
                if self.reached is not None:
                    self.reached.synchronize()
                self.reached = torch.cuda.current_stream(self.device).record_event()
            self._bring(group)
            self._bring(group.before() if group.before is not None else None)
        self._bring(group)  # let go since, where a graph is gone through twice
        assert group.here is not None
        t = group.here[index]
        if self.stream is not None:
            stream = torch.cuda.current_stream(self.device)
            assert group.ready is not None
            stream.wait_event(group.ready)
            t.record_stream(stream)
        return t.view(shape)
