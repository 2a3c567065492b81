"""What a rank's Chrome trace says about its steps: computation, exchanges by axis, and idle time.

    compute       the device computes (a CUDA kernel; on the CPU an operator of the main thread)
    exchange      an exchange of an axis is under way (an NCCL kernel; on the CPU gloo's part of it)
    exposed       exchanges are under way and the device does not compute; the rest of them is hidden
    idle          neither: the device waits for Python, for the CPU, or for data

So compute + exposed + idle is the whole step. An exchange is under way while it waits for other ranks, too.

Fields of CUDA events are those of Kineto: an NCCL kernel carries ``Process Group Name`` and ``Collective name``.
"""

from __future__ import annotations

import gzip
import json
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longspan.runs.profiling.intervals import Interval, clip, difference, length, union

Event = Mapping[str, Any]
#: what the labels of an exchange, of a tile of attention and of a step begin with (``labels``)
EXCHANGE, TILE, STEP = "exchange ", "attention tile ", "longspan step "
#: the axis of an exchange that is in no known group, and the name of copies between the host and the device
OTHER, COPIES = "other", "host copies"
#: intervals of a picture's lane that are nearer than this share of a step are joined
RESOLUTION = 1 / 1500
#: operators of the CPU that are not computation: their name begins so
_NOT_COMPUTE = ("c10d::", "_c10d_functional::", "autograd::", "torch::autograd")
#: compiled code, whose operators do not appear one by one
_COMPILED = ("Torch-Compiled Region", "CompiledFunction")


def read_events(path: Path) -> list[Event]:
    """The events of a Chrome trace, which may be compressed (.gz)."""
    content = path.read_bytes()
    return json.loads(gzip.decompress(content) if path.suffix == ".gz" else content)["traceEvents"]


def interval(event: Event) -> Interval:
    return float(event["ts"]), float(event["ts"]) + float(event["dur"])


@dataclass(frozen=True)
class Times:
    """When a rank computes and exchanges, over the whole trace.

    Attributes:
        steps: the recorded steps, in order.
        compute: times of computation, joined.
        exchanges: axis -> times of its exchanges, joined.
        operations: (axis, operation) -> times, joined.
        tiles: direction -> times of attention's tiles.
    """

    steps: list[Interval]
    compute: list[Interval]
    exchanges: dict[str, list[Interval]]
    operations: dict[tuple[str, str], list[Interval]]
    tiles: dict[str, list[Interval]]


def times_of(events: Sequence[Event], axes: Mapping[str, str]) -> Times:
    """Sorts the events of a trace.

    Args:
        axes: name of each process group -> axis.
    """
    whole = [e for e in events if e.get("ph") == "X" and e.get("dur") is not None]
    marks = [e for e in whole if e["name"].startswith(STEP) and e.get("cat") == "user_annotation"]
    steps = sorted(map(interval, marks))
    on_gpu = any(e.get("cat") == "kernel" for e in whole)
    operations: dict[tuple[str, str], list[Interval]] = {}
    if on_gpu:
        compute, found = _of_gpu(whole, axes)
    else:
        compute, found = _of_cpu(whole, marks[0]["tid"] if marks else None)
    for key, when in found:
        operations.setdefault(key, []).append(when)
    # On a GPU this is the time from the first to the last kernel that the labelled code has started.
    category = "gpu_user_annotation" if on_gpu else "user_annotation"
    tiles: dict[str, list[Interval]] = {}
    for e in whole:
        if e.get("cat") == category and e["name"].startswith(TILE):
            tiles.setdefault(e["name"].removeprefix(TILE), []).append(interval(e))
    by_axis: dict[str, list[Interval]] = {}
    for (axis, _), parts in operations.items():
        by_axis.setdefault(axis, []).extend(parts)
    return Times(
        steps,
        union(compute),
        {axis: union(parts) for axis, parts in by_axis.items()},
        {key: union(parts) for key, parts in operations.items()},
        {direction: union(parts) for direction, parts in tiles.items()},
    )


Found = list[tuple[tuple[str, str], Interval]]


