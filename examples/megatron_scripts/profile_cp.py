"""Measures forward and backward passes of a model under context parallelism, and shows what attention sends.

    python -m torch.distributed.run --nproc-per-node 4 profile_cp.py --context-parallel-size 4 \
        --cp-comm-type p2p [--timing-log-option all] [--steps 20]

Where the script differs from the notes that it follows:

- ``get_timers`` belongs to ``megatron.training``, not to ``megatron.core``. The notes reset a timer that
  nothing starts.
- The batch is cut before the model sees it. In the notes every rank passes the whole sequence, which the model
  takes for a part of a sequence that is cp times as long.
- The backward pass is measured too, which sends as many rows again and gradients home.
- Timers print the smallest and the largest time of all ranks. The mean of rank 0 hides that a rank waits for
  others.
- Tokens a second and TFLOPS are computed. Steps a second compare nothing: a rank has fewer tokens at a higher
  degree.
- The data is made once, so that reading it is not measured.
"""

import time

import torch
import torch.distributed as dist

import longspan
from longspan import TransformerConfig, get_args, get_timers, parallel_state
from longspan.config.parameters import used_parameters
from longspan.context_parallel import SequenceLayout, get_batch_on_this_cp_rank
from longspan.models import GPTModel

WARM_UP = 2


def add_arguments(parser):
    parser.add_argument("--steps", type=int, default=10, help="steps that are measured")
    return parser


def profile_cp_communication(model, tokens, labels, num_steps):
    """Runs the steps. Returns this rank's seconds of a step."""
    timers = get_timers()
    for step in range(WARM_UP + num_steps):
        if step == WARM_UP:
            for name in ("forward", "backward", "step"):
                timers(name).reset()
        # All ranks begin together, so that no step waits for a rank that is still in the one before.
        timers("step").start(barrier=True)
        timers("forward").start()
        loss = model(tokens, labels=labels).sum()
        timers("forward").stop()
        timers("backward").start()
        loss.backward()
        timers("backward").stop()
        timers("step").stop()
        model.zero_grad()
    return timers("step").elapsed(reset=False) / num_steps


def step_flops(config, vocab_size, layout, batch):
    """Floating-point operations of a forward and a backward pass, on all ranks together."""
    layers, output = used_parameters(config, vocab_size)
    pairs = sum(layout.area(rank) for rank in range(layout.ranks))
    width = config.num_attention_heads * config.kv_channels
    # Two for a multiplication and an addition, two products in attention, and twice as much again in
    # backward.
    return 3 * batch * (2 * (sum(layers) + output) * layout.total + 4 * pairs * width * config.num_layers)


def received_bytes(config, layout, rank, batch):
    """Bytes of keys and values that attention of one layer receives in a forward pass with p2p."""
    groups = config.num_query_groups // config.tensor_model_parallel_size
    numbers = 2 * layout.received_rows(rank) * batch * groups * config.kv_channels
    return numbers * torch.finfo(config.params_dtype).bits // 8


def main():
    """Returns a dict of what was measured."""
    args = longspan.initialize(
        extra_args_provider=add_arguments,
        args_defaults={
            "num_layers": 2,
            "hidden_size": 128,
            "num_attention_heads": 8,
            "vocab_size": 512,
            "seq_length": 1024,
            "timing_log_level": 2,
        },
    )
    if args.pipeline_model_parallel_size > 1:
        raise SystemExit("this loop has no pipeline schedule: leave --pipeline-model-parallel-size out.")
    config = TransformerConfig(
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        num_attention_heads=args.num_attention_heads,
        num_query_groups=args.num_query_groups,
        ffn_hidden_size=args.ffn_hidden_size,
        tensor_model_parallel_size=args.tensor_model_parallel_size,
        context_parallel_size=args.context_parallel_size,
        hierarchical_context_parallel_sizes=args.hierarchical_context_parallel_sizes,
        sequence_parallel=args.sequence_parallel,
        cp_comm_type=args.cp_comm_type,
        params_dtype=args.params_dtype,
    )
    with torch.device(args.device):
        model = GPTModel(config, args.vocab_size, args.seq_length)
    generator = torch.Generator().manual_seed(parallel_state.get_data_parallel_rank())
    text = torch.randint(args.vocab_size, (args.micro_batch_size, args.seq_length + 1), generator=generator)
    batch = get_batch_on_this_cp_rank({"tokens": text[:, :-1], "labels": text[:, 1:]})
    tokens, labels = batch["tokens"].to(args.device), batch["labels"].to(args.device)

    seconds = profile_cp_communication(model, tokens, labels, args.steps)
    get_timers().log(["step", "forward", "backward"], rank=0, normalizer=args.steps)

    # A step takes as long as its slowest rank.
    slowest = torch.tensor(seconds, device=args.device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    layout = SequenceLayout.zigzag(args.seq_length, args.context_parallel_size)
    sequences = args.micro_batch_size * args.data_parallel_size
    found = {
        "tokens_per_second": sequences * args.seq_length / slowest.item(),
        "tflops": step_flops(config, args.vocab_size, layout, sequences) / slowest.item() / 1e12,
        "received_bytes": received_bytes(
            config, layout, parallel_state.get_context_parallel_rank(), args.micro_batch_size
        ),
    }
    if parallel_state.is_rank_0():
        print(
            f"{found['tokens_per_second']:,.0f} tokens a second, {found['tflops']:.4f} TFLOPS, on all ranks"
        )
        if get_args().cp_comm_type == "p2p":
            print(
                f"rank 0 receives {found['received_bytes'] / 2**20:.2f} MiB of keys and values a layer",
                flush=True,
            )
    return found


if __name__ == "__main__":
    main()
    dist.barrier()
    dist.destroy_process_group()
    time.sleep(0.5)  # gloo's threads let go of the last tensors; see gpt_loop.py
