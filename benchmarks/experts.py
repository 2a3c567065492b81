"""A layer with experts against transformers' Mixtral block on the same cores: forward and backward, and what is kept.

    python benchmarks/experts.py [--tokens 4096] [--hidden 512] [--ffn 1024] [--experts 8] [--repeats 10] [--threads 2]

The same weights and tokens on both sides, float32, top-2. Contestants take turns in one process; the best of ``--repeats``
counts. Their peers are transformers' two ways: ``grouped_mm``, and ``eager``, a loop over the experts. The memory is that of
the tensors that autograd keeps for backward, each storage once, weights left out.
"""

from __future__ import annotations

import argparse
import time

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from longspan import TransformerConfig
from longspan.config.sizes import MeshSizes
from longspan.expert_parallel import MoELayer
from longspan.mesh.mesh import ParallelMesh, init_distributed
from longspan.tensor_parallel import model_parallel_seed


def peer(hidden: int, ffn: int, experts: int, topk: int, how: str) -> MixtralSparseMoeBlock:
    config = MixtralConfig(
        hidden_size=hidden, intermediate_size=ffn, num_local_experts=experts, num_experts_per_tok=topk
    )
    config._experts_implementation = how
    torch.manual_seed(0)
    block = MixtralSparseMoeBlock(config)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.02)
    return block.train()


def ours(block: MixtralSparseMoeBlock, hidden: int, ffn: int, experts: int, topk: int) -> MoELayer:
    config = TransformerConfig(
        num_layers=1,
        hidden_size=hidden,
        num_attention_heads=hidden // 64,
        num_moe_experts=experts,
        moe_router_topk=topk,
        moe_router_pre_softmax=topk == 1,
        moe_ffn_hidden_size=ffn,
        gated_linear_unit=True,
        activation_func="silu",
        add_bias_linear=False,
    )
    layer = MoELayer(config, 1, ParallelMesh.build(MeshSizes()).groups)
    gate_up, down = block.experts.gate_up_proj.data, block.experts.down_proj.data
    for ours_, theirs in (
        (layer.router.weight, block.gate.weight.data),
        (layer.experts.gate_weight, gate_up[:, :ffn]),
        (layer.experts.up_weight, gate_up[:, ffn:]),
        (layer.experts.down_weight, down),
    ):
        ours_.data.to_local().copy_(theirs)
    return layer.train()


def kept_bytes(module: nn.Module, x: Tensor) -> int:
    """Bytes of the tensors kept for backward, each storage once, without weights and the input."""
    known = {
        p.untyped_storage().data_ptr() for p in (getattr(q, "_local_tensor", q) for q in module.parameters())
    }
    known.add(x.untyped_storage().data_ptr())
    found: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = getattr(t, "_local_tensor", t).untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = module(x)
    del y
    return sum(found.values())


def once(module: nn.Module, x: Tensor, up: Tensor) -> float:
    x.grad = None
    for parameter in module.parameters():
        parameter.grad = None
    begin = time.perf_counter()
    y = module(x)
    y = y[0] if isinstance(y, tuple) else y
    y.backward(up)
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (
        ("tokens", 4096),
        ("hidden", 512),
        ("ffn", 1024),
        ("experts", 8),
        ("repeats", 10),
        ("threads", 2),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    init_distributed("cpu")
    model_parallel_seed(1, 0)
    x = torch.randn(args.tokens, 1, args.hidden, requires_grad=True)
    up = torch.randn(args.tokens, 1, args.hidden)
    shape = (args.hidden, args.ffn, args.experts)
    contestants = {how: peer(*shape, 2, how) for how in ("grouped_mm", "eager")}
    contestants["longspan"] = ours(contestants["grouped_mm"], *shape, 2)
    with torch.no_grad():
        expected = contestants["eager"](x)
        difference = (contestants["longspan"](x)[0] - expected).abs().max() / expected.abs().max()
    print(
        f"{args.tokens} tokens, hidden {args.hidden}, ffn {args.ffn}, {args.experts} experts, top-2, float32, {args.threads} threads"
    )
    print(f"largest difference from transformers: {difference:.1e} of the largest output")
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for repeat in range(args.repeats + 1):
        for name, module in contestants.items():
            seconds = once(module, x, up)
            if repeat:
                times[name].append(seconds)
    best = {name: min(values) for name, values in times.items()}
    flops = 3 * 2 * 3 * args.tokens * 2 * args.hidden * args.ffn
    for name, seconds in best.items():
        print(
            f"  {name:<10} {1000 * seconds:7.1f} ms  {flops / seconds / 1e9:6.1f} GFLOP/s  {seconds / best['longspan']:.2f} x longspan's time"
        )
    print("kept for backward, MiB (k = choices a token):")
    for topk in (1, 2, 4):
        theirs = peer(*shape, topk, "grouped_mm")
        row = {"grouped_mm": theirs, "longspan": ours(theirs, *shape, topk)}
        numbers = "  ".join(f"{name} {kept_bytes(module, x) / 2**20:.1f}" for name, module in row.items())
        print(f"  k {topk}  {numbers}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
