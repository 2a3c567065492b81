"""Cross-entropy over a vocabulary cut by rows, alone and fused with the output layer.

    vocab_parallel_cross_entropy   logits [.., v/tp], target [..]            -> loss [..]
    linear_cross_entropy           hidden [t, h], weight [v/tp, h], labels   -> loss [t]

``linear_cross_entropy`` never holds the logits of a whole sequence: it computes them in
chunks of tokens, [chunk, v/tp] instead of [t, v/tp].

A rank has its own columns only. For a chunk of c tokens each rank sends [2, c] numbers:
the log-sum-exp of its columns, and the target's logit if the rank holds it (otherwise 0).
Log-sum-exps are computed in at least float32.

``plain_cross_entropy`` is the slow reference for tests.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from longspan import autocast
from longspan.config.model import IGNORE_INDEX
from longspan.matmul import product
from longspan.mesh.collectives import all_gather_dim
from longspan.tensor_parallel.mappings import tensor_parallel_group

#: The most elements of one chunk's logits: 256 MiB in float32, and 64 MiB on the CPU, where smaller products
#: are as fast.
CHUNK_NUMEL, CHUNK_NUMEL_CPU = 1 << 26, 1 << 24


def plain_cross_entropy(logits: Tensor, target: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """The reference: whole logits [t, v], target [t] -> loss [t]; 0 where target is IGNORE_INDEX."""
    return F.cross_entropy(
        logits, target, reduction="none", ignore_index=IGNORE_INDEX, label_smoothing=label_smoothing
    )


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _local_columns(target: Tensor, columns: int, width: int, rank: int, vocab: int) -> tuple[Tensor, Tensor]:
    """Target ids as local column numbers, and whether this rank holds each of them.

    Args:
        columns: number of columns for real tokens on this rank.
        width: number of columns on every rank, padding included.
        vocab: number of real tokens. A larger id stays out of range on every rank, so that
            its lookup fails, as in ``torch.nn.functional.cross_entropy``.
    """
    shifted = target - rank * width
    mine = (shifted >= 0) & (shifted < columns)
    elsewhere = ((target >= 0) & (target < vocab) & ~mine) | (target == IGNORE_INDEX)
    return shifted.masked_fill(elsewhere, 0), mine


def _local_sums(logits: Tensor, column: Tensor, mine: Tensor) -> tuple[Tensor, Tensor]:
    """[t, columns] -> this rank's (log-sum-exp [t], target logit [t]), 0 if another rank has the target."""
    picked = logits.gather(1, column.unsqueeze(1)).squeeze(1).where(mine, 0)
    return torch.logsumexp(logits, dim=1), picked


def _log_sum_exp(logits: Tensor, column: Tensor, mine: Tensor, group) -> tuple[Tensor, Tensor]:
    """[t, columns] -> (log-sum-exp [t], target logit [t]) over all ranks of the group."""
    if logits.shape[1]:
        return _over_ranks(*_local_sums(logits, column, mine), group)
    # This rank holds padding columns only.
    lse = logits.new_full((logits.shape[0],), float("-inf"))
    return _over_ranks(lse, logits.new_zeros(logits.shape[0]), group)


def _over_ranks(lse: Tensor, picked: Tensor, group) -> tuple[Tensor, Tensor]:
    """This rank's log-sum-exp [t] and target logit [t] -> log-sum-exp and target logit over all ranks."""
    if dist.get_world_size(group) > 1:
        # [tp, 2, t]
        both = all_gather_dim(torch.stack([lse, picked]).unsqueeze(0), group, 0)
        lse, picked = torch.logsumexp(both[:, 0], dim=0), both[:, 1].sum(0)
    return lse, picked


def _logit_gradient(logits: Tensor, lse: Tensor, column: Tensor, mine: Tensor, weight: Tensor) -> Tensor:
    """(softmax - onehot) * weight, in place of the logits [t, columns]."""
    grad = logits.sub_(lse.unsqueeze(1)).exp_()
    if grad.shape[1]:
        grad.scatter_add_(1, column.unsqueeze(1), -mine.to(grad.dtype).unsqueeze(1))
    return grad.mul_(weight.unsqueeze(1))


