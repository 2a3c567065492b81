"""The gated delta rule against transformers' plain PyTorch form on the same cores: forward, backward, and what is kept.

    python benchmarks/delta_rule.py [--tokens 4096] [--key-heads 16] [--value-heads 32] [--head 128] [--chunks 64]
                                    [--repeats 7] [--threads 2] [--counts]

Float32, Qwen3-Next's head sizes unless others are given; both sides normalise queries and keys. Contestants take turns
in one process; a figure is a median, a ratio the median of the turns' ratios. ``--clock cpu`` counts
processor time instead (use ``--threads 1``), which other work on the machine changes less. The memory is that of
the tensors that autograd keeps for backward, each storage once; the inputs, which the caller holds, are shown apart.
``--halves`` adds a span in the middle of a cut sequence: both halves around an exchange that does nothing, and both
halves joined by autograd. ``--counts`` prints floating-point operations and kept bytes for each chunk size and ends.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

from longspan.recurrent.delta_rule import delta_rule, span_state

NAMES = ("q", "k", "v", "g", "beta")


def peer(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    rows = [x.transpose(0, 1) for x in (q, k, v, g, beta)]
    out, _ = torch_chunk_gated_delta_rule(*rows, output_final_state=True, use_qk_l2norm_in_kernel=True)
    return out.transpose(0, 1)


def ours(chunk: int, *inputs: Tensor) -> Tensor:
    return delta_rule(*inputs, normalize=True, chunk=chunk)[0]


class Middle:
    """The exchange of a span between two others, which hands on its own tensors of the right shapes."""

    first = last = False

    def incoming(self, state: Tensor | None, transition: Tensor | None) -> Tensor | None:
        return state

    def outgoing(self, gradient: Tensor | None) -> Tensor | None:
        return gradient


def middle(chunk: int, *inputs: Tensor) -> Tensor:
    return delta_rule(*inputs, normalize=True, chunk=chunk, exchange=Middle())[0]


def joined(chunk: int, q: Tensor, *others: Tensor) -> Tensor:
    """A middle span by autograd alone; its incoming state depends on its own map, as those of later spans would."""
    state, matrix = span_state(*others, normalize=True, chunk=chunk)
    assert matrix is not None
    return delta_rule(q, *others, initial=matrix @ state, normalize=True, chunk=chunk)[0]


def operations(chunk: int, heads: int, shared: int, d: int, halves: bool = False) -> tuple[float, float]:
    """Floating-point operations of forward and backward for one token: the products of matrices and T.

    Args:
        heads: value heads; shared: value heads of a key head; d: both head sizes.
    """
    square, cell = 2 * d * d, 2 * chunk * d
    solve = chunk * chunk
    forward = 3 * square + 2 * cell + 2 * cell / shared + solve
    backward = 7 * square + 5 * cell + 5 * cell / shared + solve
    if halves:
        forward += 4 * square + 2 * cell + cell / shared
        backward += 3 * square + 2 * cell + 2 * cell / shared
    return heads * forward, heads * backward


def kept_bytes(function: Callable[..., Tensor], inputs: list[Tensor]) -> int:
    """Bytes of the tensors kept for backward, each storage once, without the inputs."""
    known = {x.untyped_storage().data_ptr() for x in inputs}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function(*inputs)
    return sum(found.values())


def once(
    function: Callable[..., Tensor], inputs: list[Tensor], up: Tensor, clock: Callable[[], float]
) -> tuple[float, float]:
    """Seconds of forward and of backward."""
    for x in inputs:
        x.grad = None
    begin = clock()
    out = function(*inputs)
    between = clock()
    out.backward(up)
    return between - begin, clock() - between


def draw(tokens: int, key_heads: int, value_heads: int, d: int) -> list[Tensor]:
    torch.manual_seed(0)
    q, k = torch.randn(2, tokens, 1, key_heads, d).unbind()
    v = torch.randn(tokens, 1, value_heads, d)
    g, beta = torch.randn(2, tokens, 1, value_heads).unbind()
    return [x.clone().requires_grad_() for x in (q, k, v, -torch.nn.functional.softplus(g), beta.sigmoid())]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--key-heads", type=int, default=16)
    parser.add_argument("--value-heads", type=int, default=32)
    parser.add_argument("--head", type=int, default=128)
    parser.add_argument("--chunks", type=int, nargs="+", default=[64])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--halves", action="store_true")
    parser.add_argument("--counts", action="store_true")
    parser.add_argument("--no-peer", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    shared = args.value_heads // args.key_heads
    print(f"{args.tokens} tokens, {args.key_heads} key and {args.value_heads} value heads of {args.head}")
    for chunk in args.chunks:
        flops = [args.tokens * x / 1e9 for x in operations(chunk, args.value_heads, shared, args.head)]
        states = args.tokens / chunk * args.value_heads * args.head**2 * 4 / 2**20
        print(
            f"  chunk {chunk:>3}: forward {flops[0]:6.1f} GFLOP, backward {flops[1]:6.1f}, states {states:6.1f} MiB"
        )
    if args.counts:
        return
    inputs = draw(args.tokens, args.key_heads, args.value_heads, args.head)
    up = torch.randn_like(inputs[2])
    contestants: dict[str, Callable[..., Tensor]] = {} if args.no_peer else {"transformers": peer}
    for chunk in args.chunks:
        contestants[f"longspan, chunk {chunk}"] = partial(ours, chunk)
    base = f"longspan, chunk {args.chunks[0]}"
    if args.halves:
        contestants["both halves, exchange"] = partial(middle, args.chunks[0])
        contestants["both halves, autograd"] = partial(joined, args.chunks[0])
    clock = time.perf_counter if args.clock == "wall" else time.process_time
    if not args.no_peer:
        found = []
        for function in (peer, contestants[base]):
            out = function(*inputs)
            found.append([out.detach(), *torch.autograd.grad(out, inputs, up)])
        for name, one, other in zip(("o", *NAMES), *found):
            print(f"  {name}: largest difference {(one - other).abs().max() / one.abs().max():.1e}")
        del found, out
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
    for repeat in range(args.repeats + 1):
        for name, function in contestants.items():
            measured = once(function, inputs, up, clock)
            if repeat:
                seconds[name].append(measured)
    held = sum(x.untyped_storage().nbytes() for x in inputs) / 2**20
    print(f"the inputs hold {held:.0f} MiB; medians of {args.repeats} turns, {args.threads} threads:")
    for name, function in contestants.items():
        forward, backward = (statistics.median(x) for x in zip(*seconds[name]))
        ratios = [sum(x) / sum(y) for x, y in zip(seconds[name], seconds[base])]
        kept = kept_bytes(function, inputs) / 2**20
        print(
            f"  {name:<22} forward {forward:6.2f} s, backward {backward:6.2f} s, "
            f"{statistics.median(ratios):5.2f} x {base}'s ({min(ratios):.2f} .. {max(ratios):.2f}); keeps {kept:7.1f} MiB"
        )


if __name__ == "__main__":
    main()
