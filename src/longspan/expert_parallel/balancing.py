"""What keeps the load of experts even: balancing losses, the z-loss, and the bias of experts.

For a set p of T_p tokens (a sequence, or a document), with E experts, k choices a token, n_e choices of expert e, and
P_e the mean over the set of the probabilities of e:

    loss = c sum over p of (T_p / N) E sum over e of f_e P_e        f_e = n_e / (k T_p)

N is the number of tokens of the global batch. A balanced layer has the loss c, one that always chooses the same k
experts c E / k. (Switch Transformer, arXiv 2101.03961; sequence-wise: DeepSeek-V3, arXiv 2412.19437.)
``global_aux_loss`` takes f_e from all tokens of the last trained step (arXiv 2501.11873 proposes the global batch).

Each rank adds the part of its own rows. n_e is summed over the ranks that hold rows of the set, and no gradient goes
through it; gradients are summed over ranks like all others, so no factor of a parallel size stands anywhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longspan.expert_parallel.tokens import TokenSet


def count_choices(indices: Tensor, real: Tensor | None, token_set: TokenSet, num_experts: int) -> Tensor:
    """This rank's part of n_e: indices [t, k] -> float64 [P, E]."""
    sets = len(token_set.tokens)
    flat = token_set.index.unsqueeze(1) * num_experts + indices
    if real is not None:
        flat = flat[real]
    return torch.bincount(flat.flatten(), minlength=sets * num_experts).view(sets, num_experts).double()


def balancing_loss(
    probabilities: Tensor, real: Tensor | None, token_set: TokenSet, counts: Tensor, topk: int
) -> Tensor:
    """This rank's part of the loss, for the coefficient 1.

    Args:
        probabilities: [t, E], those of a row add up to 1.
        counts: n_e of the whole sets [P, E], or [E] of tokens that are the same for all sets (the last step's).
    """
    experts = probabilities.shape[1]
    dtype = probabilities.dtype
    if counts.dim() == 1:
        share = counts / counts.sum().clamp(min=1)
        share = share.expand(len(token_set.tokens), experts)
    else:
        share = counts / (topk * token_set.tokens).clamp(min=1).unsqueeze(1)
    # T_p / N x 1 / T_p, the mean over the set, is one factor of each token.
    weight = experts * share * (token_set.shares / token_set.tokens.clamp(min=1)).unsqueeze(1)
    rows = weight.to(dtype)[token_set.index] * probabilities
    if real is not None:
        rows = rows * real.unsqueeze(1)
    return rows.sum()


def z_loss(logits: Tensor, real: Tensor | None, token_set: TokenSet) -> Tensor:
    """This rank's part of (1 / N) sum over tokens of logsumexp(logits)^2 (ST-MoE, arXiv 2202.08906)."""
    square = logits.logsumexp(1).square()
    weight = (token_set.shares / token_set.tokens.clamp(min=1)).to(square.dtype)[token_set.index]
    if real is not None:
        weight = weight * real
    return (square * weight).sum()


class _WithLoss(torch.autograd.Function):
    """Returns ``x``; in backward the loss gets the gradient 1, as if it had been added to the loss of the model."""

    @staticmethod
    def forward(ctx, x, loss):
        ctx.save_for_backward(loss)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        (loss,) = ctx.saved_tensors
        return grad, torch.ones_like(loss)


def with_loss(x: Tensor, loss: Tensor) -> Tensor:
    """Hangs a loss on a tensor that takes part in the model's loss: its gradient comes once, by itself."""
    return _WithLoss.apply(x, loss)


def updated_bias(bias: Tensor, counts: Tensor, rate: float) -> Tensor:
    """The bias [E] after a step in which the experts were chosen ``counts`` [E] times.

    It rises for experts below the mean and falls for those above (loss-free balancing, arXiv 2408.15664).
    """
    counts = counts.double().to(bias.device)
    return bias + rate * torch.sign(counts.mean() - counts).to(bias.dtype)