class _VocabParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, target, label_smoothing, group):
        shape, dtype = target.shape, logits.dtype
        logits = _wide(logits.reshape(-1, logits.shape[-1]))
        target = target.reshape(-1)
        valid = target != IGNORE_INDEX
        width, ranks = logits.shape[1], dist.get_world_size(group)
        column, mine = _local_columns(target, width, width, dist.get_rank(group), width * ranks)
        lse, picked = _log_sum_exp(logits, column, mine, group)
        loss = lse - picked
        if label_smoothing:
            # Padding columns, whose logits are -inf, are not classes.
            real = torch.isfinite(logits)
            sums = torch.stack([logits.where(real, 0).sum(1), real.sum(1).to(logits.dtype)])
            if ranks > 1:
                dist.all_reduce(sums, group=group)
            mean, classes = sums[0] / sums[1], sums[1]
            loss = (1 - label_smoothing) * loss + label_smoothing * (lse - mean)
        ctx.save_for_backward(logits, lse, column, mine, valid)
        ctx.smoothing, ctx.dtype = label_smoothing, dtype
        ctx.classes = classes if label_smoothing else None
        return loss.where(valid, 0).view(shape)

    @staticmethod
    def backward(ctx, grad_loss):
        logits, lse, column, mine, valid = ctx.saved_tensors
        weight = grad_loss.reshape(-1).where(valid, 0)
        grad = (logits - lse.unsqueeze(1)).exp_()
        onehot = mine.to(grad.dtype) * (1 - ctx.smoothing)
        grad.scatter_add_(1, column.unsqueeze(1), -onehot.unsqueeze(1))
        if ctx.smoothing:
            grad -= (ctx.smoothing / ctx.classes).unsqueeze(1) * torch.isfinite(logits)
        grad *= weight.unsqueeze(1)
        return grad.to(ctx.dtype).view(*grad_loss.shape, grad.shape[1]), None, None, None


