"""Cut tensors made whole, one after another, also where pipeline stages hold different ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor


def whole_tensors(
    named: Mapping[str, Tensor],
    pp_group: dist.ProcessGroup | None,
    place: Callable[[str], Any] = lambda name: 0,
) -> Iterator[tuple[str, Tensor]]:
    """Cut tensors whole, on the CPU, one after another; collective.

    Args:
        named: this rank's tensors by name.
        pp_group: the ranks with the other stages of a pipeline. The first of them gets all tensors, others their own.
        place: sorts the names of all stages; those that are alike stay in the order of the stages.
    """
    if pp_group is None or dist.get_world_size(pp_group) == 1:
        yield from ((name, _whole(tensor)) for name, tensor in named.items())
        return
    rank = dist.get_rank(pp_group)
    held: list = [None] * dist.get_world_size(pp_group)
    dist.all_gather_object(held, {name: (t.shape, t.dtype) for name, t in named.items()}, group=pp_group)
    holders: dict[str, int] = {}
    for index, names in enumerate(held):
        # A tied table is in two stages.
        holders |= {name: index for name in names if name not in holders}
    for name in sorted(holders, key=place):
        holder = holders[name]
        whole = _whole(named[name]) if holder == rank else None
        if holder and rank == 0:
            shape, dtype = held[holder][name]
            whole = torch.empty(shape, dtype=dtype)
            dist.recv(whole, group=pp_group, group_src=holder)
        elif whole is not None and holder:
            dist.send(whole.contiguous(), group=pp_group, group_dst=0)
        if whole is not None:
            yield name, whole


def _whole(tensor: Tensor) -> Tensor:
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach().cpu()
