"""The CUDA kernel against the reference. Marked gpu: runs where there is a device."""

import math

import pytest
import torch

from longspan.context_parallel.cuda_kernels import make_kernel
from longspan.context_parallel.kernels import CPU_KERNELS, select_kernel

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("heads", "groups", "d"), [(8, 8, 64), (8, 2, 128), (4, 1, 64)])
@pytest.mark.parametrize(("rows", "keys"), [(1024, 1024), (777, 777), (256, 1300)])
def test_flash_is_as_near_to_float64_as_math_in_bf16(heads, groups, d, rows, keys, causal):
    if causal:
        keys = rows
    g = torch.Generator(device="cuda").manual_seed(0)
    q, dout = (
        torch.randn(rows, 1, heads, d, device="cuda", dtype=torch.bfloat16, generator=g) for _ in range(2)
    )
    k, v = (
        torch.randn(keys, 1, groups, d, device="cuda", dtype=torch.bfloat16, generator=g) for _ in range(2)
    )
    scale = 1 / math.sqrt(d)

    def run(kernel, dtype):
        x = [t.to(dtype) for t in (q, k, v, dout)]
        out, lse = kernel.forward(*x[:3], causal, scale)
        return out, lse, *kernel.backward(x[3], *x[:3], out, lse, causal, scale)

    exact = run(CPU_KERNELS["math"], torch.float64)
    plain = run(CPU_KERNELS["math"], torch.bfloat16)
    flash = run(make_kernel("cuda-flash", False), torch.bfloat16)
    for name, a, b, e in zip(("out", "lse", "dq", "dk", "dv"), flash, plain, exact):
        error, allowed = ((x.double() - e).abs().max().item() for x in (a, b))
        assert error <= 2 * max(allowed, 1e-3), f"{name}: {error} against {allowed}"


def test_bf16_on_cuda_takes_flash():
    assert select_kernel(torch.device("cuda"), torch.bfloat16, 64).kernel.name == "cuda-flash"
    assert select_kernel(torch.device("cuda"), torch.float32, 64).kernel.name == "math"
