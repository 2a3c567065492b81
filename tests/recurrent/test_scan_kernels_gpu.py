"""Kernels of recurrent layers on CUDA, PyTorch's own and those of packages, against float64 on the CPU. Marked gpu."""

import pytest
import torch

import scans
from longspan.errors import UserError
from longspan.recurrent.kernels.choose import select_kernel
from longspan.recurrent.kernels.plain import PlainConvolution, PlainDelta, PlainStateSpace

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
PLAIN = {"mamba": PlainStateSpace(), "gated_delta": PlainDelta(), "convolution": PlainConvolution()}
SIZES = {"mamba": scans.Sizes(2, 8, 128, 64), "gated_delta": scans.Sizes(2, 4, 128, 128)}
NAMES = {"mamba": "mamba-ssm", "gated_delta": "fla"}
PACKED, WHOLE = (0, 700, 701, 1029), (0, 1000)
#: relative errors of norms: of sums in float32, and with one rounding to bfloat16 at the end
PLAIN_ERRORS = {torch.float32: 1e-4, torch.bfloat16: 5e-3}
#: packages round states and products to bfloat16 too
PACKAGE_ERROR = 3e-2


def package(part, dtype, sizes):
    """The package's kernel; the test is skipped where it is not installed."""
    kernel, reason = select_kernel(part, CUDA, dtype, sizes)
    if kernel.name == "torch":
        pytest.skip(reason)
    return kernel


@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.parametrize("dtype", PLAIN_ERRORS)
@pytest.mark.parametrize(("cu", "b"), [(PACKED, 1), (PACKED, 2), (WHOLE, 1)])
def test_plain_pytorch(kind, dtype, cu, b):
    tensors = scans.INPUTS[kind](cu[-1], b, dtype, SIZES[kind])
    found = scans.errors(kind, PLAIN[kind], tensors, cu, CUDA, PLAIN[kind])
    assert max(found) < PLAIN_ERRORS[dtype], found


@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("cu", "b"), [(PACKED, 1), (PACKED, 2), (WHOLE, 2)])
def test_a_package(kind, dtype, cu, b):
    sizes = SIZES[kind]
    kernel = package(kind, dtype, (sizes.p, sizes.d) if kind == "mamba" else (sizes.d, sizes.p))
    tensors = scans.INPUTS[kind](cu[-1], b, dtype, sizes)
    found = scans.errors(kind, kernel, tensors, cu, CUDA, PLAIN[kind])
    assert max(found) < PACKAGE_ERROR, found


class Alone:
    """An exchange with a state that comes in, and the gradient of a state that goes out: a rank between two others."""

    first = last = False

    def __init__(self, state, gradient):
        self.state, self.gradient = state, gradient
        self.found = []

    def incoming(self, state, transition):
        self.found += [state, transition]
        return self.state

    def outgoing(self, gradient):
        self.found.append(gradient)
        return self.gradient


@pytest.mark.parametrize("cu", [PACKED, WHOLE])
def test_fla_between_two_ranks(cu):
    sizes, dtype = SIZES["gated_delta"], torch.bfloat16
    kernel = package("gated_delta", dtype, (sizes.d, sizes.p))
    tensors = [x.to(CUDA) for x in scans.delta_inputs(cu[-1], 1, dtype, sizes)]
    shape = (1, sizes.heads, sizes.d, sizes.p)
    state, gradient = (x.to(CUDA) for x in scans.draw(torch.float32, shape, shape, seed=3))
    marks, found = scans.marks(cu, 1, CUDA), []
    for one in (PLAIN["gated_delta"], kernel):
        exchange = Alone(state, gradient)
        got = scans.with_gradients(
            lambda x, one=one, exchange=exchange: one(*x, marks.starts, marks.documents, exchange), tensors
        )
        found.append([*got, *exchange.found])
    for plain, its in zip(*found):
        error = (its.float() - plain.float()).norm() / plain.float().norm().clamp(min=1e-6)
        assert error < PACKAGE_ERROR


@pytest.mark.parametrize("cu", [PACKED, WHOLE])
def test_mamba_ssm_with_a_state_that_comes_in(cu):
    sizes, dtype = SIZES["mamba"], torch.bfloat16
    kernel = package("mamba", dtype, (sizes.p, sizes.d))
    tensors = [x.to(CUDA) for x in scans.state_space_inputs(cu[-1], 1, dtype, sizes)]
    (state,) = scans.draw(torch.float32, (1, sizes.heads, sizes.p, sizes.d), seed=3)
    marks, found = scans.marks(cu, 1, CUDA), []
    for one in (PLAIN["mamba"], kernel):

        def both(x, one=one):
            span = one.first_half(*x[:-1], marks.starts, marks.real)
            y = one.second_half(span, x[-1])
            return torch.cat([y.float().flatten(), span.state.flatten(), span.decay.flatten()])

        found.append(scans.with_gradients(both, [*tensors, state.to(CUDA)]))
    for plain, its in zip(*found):
        error = (its.float() - plain.float()).norm() / plain.float().norm().clamp(min=1e-6)
        assert error < PACKAGE_ERROR


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_package", [False, True])
@pytest.mark.parametrize("cu", [PACKED, WHOLE])
def test_convolution(dtype, with_package, cu):
    kernel = package("convolution", dtype, (256, 4)) if with_package else PLAIN["convolution"]
    tensors = scans.draw(dtype, (cu[-1], 2, 256), (256, 4), (256,), (3, 2, 256))
    (up,) = scans.draw(dtype, tensors[0].shape, seed=2)

    def results(device, wide, one):
        leaves = [x.to(device, wide).requires_grad_() for x in tensors]
        starts = scans.marks(cu, 2, torch.device(device)).starts
        y = one(*leaves[:3], starts, leaves[3])
        return [y, *torch.autograd.grad(y, leaves, up.to(device, wide))]

    found, exact = results("cuda", dtype, kernel), results("cpu", torch.float64, PLAIN["convolution"])
    for one, other in zip(found, exact):
        # Between the convolution and SiLU, plain PyTorch rounds once more than the package.
        assert (one.cpu().double() - other).norm() / other.norm() < (1e-5 if dtype == torch.float32 else 2e-2)


def test_auto_on_this_machine():
    for part, sizes in {"mamba": (64, 128), "gated_delta": (128, 128), "convolution": (4096, 4)}.items():
        for dtype in (torch.float32, torch.bfloat16):
            assert select_kernel(part, CUDA, dtype, sizes).kernel.name in (
                "torch",
                NAMES.get(part, "causal-conv1d"),
            )
        assert select_kernel(part, CUDA, torch.float64, sizes).kernel.name == "torch"
    for part, name in NAMES.items():
        with pytest.raises(UserError, match="takes float16 and bfloat16, not float64|is not installed"):
            select_kernel(part, CUDA, torch.float64, (64, 128), name)
