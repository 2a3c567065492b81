"""PyTorch's own context parallelism on CPU, as a peer.

``torch.distributed.tensor.experimental.context_parallel`` has handlers for the CUDA kernels only; on CPU
``scaled_dot_product_attention`` becomes an operator it does not know. ``context_parallel_on_cpu`` registers that one
operator and its backward with PyTorch's own ring, and then everything is PyTorch's: the public context, the head-tail
balancing, the ring.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._ops.utils import expand_to_full_mesh_op_strategy
from torch.distributed.tensor.experimental import context_parallel
from torch.distributed.tensor.experimental._context_parallel import _attention as ring
from torch.distributed.tensor.experimental._context_parallel import _sharding_rules as rules

aten = torch.ops.aten
FORWARD = aten._scaled_dot_product_flash_attention_for_cpu.default
BACKWARD = aten._scaled_dot_product_flash_attention_for_cpu_backward.default
SEQUENCE = 2  # the dim of [b, n, s, d]


def _forward(mesh, q, k, v, dropout_p=0.0, is_causal=False, *, attn_mask=None, scale=None):
    return ring._templated_ring_attention(
        mesh.get_group(),
        SEQUENCE,
        FORWARD,
        query=q,
        key=k,
        value=v,
        is_causal=is_causal,
        dropout_p=dropout_p,
        scale=scale,
    )


def _backward(mesh, dout, q, k, v, out, lse, dropout_p, is_causal, *, attn_mask=None, scale=None):
    return ring._templated_ring_attention_backward(
        mesh.get_group(),
        SEQUENCE,
        BACKWARD,
        grad_out=dout,
        grad_out_name="grad_out",
        query=q,
        key=k,
        value=v,
        out=out,
        logsumexp=lse,
        is_causal=is_causal,
        dropout_p=dropout_p,
        scale=scale,
    )


def _register() -> None:
    def handler(function: Callable) -> Callable:
        def run(op_call, args, kwargs):
            info = DTensor._op_dispatcher.unwrap_to_op_info(op_call, args, kwargs)
            DTensor._op_dispatcher.sharding_propagator.propagate(info)
            results = function(info.compute_mesh, *info.local_args, **info.local_kwargs)
            return DTensor._op_dispatcher.wrap(results, info.output_sharding.output_spec)

        return run

    def sharded(outputs: int, inputs: int) -> Callable:
        def strategy(schema):
            mesh = schema.get_mesh_from_args(validate=False)
            placements = [[Shard(SEQUENCE)] * (outputs + inputs)]
            return expand_to_full_mesh_op_strategy(mesh, schema, placements, input_index=outputs)

        return strategy

    ring.custom_ops[FORWARD], ring.custom_ops[BACKWARD] = handler(_forward), handler(_backward)
    register = rules.register_cp_sharding_rules

    def register_all():
        register()
        for op, strategy in ((FORWARD, sharded(2, 3)), (BACKWARD, sharded(3, 6))):
            if op not in rules._cp_strategy_contexts:
                context = rules._op_strategy_context(op, strategy, rules.RuntimeSchemaInfo(3))
                context.__enter__()
                rules._cp_strategy_contexts[op] = context

    rules.register_cp_sharding_rules = register_all


@contextlib.contextmanager
def context_parallel_on_cpu(mesh: DeviceMesh, *buffers: torch.Tensor) -> Iterator[list[torch.Tensor]]:
    """Inside, ``scaled_dot_product_attention`` is PyTorch's ring; yields this rank's shards of buffers [b, n, s, d].

    Head-tail balancing (PyTorch allows it for causal attention), keys all-gathered, as are its defaults.
    """
    if FORWARD not in ring.custom_ops:
        _register()
    held = [x.clone() for x in buffers]
    with context_parallel(
        mesh, buffers=held, buffer_seq_dims=[SEQUENCE] * len(held), no_restore_buffers=set(held)
    ):
        yield [x.detach().clone() for x in held]


def pytorch_attention(q, k, v, dout) -> Callable[[], None]:
    """Forward and backward of causal attention [b, n, s, d] as a function to time."""
    q, k, v = (x.requires_grad_() for x in (q, k, v))

    def run() -> None:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        torch.autograd.grad(out, (q, k, v), dout)

    return run