def _of_gpu(events: Iterable[Event], axes: Mapping[str, str]) -> tuple[list[Interval], Found]:
    """(times of computation, [((axis, operation), time)]) of the kernels and copies of a GPU."""
    compute: list[Interval] = []
    found: Found = []
    for e in events:
        category, name = e.get("cat"), e["name"]
        if category == "kernel" and name.startswith("nccl"):
            arguments = e.get("args") or {}
            group = arguments.get("Process Group Name", "")
            axis = axes.get(group) or arguments.get("Process Group Description") or OTHER
            found.append(((axis, arguments.get("Collective name") or name), interval(e)))
        elif category == "gpu_memcpy" and ("HtoD" in name or "DtoH" in name):
            found.append(((COPIES, "copy"), interval(e)))
        elif category in ("kernel", "gpu_memcpy", "gpu_memset"):
            compute.append(interval(e))
    return compute, found


def _of_cpu(events: Iterable[Event], main: Any) -> tuple[list[Interval], Found]:
    """The same of the CPU: operators of the main thread, and gloo's exchanges.

    gloo works in threads of its own, so that its event begins with the label of its exchange or soon after. Events
    belong to labels in order; an exchange is under way from its label's beginning to its event's end.
    """
    compute: list[Interval] = []
    labels: list[Event] = []
    gloo: list[Event] = []
    for e in events:
        category, name = e.get("cat"), e["name"]
        if name.startswith("gloo:"):
            gloo.append(e)
        elif e.get("tid") != main:
            continue
        elif category == "cpu_op" and _computes(name):
            compute.append(interval(e))
        elif category == "user_annotation" and name.startswith(EXCHANGE):
            labels.append(e)
    waiting: dict[str, deque[tuple[float, str, str]]] = {}
    for e in sorted(labels, key=interval):
        axis, _, operation = e["name"].removeprefix(EXCHANGE).partition("/")
        # gloo makes a reduce-scatter of an all-reduce.
        kind = "all_reduce" if operation == "reduce_scatter" else operation
        waiting.setdefault(kind, deque()).append((interval(e)[0], axis, operation))
    found: Found = []
    for e in sorted(gloo, key=interval):
        start, stop = interval(e)
        kind = e["name"].removeprefix("gloo:")
        queue = waiting.get("all_reduce" if kind == "reduce_scatter" else kind)
        if queue and queue[0][0] <= start:
            begun, axis, operation = queue.popleft()
            found.append(((axis, operation), (begun, stop)))
        else:
            found.append(((OTHER, kind), (start, stop)))
    return compute, found


def _computes(operator: str) -> bool:
    """Whether an operator of the CPU is computation; functions of Python and of autograd only contain operators."""
    return operator.startswith(_COMPILED) or ("::" in operator and not operator.startswith(_NOT_COMPUTE))


def figures_of_step(times: Times, step: Interval) -> dict[str, Any]:
    """The figures of one step, in seconds.

    Returns:
        step, compute, exposed, hidden, idle, and axes: axis -> (seconds, exposed, hidden, operations); attention:
        direction -> seconds inside the tiles.
    """
    compute = clip(times.compute, step)
    exchanges = union(when for axis in times.exchanges.values() for when in clip(axis, step))
    whole, busy = step[1] - step[0], length(compute)
    exposed = length(difference(exchanges, compute))
    axes: dict[str, Any] = {}
    for axis, when in sorted(times.exchanges.items()):
        own = clip(when, step)
        if not own:
            continue
        alone = length(difference(own, compute))
        axes[axis] = {
            "seconds": length(own) / 1e6,
            "exposed": alone / 1e6,
            "hidden": (length(own) - alone) / 1e6,
            "operations": {
                operation: length(clip(part, step)) / 1e6
                for (of, operation), part in sorted(times.operations.items())
                if of == axis and clip(part, step)
            },
        }
    return {
        "step": whole / 1e6,
        "compute": busy / 1e6,
        "exposed": exposed / 1e6,
        "hidden": (length(exchanges) - exposed) / 1e6,
        "idle": (whole - busy - exposed) / 1e6,
        "axes": axes,
        "attention": {name: length(clip(when, step)) / 1e6 for name, when in sorted(times.tiles.items())},
    }


def lanes_of_step(times: Times, step: Interval) -> dict[str, list[list[float]]]:
    """The lanes of a picture of one step: compute and each axis -> [start, stop] in ms since the step began.

    Intervals that a picture could not show apart are joined.
    """
    gap = (step[1] - step[0]) * RESOLUTION
    lanes = {"compute": times.compute, **dict(sorted(times.exchanges.items()))}
    return {
        name: [
            [round((a - step[0]) / 1e3, 4), round((b - step[0]) / 1e3, 4)]
            for a, b in union(clip(when, step), gap)
        ]
        for name, when in lanes.items()
        if clip(when, step)
    }
