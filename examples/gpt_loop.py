"""longspan's GPT in your own loop, written as for Megatron: tensor, context and data parallelism without FSDP.

    python -m torch.distributed.run --nproc-per-node 2 examples/gpt_loop.py [--tp 2]

The processes that are no tensor parallel ranks cut each sequence among them. The printed losses are the same for any
number of processes and any --tp: initial weights follow the seed, and gradients are summed over all ranks.
"""

import argparse
import time

import torch
import torch.distributed as dist

from longspan import TransformerConfig, finalize_model_grads, parallel_state
from longspan.context_parallel import get_batch_on_this_cp_rank
from longspan.models import GPTModel
from longspan.tensor_parallel import model_parallel_seed
from longspan.training.optimizer import gradient_norm

VOCAB, LENGTH = 256, 512


def main(tp):
    dist.init_process_group("gloo")
    cp = dist.get_world_size() // tp
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp, context_parallel_size=cp)
    model_parallel_seed(1234)  # before the model: the same weights on every rank and at every layout
    config = TransformerConfig(num_layers=2, hidden_size=64, num_attention_heads=4, tensor_model_parallel_size=tp,
                               context_parallel_size=cp, sequence_parallel=tp > 1)  # fmt: skip
    model = GPTModel(config, VOCAB, LENGTH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    steps = torch.tensor([[1], [3]])  # two sequences that count
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    for step in range(20):
        whole = (torch.arange(LENGTH + 1) * steps + 7 * step) % VOCAB
        # shifted while the sequence is whole, then cut: labels have the length of the tokens
        batch = get_batch_on_this_cp_rank({"tokens": whole[:, :-1], "labels": whole[:, 1:]})
        loss = model(batch["tokens"], labels=batch["labels"]).sum()
        loss.backward()
        count = (batch["labels"] != -100).sum()
        finalize_model_grads(model, num_tokens=count)  # summed over the ranks, divided by the tokens of all
        norm = gradient_norm(model)
        optimizer.step()
        optimizer.zero_grad()
        shown = torch.stack([loss.detach(), count])
        dist.all_reduce(shown, group=group)
        if dist.get_rank() == 0 and step % 5 == 4:
            print(f"step {step + 1:3}  loss {shown[0] / shown[1]:.4f}  gradient norm {norm:.3f}", flush=True)


parser = argparse.ArgumentParser()
parser.add_argument("--tp", type=int, default=1)
main(parser.parse_args().tp)
dist.barrier()
dist.destroy_process_group()
time.sleep(
    0.5
)  # gloo's threads let go of the last tensors; an interpreter that ends before them aborts (torch 2.13)
