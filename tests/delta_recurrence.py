"""The gated delta rule one token after another: the oracle of the chunked form. In float64 it is exact to 1e-15."""

import torch


def delta_recurrence(q, k, v, g, beta, starts=None, initial=None, scale=None):
    """The outputs [s, b, n_v, d_v] and the final state [b, n_v, d_k, d_v], by autograd's plain operations.

    Args:
        q, k: [s, b, n_k, d_k]; v: [s, b, n_v, d_v]; g, beta: [s, b, n_v]; starts: bool [s, b].
        initial: [b, n_v, d_k, d_v]; None is zero. scale: of the queries, None is d_k ** -0.5.
    """
    s, b, n_k, d_k = k.shape
    n_v, d_v = v.shape[2:]
    scale = d_k**-0.5 if scale is None else scale
    q, k = (x.repeat_interleave(n_v // n_k, 2) for x in (q, k))
    state = v.new_zeros(b, n_v, d_k, d_v) if initial is None else initial
    outs = []
    for t in range(s):
        if starts is not None:
            state = torch.where(starts[t].view(b, 1, 1, 1), 0.0, state)
        state = state * g[t].exp().view(b, n_v, 1, 1)
        error = v[t] - torch.einsum("bnkv,bnk->bnv", state, k[t])
        state = state + torch.einsum("bnk,bnv->bnkv", k[t], beta[t].unsqueeze(-1) * error)
        outs.append(torch.einsum("bnkv,bnk->bnv", state, scale * q[t]))
    return torch.stack(outs), state


def transition_matrix(k, g, beta, starts=None):
    """M [b, n_v, d_k, d_k]: the product of exp(g_t) (I - beta_t k_t k_t^T), zero if a document begins."""
    s, b, n_k, d_k = k.shape
    n_v = g.shape[2]
    k = k.repeat_interleave(n_v // n_k, 2)
    identity = torch.eye(d_k, dtype=k.dtype).expand(b, n_v, d_k, d_k)
    matrix = identity
    for t in range(s):
        step = identity - torch.einsum("bn,bni,bnj->bnij", beta[t], k[t], k[t])
        matrix = g[t].exp().view(b, n_v, 1, 1) * (step @ matrix)
        if starts is not None:
            matrix = torch.where(starts[t].view(b, 1, 1, 1), 0.0, matrix)
    return matrix
