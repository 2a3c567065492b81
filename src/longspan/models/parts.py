"""The two halves of a layer: self-attention with its projections, and the MLP. Activations are [s, b, h].

Each projection and each norm works on one row at a time, so its formula is a function of plain tensors
(``projected_heads``, ``mlp_product``), which can be compiled. Communication with other ranks is in the linear
layers and in core attention.
"""

from __future__ import annotations

from torch import Tensor, nn

from longspan.compiled import Compilable
from longspan.config.model import AttnMaskType, TransformerConfig
from longspan.context_parallel import DotProductAttention, SequenceLayout
from longspan.context_parallel.refusals import group_of_call
from longspan.context_parallel.two_layouts import attention_layout, to_attention, to_stream
from longspan.expert_parallel import MoELayer
from longspan.mesh.mesh import ProcessGroupCollection
from longspan.models.layer import Rows
from longspan.models.memory.tiled import tiled
from longspan.models.norm import Norm, normalised
from longspan.models.rotary import RotaryTable, apply_rotary
from longspan.tensor_parallel.layers import (
    ColumnParallelLinear,
    Operands,
    RowParallelLinear,
    TensorParallelModule,
    local,
    projected,
)
from longspan.tensor_parallel.mlp import mlp_activation, mlp_product
from longspan.tensor_parallel.norm import NormOverHeads
from longspan.tensor_parallel.random import Normal


def residual_std(config: TransformerConfig) -> float:
    """Initial std of layers that add to the residual stream: divided by the root of their number (GPT-2)."""
    return config.init_method_std / (2 * config.num_layers) ** 0.5


def projected_heads(
    x: Tensor, linears: tuple[Operands, ...], norms: tuple | None, rotary: RotaryTable | None, head_dim: int
) -> list[Tensor]:
    """[s, b, h] -> query [s, b, n, d], key and value [s, b, m, d], and the gate [s, b, n, d] if there is one.

    Args:
        linears: of query, key, value and, in a layer with a gate, the gate.
        norms: of the heads of query and key, or None.
    """
    q, k, *others = (projected(x, linear).unflatten(-1, (-1, head_dim)) for linear in linears)
    if norms is not None:
        q, k = normalised(q, *norms[0]), normalised(k, *norms[1])
    if rotary is not None:
        q, k = apply_rotary(q, rotary), apply_rotary(k, rotary)
    return [q, k, *others]


def rotated_heads(q: Tensor, k: Tensor, rotary: RotaryTable) -> list[Tensor]:
    """Query [s, b, n, d] and key [s, b, m, d], rotated."""
    return [apply_rotary(q, rotary), apply_rotary(k, rotary)]


def gated_heads(context: Tensor, gate: Tensor) -> Tensor:
    """The output of attention [s, b, n, d], times a sigmoid of the gate."""
    return context * gate.sigmoid()


class Sinks(TensorParallelModule):
    """A learned logit for each query head (``context_parallel.sinks``); a tensor parallel rank has its own heads'."""

    def __init__(self, config: TransformerConfig, pg_collection: ProcessGroupCollection):
        super().__init__(config, pg_collection.tp_mesh)
        initial = Normal(config.init_method_std)
        self.weight = self._parameter("weight", (config.num_attention_heads,), 0, initial)

    def forward(self) -> Tensor:
        """[n], of this rank's heads."""
        return local(self.weight)


