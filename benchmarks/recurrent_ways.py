"""The two ways of a recurrent layer over context parallel ranks: states that travel, against heads that travel.

    python benchmarks/recurrent_ways.py [--ranks 2] [--tokens 4096 16384 65536] [--pairs 5] [--hidden 256]

Forward and backward of one layer of Mamba-2 and of one of the gated delta rule (norm, projections, convolution, scan,
gated norm), on gloo ranks of one thread, float32. The head sizes are the published ones, with fewer heads: Mamba-2
has 8 heads of 64 with a state of 128 in 2 groups, the gated delta rule 2 key and 4 value heads of 128. The ways take
turns. Bytes are the most that a rank sends in a layer's forward pass, by the formulas that
``tests/models/test_counted_bytes.py`` holds against real messages.
"""

from __future__ import annotations

import argparse
from functools import partial

import common
import torch
import torch.distributed as dist

from longspan.config.model import TransformerConfig
from longspan.config.sizes import MeshSizes
from longspan.context_parallel import SequenceLayout
from longspan.context_parallel.recurrent_costs import a2a_bytes, planned_state_bytes, recurrent_sizes
from longspan.mesh.mesh import ParallelMesh
from longspan.models import TransformerLayer

KINDS = {
    "mamba": (
        "M",
        {"mamba_num_heads": 8, "mamba_head_dim": 64, "mamba_num_groups": 2, "mamba_state_dim": 128},
    ),
    "gated_delta": ("G", {"linear_num_key_heads": 2, "linear_num_value_heads": 4}),
}


def layer_of(kind: str, way: str, hidden: int, mesh: ParallelMesh) -> TransformerLayer:
    """A layer of one mixer without an MLP; all ranks have the same weights."""
    letter, sizes = KINDS[kind]
    config = TransformerConfig(
        num_layers=1,
        hidden_size=hidden,
        num_attention_heads=4,
        normalization="RMSNorm",
        add_bias_linear=False,
        hybrid_override_pattern=letter,
        context_parallel_size=mesh.sizes.cp,
        ssm_cp_type=way,
        **sizes,
    )
    return TransformerLayer(config, 1, mesh.groups, seed=1)


def step(layer: TransformerLayer, x: torch.Tensor, up: torch.Tensor, layout: SequenceLayout) -> None:
    layer(x, layout=layout)[0].backward(up)
    x.grad = None
    layer.zero_grad()


def bench(args: argparse.Namespace) -> None:
    ranks = dist.get_world_size()
    mesh = ParallelMesh.build(MeshSizes(cp=ranks))
    for kind in KINDS:
        layers = {way: layer_of(kind, way, args.hidden, mesh) for way in ("state", "a2a")}
        sizes = recurrent_sizes(layers["state"].config, kind, 1)
        for tokens in args.tokens:
            layout = SequenceLayout.contiguous(tokens, ranks)
            rows = layout.local_length
            x = torch.randn(rows, 1, args.hidden, requires_grad=True)
            up = torch.randn(rows, 1, args.hidden)
            contestants = {
                way: (partial(step, layer, x, up, layout), 1, True) for way, layer in layers.items()
            }
            times = common.compare_clocks(contestants, args.pairs, warmup=1)
            common.report_clocks(f"{kind}, {tokens:,} tokens, {ranks} ranks x 1 thread", times, "state")
            if dist.get_rank() == 0:
                sent = max(planned_state_bytes(sizes, 1, layout)), a2a_bytes(sizes, rows, 1, ranks, 4)
                print(
                    f"  a rank sends in forward: state {sent[0]:,} bytes, a2a {sent[1]:,} bytes", flush=True
                )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 16384, 65536])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--hidden", type=int, default=256)
    args = parser.parse_args()
    print(common.machine())
    common.run_ranks(args.ranks, bench, args)
