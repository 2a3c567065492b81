"""The memory of one step by component, from the profiler's events of allocation.

Memory that lives through the step is named by its address: parameters, gradients, optimizer state, buffers. What the
step allocates is named by the code that allocates it, and by when it is freed:

    gathered weights       FSDP's whole weights of a layer
    gradient reduction     FSDP's gradients on their way to the ranks that keep them
    gradients              what is left of them after the step
    logits and loss        cross-entropy, with its part of the backward pass
    kept for backward      allocated in the forward pass and freed in the backward pass: activations
    attention              the rest of attention's tiles: received keys, partial results
    experts                the rest of the experts' products
    forward, backward      the rest of either pass
    optimizer              the optimizer's own work
    other                  what none of these explains
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from longspan.runs.profiling.intervals import Interval, union
from longspan.runs.profiling.trace import Event, interval

#: beginning of an event's name -> the component of what is allocated in it
MARKS = {
    "FSDP::all_gather": "gathered weights",
    "FSDP::pre_forward": "gathered weights",
    "FSDP::pre_backward": "gathered weights",
    "FSDP::post_backward_reduce": "gradient reduction",
    "_LinearCrossEntropy": "logits and loss",
    "_VocabParallelCrossEntropy": "logits and loss",
    "MoveKeys": "attention",
    "_ToHeads": "attention",
    "_ToTokens": "attention",
    "_ExpertMLPs": "experts",
    "Optimizer.step": "optimizer",
}
#: these marks name an allocation even where it is kept for the backward pass
_STRONG = {"gathered weights", "gradient reduction", "logits and loss", "optimizer"}
KEPT, OTHER = "kept for backward", "other"
#: the order of components in tables and pictures: what lives longest first
COMPONENTS = (
    "parameters",
    "optimizer state",
    "buffers",
    "gradients",
    "gathered weights",
    KEPT,
    "attention",
    "experts",
    "logits and loss",
    "gradient reduction",
    "forward",
    "backward",
    "optimizer",
    OTHER,
)
#: points of a timeline
POINTS = 400


@dataclass
class Allocation:
    """Bytes at an address, from ``start`` to ``stop`` (None: not freed in the trace); component "" is not known yet."""

    size: int
    start: float
    thread: Any
    stop: float | None = None
    component: str = ""


def timeline(
    events: Sequence[Event],
    step: Interval,
    before: Mapping[int, tuple[int, str]],
    gradients: Iterable[int],
    device_type: int,
) -> dict[str, Any]:
    """The memory of a step.

    Args:
        step: its start and stop.
        before: memory held when it began: address -> (bytes, component).
        gradients: addresses of the gradients after it.
        device_type: 0 for the CPU, 1 for CUDA, as events of allocation have it.

    Returns:
        peak_bytes and peak_ms (since the step began), at_peak (component -> bytes), at_start, and points: ms and for
        each component a list of bytes.
    """
    found, unseen = allocations(events, step, before, device_type)
    marks, backward = _marks(events, step[1])
    kept = set(gradients)
    for address, allocation in found:
        left = allocation.stop is None or allocation.stop > step[1]
        if not allocation.component:
            new = "gradients" if left and address in kept else _component(allocation, marks, backward)
            allocation.component = new
    changes: list[tuple[float, int, str]] = []
    held: dict[str, int] = dict.fromkeys(COMPONENTS, 0)
    for _, allocation in found:
        if allocation.start < step[0]:
            held[allocation.component] += allocation.size
        else:
            changes.append((allocation.start, allocation.size, allocation.component))
        if allocation.stop is not None and allocation.stop < step[1]:
            changes.append((allocation.stop, -allocation.size, allocation.component))
    held[OTHER] += unseen
    changes.sort(key=lambda change: change[0])
    return _series(changes, held, step)


def allocations(
    events: Sequence[Event], step: Interval, before: Mapping[int, tuple[int, str]], device_type: int
) -> tuple[list[tuple[int, Allocation]], int]:
    """What is held in a step: [(address, Allocation)], and bytes held before the trace began that have no name.

    An allocation of ``before`` has its component.
    """
    changes = [
        e["args"] | {"ts": float(e["ts"]), "tid": e.get("tid")}
        for e in events
        if e.get("name") == "[memory]" and e["args"].get("Device Type") == device_type
    ]
    changes.sort(key=lambda change: change["ts"])
    alive: dict[int, Allocation] = {}
    found: list[tuple[int, Allocation]] = []
    started = False
    unseen = 0

    def start() -> None:
        for address, (size, component) in before.items():
            alive[address] = Allocation(size, step[0] - 1.0, None, component=component)
        found.extend(alive.items())

    for change in changes:
        if change["ts"] >= step[1]:
            break
        if not started and change["ts"] >= step[0]:
            started = True
            start()
            if device_type:
                # A GPU's allocator counts all that it holds, so that the rest is known, if not its name.
                unseen = int(change.get("Total Allocated", 0)) - int(change["Bytes"])
                unseen = max(0, unseen - sum(allocation.size for allocation in alive.values()))
        address, size = int(change["Addr"]), int(change["Bytes"])
        if size >= 0:
            alive[address] = Allocation(size, change["ts"], change["tid"])
            if started:
                found.append((address, alive[address]))
        elif address in alive:
            alive.pop(address).stop = change["ts"]
    if not started:
        start()
    return found, unseen


_Marks = dict[Any, tuple[list[float], list[tuple[float, float, str]]]]


def _marks(events: Sequence[Event], end: float) -> tuple[_Marks, list[Interval]]:
    """(thread -> (starts, marks of that thread by start), times of backward passes), up to the end of a step."""
    by_thread: dict[Any, list[tuple[float, float, str]]] = {}
    backward: list[Interval] = []
    for e in events:
        name = e.get("name", "")
        if e.get("ph") != "X" or e.get("cat") not in ("cpu_op", "user_annotation"):
            continue
        start, stop = interval(e)
        if start >= end:
            continue
        if name.startswith("autograd::engine::evaluate_function"):
            backward.append((start, stop))
        component = next((c for prefix, c in MARKS.items() if name.startswith(prefix)), None)
        if component:
            by_thread.setdefault(e.get("tid"), []).append((start, stop, component))
    marks: _Marks = {}
    for thread, found in by_thread.items():
        found.sort(key=lambda mark: (mark[0], -mark[1]))
        marks[thread] = [start for start, _, _ in found], found
    # Between two functions of a backward pass there is nothing else.
    return marks, union(backward, gap=200.0)


def _inside(times: list[Interval], at: float) -> bool:
    place = bisect.bisect_right(times, (at, float("inf"))) - 1
    return place >= 0 and at < times[place][1]


def _component(allocation: Allocation, marks: _Marks, backward: list[Interval]) -> str:
    at = allocation.start
    mark = None
    starts, found = marks.get(allocation.thread, ([], []))
    # The innermost mark began last; marks are nested at most a few deep.
    for place in range(bisect.bisect_right(starts, at) - 1, max(-1, bisect.bisect_right(starts, at) - 9), -1):
        if at <= found[place][1]:
            mark = found[place][2]
            break
    if mark in _STRONG:
        return str(mark)
    in_backward = _inside(backward, at)
    if not in_backward and allocation.stop is not None and _inside(backward, allocation.stop):
        return KEPT
    if mark:
        return mark
    if in_backward:
        return "backward"
    return "forward" if backward and at < backward[-1][1] else OTHER


def _series(changes: list[tuple[float, int, str]], held: dict[str, int], step: Interval) -> dict[str, Any]:
    """Adds changes up to a timeline of at most about ``POINTS`` points, the peak among them."""
    at_start, now = dict(held), dict(held)
    total = peak = sum(held.values())
    peak_at, at_peak = step[0], dict(held)
    width = (step[1] - step[0]) / POINTS
    # The highest moment of each part of the step.
    rows: list[tuple[float, dict[str, int]]] = [(step[0], dict(held))]
    part, highest, row, row_at = 0, -1, dict(held), step[0]
    for when, size, component in changes:
        index = int((when - step[0]) / width) if width else 0
        if index != part and highest >= 0:
            rows.append((row_at, row))
            highest = -1
        part = index
        now[component] += size
        total += size
        if total > highest:
            highest, row, row_at = total, dict(now), when
        if total > peak:
            peak, peak_at, at_peak = total, when, dict(now)
    if highest >= 0:
        rows.append((row_at, row))
    rows.append((step[1], dict(now)))
    used = [c for c in COMPONENTS if any(values[c] for _, values in rows) or at_peak[c]]
    return {
        "peak_bytes": peak,
        "peak_ms": round((peak_at - step[0]) / 1e3, 4),
        "at_peak": {c: at_peak[c] for c in used if at_peak[c]},
        "at_start": {c: at_start[c] for c in used if at_start[c]},
        "points": {
            "ms": [round((when - step[0]) / 1e3, 4) for when, _ in rows],
            "components": {c: [values[c] for _, values in rows] for c in used},
        },
    }