class SelfAttention(nn.Module, Compilable):
    """Projections to heads, norms of heads, rotary embedding, core attention, and the output projection.

    With ``attention_output_gate`` the output of core attention is multiplied by sigmoid(x G^T), feature by feature.

    Args:
        attn_mask_type: causal for a decoder; no_mask for an encoder, where every token attends to all.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        attn_mask_type: AttnMaskType = AttnMaskType.causal,
    ):
        super().__init__()
        self.config = config
        self.head_dim = d = config.kv_channels
        heads, groups, h = config.num_attention_heads, config.num_query_groups, config.hidden_size
        bias, tp = config.add_bias_linear, pg_collection.tp_mesh
        kwargs = {"bias": bias or config.add_qkv_bias, "tp_group": tp}
        self.linear_q = ColumnParallelLinear(h, heads * d, config, **kwargs)
        self.linear_k = ColumnParallelLinear(h, groups * d, config, **kwargs)
        self.linear_v = ColumnParallelLinear(h, groups * d, config, **kwargs)
        gated = config.attention_output_gate
        self.linear_gate = ColumnParallelLinear(h, heads * d, config, **kwargs) if gated else None

        def norm(heads: int) -> Norm | NormOverHeads | None:
            if not config.qk_layernorm:
                return None
            over = config.qk_layernorm_over_heads
            return (
                NormOverHeads(config, pg_collection, heads)
                if over
                else Norm(config, pg_collection, heads=True)
            )

        self.q_layernorm, self.k_layernorm = norm(heads), norm(groups)
        self.core_attention = DotProductAttention(
            config, layer_number, attn_mask_type, pg_collection=pg_collection
        )
        self.sinks = Sinks(config, pg_collection) if config.softmax_type == "learnable" else None
        self.linear_proj = RowParallelLinear(
            heads * d, h, config, bias=bias, init_std=residual_std(config), tp_group=tp
        )

    def heads(self, x: Tensor, rotary: RotaryTable | None) -> tuple[Tensor, ...]:
        """[s, b, h] -> query [s, b, n, d], key and value [s, b, m, d] of this rank's heads; and the gate if it has one.

        With sequence parallelism the input is gathered once for all of them.
        """
        entered = self.linear_q.enter(x)
        layers = (self.linear_q, self.linear_k, self.linear_v, self.linear_gate)
        linears = tuple(layer.operands() for layer in layers if layer is not None)
        q_norm, k_norm, norms = self.q_layernorm, self.k_layernorm, None
        if isinstance(q_norm, Norm) and isinstance(k_norm, Norm):
            norms = q_norm.operands(), k_norm.operands()
        if not isinstance(q_norm, NormOverHeads) or not isinstance(k_norm, NormOverHeads):
            return tuple(self.part(projected_heads)(entered, linears, norms, rotary, self.head_dim))
        q, k, *others = self.part(projected_heads)(entered, linears, None, None, self.head_dim)
        q, k = q_norm(q), k_norm(k)
        if rotary is not None:
            q, k = self.part(rotated_heads)(q, k, rotary)
        return q, k, *others

    def enter(self, x: Tensor, rows: Rows) -> tuple[Tensor, ...]:
        """[s, b, h] -> what :meth:`mix` takes: query, key and value, and the gate if the layer has one."""
        return self.heads(x, rows.rotary)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, *gate: Tensor, rows: Rows) -> tuple[Tensor, ...]:
        """Core attention -> what :meth:`output` takes: the context [s, b, n, d], and the gate as it is.

        If attention has a layout of its own, rows are moved there and back.
        """
        layout, stream = rows.attention_layout, rows.layout
        group = group_of_call(rows.packed_seq_params, self.core_attention.cp_group)
        moved = layout is not stream and group is not None
        if moved:
            q, k, v = to_attention(q, k, v, stream, layout, rows.rank, group)
        context, _ = self.core_attention(
            q,
            k,
            v,
            packed_seq_params=rows.packed_seq_params,
            layout=layout,
            softmax_offset=None if self.sinks is None else self.sinks(),
        )
        context = to_stream(context, stream, layout, rows.rank, group) if moved else context
        return context, *gate

    def plan(self, layout: SequenceLayout) -> None:
        """Computes in advance what :meth:`mix` needs of the stream's layout."""
        self.core_attention.plan(attention_layout(self.config, layout))

    def output(self, context: Tensor, gate: Tensor | None = None) -> Tensor:
        """The output of core attention [s, b, n, d], and the gate of the same shape -> [s, b, h]."""
        if gate is not None:
            context = self.part(gated_heads)(context, gate)
        return self.linear_proj(context.flatten(2))


class MLP(nn.Module, Compilable):
    """h -> ffn -> h: down(act(up(x))), or down(act(gate(x)) * up(x)) if it is gated.

    Attributes:
        tiles: number of runs of tokens that are computed one after another, in forward and backward, so that
            activations [t, ffn] exist for one run at a time (``models/memory/tiled.py``). None takes tokens /
            hidden size, rounded up. The input is gathered and the output summed over tensor parallel ranks
            once for all tiles, so tiles add no communication.
    """

    def __init__(self, config: TransformerConfig, pg_collection: ProcessGroupCollection):
        super().__init__()
        h, ffn = config.hidden_size, config.ffn_hidden_size
        kwargs = {"bias": config.add_bias_linear, "tp_group": pg_collection.tp_mesh}
        self.activation = mlp_activation(config)
        self.linear_gate = (
            ColumnParallelLinear(h, ffn, config, **kwargs) if config.gated_linear_unit else None
        )
        self.linear_up = ColumnParallelLinear(h, ffn, config, **kwargs)
        self.linear_down = RowParallelLinear(ffn, h, config, init_std=residual_std(config), **kwargs)
        self.tiles: int | None = 1

    def forward(self, x: Tensor, rows: Rows | None = None, memory: dict | None = None) -> Tensor:
        """[s, b, h] -> [s, b, h]. ``rows`` is not read, because padding rows are computed like all others."""
        x = self.linear_up.enter(x)
        tiles = self.tiles or -(-x.shape[0] * x.shape[1] // x.shape[2])
        if tiles == 1:
            return self.linear_down.leave(self._product(x))
        y = tiled(self._product, x.flatten(0, 1), list(self.parameters()), tiles)
        return self.linear_down.leave(y.view(*x.shape[:2], -1))

    def _product(self, x: Tensor) -> Tensor:
        gate = None if self.linear_gate is None else self.linear_gate.operands()
        up, down = self.linear_up.operands(), self.linear_down.operands()
        return self.part(mlp_product)(x, gate, up, down, self.activation)


class SparseMLP(MoELayer):
    """A mixture of experts in the place of an MLP.

    Attributes:
        tiles: without effect: an expert's activations are those of its tokens alone.
    """

    tiles: int | None = 1

    def forward(self, x: Tensor, rows: Rows, memory: dict) -> Tensor:  # type: ignore[override]
        """[s, b, h] -> [s, b, h]"""
        assert rows.routed is not None
        cp_group = group_of_call(rows.packed_seq_params, self.groups.cp)
        return self.compute(x, rows.routed, memory, cp_group, balance=self.training)[0]


def make_mlp(
    config: TransformerConfig, number: int, groups: ProcessGroupCollection
) -> MLP | SparseMLP | None:
    """The MLP of layer ``number``: dense, or experts; None if the layer has neither."""
    kind = config.parts_of_layer(number).mlp
    if kind is None:
        return None
    return SparseMLP(config, number, groups) if kind == "experts" else MLP(config, groups)
