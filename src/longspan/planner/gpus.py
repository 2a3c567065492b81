"""Facts about GPUs, each with the document to check it against; the numbers are not checked against it yet."""

from __future__ import annotations

from dataclasses import dataclass

from longspan.errors import UserError, did_you_mean


@dataclass(frozen=True)
class Gpu:
    """A GPU.

    Attributes:
        memory: bytes of device memory.
        source: the document that gives the number.
    """

    name: str
    memory: int
    source: str


_GB = 10**9

#: by the name that ``--gpu`` takes
GPUS = {
    "a100-40": Gpu("A100 40 GB", 40 * _GB, "NVIDIA A100 datasheet, 2021"),
    "a100": Gpu("A100 80 GB", 80 * _GB, "NVIDIA A100 datasheet, 2021"),
    "h100": Gpu("H100 SXM 80 GB", 80 * _GB, "NVIDIA H100 datasheet, 2023"),
    "h200": Gpu("H200 SXM 141 GB", 141 * _GB, "NVIDIA H200 datasheet, 2023"),
    "b200": Gpu("B200 180 GB", 180 * _GB, "NVIDIA DGX B200 datasheet, 2024: 1,440 GB over 8 GPUs"),
    "l40s": Gpu("L40S 48 GB", 48 * _GB, "NVIDIA L40S datasheet, 2023"),
}

#: bytes that a process takes on a GPU before its first tensor (context, kernels, NCCL's buffers): an estimate
FRAMEWORK = 2 * 2**30


def find_gpu(name: str) -> Gpu:
    """The GPU of a name.

    Raises:
        UserError: there is no GPU of this name in the table.
    """
    found = GPUS.get(name.lower())
    if found is None:
        raise UserError(f"--gpu {name}: one of {', '.join(GPUS)}.{did_you_mean(name.lower(), GPUS)}")
    return found
