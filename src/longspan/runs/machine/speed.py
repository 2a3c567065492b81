"""How fast exchanges, links and ranks are, and which of them is much slower than the others.

A collective takes as long on every rank as on the slowest link and rank, so it shows that something is slow
but not what. Links between two ranks and products of matrices on each rank show it. Links on one machine are
compared with each other, and so are links between machines, because the two kinds differ by nature.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from longspan.runs.machine.collectives import COLLECTIVES, REMEDY, Collective
from longspan.runs.machine.protocol import Check, Finding, Place

#: bytes of a rank's input to a small exchange and to a large one, by device
SMALL, LARGE = {"cpu": 2**12, "cuda": 2**12}, {"cpu": 2**21, "cuda": 2**26}
#: times that something is measured, of which the median counts
TIMES = 5
#: a link is slow if its bandwidth is below this share of the other links' median
SLOW_LINK = 0.5
#: a rank is slow if it computes this many times as long as the median rank
SLOW_RANK = 1.5
#: the products of matrices that measure a rank: rows and columns, and data type
PRODUCT = {"cpu": (512, torch.float32), "cuda": (8192, torch.bfloat16)}
#: the largest difference of a product from that of float64, relative to its largest element
PRODUCT_ERROR = {torch.float32: 1e-5, torch.bfloat16: 2**-7}

LOOK_AT_LINK = (
    "Look at the cable, switch and network interface of these machines, and at what else uses the link."
)
LOOK_AT_RANK = (
    "Look at what else runs on the machine, and at the clock, temperature and health of its GPU or CPU."
)

Clock = Callable[[Callable[[], object], Place], float]
"""Seconds that a function takes on this rank."""


def seconds(function: Callable[[], object], place: Place) -> float:
    """How long a function takes on this rank, with what it has started on the device."""
    _finish(place.device)
    begin = time.perf_counter()
    function()
    _finish(place.device)
    return time.perf_counter() - begin


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_seconds(function: Callable[[], object], place: Place, clock: Clock = seconds) -> float:
    """The median of ``TIMES`` measurements, each begun by all ranks at once, after a call that is not counted."""
    function()
    taken = []
    for _ in range(TIMES):
        dist.barrier(place.group)
        taken.append(clock(function, place))
    return statistics.median(taken)


# --- collectives ------------------------------------------------------------------------------


def checks_of_bandwidth(device: str, collectives: dict[str, Collective] = COLLECTIVES) -> list[Check]:
    """The checks that measure each collective with a small and a large input."""
    return [
        Check(
            f"speed of {name}",
            functools.partial(_seconds_of_sizes, collective),
            functools.partial(_judge_bandwidth, name, collective),
            REMEDY[device],
            needs_sound=True,
        )
        for name, collective in collectives.items()
        if collective.travels is not None
    ]


def _seconds_of_sizes(collective: Collective, place: Place) -> list[float]:
    """[seconds with a small input, seconds with a large one]."""
    found = []
    for size in (SMALL, LARGE):
        # float32 elements, of which each rank gets the same number
        elements = size[place.device.type] // 4 // place.world * place.world or place.world
        x = torch.ones(elements, device=place.device)
        found.append(median_seconds(functools.partial(collective.exchange, x, place), place))
    return found


def _judge_bandwidth(
    name: str, collective: Collective, times: list[list[float]], place: Place
) -> list[Finding]:
    assert collective.travels is not None
    small_s, large_s = (max(taken) for taken in zip(*times))
    size = LARGE[place.device.type]
    rate = size * collective.travels(place.world) / large_s / 1e9
    text = f"{_size(SMALL[place.device.type])} in {1e3 * small_s:.2f} ms, {_size(size)} at {rate:.2f} GB/s a rank"
    return [Finding(f"speed of {name}", "ok", text, figures={"small_s": small_s, "gb_per_s": rate})]


def _size(count: int) -> str:
    return f"{count // 2**20} MiB" if count >= 2**20 else f"{count // 2**10} KiB"


# --- links ------------------------------------------------------------------------------------


def check_of_links(device: str, clock: Clock = seconds) -> Check:
    """The check of the link from each rank to the next one.

    Args:
        clock: measures how long a receiving rank takes.
    """
    return Check(
        "links", functools.partial(_seconds_of_link, clock), judge_links, REMEDY[device], needs_sound=True
    )


def turns(world: int) -> list[list[int]]:
    """The receiving ranks of each turn. In a turn a rank has one link, so that no link waits for another."""
    odd, even = list(range(1, world, 2)), list(range(2, world, 2))
    # The link from the last rank to the first one has a turn of its own if the number of ranks is odd.
    return [odd, even, [0]] if world % 2 else [odd, [*even, 0]]


def _seconds_of_link(clock: Clock, place: Place) -> float:
    """The seconds in which this rank receives from the rank before it."""
    rank, world = place.rank, place.world
    x = torch.ones(LARGE[place.device.type] // 4, device=place.device)
    found = 0.0
    for receivers in turns(world):
        if rank in receivers:
            found = median_seconds(
                functools.partial(_pass, dist.irecv, x, (rank - 1) % world, place), place, clock
            )
        elif (rank + 1) % world in receivers:
            median_seconds(functools.partial(_pass, dist.isend, x, (rank + 1) % world, place), place)
        else:
            median_seconds(lambda: None, place)
    return found


def _pass(operation: Callable, x: torch.Tensor, peer: int, place: Place) -> None:
    """Sends a tensor to a peer, or receives it."""
    for work in dist.batch_isend_irecv([dist.P2POp(operation, x, group=place.group, group_peer=peer)]):
        work.wait()


def judge_links(times: Sequence[float], place: Place) -> list[Finding]:
    """Names each link with less than half of the median bandwidth of the other links of its kind.

    Args:
        times: seconds in which each rank has received ``LARGE`` bytes from the rank before it.
    """
    kinds: dict[str, dict[int, float]] = {"on a machine": {}, "between machines": {}}
    for rank, taken in enumerate(times):
        same = place.hosts[rank] == place.hosts[rank - 1]
        kinds["on a machine" if same else "between machines"][rank] = LARGE[place.device.type] / taken / 1e9
    texts = [f"{kind} {statistics.median(rates.values()):.2f} GB/s" for kind, rates in kinds.items() if rates]
    rates_by_link = {
        f"{(rank - 1) % place.world}->{rank}": rate for kind in kinds.values() for rank, rate in kind.items()
    }
    findings = [Finding("links", "ok", f"median {', '.join(texts)}", figures={"gb_per_s": rates_by_link})]
    for name, rates in kinds.items():
        for rank, rate in rates.items():
            others = [other for receiver, other in rates.items() if receiver != rank]
            if not others or rate >= SLOW_LINK * statistics.median(others):
                continue
            ends = " -> ".join(place.named([end]) for end in ((rank - 1) % place.world, rank))
            share = rate / statistics.median(others)
            text = f"{ends}: {rate:.2f} GB/s, {share:.2f} of the median of the other links {name}"
            findings.append(Finding("link", "slow", text, LOOK_AT_LINK, {"share": share}))
    return findings


# --- ranks ------------------------------------------------------------------------------------


def check_of_compute(clock: Clock = seconds) -> Check:
    """The check of each rank's products of matrices: whether they are right, and how long they take.

    Args:
        clock: measures how long a product takes.
    """
    return Check(
        "products", functools.partial(_product, clock), judge_compute, LOOK_AT_RANK, needs_sound=True
    )


def _product(clock: Clock, place: Place) -> dict[str, float]:
    """seconds of a product of matrices of fixed size, and its largest error relative to float64."""
    size, dtype = PRODUCT[place.device.type]
    # The same numbers on every rank, drawn on the CPU.
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-2, 3, (size, size), generator=generator).to(place.device, dtype) for _ in range(2))
    taken = median_seconds(lambda: a @ b, place, clock)
    rows = torch.arange(0, size, size // 8, device=place.device)
    exact = a[rows].double() @ b.double()
    error = ((a @ b)[rows].double() - exact).abs().max() / exact.abs().max()
    return {"seconds": taken, "error": error.item()}


def judge_compute(measured: Sequence[dict[str, float]], place: Place) -> list[Finding]:
    """Names each rank whose product is wrong, and each that takes 1.5 times as long as the median rank."""
    size, dtype = PRODUCT[place.device.type]
    findings = []
    # The comparison is false for NaN, so a NaN is wrong.
    wrong = [rank for rank, one in enumerate(measured) if not one["error"] <= PRODUCT_ERROR[dtype]]
    if wrong:
        text = f"{place.named(wrong)}: a product of matrices differs from float64's by {measured[wrong[0]]['error']:.1e}"
        findings.append(
            Finding("products", "wrong", f"{text} of its largest element", "Take this machine out of use.")
        )
    times = [one["seconds"] for one in measured]
    # With two ranks this is the faster one.
    usual = statistics.median_low(times)
    rates = [2 * size**3 / taken / 1e12 for taken in times]
    if not wrong:
        text = f"{size} x {size} {str(dtype).removeprefix('torch.')}: median {statistics.median(rates):.2f} TFLOP/s a rank"
        findings.append(Finding("products", "ok", text, figures={"tflop_per_s": rates}))
    for rank, taken in enumerate(times):
        if taken > SLOW_RANK * usual:
            text = f"{place.named([rank])}: {taken / usual:.1f} times as long as the median rank"
            findings.append(Finding("rank", "slow", text, LOOK_AT_RANK, {"times": taken / usual}))
    return findings
