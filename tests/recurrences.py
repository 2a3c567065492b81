"""The recurrences of recurrent layers, one token after another in float64: what the chunked forms must equal."""

import torch


def convolution(x, weight, bias=None, starts=None, tail=None, tail_valid=None):
    """y [s, b, c] of the causal depthwise convolution of x [s, b, c], a column and a token at a time."""
    s, batch, channels = x.shape
    k = weight.shape[1]
    columns = []
    for b in range(batch):
        # The window, oldest first: the last k - 1 inputs of the open document, None where there is none.
        window = [None] * (k - 1)
        if tail is not None:
            window = [tail[i, b] if tail_valid is None or tail_valid[i, b] else None for i in range(k - 1)]
        rows = []
        for t in range(s):
            if starts is not None and starts[t, b]:
                window = [None] * (k - 1)
            window.append(x[t, b])
            y = torch.zeros_like(x[t, b]) if bias is None else bias
            for i, value in enumerate(window):
                if value is not None:
                    y = y + weight[:, i] * value
            rows.append(y)
            window = window[1:]
        columns.append(torch.stack(rows) if rows else x[:, b])
    return torch.stack(columns, 1)


def state_space(x, dt, A, B, C, D=None, starts=None, initial=None):
    """y [s, b, n, p] and the final state [b, n, p, d] of Mamba-2's recurrence."""
    s, b, n, p = x.shape
    repeat = n // B.shape[2]
    state = x.new_zeros(b, n, p, B.shape[3]) if initial is None else initial
    rows = []
    for t in range(s):
        if starts is not None:
            state = torch.where(starts[t][:, None, None, None], torch.zeros_like(state), state)
        Bt, Ct = (z[t].repeat_interleave(repeat, 1) for z in (B, C))
        decay = (dt[t] * A).exp()[..., None, None]
        state = decay * state + (dt[t][..., None] * x[t]).unsqueeze(-1) * Bt.unsqueeze(-2)
        y = (state * Ct.unsqueeze(-2)).sum(-1)
        rows.append(y if D is None else y + D[:, None] * x[t])
    return torch.stack(rows) if rows else x, state
