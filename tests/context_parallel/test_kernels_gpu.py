"""The CUDA kernel against the reference. Marked gpu: runs where there is a device."""

import math

import pytest
import torch

from longspan.config.packages import has_package
from longspan.context_parallel import Schedule, SequenceLayout, context_parallel_attention
from longspan.context_parallel.kernels.choose import CPU_KERNELS, select_kernel
from longspan.context_parallel.kernels.cuda import make_kernel
from longspan.context_parallel.move_keys import backward_step, forward_step
from oracle import dense, inputs

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
    taken = select_kernel(torch.device("cuda"), torch.bfloat16, 64).kernel.name
    assert taken in ("flash-attn-3", "flash-attn-2", "cuda-flash")
    installed = has_package("flash_attn") or has_package("flash_attn_interface")
    assert installed or taken == "cuda-flash"
    assert select_kernel(torch.device("cuda"), torch.float32, 64).kernel.name == "math"


@pytest.mark.parametrize("name", ["cuda-flash", "cudnn"])
@pytest.mark.parametrize("window", [None, 300])
@pytest.mark.parametrize("ranks", [1, 4])
def test_all_ranks_in_turn_are_as_near_to_float64_as_one_call(name, window, ranks):
    """Packed documents, their tiles packed into variable-length calls, merged over steps."""
    cu, heads, groups, d = (0, 700, 701, 1500, 4096), 4, 2, 64
    x = [t.cuda() for t in inputs(cu[-1], heads, groups, d, torch.bfloat16)]
    kernel, scale = make_kernel(name, False), 1 / math.sqrt(d)
    layout = SequenceLayout.make("auto", cu[-1], ranks, cu_seqlens=cu, windows=[window])
    q, k, v, dout = (t.unsqueeze(1) for t in x)
    wide = {"dtype": torch.float32, "device": "cuda"}
    whole_out, dq, dk, dv = (torch.zeros(t.shape, **wide) for t in (q, q, k, v))
    for rank in range(ranks):
        schedule = Schedule.of(layout, rank, window=window, rows_a_step=0)
        positions = layout.positions(rank)
        own = positions[positions < layout.total].cuda()
        assert len(own) == len(positions)
        out = torch.zeros((len(own), 1, heads, d), **wide)
        lse = torch.full((1, heads, len(own)), float("-inf"), **wide)
        rows = []
        for step in schedule.steps:
            held = own
            if step.receives:
                held = torch.cat([layout.positions(m.peer)[a:b] for m in step.receives for a, b in m.ranges])
                held = (torch.cat([held[a:b] for a, b in step.order]) if step.order else held).cuda()
            rows.append(held)
            forward_step(out, lse, q[own], k[held], v[held], step, kernel, scale)
        whole_out[own] = out
        dq_own = torch.zeros((len(own), 1, heads, d), **wide)
        for step, held in zip(schedule.steps, rows):
            dk_rows, dv_rows = (torch.zeros((len(held), 1, groups, d), **wide) for _ in range(2))
            rest = (q[own], k[held], v[held], out.bfloat16(), lse, step, kernel, scale)
            backward_step(dq_own, dk_rows, dv_rows, dout[own], *rest)
            dk.index_add_(0, held, dk_rows)
            dv.index_add_(0, held, dv_rows)
        dq[own] = dq_own
    plain = []
    for dtype in (torch.float64, torch.bfloat16):
        leaves = [t.to(dtype).requires_grad_() for t in x[:3]]
        with torch.device("cuda"):  # where dense makes its mask: this size takes the CPU seconds
            o, _ = dense(*leaves, cu, True, window)
        plain.append((o.detach(), *torch.autograd.grad(o, leaves, x[3].to(dtype))))
    for what, got, exact, rough in zip(("out", "dq", "dk", "dv"), (whole_out, dq, dk, dv), *plain):
        error = (got.squeeze(1).double() - exact).abs().max().item()
        allowed = (rough.double() - exact).abs().max().item()
        assert error <= 2 * max(allowed, 1e-3), f"{what}: {error} against {allowed}"


def test_deterministic_mode_gives_equal_bits_twice():
    kernel = select_kernel(torch.device("cuda"), torch.bfloat16, 64, deterministic=True).kernel
    q, k, v, dout = (t.cuda().unsqueeze(1) for t in inputs(4096, 8, 2, 64, torch.bfloat16))
    out, lse = kernel.forward(q, k, v, True, 0.125)
    first, second = (kernel.backward(dout, q, k, v, out, lse, True, 0.125) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_deterministic_mode_gives_equal_bits_where_keys_are_read_many_times():
    cu = (0, 700, 701, 1500, 4096)
    layout = SequenceLayout.contiguous(cu[-1], 1, cu_seqlens=cu)
    q, k, v, dout = (t.cuda() for t in inputs(cu[-1], 8, 2, 64, torch.bfloat16))
    leaves = [t.requires_grad_() for t in (q, k, v)]

    def gradients():
        out, _ = context_parallel_attention(
            *leaves, group=None, layout=layout, window=100, deterministic=True
        )
        return torch.autograd.grad(out, leaves, dout)

    assert all(torch.equal(a, b) for a, b in zip(gradients(), gradients()))
