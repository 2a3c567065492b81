"""Verifies context parallelism: logits, losses and all gradients of a layout against one process, in float64.

    python -m torch.distributed.run --nproc-per-node 4 verify_cp.py \
        --tensor-model-parallel-size 2 --context-parallel-size 2 --sequence-parallel

The script of this name in the notes prints the sizes of the groups, which are right even if attention is
wrong. This one prints them too, and then computes the same batch twice: cut over all ranks, and whole on each
rank alone. It ends with exit code 1 if anything differs by more than rounding. ``--reference-seed`` gives the
reference other weights: the comparison has to fail then. (``longspan verify CONFIG`` does all this for the
config of a run.)
"""

import dataclasses
import time

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

import longspan
from longspan import TransformerConfig, finalize_model_grads, get_args, parallel_state
from longspan.context_parallel import SequenceLayout
from longspan.models import GPTModel

VOCAB, BATCH, TOLERANCE = 300, 2, 1e-10


def add_arguments(parser):
    parser.add_argument(
        "--reference-seed", type=int, help="seed of the reference's weights (default: --seed)"
    )
    return parser


def print_groups():
    if parallel_state.is_rank_0():
        print(
            f"TP: {parallel_state.get_tensor_model_parallel_world_size()}, "
            f"PP: {parallel_state.get_pipeline_model_parallel_world_size()}, "
            f"CP: {parallel_state.get_context_parallel_world_size()}, "
            f"DP: {parallel_state.get_data_parallel_world_size()}; "
            f"the CP group of rank 0: {parallel_state.get_context_parallel_global_ranks()}"
        )


def batch():
    """Tokens and labels [b, s], the same on every rank; labels are shifted, and some have no target."""
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(VOCAB, (BATCH, get_args().seq_length + 1), generator=generator)
    labels = text[:, 1:].clone()
    labels[:, :5] = -100
    return text[:, :-1], labels


def of_all_ranks(config, device):
    """(logits of this rank's rows, losses of these rows, {name: whole gradient}) of the layout."""
    args = get_args()
    # Any length is fine: the layout pads to what its ranks need, and padding counts nowhere.
    multiple = args.tensor_model_parallel_size if args.sequence_parallel else 1
    layout = SequenceLayout.make("zigzag", args.seq_length, args.context_parallel_size, multiple_of=multiple)
    rank = parallel_state.get_context_parallel_rank()
    tokens, labels = batch()
    tokens, labels = (
        layout.shard(tokens, rank, dim=1).to(device),
        layout.shard(labels, rank, dim=1, pad_value=-100).to(device),
    )
    with torch.device(device):
        model = GPTModel(config, VOCAB, args.seq_length, parallel_output=False)
    logits = model(tokens, layout=layout)
    losses = model(tokens, labels=labels, layout=layout)
    # Data parallel ranks compute on the same batch here, so that each counts once in the sum over all ranks.
    (losses.sum() / parallel_state.get_data_parallel_world_size()).backward()
    finalize_model_grads(model)
    positions = layout.positions(rank)
    real = positions < args.seq_length
    gradients = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
    return logits.detach()[:, real], losses.detach()[:, real], gradients, positions[real]


def of_one_process(config, device):
    """(logits, losses, {name: gradient}) of the whole batch, on this rank alone."""
    args = get_args()
    alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    config = dataclasses.replace(
        config,
        tensor_model_parallel_size=1,
        context_parallel_size=1,
        sequence_parallel=False,
        hierarchical_context_parallel_sizes=None,
        cp_comm_type="p2p",
    )
    groups = dataclasses.replace(
        parallel_state.get_process_groups(),
        tp=alone,
        cp=alone,
        tp_mesh=DeviceMesh.from_group(alone, device),
    )
    seed = args.seed if args.reference_seed is None else args.reference_seed
    with torch.device(device):
        model = GPTModel(
            config, VOCAB, args.seq_length, parallel_output=False, pg_collection=groups, seed=seed
        )
    tokens, labels = (tensor.to(device) for tensor in batch())
    logits = model(tokens)
    losses = model(tokens, labels=labels)
    losses.sum().backward()
    gradients = {name: p.grad.to_local() for name, p in model.named_parameters()}
    return logits.detach(), losses.detach(), gradients


def error(found, expected):
    """The largest difference, relative to the largest expected value."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


def verify_cp():
    """Compares both. Returns {what: the largest error on any rank}."""
    args = get_args()
    config = TransformerConfig(
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        num_attention_heads=args.num_attention_heads,
        num_query_groups=args.num_query_groups,
        tensor_model_parallel_size=args.tensor_model_parallel_size,
        context_parallel_size=args.context_parallel_size,
        hierarchical_context_parallel_sizes=args.hierarchical_context_parallel_sizes,
        sequence_parallel=args.sequence_parallel,
        cp_comm_type=args.cp_comm_type,
        params_dtype=torch.float64,
        init_method_std=0.2,
    )
    logits, losses, gradients, positions = of_all_ranks(config, args.device)
    whole_logits, whole_losses, whole_gradients = of_one_process(config, args.device)
    errors = {
        "logits": error(logits, whole_logits[:, positions]),
        "losses": error(losses, whole_losses[:, positions]),
    }
    errors |= {f"gradient of {n}": error(gradients[n], whole_gradients[n]) for n in gradients}
    largest = torch.tensor(list(errors.values()), device=args.device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return dict(zip(errors, largest.tolist()))


def main():
    """Returns the errors; ends with exit code 1 if one of them is above the tolerance."""
    args = longspan.initialize(
        extra_args_provider=add_arguments,
        args_defaults={
            "num_layers": 2,
            "hidden_size": 64,
            "num_attention_heads": 8,
            "num_query_groups": 4,
            "seq_length": 101,  # divides by nothing
        },
    )
    if args.pipeline_model_parallel_size > 1:
        raise SystemExit("the whole model is on each rank here: leave --pipeline-model-parallel-size out.")
    print_groups()
    errors = verify_cp()
    worst = max(errors, key=errors.get)
    passed = errors[worst] <= TOLERANCE
    if parallel_state.is_rank_0():
        print(
            f"logits {errors['logits']:.1e}, losses {errors['losses']:.1e}; worst: {worst} {errors[worst]:.1e}"
        )
        print("passed" if passed else f"failed: more than {TOLERANCE:.0e}", flush=True)
    if not passed:
        raise SystemExit(1)
    return errors


if __name__ == "__main__":
    main()
    dist.barrier()
    dist.destroy_process_group()
    time.sleep(0.5)  # gloo's threads let go of the last tensors; see gpt_loop.py
