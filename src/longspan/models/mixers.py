"""Recurrent mixers: Mamba-2 (Dao and Gu 2024) and the gated delta rule (Yang et al. 2024). Activations are [s, b, h].

    x [s, b, h] -> in_proj -> [s, b, G w] -> convolution and SiLU -> scan [s, b, n, p] -> gated norm -> out_proj [s, b, h]

A tensor parallel rank has whole groups of heads (``config.recurrent.MixerSizes`` gives the order of features). Over
context parallel ranks, a mixer works in one of two ways (``ssm_cp_type``):

    state    a rank scans its own tokens, and states travel (``context_parallel.state``)
    a2a      features travel, so that a rank scans all tokens of some heads (``context_parallel.move_features``)

In both, the convolution comes first and reads the last rows of the ranks before. State and convolution begin anew at
the first token of every document.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from longspan import autocast
from longspan.config.model import TransformerConfig
from longspan.config.recurrent import mixer_problems, mixer_sizes
from longspan.context_parallel.move_features import FeatureMove, to_heads, to_tokens
from longspan.context_parallel.move_rows import move_rows, tails
from longspan.context_parallel.recurrent_costs import chosen_way, recurrent_sizes
from longspan.context_parallel.refusals import group_of_call
from longspan.context_parallel.runs_of_tokens import Marks, borders, marks_of_all, marks_of_rank
from longspan.context_parallel.state import Decays, HandOn, StatesOfRanks, Transitions
from longspan.mesh.default_groups import process_groups
from longspan.mesh.mesh import ProcessGroupCollection
from longspan.models.layer import Rows
from longspan.models.parts import residual_std
from longspan.recomputed import rms_norm
from longspan.recurrent.kernels.choose import CONVOLUTION, chosen_kernel, scan_sizes
from longspan.recurrent.kernels.protocol import ConvolutionKernel, DeltaKernel, StateSpaceKernel
from longspan.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    TensorParallelModule,
    local,
    projected,
)
from longspan.tensor_parallel.norm import rms_norm_over_ranks
from longspan.tensor_parallel.random import Constant, Initial, Range, Uniform


class Convolution(TensorParallelModule):
    """The weights of a causal depthwise convolution, [channels, kernel]; a rank has the channels of its groups."""

    def __init__(self, channels: int, kernel: int, bias: bool, config: TransformerConfig, tp_mesh):
        super().__init__(config, tp_mesh)
        # The same spread as torch.nn.Conv1d's: uniform between the bounds +-1 / sqrt(kernel).
        spread = Uniform((3 * kernel) ** -0.5)
        self.weight = self._parameter("weight", (channels, kernel), 0, spread)
        self.bias = self._parameter("bias", (channels,), 0, spread) if bias else None

    def forward(
        self, x: Tensor, starts: Tensor | None, tail: Tensor | None, kernel: ConvolutionKernel
    ) -> Tensor:
        """[s, b, channels] -> the same shape, after SiLU."""
        bias = None if self.bias is None else local(self.bias)
        return kernel(x, local(self.weight), bias, starts, tail)


class HeadNorm(TensorParallelModule):
    """The weight of the norm in front of the output projection.

    Args:
        size: number of weights.
        each_feature: every feature has a weight, and a rank has those of its heads. Otherwise one head's weights
            serve all heads.
    """

    def __init__(self, size: int, each_feature: bool, config: TransformerConfig, tp_mesh):
        super().__init__(config, tp_mesh)
        self.each_feature = each_feature
        self.weight = self._parameter("weight", (size,), 0 if each_feature else None, Constant(1.0))

    def operand(self) -> Tensor:
        """The weight for computation."""
        return local(self.weight) if self.each_feature else self.replicated(self.weight, over_heads=True)


def _decay_rates(seed: int, name: str, shape: tuple[int, ...], rows: Range) -> Tensor:
    """log A with A uniform between 1 and 16 (Mamba-2)."""
    return (8.5 + Uniform(7.5 / 3**0.5)(seed, name, shape, rows)).log()


def _step_biases(seed: int, name: str, shape: tuple[int, ...], rows: Range) -> Tensor:
    """Biases whose softplus, the step size, is log-uniform between 0.001 and 0.1 (Mamba-2)."""
    low, high = math.log(0.001), math.log(0.1)
    middle, reach = (low + high) / 2, (high - low) / 2
    step = (middle + Uniform(reach / 3**0.5)(seed, name, shape, rows)).exp()
    return step + torch.log(-torch.expm1(-step))


_OF_HEADS: dict[str, Initial] = {"A_log": _decay_rates, "dt_bias": _step_biases, "D": Constant(1.0)}


class RecurrentMixer(TensorParallelModule):
    """What both mixers share: projections, convolution, parameters of heads, and the way over the ranks.

    Args:
        layer_number: from 1.
        pg_collection: None takes the installed groups.

    Attributes:
        scan_kernel, convolution_kernel: kernels of one's own (``recurrent.kernels.protocol``). None takes those of the
            config's ``recurrent_backend``.

    Raises:
        ValueError: the config does not fit the groups.
    """

    kind: str
    scan_kernel: StateSpaceKernel | DeltaKernel | None = None
    convolution_kernel: ConvolutionKernel | None = None

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int = 1,
        pg_collection: ProcessGroupCollection | None = None,
    ):
        groups = process_groups(pg_collection)
        mesh = groups.tp_mesh
        for _, message in mixer_problems(config, self.kind):
            raise ValueError(message)
        super().__init__(config, mesh)
        self.config, self.number, self.cp_group = config, layer_number, groups.cp
        self.sizes = sizes = mixer_sizes(config, self.kind)
        self.costs = recurrent_sizes(config, self.kind, self.tp_size)
        self.groups, self.heads = self.costs.groups, self.costs.heads
        self.each = self.heads // self.groups
        bias = config.add_bias_linear
        h = config.hidden_size
        self.in_proj = ColumnParallelLinear(h, sizes.groups * sizes.inputs, config, bias=bias, tp_group=mesh)
        self.conv1d = Convolution(sizes.groups * sizes.channels, sizes.kernel, sizes.conv_bias, config, mesh)
        for name in sizes.of_heads:
            setattr(self, name, self._parameter(name, (sizes.heads,), 0, _OF_HEADS[name]))
        self.norm = HeadNorm(sizes.norm, self.kind == "mamba", config, mesh)
        inner, std = sizes.heads * sizes.head_dim, residual_std(config)
        self.out_proj = RowParallelLinear(inner, h, config, bias=bias, init_std=std, tp_group=mesh)

    def forward(self, x: Tensor, rows: Rows) -> Tensor:
        """[s, b, h] -> [s, b, h]"""
        return self.output(*self.mix(*self.enter(x, rows), rows=rows))

    def plan(self, layout) -> None:
        """Computes in advance what :meth:`mix` needs of a layout."""
        borders(layout)

    def enter(self, x: Tensor, rows: Rows) -> tuple[Tensor, ...]:
        """[s, b, h] -> the projected features [s, b, G w] of this rank's groups."""
        return (projected(self.in_proj.enter(x), self.in_proj.operands()),)

    def mix(self, inputs: Tensor, *, rows: Rows) -> tuple[Tensor, Tensor]:
        """The projected features -> the scan's output [s, b, n, p], and the gate z of the same shape."""
        s, b, _ = inputs.shape
        group = group_of_call(rows.packed_seq_params, self.cp_group)
        features, gate, numbers = self.split(inputs.unflatten(-1, (self.groups, -1)))
        features = self._convolved(features.flatten(2), rows, group).unflatten(-1, (self.groups, -1))
        ranks = rows.layout.ranks
        if group is None or ranks == 1:
            marks = marks_of_rank(rows.layout, rows.rank, inputs.device, b)
            y = self.scan(features, numbers, self.each, slice(None), marks, None)
        else:
            way = chosen_way(self.config.ssm_cp_type, self.costs, s, b, ranks, inputs.element_size())
            scanned = self._by_state if way == "state" else self._by_heads
            y = scanned(features, numbers, rows, group)
        return y, gate

    def _convolved(self, x: Tensor, rows: Rows, group: dist.ProcessGroup | None) -> Tensor:
        """[s, b, channels] -> the same shape, after SiLU; the tail comes from the ranks before."""
        marks = marks_of_rank(rows.layout, rows.rank, x.device, x.shape[1])
        tail = None
        if group is not None and rows.layout.ranks > 1 and self.sizes.kernel > 1:
            move = tails(rows.layout, self.sizes.kernel - 1, rows.rank, x.device)
            tail = move_rows(x, move, group)
        sizes = (x.shape[2], self.sizes.kernel)
        kernel = self.convolution_kernel or self._chosen(CONVOLUTION, x, sizes)
        return self.conv1d(x, marks.starts, tail, kernel)

    def _chosen(self, part: str, x: Tensor, sizes: tuple[int, ...]):
        """The kernel of the config's ``recurrent_backend`` for inputs like x."""
        config = self.config
        backend, deterministic = config.recurrent_backend, config.deterministic_mode
        return chosen_kernel(part, x.device, x.dtype, sizes, backend, deterministic)

    def _scan_kernel(self, x: Tensor):
        return self.scan_kernel or self._chosen(self.kind, x, scan_sizes(self.config, self.kind))

    def _by_state(self, features: Tensor, numbers: Tensor, rows: Rows, group: dist.ProcessGroup) -> Tensor:
        """Each rank scans its own tokens, and states travel."""
        marks = marks_of_rank(rows.layout, rows.rank, features.device, features.shape[1])
        return self.scan(features, numbers, self.each, slice(None), marks, (group, rows))

    def _by_heads(self, features: Tensor, numbers: Tensor, rows: Rows, group: dist.ProcessGroup) -> Tensor:
        """Features travel: this rank scans all tokens of some heads."""
        b, rank, ranks = features.shape[1], rows.rank, rows.layout.ranks
        # Each number of the heads is a run of its own: of the delta rule beta, and then the decay.
        parts = [*self.feature_parts(), *[(self.each, False)] * (numbers.shape[-1] // self.each)]
        key = ("features", self.groups, tuple(parts), self.each, features.device)
        # The layout keeps it: copies from the CPU in every layer would make the GPU wait.
        move = rows.layout.once(
            key, lambda: FeatureMove.of(self.groups, parts, self.each, ranks).on(features.device)
        )
        there = to_heads(torch.cat([features, numbers], -1).flatten(2), move, group)
        there = there.unflatten(-1, (move.groups, -1))
        each = move.heads // move.groups
        count = numbers.shape[-1] // self.each * each
        features, numbers = there.split([there.shape[-1] - count, count], -1)
        held = slice(rank * move.heads, (rank + 1) * move.heads)
        marks = marks_of_all(rows.layout, features.device, b)
        y = self.scan(features, numbers, each, held, marks, None)
        return to_tokens(y.flatten(2), group).unflatten(-1, (self.heads, -1))

    def split(self, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[s, b, G, w] -> what the convolution reads [s, b, G, c], the gate [s, b, n, p], the numbers of heads."""
        raise NotImplementedError

    def feature_parts(self) -> list[tuple[int, bool]]:
        """(width, whether all heads of the group share it) of the parts of the convolution's features."""
        raise NotImplementedError

    def scan(
        self,
        features: Tensor,
        numbers: Tensor,
        each: int,
        heads: slice,
        marks: Marks,
        over: tuple[dist.ProcessGroup, Rows] | None,
    ) -> Tensor:
        """The outputs of heads, [s, b, n, p].

        Args:
            features: [s, b, G, c] after the convolution.
            numbers: [s, b, G, ..], those of each head.
            each: heads of a group.
            heads: which of the rank's heads they are; it selects the parameters of heads.
            marks: of all rows that are here.
            over: the ranks over which states travel; None if all tokens are here.
        """
        raise NotImplementedError

    def output(self, y: Tensor, gate: Tensor) -> Tensor:
        """The scan's output [s, b, n, p] and the gate -> [s, b, h]."""
        return self.out_proj(self.normalised(y, gate).flatten(2))

    def normalised(self, y: Tensor, gate: Tensor) -> Tensor:
        """The gated norm, [s, b, n, p]."""
        raise NotImplementedError


class MambaMixer(RecurrentMixer):
    """Mamba-2: the norm is after the gate, ``norm(y silu(z))``, of each group's heads or of all heads together."""

    kind = "mamba"

    def split(self, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        p, d = self.sizes.head_dim, self.config.mamba_state_dim
        gate, features, dt = inputs.split([self.each * p, self.each * p + 2 * d, self.each], -1)
        return features, gate.unflatten(-1, (self.each, p)).flatten(2, 3), dt

    def feature_parts(self) -> list[tuple[int, bool]]:
        d = self.config.mamba_state_dim
        return [(self.each * self.sizes.head_dim, False), (d, True), (d, True)]

    def scan(self, features, numbers, each, heads, marks, over):
        p, d = self.sizes.head_dim, self.config.mamba_state_dim
        x, B, C = features.split([each * p, d, d], -1)
        x = x.unflatten(-1, (each, p)).flatten(2, 3)
        wide = torch.promote_types(x.dtype, torch.float32)
        with autocast.off(x):
            dt = F.softplus(numbers.flatten(2).to(wide) + local(self.dt_bias)[heads].to(wide))
            if self.config.mamba_dt_min:
                dt = dt.clamp(min=self.config.mamba_dt_min)
            A = -local(self.A_log)[heads].to(wide).exp()
            kernel: StateSpaceKernel = self._scan_kernel(x)
            D = local(self.D)[heads].to(wide)
            span = kernel.first_half(x, dt, A, B, C, D, marks.starts, marks.real)
            if over is None:
                return kernel.second_half(span, None)
            group, rows = over
            state, decay = span.state, span.decay
            states = StatesOfRanks.of(
                group, rows.layout, Decays(), state.shape, decay.shape, state.dtype, state.device
            )
            return kernel.second_half(span, HandOn.apply(state, decay, states))

    def normalised(self, y: Tensor, gate: Tensor) -> Tensor:
        wide = torch.promote_types(y.dtype, torch.float32)
        gated = (y.to(wide) * F.silu(gate.to(wide))).flatten(2)
        epsilon, inner = self.config.layernorm_epsilon, gated.shape[-1]
        if self.config.mamba_grouped_norm:
            gated = gated.unflatten(-1, (self.groups, -1))
            normed = rms_norm(gated, _ones(gated), epsilon).flatten(2)
        else:
            normed = rms_norm_over_ranks(gated, _ones(gated), inner * self.tp_size, epsilon, self.tp_group)
        return (normed.to(y.dtype) * self.norm.operand()).unflatten(-1, (self.heads, -1))


class GatedDeltaMixer(RecurrentMixer):
    """The gated delta rule: the norm is of each head and before the gate, ``norm(y) silu(z)``."""

    kind = "gated_delta"

    def split(self, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        d_k, d_v = self.config.linear_key_head_dim, self.config.linear_value_head_dim
        each = self.each
        features, gate, numbers = inputs.split([2 * d_k + each * d_v, each * d_v, 2 * each], -1)
        return features, gate.unflatten(-1, (each, d_v)).flatten(2, 3), numbers

    def feature_parts(self) -> list[tuple[int, bool]]:
        d_k = self.config.linear_key_head_dim
        return [(d_k, True), (d_k, True), (self.each * self.config.linear_value_head_dim, False)]

    def scan(self, features, numbers, each, heads, marks, over):
        d_k, d_v = self.config.linear_key_head_dim, self.config.linear_value_head_dim
        q, k, v = features.split([d_k, d_k, each * d_v], -1)
        v = v.unflatten(-1, (each, d_v)).flatten(2, 3)
        wide = torch.promote_types(v.dtype, torch.float32)
        with autocast.off(v):
            b, a = (x.flatten(2).to(wide) for x in numbers.split(each, -1))
            beta = b.sigmoid() * (2 if self.config.linear_allow_neg_eigval else 1)
            rate = local(self.A_log)[heads].to(wide).exp()
            g = -rate * F.softplus(a + local(self.dt_bias)[heads].to(wide))
            if marks.real is not None:
                padding = ~marks.real.unsqueeze(-1)
                beta, g = beta.masked_fill(padding, 0), g.masked_fill(padding, 0)
            states = None
            if over is not None:
                group, rows = over
                shape = (v.shape[1], v.shape[2], d_k)
                states = StatesOfRanks.of(
                    group, rows.layout, Transitions(), (*shape, d_v), (*shape, d_k), wide, v.device
                )
            kernel: DeltaKernel = self._scan_kernel(v)
            return kernel(q, k, v, g, beta, marks.starts, marks.documents, states)

    def normalised(self, y: Tensor, gate: Tensor) -> Tensor:
        epsilon = self.config.linear_norm_epsilon or self.config.layernorm_epsilon
        wide = torch.promote_types(y.dtype, torch.float32)
        normed = rms_norm(y.to(wide), self.norm.operand().to(wide), epsilon)
        return (normed * F.silu(gate.to(wide))).to(y.dtype)


def _ones(x: Tensor) -> Tensor:
    """A weight of ones for the last dim."""
    return torch.ones(x.shape[-1], dtype=x.dtype, device=x.device)


MIXERS: dict[str, type[RecurrentMixer]] = {"mamba": MambaMixer, "gated_delta": GatedDeltaMixer}


def make_mixer(
    kind: str, config: TransformerConfig, number: int, groups: ProcessGroupCollection
) -> nn.Module:
    """The recurrent mixer of layer ``number``."""
    return MIXERS[kind](config, number, groups)
