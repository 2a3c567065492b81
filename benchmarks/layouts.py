"""Layouts of packed documents: balance of work, rows that travel, and what planning costs.

    python benchmarks/layouts.py

The packs are those of lengths.json: 64K tokens over 8 ranks, 512K over 64. Needs no process group. A ring would move
every rank's keys to every other; rows are given as a share of that.
"""

from __future__ import annotations

import itertools
import json
import statistics
import time
from pathlib import Path

import common

from longspan.context_parallel import Schedule, SequenceLayout
from longspan.context_parallel.layout import LAYOUTS

LENGTHS = json.loads(Path(__file__).with_name("lengths.json").read_text())


def measure(name: str, packs: list[list[int]], ranks: int) -> str:
    """A line of the table: imbalance mean and worst, rows mean, tiles a rank, planning and schedule in ms."""
    imbalance, rows, tiles, planning, scheduling = [], [], [], [], []
    for lengths in packs:
        cu = list(itertools.accumulate(lengths, initial=0))
        start = time.perf_counter()
        layout = SequenceLayout.make(name, cu[-1], ranks, cu_seqlens=cu)
        middle = time.perf_counter()
        schedule = Schedule.of(layout, ranks // 2)
        planning.append(1e3 * (middle - start))
        scheduling.append(1e3 * (time.perf_counter() - middle))
        areas = [layout.area(r) for r in range(ranks)]
        imbalance.append(max(areas) * ranks / sum(areas))
        received = sum(layout.received_rows(r) for r in range(ranks))
        rows.append(received / (ranks - 1) / layout.padded_total)
        tiles.append(sum(len(step.tiles) for step in schedule.steps))
    mean = statistics.mean
    return (
        f"  {name:<20} {mean(imbalance):7.3f} {max(imbalance):7.3f} {100 * mean(rows):9.1f} % {mean(tiles):8.0f} "
        f"{statistics.median(planning):10.2f} {max(planning):8.2f} {statistics.median(scheduling):10.2f}"
    )


if __name__ == "__main__":
    print(common.machine())
    for title, packs, ranks in (
        ("64K tokens over 8 ranks", LENGTHS["packs"]["65536"], 8),
        ("512K tokens over 64 ranks", LENGTHS["packs_512k"], 64),
    ):
        print(f"\n{len(packs)} packs of {title}")
        print(
            "                       max/mean  worst      rows      tiles   plan, ms      max   schedule, ms"
        )
        for name in LAYOUTS:
            print(measure(name, packs, ranks))
