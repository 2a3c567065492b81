"""A function of each token by itself, computed one tile (a run of tokens) at a time, forward and backward.

The tensors that the function keeps for backward exist for one tile at a time: forward keeps only the input
[t, h], and backward computes each tile again and its gradients directly afterwards. So the function runs
twice a step (three times within full recomputation). Gradients of parameters are summed over the tiles in
order, in at least float32, so two runs give equal bits.

It follows the tiled MLP of Arctic Long Sequence Training (Bekman et al. 2025, arXiv:2506.13996).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from longspan import autocast


def _slices(tokens: int, tiles: int) -> Iterator[slice]:
    """``tiles`` runs of tokens, or one per token if these are fewer. Lengths differ by at most one."""
    tiles = max(1, min(tiles, tokens))
    short, longer = divmod(tokens, tiles)
    start = 0
    for i in range(tiles):
        stop = start + short + (i < longer)
        yield slice(start, stop)
        start = stop


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, function, tiles, x, *parameters):
        ctx.function, ctx.tiles, ctx.parameters = function, tiles, parameters
        ctx.save_for_backward(x)
        ctx.autocast = autocast.state(x)
        out = None
        for part in _slices(len(x), tiles):
            y = function(x[part])
            out = y.new_empty((len(x), *y.shape[1:])) if out is None else out
            out[part] = y
        return out

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        x_needed, *needed = ctx.needs_input_grad[2:]
        wanted = [p for p, need in zip(ctx.parameters, needed) if need]
        sums = [None] * len(wanted)
        grad_x = torch.empty_like(x) if x_needed else None
        for part in _slices(len(x), ctx.tiles):
            tile = x[part].detach().requires_grad_(x_needed)
            with torch.enable_grad(), ctx.autocast():
                y = ctx.function(tile)
            leaves = [tile, *wanted] if x_needed else wanted
            found = list(torch.autograd.grad(y, leaves, grad[part], allow_unused=True))
            if grad_x is not None:
                grad_x[part] = found.pop(0)
            for i, new in enumerate(found):
                if new is not None:
                    wide = new.to(torch.promote_types(new.dtype, torch.float32))
                    sums[i] = wide if sums[i] is None else sums[i].add_(wide)
        summed = iter(s if s is None else s.to(p.dtype) for s, p in zip(sums, wanted))
        return None, None, grad_x, *(next(summed) if need else None for need in needed)


def tiled(
    function: Callable[[Tensor], Tensor], x: Tensor, parameters: Sequence[Tensor], tiles: int
) -> Tensor:
    """``function(x)`` [t, n], computed for ``tiles`` runs of rows, one after another.

    Args:
        function: [t, h] -> [t, n]. Each row depends on its own input row and on the parameters only; no other
            tensor that the function reads gets a gradient.
        x: [t, h].
        parameters: all parameters of the function; parameters that it does not use get no gradient.
        tiles: number of runs, at least 1; a number above t counts as t.
    """
    return _Tiled.apply(function, tiles, x, *parameters)
