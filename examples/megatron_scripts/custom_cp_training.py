"""A training script of your own, written as for Megatron-LM: flags, model provider, forward step and loop.

    NPROC=4 TP=2 CP=2 bash launch_custom_cp_training.sh
    python -m torch.distributed.run --nproc-per-node 2 custom_cp_training.py --context-parallel-size 2

The printed losses are the same for every number of processes and every layout. The script follows a common
set of notes on context parallelism. Where it differs from them, the notes do not train what they mean to:

- Labels are shifted by one token while the sequence is whole. With ``labels = tokens.clone()`` the model
  learns to copy its input, and a shift after the cut would lose the target at each border.
- ``get_batch_on_this_cp_rank`` cuts the batch. Without it every context parallel rank takes the whole
  sequence for its part.
- The samples follow the index alone. Tokens drawn by ``torch.randint`` in each process would differ between
  tensor parallel ranks, which have to compute on the same tokens.
- The loss of a rank is a sum, and ``finalize_model_grads`` divides by the tokens of all ranks.
  ``losses.mean()`` on each rank is right only if all ranks have equally many targets, and nothing sums
  gradients over ranks in the notes.
- A step has global_batch_size sequences; the notes make an optimizer step for each micro-batch.
- The norm for clipping is that of the gradients of all ranks. ``torch.nn.utils.clip_grad_norm_`` reads each
  rank's own part.
- With ``--bf16`` products are computed in bfloat16 and weights stay float32, because AdamW's updates of
  bfloat16 weights are mostly rounded away. (Megatron-LM's own optimizer keeps float32 copies for that
  reason.)
- All ranks write the checkpoint together, because rank 0 has only a part of tensor parallel weights.

A flag that this script does not read, such as --lr-decay-style, is checked and has no effect, as in a script
for Megatron-LM; ``longspan pretrain`` reads all of them.
"""

import math
import time

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset, DistributedSampler

import longspan
from longspan import TransformerConfig, finalize_model_grads, get_args, get_timers, parallel_state
from longspan.context_parallel import get_batch_on_this_cp_rank
from longspan.models import GPTModel
from longspan.training.optimizer import clip_gradients, gradient_norm


class SimpleTextDataset(Dataset):
    """Sequences that count up in steps, which can be learned; the index alone decides a sequence."""

    def __init__(self, seq_length, num_samples, vocab_size):
        self.seq_length, self.num_samples, self.vocab_size = seq_length, num_samples, vocab_size

    def __len__(self):
        return self.num_samples

    def __getitem__(self, index):
        text = (index + (1 + index % 3) * torch.arange(self.seq_length + 1)) % self.vocab_size
        return text[:-1], text[1:]  # tokens, and for each token the next one


def get_batch(data_iterator):
    """This rank's part of a micro-batch: tokens and labels [b, s / cp]."""
    tokens, labels = next(data_iterator)
    batch = get_batch_on_this_cp_rank({"tokens": tokens, "labels": labels})
    device = get_args().device
    return batch["tokens"].to(device), batch["labels"].to(device)


def get_model_config():
    args = get_args()
    return TransformerConfig(
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        num_attention_heads=args.num_attention_heads,
        ffn_hidden_size=args.ffn_hidden_size,
        tensor_model_parallel_size=args.tensor_model_parallel_size,
        context_parallel_size=args.context_parallel_size,
        sequence_parallel=args.sequence_parallel,
        cp_comm_type=args.cp_comm_type,
        hierarchical_context_parallel_sizes=args.hierarchical_context_parallel_sizes,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=F.silu,
        normalization="RMSNorm",
        layernorm_zero_centered_gamma=True,
        init_method_std=args.init_method_std,
    )


def model_provider():
    args = get_args()
    with torch.device(args.device):
        # vocab_size counts real tokens: the model pads its tables itself.
        return GPTModel(get_model_config(), args.vocab_size, args.seq_length)


def forward_step(data_iterator, model):
    """The sum of the losses of a micro-batch over this rank's tokens, and their number."""
    args, timers = get_args(), get_timers()
    timers("batch-generator").start()
    tokens, labels = get_batch(data_iterator)
    timers("batch-generator").stop()
    timers("forward").start()
    # With labels the model returns the loss of each token, and no rank ever holds all logits.
    with torch.autocast(args.device, torch.bfloat16, enabled=args.bf16):
        losses = model(tokens, labels=labels)
    timers("forward").stop()
    return losses.sum(), (labels != -100).sum()


