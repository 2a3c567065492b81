"""The time of a training step, from what it computes and sends and from the facts about a GPU.

    compute         products, attention and copies, each by its rate; kernels follow one another
    communication   (n - 1) / n of a gathered or scattered buffer through the slowest link of the group's ring,
                    twice that for an all-reduce
    exposed         tp and ep: all of it, because the next kernel needs the result;
                    keys of cp: what attention does not hide; weights and gradients (FSDP): what the rest does not hide
    bubble          (pp - 1) / (v m) of the micro-batches' time, with m micro-batches and v stages a rank
                    (arXiv 2104.04473)

The rates are those of long kernels. Steps whose kernels are short take longer than planned.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from longspan.planner.gpus import COPY, LATENCY_S, LINK, MATMUL, Gpu
from longspan.planner.work import Work

#: axes whose collectives run beside the computation, in this order
HIDDEN = ("fsdp", "dp_replicate", "edp", "edp_replicate")
#: axes whose keys and values travel while attention computes
KEYS = ("cp", "dp_cp", "cp outer")


@dataclass(frozen=True)
class Group:
    """Where a process group lies.

    Attributes:
        ranks: of the group.
        per_machine: ranks of the group on one machine.
    """

    ranks: int
    per_machine: int

    def bandwidth(self, gpu: Gpu) -> float:
        """Bytes a second that each rank sends in a ring: every GPU of a machine brings its share of the network."""
        if self.ranks <= self.per_machine:
            return gpu.link * LINK
        return min(gpu.link, gpu.network * self.per_machine) * LINK


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step on one pipeline rank.

    Attributes:
        compute: part -> seconds: ``products``, ``attention``, ``other kernels``.
        communication: axis -> seconds.
        exposed: axis -> the seconds in which nothing is computed.
        bubble: seconds of waiting for other stages.
    """

    compute: dict[str, float]
    communication: dict[str, float] = field(default_factory=dict)
    exposed: dict[str, float] = field(default_factory=dict)
    bubble: float = 0.0

    @property
    def total(self) -> float:
        return sum(self.compute.values()) + sum(self.exposed.values()) + self.bubble


def communication_time(collective: str, calls: float, size: float, group: Group, gpu: Gpu) -> float:
    """Seconds of a number of equal collectives that have ``size`` bytes in all, as ``Work.sent`` counts them."""
    n = group.ranks
    if n == 1:
        return 0.0
    if collective in ("message", "broadcast"):
        share, hops = 1.0, 1
    elif collective == "all-to-all":
        share, hops = (n - 1) / n, 1
    else:
        share, hops = (n - 1) / n * (2 if collective == "all-reduce" else 1), n - 1
    return calls * hops * LATENCY_S + size * share / group.bandwidth(gpu)


def step_time(
    work: Work,
    gpu: Gpu,
    groups: dict[str, Group],
    precision: str,
    pp: int,
    micro_batches: int,
    virtual: int = 1,
) -> StepTime:
    """The time of a step.

    Args:
        groups: axis -> its group.
        precision: of products: bfloat16, tf32 or float32.
        pp: pipeline ranks.
        virtual: stages of a rank.
    """
    matmul = sum(flops for (_, kind), flops in work.flops.items() if kind == "matmul")
    forward = sum(flops for (_, kind), flops in work.flops.items() if kind == "attention")
    backward = sum(flops for (_, kind), flops in work.flops.items() if kind == "attention backward")
    # Attention kernels compute in bfloat16 or float16 alone; wider precisions take plain products.
    rates = gpu.attention if precision == "bfloat16" else (gpu.flops[precision] * MATMUL,) * 2
    compute = {
        "products": matmul / (gpu.flops[precision] * MATMUL),
        "attention": forward / rates[0] + backward / rates[1],
        "other kernels": sum(work.moved.values()) / (gpu.bandwidth * COPY),
    }
    communication: dict[str, float] = {}
    travelling = 0.0
    for (axis, collective), (calls, size) in work.sent.items():
        if axis not in groups:
            continue
        seconds = communication_time(collective, calls, size, groups[axis], gpu)
        communication[axis] = communication.get(axis, 0.0) + seconds
        # Heads that move (a2a) do so before and after attention, and are exposed with what is gathered.
        if axis in KEYS and collective == "message":
            travelling += seconds
    exposed = {
        axis: seconds
        for axis, seconds in communication.items()
        if axis not in HIDDEN and axis not in KEYS and axis != "pp"
    }
    others = sum(seconds for axis, seconds in communication.items() if axis in KEYS) - travelling
    if travelling or others:
        exposed["cp"] = max(0.0, travelling - compute["attention"]) + others
    behind = sum(compute.values())
    for axis in HIDDEN:
        if axis in communication:
            exposed[axis] = max(0.0, communication[axis] - behind)
            behind = max(0.0, behind - communication[axis])
    busy = sum(compute.values()) + sum(exposed.values())
    bubble = (pp - 1) / (virtual * micro_batches) * busy
    return StepTime(compute, communication, exposed, bubble)
