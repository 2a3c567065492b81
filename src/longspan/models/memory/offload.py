"""The tensors that layers save for backward, kept in the CPU's memory.

    forward    While layer i computes, a separate stream copies the tensors that it saves to pinned memory.
               When layer i + 1 has ended, the compute stream waits for layer i's copies, and layer i's
               tensors on the device are freed.
    backward   While layer i computes, the tensors that layer i - 1 saved are copied back.

So at most two layers' saved tensors are on the device at a time. The tensors of a layer are one group: a
tensor that the layer saves several times (the input of three projections) is copied once. Weights, small
tensors, and tensors that all layers share (the rotary table) stay on the device.

With full recomputation a layer saves its input, with selective recomputation also the tensors that attention
needs, and otherwise everything.

PyTorch's own ``torch.autograd.graph.save_on_cpu`` waits for each copy and copies weights too. torchtune and
TRL (``OffloadActivations``) overlap copies of single tensors with computation; this module overlaps copies of
whole, equal layers.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

#: Tensors of fewer bytes than this stay on the device.
MINIMUM_BYTES = 1 << 16


class _Group:
    """The tensors that one layer saved in one forward pass: CPU copies, and originals while on the device.

    Only the autograd graph holds groups (through its handles), so freeing the graph frees them.
    """

    def __init__(self, before: weakref.ref[_Group] | None):
        # The group of the layer before this group's layer.
        self.before = before
        self.host: list[Tensor] = []
        self.here: list[Tensor] | None = []
        # The end of this group's last copy, in either direction.
        self.ready: torch.cuda.Event | None = None


#: What autograd keeps instead of a tensor: the tensor's group, its number in the group, and its shape.
_Handle = tuple[_Group, int, torch.Size]


class Offload:
    """Offloads the saved tensors of all layers of a model; see the module's docstring.

    Args:
        minimum: tensors of fewer bytes stay on the device.

    Attributes:
        moved: bytes copied to the CPU so far.
    """

    def __init__(self, device: torch.device, minimum: int = MINIMUM_BYTES):
        self.device, self.minimum = device, minimum
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.on_device: deque[weakref.ref[_Group]] = deque()
        self.last: weakref.ref[_Group] | None = None
        # The group that backward has reached, and the event at which it reached this group.
        self.asked: weakref.ref[_Group] | None = None
        self.reached: torch.cuda.Event | None = None
        self.moved = 0

    @contextmanager
    def layer(self, stay: Callable[[], Iterable[Tensor]]) -> Iterator[None]:
        """A context for the forward pass of one layer.

        Args:
            stay: returns the tensors that stay on the device, as do all views of them. It is called for each tensor
                that is kept, because weights of a part may be gathered while the layer runs.
        """
        group = _Group(self.last)
        known: dict[tuple, int] = {}

        def pack(t: Tensor) -> Tensor | _Handle:
            if self._stays(t, stay):
                return t
            assert group.here is not None
            shape, t = t.shape, t.detach()
            # Attention's output is saved in two shapes. Both are flattened, so they share a key and a copy.
            if t.is_contiguous():
                t = t.view(-1)
            # group.here keeps the tensor alive, so no other tensor can get its address.
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
        # This layer's tensors and those of the layer before stay on the device.
        while len(self.on_device) > 2:
            self._let_go(self.on_device.popleft()())

    def _stays(self, t: Tensor, stay: Callable[[], Iterable[Tensor]]) -> bool:
        return (
            isinstance(t, DTensor)
            or t.device.type != self.device.type
            or t.nbytes < self.minimum
            # An expanded tensor takes less memory than its copy would.
            or 0 in t.stride()
            or t.untyped_storage().data_ptr() in {other.untyped_storage().data_ptr() for other in stay()}
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
        """Frees a layer's tensors on the device, after the compute stream has waited for their copies."""
        if group is not None:
            if group.ready is not None:
                torch.cuda.current_stream(self.device).wait_event(group.ready)
            group.here = None

    def _bring(self, group: _Group | None) -> None:
        """Starts copying a layer's tensors back, unless they are on the device."""
        if group is None or group.here is not None:
            return
        if self.stream is None:
            group.here = [t.clone() for t in group.host]
            return
        # The copies to the CPU end before these copies start, because both use the same stream.
        with torch.cuda.stream(self.stream):
            group.here = [t.to(self.device, non_blocking=True) for t in group.host]
            group.ready = self.stream.record_event()

    def _unpack(self, saved: Tensor | _Handle) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        group, index, shape = saved
        # Backward has reached another layer.
        if self.asked is None or self.asked() is not group:
            self.asked = weakref.ref(group)
            if self.stream is not None:
                # The CPU may run far ahead of the device. It waits, so that no layer is brought back early.
                if self.reached is not None:
                    self.reached.synchronize()
                self.reached = torch.cuda.current_stream(self.device).record_event()
            self._bring(group)
            self._bring(group.before() if group.before is not None else None)
        # If backward runs through the graph twice, a forward pass in between may have freed the tensors.
        self._bring(group)
        assert group.here is not None
        t = group.here[index]
        if self.stream is not None:
            stream = torch.cuda.current_stream(self.device)
            assert group.ready is not None
            stream.wait_event(group.ready)
            t.record_stream(stream)
        return t.view(shape)