def train_step(data_iterator, model, optimizer, lr_scheduler):
    """One step of the whole batch. Returns its mean loss and the norm of its gradient before clipping."""
    args, timers = get_args(), get_timers()
    total, count = torch.zeros(2, device=args.device, dtype=torch.float64)
    timers("step", log_level=0).start()
    optimizer.zero_grad()
    for _ in range(args.gradient_accumulation_steps):
        loss, tokens = forward_step(data_iterator, model)
        timers("backward").start()
        loss.backward()
        timers("backward").stop()
        total += loss.detach()
        count += tokens
    timers("all-grads-sync", log_level=1).start(barrier=args.barrier_with_L1_time)
    finalize_model_grads(model, num_tokens=count)
    timers("all-grads-sync").stop()
    norm = gradient_norm(model)
    clip_gradients(model, norm, args.clip_grad)
    optimizer.step()
    lr_scheduler.step()
    timers("step").stop()
    sums = torch.stack([total, count])
    dist.all_reduce(sums, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    return (sums[0] / sums[1]).item(), norm.item()


def learning_rate_factor(step):
    """Warm-up over a hundredth of the steps, then a cosine down to min_lr, as a share of lr."""
    args = get_args()
    warmup = args.train_iters // 100
    if step < warmup:
        return step / warmup
    progress = min(1.0, (step - warmup) / max(1, args.train_iters - warmup))
    low = args.min_lr / args.lr
    return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress))


def main():
    args = longspan.initialize(
        args_defaults={
            "micro_batch_size": 1,
            "global_batch_size": 4,
            "seq_length": 128,
            "vocab_size": 64,
            "num_layers": 2,
            "hidden_size": 64,
            "num_attention_heads": 4,
            "ffn_hidden_size": 128,
            "position_embedding_type": "rope",
            "train_iters": 20,
            "lr": 3e-3,
            "min_lr": 3e-4,
            "weight_decay": 0.1,
            "adam_beta2": 0.95,
            "log_interval": 5,
        }
    )
    if args.pipeline_model_parallel_size > 1:
        raise SystemExit("this loop has no pipeline schedule: leave --pipeline-model-parallel-size out.")
    first = parallel_state.is_rank_0()
    if first:
        print(
            f"TP {parallel_state.get_tensor_model_parallel_world_size()}, "
            f"CP {parallel_state.get_context_parallel_world_size()} ({args.cp_comm_type}), "
            f"DP {parallel_state.get_data_parallel_world_size()}; sequences of {args.seq_length} tokens, "
            f"micro-batch {args.micro_batch_size}, global batch {args.global_batch_size}"
        )
    model = model_provider()
    betas = (args.adam_beta1, args.adam_beta2)
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, betas, weight_decay=args.weight_decay)
    lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate_factor)

    dataset = SimpleTextDataset(args.seq_length, args.global_batch_size * args.train_iters, args.vocab_size)
    # Data parallel ranks read different samples; the tensor and context parallel ranks of one of them read
    # the same.
    sampler = DistributedSampler(
        dataset, parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    )
    data_iterator = iter(DataLoader(dataset, args.micro_batch_size, sampler=sampler))

    model.train()
    losses = []
    for step in range(1, args.train_iters + 1):
        lr = optimizer.param_groups[0]["lr"]
        loss, norm = train_step(data_iterator, model, optimizer, lr_scheduler)
        losses.append(loss)
        if step % args.log_interval == 0:
            if first:
                print(f"step {step:4}  loss {loss:.6f}  gradient norm {norm:.4f}  lr {lr:.2e}", flush=True)
            get_timers().log(rank=0, normalizer=args.log_interval)
    if args.save:
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": args.train_iters}
        dcp.save(state, checkpoint_id=args.save)
        if first:
            print(f"checkpoint saved to {args.save}")
    return losses


if __name__ == "__main__":
    main()
    dist.barrier()
    dist.destroy_process_group()
    time.sleep(0.5)  # gloo's threads let go of the last tensors; see gpt_loop.py
