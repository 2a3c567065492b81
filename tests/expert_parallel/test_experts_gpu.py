"""Experts on a GPU: the grouped products of bfloat16 against a loop over the experts. Not run without one."""

import pytest
import torch

from longspan.expert_parallel.grouped import Choices, Weights, expert_mlps

pytestmark = pytest.mark.gpu


def swiglu(gate, up):
    return torch.nn.functional.silu(gate) * up


@pytest.mark.parametrize("choices_of", ["random", "one expert"])
def test_grouped_products_are_those_of_a_loop(choices_of):
    torch.manual_seed(0)
    rows, hidden, ffn, experts, k = 512, 128, 256, 8, 2
    make = dict(device="cuda", dtype=torch.bfloat16)
    x = torch.randn(rows, hidden, **make)
    weights = Weights(
        *(
            torch.randn(experts, *shape, **make) * 0.05
            for shape in ((ffn, hidden), (ffn, hidden), (hidden, ffn))
        )
    )
    indices = torch.rand(rows, experts, device="cuda").argsort(1)[:, :k]
    if choices_of == "one expert":
        indices = torch.tensor([3, 4], device="cuda").expand(rows, k)
    scores = torch.rand(rows, k, **make)
    found = []
    for grouped in (True, False):
        inputs = [t.clone().requires_grad_() for t in (x, scores, *weights[:3])]
        kept = torch.ones_like(indices, dtype=torch.bool)
        choices = Choices.of(indices, kept, experts, grouped)
        out = expert_mlps(inputs[0], inputs[1], choices, Weights(*inputs[2:]), swiglu)
        out.backward(torch.ones_like(out) * 0.1)
        found.append([out, *(t.grad for t in inputs)])
    for a, b in zip(*found):
        torch.testing.assert_close(a.float(), b.float(), rtol=2e-2, atol=2e-2 * b.float().abs().max().item())
