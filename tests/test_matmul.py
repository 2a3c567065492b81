"""Matrix products by either library: equal to float64 whatever the strides, with gradients."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from longspan import matmul


def layouts(x):
    """x with its strides as they are, turned, and neither."""
    wide = torch.zeros(x.shape[0], 2 * x.shape[1], dtype=x.dtype)
    wide[:, : x.shape[1]] = x
    return x, x.t().contiguous().t(), wide[:, : x.shape[1]]


@pytest.mark.parametrize(("m", "k", "n"), [(300, 70, 50), (50, 70, 300), (3, 5, 7), (1, 500, 500)])
def test_product_of_any_strides(m, k, n):
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(m, k, generator=g), torch.randn(k, n, generator=g)
    expected = (a.double() @ b.double()).float()
    for x, y in itertools.product(layouts(a), layouts(b)):
        torch.testing.assert_close(matmul.product(x, y), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_equals_torch(bias, dtype):
    g = torch.Generator().manual_seed(0)
    shapes = [(33, 2, 64), (48, 64)] + [(48,)] * bias
    leaves = [torch.randn(shape, generator=g).to(dtype).requires_grad_() for shape in shapes]
    dout = torch.randn(33, 2, 48, generator=g).to(dtype)
    results = []
    for function in (matmul.linear, F.linear):
        y = function(*leaves)
        results.append([y, *torch.autograd.grad(y, leaves, dout)])
    for got, expected in zip(*results):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-4 if dtype == torch.float32 else 0)


def test_linear_of_a_frozen_weight_or_no_rows():
    x, weight = torch.randn(40, 64, requires_grad=True), torch.randn(48, 64)
    (grad,) = torch.autograd.grad(matmul.linear(x, weight).sum(), x)
    torch.testing.assert_close(grad, weight.sum(0).expand_as(x), rtol=0, atol=1e-4)
    assert matmul.linear(x[:0], weight).shape == (0, 48)
    torch.testing.assert_close(matmul.linear(x[0], weight), F.linear(x[0], weight))  # a vector, too
