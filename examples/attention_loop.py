"""longspan's attention in your own model and loop: a pack of three documents, cut over the processes.

    python -m torch.distributed.run --nproc-per-node 2 examples/attention_loop.py

Everything but attention works on tokens one by one, so it runs on this rank's rows as it is.
"""

import time

import torch
import torch.distributed as dist
from torch import nn

from longspan import finalize_model_grads, parallel_state
from longspan.context_parallel import SequenceLayout, context_parallel_attention

HEADS, SIZE, VOCAB, BOUNDARIES = 4, 16, 256, (0, 300, 500, 1024)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        width = HEADS * SIZE
        self.norm, self.qkv, self.out = (
            nn.LayerNorm(width),
            nn.Linear(width, 3 * width),
            nn.Linear(width, width),
        )

    def forward(self, x, group, layout):  # x [rows, width]: this rank's rows
        q, k, v = self.qkv(self.norm(x)).view(len(x), 3, HEADS, SIZE).unbind(1)
        y, _ = context_parallel_attention(q, k, v, group=group, layout=layout)
        return x + self.out(y.flatten(1))


def main():
    parallel_state.initialize_model_parallel(context_parallel_size=dist.get_world_size())
    group, rank = parallel_state.get_context_parallel_group(), dist.get_rank()
    torch.manual_seed(0)  # the same weights and the same tokens on every rank
    embed, block, head = nn.Embedding(VOCAB, HEADS * SIZE), Block(), nn.Linear(HEADS * SIZE, VOCAB)
    model = nn.ModuleList([embed, block, head])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    tokens = torch.randint(VOCAB, (BOUNDARIES[-1],)).sort().values  # something to learn
    targets = tokens.roll(-1)
    targets[[stop - 1 for stop in BOUNDARIES[1:]]] = -100  # a document's last token has no next one

    layout = SequenceLayout.balanced(BOUNDARIES, dist.get_world_size())
    mine, wanted = (
        layout.shard(tokens, rank),
        layout.shard(targets, rank, pad_value=-100),
    )  # cut after the shift
    for step in range(20):
        logits = head(block(embed(mine), group, layout))
        loss = nn.functional.cross_entropy(logits, wanted, reduction="sum") / (targets != -100).sum()
        loss.backward()  # this rank's share of the mean: shares and gradients are summed
        finalize_model_grads(model)
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(shown := loss.detach())
        if rank == 0 and step % 5 == 4:
            print(f"step {step + 1:3}  loss {shown.item():.4f}", flush=True)


dist.init_process_group("gloo")
main()
dist.destroy_process_group()
time.sleep(
    0.5
)  # gloo's threads let go of the last tensors; an interpreter that ends before them aborts (torch 2.13)
