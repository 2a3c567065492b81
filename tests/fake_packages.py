"""Stand-ins for packages with GPU kernels: their arguments, layouts and results, by recurrences token by token."""

import torch
import torch.nn.functional as F

import delta_recurrence
import recurrences


def _starts(seq_idx, shape):
    """bool [s, b]: where a token's document is another than the one of the token before; document 0 is before all."""
    if seq_idx is None:
        return None
    assert seq_idx.dtype == torch.int32
    assert seq_idx.is_contiguous()
    assert seq_idx.shape == shape
    return seq_idx.diff(prepend=torch.zeros_like(seq_idx[:, :1])).t() != 0


def _wide(x):
    return torch.promote_types(x.dtype, torch.float32)


# fmt: off
def mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, initial_states=None, seq_idx=None,
                              dt_softplus=False, dt_limit=(0.0, float("inf")), return_final_states=False):
    # fmt: on
    """mamba-ssm's: x [b, s, n, p], dt [b, s, n], B and C [b, s, g, d]; y in the dtype of x, the state in float32."""
    b, s, n, _ = x.shape
    g, d = B.shape[2:]
    assert (dt.shape, A.shape, B.shape, C.shape) == ((b, s, n), (n,), (b, s, g, d), (b, s, g, d))
    assert x.dtype == B.dtype == C.dtype
    assert dt.dtype == A.dtype == _wide(x)
    assert D is None or (D.shape, D.dtype) == ((n,), _wide(x))
    assert z is None
    assert dt_bias is None
    assert not dt_softplus
    assert chunk_size == 2 ** (chunk_size.bit_length() - 1)
    rows = [t.transpose(0, 1).to(_wide(x)) for t in (x, dt, B, C)]
    state = None if initial_states is None else initial_states.to(_wide(x))
    y, state = recurrences.state_space(
        rows[0], rows[1], A, rows[2], rows[3], D, _starts(seq_idx, (b, s)), state
    )
    y = y.transpose(0, 1).to(x.dtype)
    return (y, state) if return_final_states else y


def chunk_gated_delta_rule(q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False,
                           use_qk_l2norm_in_kernel=False, cu_seqlens=None, **kwargs):  # fmt: skip
    """fla's: q, k [b, t, n, d_k], v [b, t, n, d_v], g and beta [b, t, n]; with cu_seqlens, b = 1 and a state a document."""
    assert not kwargs
    b, t, n, d_k = q.shape
    assert (k.shape, v.shape[:3], g.shape, beta.shape) == (q.shape, (b, t, n), (b, t, n), (b, t, n))
    assert q.dtype == k.dtype == v.dtype
    assert g.dtype == _wide(v)
    assert all(x.is_contiguous() for x in (q, k, v, g, beta))
    cu = [0, t]
    if cu_seqlens is not None:
        assert b == 1
        assert cu_seqlens.dtype == torch.int64
        cu = cu_seqlens.tolist()
        assert (cu[0], cu[-1]) == (0, t)
        assert all(one < other for one, other in zip(cu, cu[1:]))
    documents = b if cu_seqlens is None else len(cu) - 1
    if initial_state is not None:
        assert initial_state.shape == (documents, n, d_k, v.shape[3])
        assert initial_state.dtype == _wide(v)
    rows = [x.transpose(0, 1).to(_wide(v)) for x in (q, k, v, g, beta)]
    if use_qk_l2norm_in_kernel:
        rows[:2] = [x / torch.sqrt(x.pow(2).sum(-1, keepdim=True) + 1e-6) for x in rows[:2]]
    outs, states = [], []
    for number, (first, last) in enumerate(zip(cu, cu[1:])):
        state = initial_state
        if state is not None and cu_seqlens is not None:
            state = state[number : number + 1]
        out, state = delta_recurrence.delta_recurrence(
            *(x[first:last] for x in rows), None, state, scale=scale
        )
        outs.append(out)
        states.append(state)
    out = torch.cat(outs).transpose(0, 1).to(v.dtype)
    return out, torch.cat(states) if output_final_state else None


def causal_conv1d_fn(x, weight, bias=None, seq_idx=None, initial_states=None, return_final_states=False,
                     final_states_out=None, activation=None):  # fmt: skip
    """causal-conv1d's: x [b, c, s], and with documents, or for all but the smallest c, channels are next to each other."""
    b, c, s = x.shape
    assert x.stride(1) == 1
    assert x.stride(2) >= c
    assert weight.shape[0] == c
    assert 2 <= weight.shape[1] <= 4
    assert initial_states is None
    assert not return_final_states
    starts = _starts(seq_idx, (b, s))
    y = recurrences.convolution(x.permute(2, 0, 1), weight, bias, starts).permute(1, 2, 0)
    return F.silu(y) if activation == "silu" else y
