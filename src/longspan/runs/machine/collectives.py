"""Every exchange that longspan uses, with small integers whose result is known.

The integers are at most 192 after summing, so they are exact in bfloat16 too, in every order of summation.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from longspan.mesh.collectives import all_gather_dim, all_reduce_sum, all_to_all, reduce_scatter_dim
from longspan.runs.machine.protocol import NAMED, Check, Finding, Place

DTYPES = (torch.float32, torch.bfloat16)
#: elements of each rank's part; odd, so that parts have no aligned size
ELEMENTS = 1001
#: a rank contributes to a sum at its element i only where (rank + i) % ranks is below this
CONTRIBUTORS = 64
REMEDY = {
    "cpu": "Look at the firewall between the machines, and at GLOO_SOCKET_IFNAME.",
    "cuda": "Set NCCL_DEBUG=INFO and start again; look at NCCL_SOCKET_IFNAME, and at the GPU and network of these ranks.",
}

Exchange = Callable[[Tensor, Place], Tensor]
"""A rank's input -> its result."""


@dataclass(frozen=True)
class Collective:
    """An exchange of tensors, and its known result.

    Attributes:
        exchange: the call that is checked.
        own: (rank, number of ranks) -> the input of this rank, int64.
        expected: (rank, number of ranks) -> its result, int64.
        travels: number of ranks -> bytes that each rank has to receive for each byte of its input; None: the
            speed is not measured.
    """

    exchange: Exchange
    own: Callable[[int, int], Tensor]
    expected: Callable[[int, int], Tensor]
    travels: Callable[[int], float] | None = None


def numbers(rank: int, world: int, part: int = 0, count: int = ELEMENTS) -> Tensor:
    """Integers of a rank from 0 to 3: int64 [count], which begin with element ``part`` x ELEMENTS."""
    i = torch.arange(part * ELEMENTS, part * ELEMENTS + count)
    return (3 * rank + i) % 4 * ((rank + i) % world < CONTRIBUTORS)


def parts(rank: int, world: int) -> Tensor:
    """The integers of a rank for an exchange that needs a part for each rank: int64 [ranks x ELEMENTS]."""
    return numbers(rank, world, count=world * ELEMENTS)


def of_all(world: int, part: int = 0) -> Tensor:
    """A part of all ranks' integers: int64 [ranks, ELEMENTS]."""
    return torch.stack([numbers(rank, world, part) for rank in range(world)])


def rows_for(rank: int, other: int) -> int:
    """The rows that a rank sends to another one in an uneven all-to-all: 0 to 3."""
    return (2 * rank + other) % 4


def rows_sent(rank: int, other: int) -> Tensor:
    """The integers that a rank sends to another one, int64 [rows, 5]."""
    first = torch.arange(rows_for(rank, other) * 5).view(-1, 5)
    return (first + 7 * rank + 11 * other) % 97


def uneven(x: Tensor, place: Place) -> Tensor:
    """all_to_all_single with a different number of rows for each rank."""
    received = [rows_for(other, place.rank) for other in range(place.world)]
    sent = [rows_for(place.rank, other) for other in range(place.world)]
    return all_to_all(x, place.group, received, sent)


def broadcast(x: Tensor, place: Place) -> Tensor:
    """The last rank's tensor on every rank."""
    x = x.clone()
    dist.broadcast(x, group=place.group, group_src=place.world - 1)
    return x


def largest(x: Tensor, place: Place) -> Tensor:
    """The largest element over the ranks."""
    x = x.clone()
    dist.all_reduce(x, op=dist.ReduceOp.MAX, group=place.group)
    return x


