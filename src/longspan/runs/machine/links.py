"""How the GPUs of this machine are connected, and which groups of ranks would exchange over slow links.

The links are those that ``nvidia-smi topo -m`` prints: a matrix with a class of link for each pair of GPUs.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from longspan.config.run import Checked
from longspan.mesh.topology import RankGenerator, hierarchical_groups

#: class of link -> what it is; NV followed by a number is a bonded set of NVLinks
CLASSES = {
    "PIX": "one PCIe bridge",
    "PXB": "several PCIe bridges",
    "PHB": "PCIe through the CPU's host bridge",
    "NODE": "PCIe and the link between host bridges of a CPU",
    "SYS": "PCIe and the link between CPU sockets",
}
#: classes over which keys and heads should not travel if there is another way, the slowest first
SLOW = ("SYS", "NODE", "PHB")
#: seconds that nvidia-smi may take
WAIT_S = 20.0
_ESCAPES = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True)
class Links:
    """The links of a machine: ``between[i, j]``, i < j, is the class of the link of GPUs i and j."""

    gpus: int
    between: dict[tuple[int, int], str]

    def of(self, one: int, other: int) -> str:
        return self.between[min(one, other), max(one, other)]

    def lines(self) -> list[str]:
        """The links as text: a line for each class, the fastest first."""
        pairs_of: dict[str, list[str]] = {}
        for (i, j), kind in self.between.items():
            pairs_of.setdefault(kind, []).append(f"{i}-{j}")
        if not pairs_of:
            return ["one GPU"]
        if len(pairs_of) == 1:
            (kind,) = pairs_of
            return [f"{kind} between all {self.gpus} GPUs: {described(kind)}"]
        kinds = sorted(pairs_of, key=_slowness)
        return [f"{kind} ({described(kind)}): GPUs {', '.join(pairs_of[kind])}" for kind in kinds]


def described(kind: str) -> str:
    """What a class of link is."""
    count = kind.removeprefix("NV")
    if kind.startswith("NV") and count.isdigit():
        return f"{count} NVLink{'s' if count != '1' else ''}"
    return CLASSES.get(kind, "unknown to longspan")


def _slowness(kind: str) -> tuple[int, int]:
    """Orders classes from the fastest to the slowest."""
    count = kind.removeprefix("NV")
    if count != kind and count.isdigit():
        return 0, -int(count)
    return 1, [*CLASSES].index(kind) if kind in CLASSES else len(CLASSES)


def parse(text: str) -> Links:
    """The links of the output of ``nvidia-smi topo -m``.

    Raises:
        ValueError: there is no matrix of GPUs in the text.
    """
    lines = [_ESCAPES.sub("", line) for line in text.splitlines()]
    # The first columns are GPUs; network cards and affinities follow.
    header = next((line.split() for line in lines if line[:1].isspace() and "GPU0" in line.split()), None)
    if header is None:
        raise ValueError("no matrix of GPUs in the output of nvidia-smi topo -m")
    names = [name for name in header if re.fullmatch(r"GPU\d+", name)]
    rows = {line.split()[0]: line.split()[1:] for line in lines if line.split()}
    if missing := [name for name in names if len(rows.get(name, [])) < len(names)]:
        raise ValueError(f"no whole row of {missing[0]} in the output of nvidia-smi topo -m")
    between = {(i, j): rows[names[i]][j] for i in range(len(names)) for j in range(i + 1, len(names))}
    return Links(len(names), between)


def read_links() -> tuple[Links | None, str]:
    """(the links of this machine's GPUs or None, why there are none)."""
    try:
        done = subprocess.run(
            ["nvidia-smi", "topo", "-m"], capture_output=True, text=True, timeout=WAIT_S, check=False
        )
    except FileNotFoundError:
        return None, "nvidia-smi is not installed"
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, f"nvidia-smi cannot be run: {error}"
    if done.returncode:
        said = (done.stderr or done.stdout).strip().partition("\n")[0]
        return None, f"nvidia-smi topo -m fails: {said}"
    try:
        return parse(done.stdout), ""
    except ValueError as error:
        return None, str(error)


def visible_gpus(links: Links, variable: str | None) -> list[int]:
    """The GPU of each local rank, by nvidia-smi's numbers.

    Args:
        variable: CUDA_VISIBLE_DEVICES; names of GPUs (UUIDs), which nvidia-smi's matrix does not have, count as unset.
    """
    named = [part.strip() for part in (variable or "").split(",") if part.strip()]
    if named and all(part.isdigit() and int(part) < links.gpus for part in named):
        return list(map(int, named))
    return list(range(links.gpus))


def slow_groups(groups: Sequence[Sequence[int]], links: Links, gpus: Sequence[int]) -> list[str]:
    """What is slow about groups of ranks that exchange much, a text each; empty if nothing is.

    Args:
        groups: the ranks of each group; every machine has ``len(gpus)`` consecutive ranks, as the launcher numbers them.
        gpus: the GPU of each local rank. Other machines are taken to be like this one.
    """
    local = len(gpus)
    crossing = [ranks for ranks in groups if len({rank // local for rank in ranks}) > 1]
    found = []
    if crossing:
        found.append(
            f"{len(crossing)} of {len(groups)} groups cross machines of {local} GPUs, such as ranks {_named(crossing[0])}"
        )
    worst: dict[str, tuple[int, int]] = {}
    for ranks in groups:
        for at, one in enumerate(ranks):
            for other in ranks[at + 1 :]:
                if one // local == other // local and gpus[one % local] != gpus[other % local]:
                    worst.setdefault(links.of(gpus[one % local], gpus[other % local]), (one, other))
    for kind in SLOW:
        if kind in worst:
            one, other = worst[kind]
            found.append(
                f"ranks {one} and {other} exchange over {kind} ({described(kind)}): GPUs {gpus[one % local]} and "
                f"{gpus[other % local]}"
            )
    return found


def _named(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:8]))
    return f"{shown} ..." if len(ranks) > 8 else shown


def context_parallel_groups(run: Checked) -> list[list[int]]:
    """The groups of ranks that exchange keys or heads in every layer of attention.

    With ``a2a+p2p`` these are the inner groups: the outer ones are there to cross slow links.
    """
    sizes = run.sizes
    grid = RankGenerator(sizes.tp, 1, sizes.dp, sizes.pp, sizes.cp, sizes.order)
    if run.config.hybrid_context_parallel:
        return grid.get_ranks("dp-cp")
    groups = grid.get_ranks("cp")
    if not sizes.hierarchical_cp:
        return groups
    return [inner for ranks in groups for inner in hierarchical_groups(ranks, sizes.hierarchical_cp)[0]]


def remedy(run: Checked, local: int) -> str:
    """What to change so that context parallel groups stay on fast links.

    Args:
        local: GPUs of a machine.
    """
    tp, cp = run.sizes.tp, run.sizes.cp
    inside = max((i for i in range(1, cp + 1) if cp % i == 0 and i * tp <= local), default=1)
    if 1 < inside < cp:
        return (
            f"Let heads move on a machine and keys between machines: cp_comm_type: a2a+p2p with "
            f"hierarchical_context_parallel_sizes: [{inside}, {cp // inside}]; or a smaller context_parallel_size."
        )
    return (
        "Choose sizes whose tensor and context parallel groups are GPUs with NVLink between them; "
        "CUDA_VISIBLE_DEVICES gives the GPUs their order."
    )