def vocab_parallel_cross_entropy(
    logits: Tensor,
    target: Tensor,
    label_smoothing: float = 0.0,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Cross-entropy of logits whose columns are cut over the tensor parallel group.

    Args:
        logits: [..., v/tp], this rank's columns.
        target: [...] ids over the whole vocabulary; the loss is 0 where the target is -100.
        label_smoothing: alpha, as in ``torch.nn.functional.cross_entropy``: the mass alpha is spread
            over all K classes of all ranks, the target's class included. Padding columns, whose
            logits are -inf, are not classes. The loss is the same at every tp.

            Megatron-LM's argument of this name means another mass, alpha K / (K - 1), and Megatron-LM
            takes K and the mean over each rank's own columns, so its loss depends on tp. At tp 1
            ``label_smoothing=alpha * K / (K - 1)`` gives Megatron-LM's loss; K is then the number of
            its columns, padding included.
        group: tensor parallel group; None takes the installed group.

    Returns:
        Loss [...] in nats, at least float32, the same on every rank of the group.
    """
    return _VocabParallelCrossEntropy.apply(logits, target, label_smoothing, tensor_parallel_group(group))


def _chunk_sums(logits: Tensor, column: Tensor, mine: Tensor) -> tuple[Tensor, Tensor]:
    """[c, columns] -> this rank's log-sum-exp [c] and target logit [c], in one pass if compiled."""
    return _local_sums(_wide(logits), column, mine)


def _chunk_gradient(
    logits: Tensor, lse: Tensor, column: Tensor, mine: Tensor, weight: Tensor, dtype: torch.dtype
) -> Tensor:
    """:func:`_logit_gradient` in ``dtype``, for the compiler: one pass, which does not change the logits."""
    target = (torch.arange(logits.shape[1], device=logits.device) == column.unsqueeze(1)) & mine.unsqueeze(1)
    grad = (_wide(logits) - lse.unsqueeze(1)).exp() - target.to(lse.dtype)
    return (grad * weight.unsqueeze(1)).to(dtype)


class _Chunks:
    """A chunk's logits, their sums and gradients, by plain or compiled functions (``longspan.compiled``)."""

    def __init__(self, part: Callable[[Callable], Callable] | None, group: dist.ProcessGroup):
        self.group = group
        self.compiled = part is not None
        self.sums = part(_chunk_sums) if part is not None else _chunk_sums
        self.gradient_of = part(_chunk_gradient) if part is not None else _chunk_gradient

    def logits(self, hidden: Tensor, used: Tensor) -> Tensor:
        """[c, h] and [columns, h] -> [c, columns], at least float32; compiled functions widen them later."""
        logits = product(hidden, used.t())
        return logits if self.compiled and used.shape[0] else _wide(logits)

    def log_sum_exp(self, logits: Tensor, column: Tensor, mine: Tensor) -> tuple[Tensor, Tensor]:
        if self.compiled and logits.shape[1]:
            lse, picked = self.sums(logits, column, mine)
            return _over_ranks(lse, picked, self.group)
        return _log_sum_exp(logits, column, mine, self.group)

    def gradient(self, logits, lse, column, mine, weight, dtype) -> Tensor:
        """The logits' gradient in ``dtype``. Without compiled functions it overwrites the logits."""
        if self.compiled and logits.shape[1]:
            return self.gradient_of(logits, lse, column, mine, weight, dtype)
        return _logit_gradient(logits, lse, column, mine, weight).to(dtype)


class _LinearCrossEntropy(torch.autograd.Function):
    """Loss and gradients in one pass over the chunks.

    Forward already computes the gradients of the plain sum of losses while it has a chunk's
    logits, with three matrix products in all. A training step needs the gradients of this sum
    times a scale, so backward only multiplies by the scale. If the weights in backward differ
    between tokens, backward computes all chunks again.
    """

    @staticmethod
    def forward(ctx, hidden, weight, labels, vocab_size, chunk, chunks):
        width, rank = weight.shape[0], dist.get_rank(chunks.group)
        columns = max(0, min(width, vocab_size - rank * width))
        # Padding columns take no part.
        used = weight[:columns]
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        loss = torch.empty(labels.shape, dtype=dtype, device=hidden.device)
        lses = torch.empty_like(loss)
        ctx.columns, ctx.rank, ctx.chunk, ctx.vocab_size = columns, rank, chunk, vocab_size
        ctx.chunks = chunks
        wanted = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        sums = _empty_gradients(hidden, weight, ctx.needs_input_grad[1]) if wanted else None
        for start in range(0, labels.shape[0], chunk):
            part = slice(start, start + chunk)
            column, mine = _local_columns(labels[part], columns, width, rank, vocab_size)
            logits = chunks.logits(hidden[part], used)
            lses[part], picked = chunks.log_sum_exp(logits, column, mine)
            valid = labels[part] != IGNORE_INDEX
            loss[part] = (lses[part] - picked).where(valid, 0)
            if sums is not None:
                grad = chunks.gradient(logits, lses[part], column, mine, valid.to(dtype), hidden.dtype)
                _add_chunk(sums, grad, hidden, used, part)
        ctx.save_for_backward(hidden, weight, labels, lses, *(sums or ()))
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        hidden, weight, labels, lses, *sums = ctx.saved_tensors
        # Strides of 0 mean one number for all tokens: the gradient of a sum.
        if grad_loss.numel() and not any(grad_loss.stride()):
            scale = grad_loss.flatten()[0]
            grad_hidden = torch.empty_like(hidden)
            # The product is computed in the scale's dtype, so that 1 / tokens is not rounded to bfloat16.
            for start in range(0, hidden.shape[0], ctx.chunk):
                part = slice(start, start + ctx.chunk)
                grad_hidden[part] = sums[0][part].to(scale.dtype) * scale
            grad_weight = None if sums[1] is None else sums[1] * scale
        else:
            grad_hidden, grad_weight = _empty_gradients(hidden, weight, ctx.needs_input_grad[1])
            used = weight[: ctx.columns]
            for start in range(0, labels.shape[0], ctx.chunk):
                part = slice(start, start + ctx.chunk)
                column, mine = _local_columns(
                    labels[part], ctx.columns, weight.shape[0], ctx.rank, ctx.vocab_size
                )
                scale = grad_loss[part].where(labels[part] != IGNORE_INDEX, 0)
                logits = ctx.chunks.logits(hidden[part], used)
                grad = ctx.chunks.gradient(logits, lses[part], column, mine, scale, hidden.dtype)
                _add_chunk((grad_hidden, grad_weight), grad, hidden, used, part)
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, None, None, None, None


def _empty_gradients(hidden: Tensor, weight: Tensor, trained: bool) -> tuple[Tensor, Tensor | None]:
    """An empty gradient of hidden [t, h], and zeros in at least float32 for a trained weight's gradient."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    zeros = torch.zeros(weight.shape, dtype=dtype, device=weight.device) if trained else None
    return torch.empty_like(hidden), zeros


def _add_chunk(
    sums: tuple[Tensor, Tensor | None], grad: Tensor, hidden: Tensor, used: Tensor, part: slice
) -> None:
    """From logit gradients [c, columns]: sets a chunk's rows of hidden's gradient, adds to the weight's."""
    grad_hidden, grad_weight = sums
    grad_hidden[part] = product(grad, used)
    if grad_weight is not None:
        grad_weight[: used.shape[0]] += product(grad.t(), hidden[part])


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    vocab_size: int,
    group: dist.ProcessGroup,
    chunk: int | None = None,
    part: Callable[[Callable], Callable] | None = None,
) -> Tensor:
    """Output layer and cross-entropy in one function, in chunks of tokens.

    The gradient of ``hidden`` comes from this rank's columns only. The caller's ``copy`` or
    sequence parallel gather sums it over the group.

    Args:
        hidden: [t, h]; weight: [v/tp, h], this rank's rows of the padded vocabulary.
        labels: [t] ids, already shifted; -100 where there is no target.
        vocab_size: number of real tokens; rows beyond it are padding and take no part.
        chunk: tokens at a time; None keeps a chunk's logits below 256 MiB in float32 (64 MiB on the CPU).
        part: function -> its compiled form (``longspan.compiled``); None uses the plain functions.

    Returns:
        Loss [t] in nats, at least float32; 0 where there is no target.
    """
    if chunk is None:
        numel = CHUNK_NUMEL_CPU if hidden.device.type == "cpu" else CHUNK_NUMEL
        chunk = max(1, numel // weight.shape[0])
    hidden, weight = autocast.cast(hidden, weight)
    with autocast.off(hidden):
        return _LinearCrossEntropy.apply(hidden, weight, labels, vocab_size, chunk, _Chunks(part, group))
