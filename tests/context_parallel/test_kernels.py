"""The backends of attention: each tile against dense attention, what they refuse, and the merge."""

import math

import pytest
import torch

from longspan.context_parallel import (
    SequenceLayout,
    context_parallel_attention,
)
from longspan.context_parallel.calls import VarlenCall
from longspan.context_parallel.kernels.choose import CPU_KERNELS, chosen_kernel
from longspan.context_parallel.kernels.cpu_blocks import CpuBlocks
from longspan.context_parallel.kernels.cpu_flash import CpuFlash
from longspan.context_parallel.kernels.cuda import FlashAttn
from longspan.context_parallel.kernels.protocol import merge
from longspan.context_parallel.tiles import Mask
from oracle import dense, inputs

#: blocks of a few rows and keys, the last ones short
SMALL_BLOCKS = CpuBlocks(CpuFlash(), least=0, rows=34, keys=23)


def installed_flash_attention(forward, backward=None):
    kernel = FlashAttn.__new__(FlashAttn)
    kernel.name, kernel.deterministic = "flash-attn-3", False
    kernel._forward, kernel._backward = forward, backward
    return kernel


def test_a_kernel_is_chosen_once_for_all_calls_of_a_kind():
    chosen_kernel.cache_clear()
    x = torch.randn(8, 1, 12)
    for layout in (SequenceLayout.zigzag(8, 1), SequenceLayout.contiguous(8, 1)):
        for window in (None, 3):
            context_parallel_attention(x, x, x, group=None, layout=layout, window=window)
    assert chosen_kernel.cache_info().misses == 1


def test_releases_of_flash_attention():
    """Early releases of 3 have arguments without defaults; those of 2 before 2.7 return other things after the output."""
    q, lse = torch.zeros(6, 4, 8), torch.zeros(4, 6)
    call = VarlenCall.single(6, 6, Mask.CAUSAL, q.device)

    def beta(q, k, v, k_new, out, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal,
             window_size=(-1, -1)):  # fmt: skip
        assert (k_new, out, max_seqlen_q, causal, window_size) == (None, None, 6, True, (-1, 0))
        return q, lse, None

    def beta_backward(
        dout, q, k, v, out, softmax_lse, cu_seqlens_q, sequed_q, dq, dk, dv, softmax_scale, causal
    ):
        assert (sequed_q, causal) == (None, True)

    kernel = installed_flash_attention(beta, beta_backward)
    assert kernel.forward_varlen(q, q, q, call, 1.0) == (q, lse)
    assert len(kernel.backward_varlen(q, q, q, q, q, lse, call, 1.0)) == 3
    for second in (q, torch.zeros(1, 4, 6)):
        old = installed_flash_attention(lambda q, k, v, second=second: (q, second))
        with pytest.raises(ValueError, match=r"flash-attn-3 .* too old .* attention_backend: cuda-flash"):
            old.forward_varlen(q, q, q, call, 1.0)


# --- kernels ------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", ["cpu-blocks", "cpu-flash", "math"])
def test_kernel_equals_dense(name, causal):
    t = 1500 if name == "math" else 150  # math goes through the rows in blocks of 256
    q, k, v, dout = inputs(t, 4, 2, 8)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, lse = dense(*leaves, (0, t), causal)
    expected = torch.autograd.grad(out, leaves, dout)
    kernel = SMALL_BLOCKS if name == "cpu-blocks" else CPU_KERNELS[name]
    q, k, v, dout = (x.detach().unsqueeze(1) for x in (q, k, v, dout))
    got, got_lse = kernel.forward(q, k, v, causal, 1 / math.sqrt(8))
    grads = kernel.backward(dout, q, k, v, got, got_lse, causal, 1 / math.sqrt(8))
    torch.testing.assert_close(got.squeeze(1), out, rtol=0, atol=1e-12)
    torch.testing.assert_close(got_lse[0], lse, rtol=0, atol=1e-12)
    for x, ref in zip(grads, expected):
        torch.testing.assert_close(x.squeeze(1), ref, rtol=0, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "keys", "causal"), [(1500, 1500, True), (700, 1300, False)])
def test_cpu_blocks_is_as_near_to_float64_as_flash(rows, keys, causal, dtype):
    g = torch.Generator().manual_seed(0)
    q, dout = (torch.randn(rows, 2, 6, 16, generator=g).to(dtype) for _ in range(2))
    k, v = (torch.randn(keys, 2, 2, 16, generator=g).to(dtype) for _ in range(2))

    def run(name, dtype):
        x = [t.to(dtype) for t in (q, k, v, dout)]
        out, lse = CPU_KERNELS[name].forward(*x[:3], causal, 0.25)
        return out, lse, *CPU_KERNELS[name].backward(x[3], *x[:3], out, lse, causal, 0.25)

    for blocks, flash, exact in zip(
        run("cpu-blocks", dtype), run("cpu-flash", dtype), run("math", torch.float64)
    ):
        error, allowed = ((x.double() - exact).square().mean().sqrt().item() for x in (blocks, flash))
        assert error <= 2 * allowed


@pytest.mark.parametrize("backend", ["cpu-blocks", "cpu-flash", "math"])
def test_tensors_of_any_strides(backend):
    """Kernels take the head's numbers to lie side by side; a caller's tensor need not."""
    kernel = SMALL_BLOCKS if backend == "cpu-blocks" else CPU_KERNELS[backend]
    q, k, v, dout = inputs(37, 4, 2, 8)
    found = []
    for turn in (
        lambda x: x,
        lambda x: x.mT.contiguous().mT,
        lambda x: x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    ):
        leaves = [turn(x).detach().requires_grad_() for x in (q, k, v)]
        layout = SequenceLayout.zigzag(37, 1)
        out, lse = context_parallel_attention(*leaves, group=None, layout=layout, backend=kernel)
        found.append((out, lse, *torch.autograd.grad(out, leaves, turn(dout))))
    for other in found[1:]:
        for got, expected in zip(other, found[0]):
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("sign", "size", "scale"), [(1, 1e12, 0.25), (-1, 1e32, 0.25), (1, 1, 0.0), (1, 1, -0.25)]
)
def test_cpu_blocks_of_any_scores(sign, size, scale):
    """Scores so large that rounding moves them by hundreds, rows without a score above -1e30, scales that are not positive."""
    g = torch.Generator().manual_seed(0)
    q, k, v, dout = (torch.rand(70, 1, 2, 16, generator=g) for _ in range(4))
    q *= sign * size

    def run(kernel, dtype):
        x = [t.to(dtype) for t in (q, k, v, dout)]
        out, lse = kernel.forward(*x[:3], True, scale)
        return out, lse, *kernel.backward(x[3], *x[:3], out, lse, True, scale)

    got, exact = run(CpuBlocks(CpuFlash(), least=0), torch.float32), run(CPU_KERNELS["math"], torch.float64)
    for a, b in zip(got[:2] if size > 1 else got, exact):  # gradients of such scores are rounding
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


def test_merge_guards_rows_without_keys():
    out, lse = (
        torch.zeros(2, 1, 1, 3, dtype=torch.float64),
        torch.full((1, 1, 2), float("-inf"), dtype=torch.float64),
    )
    merge(out, lse, torch.ones_like(out), lse.clone())
    assert (out == 0).all()
    assert (lse == float("-inf")).all()
    merge(out, lse, torch.ones_like(out), torch.zeros_like(lse))
    assert (out == 1).all()
    assert (lse == 0).all()
