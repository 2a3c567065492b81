"""A model of transformers in a plain loop, its sequences cut over the processes.

    python -m torch.distributed.run --nproc-per-node 2 examples/transformers_loop.py [--fsdp]

The printed losses are the same for any number of processes.
"""

import sys
import time

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, LlamaConfig

from longspan.integrations.transformers import (
    all_reduce_gradients,
    longspan_context,
    shard_batch,
    sum_fsdp_gradients,
)


def main():
    group = dist.group.WORLD
    torch.manual_seed(0)  # the same weights and the same batches on every rank
    config = LlamaConfig(vocab_size=256, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                         intermediate_size=128)  # fmt: skip
    # or: AutoModelForCausalLM.from_pretrained("your/model", attn_implementation="longspan")
    model = AutoModelForCausalLM.from_config(config, attn_implementation="longspan")
    if "--fsdp" in sys.argv:
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
        sum_fsdp_gradients(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    tokens = torch.randint(256, (2, 1)) + torch.arange(1000) * torch.tensor(
        [[1], [3]]
    )  # two sequences that count
    for step in range(20):
        batch = {"input_ids": tokens % 256, "labels": tokens % 256}  # whole, as a collator makes it
        shard = shard_batch(batch, group=group, config=config)
        with longspan_context(shard.layout, group=group):
            loss = model(**shard.inputs).loss  # this rank's share of the mean
        loss.backward()
        if "--fsdp" not in sys.argv:
            all_reduce_gradients(model, group)
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(shown := loss.detach())
        if dist.get_rank() == 0 and step % 5 == 4:
            print(f"step {step + 1:3}  loss {shown.item():.4f}", flush=True)


dist.init_process_group("gloo")
main()
dist.destroy_process_group()
time.sleep(
    0.5
)  # gloo's threads let go of the last tensors; an interpreter that ends before them aborts (torch 2.13)
