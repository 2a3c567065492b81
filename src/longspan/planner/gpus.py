"""Facts about GPUs and about how much of them programs reach, each with its source."""

from __future__ import annotations

from dataclasses import dataclass

from longspan.errors import UserError, did_you_mean

_GB, _TERA = 10**9, 10**12


@dataclass(frozen=True)
class Gpu:
    """A GPU in its usual machine of eight.

    Attributes:
        memory: bytes of device memory.
        flops: floating-point operations a second of dense products: of bfloat16, TF32 and float32.
        bandwidth: bytes a second of device memory.
        link: bytes a second from one GPU to others of the machine, in one direction.
        network: bytes a second of a GPU's share of the network between machines, in one direction.
        attention: operations a second of attention kernels with a causal mask and heads of 128, forward and backward.
        source: the documents that give the numbers.
    """

    name: str
    memory: int
    flops: dict[str, float]
    bandwidth: float
    link: float
    network: float
    attention: tuple[float, float]
    source: str


def _rates(bfloat16: float, tf32: float, float32: float) -> dict[str, float]:
    return {"bfloat16": bfloat16 * _TERA, "tf32": tf32 * _TERA, "float32": float32 * _TERA}


#: FlashAttention-2 on Ampere and Ada, FlashAttention-3 on Hopper, as shares of the bfloat16 rate: the curves for long
#: causal sequences and heads of 128 in arXiv 2307.08691 (A100: about 190 forward, 170 backward) and arXiv 2407.08608
#: (H100: about 620 forward, 530 backward)
_AMPERE, _HOPPER = (0.61, 0.54), (0.63, 0.54)


def _gpu(
    name: str,
    memory: float,
    rates: dict[str, float],
    bandwidth: float,
    link: float,
    network: float,
    attention: tuple[float, float],
    source: str,
) -> Gpu:
    forward, backward = (share * rates["bfloat16"] for share in attention)
    return Gpu(
        name,
        round(memory * _GB),
        rates,
        bandwidth * _GB,
        link * _GB,
        network * _GB,
        (forward, backward),
        source,
    )


#: by the name that ``--gpu`` takes
GPUS = {
    "a100-40": _gpu(
        "A100 40 GB",
        40,
        _rates(312, 156, 19.5),
        1555,
        300,
        25,
        _AMPERE,
        "NVIDIA A100 and DGX A100 datasheets",
    ),
    "a100": _gpu(
        "A100 80 GB",
        80,
        _rates(312, 156, 19.5),
        2039,
        300,
        25,
        _AMPERE,
        "NVIDIA A100 and DGX A100 datasheets",
    ),
    "h100": _gpu(
        "H100 SXM 80 GB",
        80,
        _rates(989, 495, 67),
        3350,
        450,
        50,
        _HOPPER,
        "NVIDIA H100 and DGX H100 datasheets",
    ),
    "h200": _gpu(
        "H200 SXM 141 GB",
        141,
        _rates(989, 495, 67),
        4800,
        450,
        50,
        _HOPPER,
        "NVIDIA H200 and DGX H200 datasheets",
    ),
    "b200": _gpu(
        "B200 180 GB", 180, _rates(2250, 1100, 75), 8000, 900, 50, _HOPPER, "NVIDIA DGX B200 datasheet"
    ),
    "l40s": _gpu(
        "L40S 48 GB", 48, _rates(362, 183, 91.6), 864, 32, 25, _AMPERE, "NVIDIA L40S datasheet; PCIe 4.0 x16"
    ),
}
#: GPUs of a machine
PER_MACHINE = 8

#: What programs reach of these rates. Products: the largest rates that the survey of matmul shapes in the book
#: "Machine Learning Engineering" (S. Bekman, the MAMF tables) finds are 0.80 to 0.87 of the datasheets', on shapes that it
#: searched for; a training step's own shapes and the lower clock of a loaded GPU reach less. Copies: 0.9 is a copy
#: kernel's, and small tensors reach less. Links: bus bandwidth of nccl-tests over that of the link.
MATMUL, COPY, LINK = 0.70, 0.80, 0.80
#: seconds until a collective begins to move data, for each rank that it passes
LATENCY_S = 5e-6

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
