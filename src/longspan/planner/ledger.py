"""The bytes of every live tensor of a step, from allocation to release.

Each storage is a block. The ledger is the list of all allocations and releases in their order, so that the
peaks and what is alive at each are known afterwards, whatever a block turns out to be: the gradient of
a parameter is an ordinary tensor until autograd has stored it.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


@dataclass(eq=False)
class Block:
    """The bytes of one storage; a storage that is resized begins another block.

    Attributes:
        size: bytes.
        component: what the block is for, one of ``components.COMPONENTS``.
        origin: the operation that allocated the block.
    """

    size: int
    component: str
    origin: str


class Ledger:
    """All allocations and releases since the ledger was made.

    Args:
        device_type: storages of other devices are not counted.
        unit: sizes are rounded up to a multiple of this many bytes, as the device's allocator does.

    Attributes:
        events: pairs of a block and +1 for its allocation or -1 for its release.
        marks: pairs of the number of the next event and the name of the part of the step that begins with it.
    """

    def __init__(self, device_type: str, unit: int = 1):
        self.device_type, self.unit = device_type, unit
        self.events: list[tuple[Block, int]] = []
        self.marks: list[tuple[int, Hashable]] = []
        self._blocks: dict[int, Block] = {}
        #: a result that takes the memory of an argument, if the argument is released before the next operation
        self._waiting: Block | None = None

    def block_of(self, tensor: Tensor) -> Block | None:
        """The block of a tensor's storage; None if its storage has no bytes or lies on another device."""
        held = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        return self._blocks.get(held.untyped_storage()._cdata)

    def settle(self) -> None:
        """Counts the block whose allocation was put off (see :meth:`add`)."""
        if self._waiting is not None:
            self.events.append((self._waiting, 1))
            self._waiting = None

    def add(self, tensor: Tensor, component: str, origin: str, later: bool = False) -> None:
        """Counts the storage of a tensor that an operation returned, unless it is counted already.

        Args:
            later: the allocation counts when the next operation begins. A result that autograd would have written
                over an argument, if no dispatch mode were active, thereby takes the argument's place.
        """
        if tensor.device.type != self.device_type:
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, self._rounded(storage.nbytes())
        held = self._blocks.get(key)
        if held is not None:
            if held.size != size:
                self.resize(storage, component)
            return
        if not size:
            return
        block = self._blocks[key] = Block(size, component, origin)
        weakref.finalize(storage, self._release, key)
        if later:
            self._waiting = block
        else:
            self.events.append((block, 1))

    def passing(self, size: int, component: str, origin: str) -> None:
        """Counts bytes that an operation takes and gives back before it returns."""
        if size:
            block = Block(self._rounded(size), component, origin)
            self.events += [(block, 1), (block, -1)]

    def resize(self, storage: torch.UntypedStorage, component: str = "other") -> None:
        """Counts the present size of a storage whose size was changed."""
        key, size = storage._cdata, self._rounded(storage.nbytes())
        held = self._blocks.pop(key, None)
        if held is not None:
            self.events.append((held, -1))
        elif size:
            weakref.finalize(storage, self._release, key)
        if size or held is not None:
            # A storage without bytes stays known, so that its end is watched only once.
            block = self._blocks[key] = Block(size, component, "resize")
            self.events.append((block, 1))

    def _rounded(self, size: int) -> int:
        return -(-size // self.unit) * self.unit

    def _release(self, key: int) -> None:
        block = self._blocks.pop(key, None)
        if block is None:
            return
        if block is self._waiting:
            self._waiting = None
        else:
            self.events.append((block, -1))

    def mark(self, part: Hashable) -> None:
        """From now on events belong to this part of the step."""
        self.settle()
        self.marks.append((len(self.events), part))

    def peaks(self, begin: int) -> dict[Hashable, dict[str, int]]:
        """The bytes of each component at the peak of each part of the step, from event number ``begin`` on.

        A part that comes several times, as for several micro-batches, has its highest peak.
        """
        marks = iter([*self.marks, (len(self.events) + 1, None)])
        following, name = next(marks)
        part: Hashable = None
        live: dict[str, int] = defaultdict(int)
        total, most = 0, defaultdict[Hashable, int](int)
        found: dict[Hashable, dict[str, int]] = {}
        for number, (block, sign) in enumerate(self.events):
            while number >= following:
                part = name
                following, name = next(marks)
            live[block.component] += sign * block.size
            total += sign * block.size
            if number >= begin and total > most[part]:
                most[part], found[part] = total, dict(live)
        return found
