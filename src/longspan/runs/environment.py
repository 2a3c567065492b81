"""Environment variables that launch scripts set, and the effect of each on longspan.

This one table serves ``longspan env``, the notes at the start of a run, and docs/migrating.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

#: The variable holds the process id of the longspan launcher. It is absent if torchrun started the rank.
LAUNCHER = "LONGSPAN_LAUNCHER"
#: The variable holds how often the launcher, longspan or torchrun, has started the ranks before.
RESTARTS = "TORCHELASTIC_RESTART_COUNT"
#: TORCHELASTIC_RUN_ID in the ranks that longspan starts; torchrun sets other values
RUN_ID = "longspan"

Handling = Literal["set by longspan", "advised", "left alone", "no effect"]
SET: Handling = "set by longspan"
ADVISED: Handling = "advised"
LEFT: Handling = "left alone"
UNREAD: Handling = "no effect"


@dataclass(frozen=True)
class Variable:
    """How longspan handles an environment variable.

    Attributes:
        handling: ``set by longspan`` (some variables only if they are not set yet), ``advised``, ``left alone``
            (a library or a script reads it), or ``no effect`` (no program reads it).
        text: which program reads it, and what the user should do.
        only: ``nccl``: it matters only if NCCL is used, on CUDA; ``torchrun``: only if torchrun starts the
            processes; None: always.
    """

    handling: Handling
    text: str
    only: Literal["nccl", "torchrun"] | None = None


VARIABLES: dict[str, Variable] = {
    "CUDA_DEVICE_MAX_CONNECTIONS": Variable(
        LEFT,
        "not needed: no result and no exchange here depends on the order in which CUDA starts kernels of different streams.",
        "nccl",
    ),
    "CUDA_VISIBLE_DEVICES": Variable(LEFT, "CUDA shows these GPUs only; device: auto counts them."),
    "NCCL_ALGO": Variable(
        LEFT,
        "read by NCCL. Better unset: Tree is for all-reduce alone, and NCCL may refuse FSDP's all-gather with it.",
        "nccl",
    ),
    "NCCL_PROTO": Variable(LEFT, "read by NCCL. Better unset: NCCL chooses by size.", "nccl"),
    "NCCL_IB_DISABLE": Variable(
        LEFT, "read by NCCL; 0 is its default (InfiniBand is used where it is).", "nccl"
    ),
    "NCCL_SOCKET_IFNAME": Variable(LEFT, "read by NCCL: the network interface to use.", "nccl"),
    "NCCL_DEBUG": Variable(
        LEFT,
        "read by NCCL: its log. Who sends what to whom is shown by longspan layout, without a run.",
        "nccl",
    ),
    "NCCL_DEBUG_SUBSYS": Variable(
        LEFT, "read by NCCL: parts of its log; rows of keys travel as P2P, not as COLL.", "nccl"
    ),
    "NCCL_BLOCKING_WAIT": Variable(
        LEFT,
        "an old name: PyTorch calls it TORCH_NCCL_BLOCKING_WAIT now. For time-outs use ddp_timeout.",
        "nccl",
    ),
    "TORCH_NCCL_BLOCKING_WAIT": Variable(
        LEFT, "read by PyTorch: waiting for NCCL blocks. For time-outs use ddp_timeout.", "nccl"
    ),
    "NCCL_TIMEOUT": Variable(
        UNREAD, "read by nobody. The time-out is ddp_timeout, in seconds (--distributed-timeout-minutes)."
    ),
    "MASTER_ADDR": Variable(
        SET, "the launcher sets it. Say it by --main-process-ip, or torchrun's --master-addr.", "torchrun"
    ),
    "MASTER_PORT": Variable(
        SET, "the launcher sets it. Say it by --main-process-port, or torchrun's --master-port.", "torchrun"
    ),
    "RANK": Variable(SET, "the launcher sets it; with WORLD_SIZE it says that this process is one of many."),
    "WORLD_SIZE": Variable(SET, "the launcher sets it: processes over all machines (--num-processes)."),
    "LOCAL_RANK": Variable(SET, "the launcher sets it: this machine's processes are numbered, and its GPUs."),
    "GLOO_SOCKET_IFNAME": Variable(
        SET,
        "read by gloo: the network interface to use. On one machine, where it is not set: the loopback interface.",
    ),
    "OMP_NUM_THREADS": Variable(
        SET,
        "on CPU, where it is not set: cores / processes of this machine; training takes that many for PyTorch anyway.",
    ),
    "PYTORCH_CUDA_ALLOC_CONF": Variable(
        ADVISED,
        "read by PyTorch (PYTORCH_ALLOC_CONF is its new name): expandable_segments:True leaves fewer gaps in GPU memory.",
    ),
    "PYTORCH_ALLOC_CONF": Variable(
        ADVISED, "read by PyTorch: expandable_segments:True leaves fewer gaps in GPU memory."
    ),
    "SLURM_JOB_NODELIST": Variable(
        LEFT, "for scripts: its first machine is --main-process-ip, or torchrun's --master-addr."
    ),
    "SLURM_JOB_NUM_NODES": Variable(LEFT, "for scripts: it is --num-machines, or torchrun's --nnodes."),
    "HF_HUB_OFFLINE": Variable(LEFT, "read by huggingface_hub: nothing is fetched."),
}


def found(environ: Mapping[str, str]) -> list[dict[str, str]]:
    """The variables of the table that are set, each as a dict of name, value, handling and text."""
    return [
        {"name": name, "value": environ[name], "handling": known.handling, "text": known.text}
        for name, known in VARIABLES.items()
        if name in environ
    ]


def without_effect(environ: Mapping[str, str], device: str, joined: bool) -> list[str]:
    """Notes on the variables that are set and change nothing in this run.

    Args:
        device: ``cpu`` or ``cuda``.
        joined: a launcher has started this process, so the launcher's variables have an effect.
    """
    # The longspan that started this process has printed these notes already.
    if environ.get("TORCHELASTIC_RUN_ID") == RUN_ID:
        return []
    notes = []
    idle = (
        [n for n, known in VARIABLES.items() if n in environ and known.only == "nccl"]
        if device == "cpu"
        else []
    )
    if idle:
        notes.append(f"{', '.join(idle)}: for CUDA and NCCL; this run is on CPU, over gloo.")
    for name, known in VARIABLES.items():
        if name in environ and (known.handling == UNREAD or (known.only == "torchrun" and not joined)):
            notes.append(f"{name}: {known.text}")
    return notes
