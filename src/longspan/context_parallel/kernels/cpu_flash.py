"""PyTorch's flash attention for CPU, with the protocol of ``protocol``."""

from __future__ import annotations

import torch

from longspan.context_parallel.kernels.protocol import heads_first, rows_first

aten = torch.ops.aten


class CpuFlash:
    """PyTorch's blockwise attention for CPU; grouped key/value heads need no copy."""

    name, varlen = "cpu-flash", False

    def forward(self, q, k, v, causal, scale):
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
            heads_first(q), heads_first(k), heads_first(v), 0.0, causal, scale=scale
        )
        return rows_first(out), lse

    def backward(self, dout, q, k, v, out, lse, causal, scale):
        grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *map(heads_first, (dout, q, k, v, out)), lse, 0.0, causal, scale=scale
        )
        return tuple(rows_first(g) for g in grads)