def distances(world: int) -> list[int]:
    """The distances over which ranks exchange: to the next one, half around, and to the one before."""
    return sorted({1, max(1, world // 2), world - 1}) if world > 1 else []


def to_neighbours(x: Tensor, place: Place) -> Tensor:
    """Each rank's tensor to the ranks at all ``distances``, in one batch, as attention exchanges keys."""
    received = [torch.empty_like(x) for _ in distances(place.world)]
    operations = []
    for distance, buffer in zip(distances(place.world), received):
        to, source = (place.rank + distance) % place.world, (place.rank - distance) % place.world
        operations.append(dist.P2POp(dist.isend, x, group=place.group, group_peer=to))
        operations.append(dist.P2POp(dist.irecv, buffer, group=place.group, group_peer=source))
    for work in dist.batch_isend_irecv(operations) if operations else []:
        work.wait()
    return torch.stack([x, *received])


def along_a_chain(x: Tensor, place: Place) -> Tensor:
    """Each rank's tensor to the next by send and recv, as in a pipeline; the first rank keeps its own."""
    received = x.clone()
    for turn in (0, 1):
        if place.rank % 2 == turn and place.rank + 1 < place.world:
            dist.send(x, group=place.group, group_dst=place.rank + 1)
        if place.rank % 2 != turn and place.rank > 0:
            dist.recv(received, group=place.group, group_src=place.rank - 1)
    return received


def _own_rows(rank: int, world: int) -> Tensor:
    return torch.cat([rows_sent(rank, other) for other in range(world)])


def _received_rows(rank: int, world: int) -> Tensor:
    return torch.cat([rows_sent(other, rank) for other in range(world)])


def _of_neighbours(rank: int, world: int) -> Tensor:
    sources = [rank, *((rank - distance) % world for distance in distances(world))]
    return torch.stack([numbers(source, world) for source in sources])


#: The exchanges by torch's names, from the simplest on.
COLLECTIVES: dict[str, Collective] = {
    "all_reduce": Collective(
        lambda x, place: all_reduce_sum(x, place.group),
        numbers,
        lambda rank, world: of_all(world).sum(0),
        lambda world: 2 * (world - 1) / world,
    ),
    "all_reduce (max)": Collective(largest, numbers, lambda rank, world: of_all(world).amax(0)),
    "broadcast": Collective(
        broadcast, numbers, lambda rank, world: numbers(world - 1, world), lambda world: 1.0
    ),
    "all_gather_into_tensor": Collective(
        lambda x, place: all_gather_dim(x, place.group, 0),
        numbers,
        lambda rank, world: of_all(world).flatten(),
        lambda world: world - 1,
    ),
    "reduce_scatter_tensor": Collective(
        lambda x, place: reduce_scatter_dim(x, place.group, 0),
        parts,
        lambda rank, world: of_all(world, rank).sum(0),
        lambda world: (world - 1) / world,
    ),
    "all_to_all_single": Collective(
        lambda x, place: all_to_all(x, place.group),
        parts,
        lambda rank, world: of_all(world, rank).flatten(),
        lambda world: (world - 1) / world,
    ),
    "all_to_all_single (uneven)": Collective(uneven, _own_rows, _received_rows),
    "batch_isend_irecv": Collective(to_neighbours, numbers, _of_neighbours),
    "send and recv": Collective(along_a_chain, numbers, lambda rank, world: numbers(max(rank - 1, 0), world)),
}


def checks_of_results(device: str, collectives: dict[str, Collective] = COLLECTIVES) -> list[Check]:
    """The checks that each exchange returns the known result, in float32 and bfloat16.

    Args:
        device: ``cpu`` or ``cuda``.
        collectives: name -> exchange.
    """

    def check(name: str, about: str, measure: Callable[[Place], str | None]) -> Check:
        def judge(texts: list[str | None], place: Place) -> list[Finding]:
            wrong = [f"{place.named([rank])}: {text}" for rank, text in enumerate(texts) if text is not None]
            if not wrong:
                return [Finding(name, "ok", about)]
            more = [f"{len(wrong) - NAMED} more ranks"] if len(wrong) > NAMED else []
            return [Finding(name, "wrong", "; ".join([*wrong[:NAMED], *more]), REMEDY[device])]

        return Check(name, measure, judge, REMEDY[device])

    return [
        check("barrier", "all ranks arrive", lambda place: dist.barrier(place.group)),
        check("objects", "gathered, scattered and broadcast", objects),
        *(
            check(name, "float32, bfloat16", functools.partial(result, collective))
            for name, collective in collectives.items()
        ),
    ]


def result(collective: Collective, place: Place) -> str | None:
    """What is wrong with an exchange on this rank; None if it returns the known result."""
    # Both data types are exchanged in any case, because the other ranks exchange them too.
    results = {}
    for dtype in DTYPES:
        own = collective.own(place.rank, place.world).to(place.device, dtype)
        results[str(dtype).removeprefix("torch.")] = collective.exchange(own, place).double().cpu()
    expected = collective.expected(place.rank, place.world)
    for name, got in results.items():
        if got.shape != expected.shape:
            return f"{name}: a result of shape {list(got.shape)} instead of {list(expected.shape)}"
        # The comparison is false for NaN, so a NaN counts as different.
        different = (~(got == expected)).flatten().nonzero()
        if len(different):
            at = int(different[0])
            values = f"{got.flatten()[at]:g} instead of {expected.flatten()[at]}"
            return f"{name}: {len(different)} of {got.numel()} elements differ, the first is {values}"
    return None


def objects(place: Place) -> str | None:
    """What is wrong with the exchanges of Python objects on this rank; None if nothing is."""
    everyone = list(range(place.world))
    gathered: list[Any] = [None] * place.world
    dist.all_gather_object(gathered, place.rank, group=place.group)
    at_first: list[Any] | None = [None] * place.world if place.rank == 0 else None
    dist.gather_object(place.rank, at_first, group=place.group, group_dst=0)
    scattered: list[Any] = [None]
    sources = [[rank] for rank in everyone] if place.rank == 0 else None
    dist.scatter_object_list(scattered, sources, group=place.group, group_src=0)
    told: list[Any] = ["known" if place.rank == 0 else None]
    dist.broadcast_object_list(told, group=place.group, group_src=0)
    for name, got, expected in (
        ("all_gather_object", gathered, everyone),
        ("gather_object", at_first or everyone, everyone),
        ("scatter_object_list", scattered, [[place.rank]]),
        ("broadcast_object_list", told, ["known"]),
    ):
        if got != expected:
            return f"{name} returned {got!s:.100} instead of {expected!s:.100}"
    return None
