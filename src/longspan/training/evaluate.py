"""Measures how a model uses long context, by loss by position and a needle test; the same at any layout.

Loss by position: the loss of held-out tokens, grouped by their place in their document. A model that
uses its context gets better with more context; a model that was trained on short documents gets worse
at positions beyond their length.

Needle: held-out text of a given length has a made-up pair "key value" (random tokens) at a given depth.
At the end the key comes again, and the model must continue with the value. Only attention over the
whole distance can do this. (After Kamradt 2023; random tokens need no tokenizer, no instruction
following and no language.)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist

from longspan.config.model import IGNORE_INDEX
from longspan.context_parallel.run_layout import run_layout
from longspan.data import TokenDataset
from longspan.training.sharding import LocalBatch
from longspan.training.trainer import Trainer

#: number of tokens of a needle's key, and of its value
NEEDLE = 8
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
#: seed of the random numbers of needles, which nothing else uses
SEED = 7


def position_edges(sequence_len: int, buckets: int = 8) -> list[int]:
    """The edges of the buckets: 0, then the length s divided by powers of two: [0, s/128, .., s/2, s]."""
    return [0, *sorted({sequence_len >> i for i in range(buckets)} - {0})]


@torch.no_grad()
def loss_by_position(trainer: Trainer) -> list[dict]:
    """Mean loss of the held-out tokens in each bucket of positions; collective.

    Returns:
        For each bucket: from, to (positions in the document), tokens, loss (nats; None without
        tokens), right (share of tokens to which the model gives a probability of more than a half).
    """
    assert trainer.valid_data is not None
    trainer.model.eval()
    edges = position_edges(trainer.run.batch.sequence_len)
    rank = dist.get_rank(trainer.groups.cp)
    sums = torch.zeros(3, len(edges) - 1, dtype=torch.float64)
    inner = torch.tensor(edges[1:-1])
    for batch in trainer.shard.evaluation(trainer.valid_data):
        loss = trainer.losses(batch).double().cpu()
        bucket = torch.bucketize(batch.layout.document_positions(rank), inner, right=True).expand_as(loss)
        valid = batch.labels != IGNORE_INDEX
        found = torch.stack([torch.ones_like(loss), loss, (loss < np.log(2)).double()])
        for row, values in zip(sums, found):
            row.index_add_(0, bucket[valid], values[valid])
    dist.all_reduce(sums, group=trainer.groups.dp_cp)
    return [
        {
            "from": a,
            "to": b,
            "tokens": int(n),
            "loss": loss / n if n else None,
            "right": right / n if n else None,
        }
        for a, b, (n, loss, right) in zip(edges, edges[1:], sums.t().tolist())
    ]


@torch.no_grad()
def needles(trainer: Trainer, lengths: Sequence[int], trials: int) -> list[dict]:
    """Measures how often the model finds the value of a needle; collective.

    Args:
        lengths: numbers of tokens of the texts.
        trials: number of texts for each length and depth.

    Returns:
        For each length and depth: length, depth, right (share of the value's tokens that get a probability
        of more than a half) and probability (the geometric mean of these tokens' probabilities).
    """
    assert trainer.valid_data is not None
    trainer.model.eval()
    run, group = trainer.run, trainer.groups.cp
    rank = dist.get_rank(group)
    results = []
    for length in lengths:
        layout = run_layout(run, length, name="auto")
        for depth in DEPTHS:
            sums = torch.zeros(2, dtype=torch.float64)
            for trial in range(trials):
                tokens, labels = needle_text(trainer.valid_data, run.vocab_size, length, depth, trial)
                local = (
                    layout.shard(tokens, rank, dim=1),
                    layout.shard(labels, rank, dim=1, pad_value=IGNORE_INDEX),
                )
                loss = trainer.losses(LocalBatch(*local, layout)).double().cpu()[local[1] != IGNORE_INDEX]
                sums += torch.stack([(loss < np.log(2)).double().sum(), loss.sum()])
            dist.all_reduce(sums, group=group)
            count = trials * NEEDLE
            results.append(
                {
                    "length": length,
                    "depth": depth,
                    "right": sums[0].item() / count,
                    "probability": float(np.exp(-sums[1].item() / count)),
                }
            )
    return results


def needle_text(
    data: TokenDataset, vocab: int, length: int, depth: float, trial: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Held-out text with a needle: tokens and labels, [1, length]; only the value at the end has labels."""
    g = np.random.Generator(np.random.PCG64([SEED, length, int(100 * depth), trial]))
    key, value = g.integers(0, vocab, NEEDLE), g.integers(0, vocab, NEEDLE)
    room = length - 4 * NEEDLE
    rows: list[np.ndarray] = []
    at, held = int(g.integers(len(data))), 0
    # The text is made of successive rows, from a random row on.
    while held < room:
        bounds = data.boundaries(at % len(data))
        rows.append(data.row(at % len(data)).tokens[: bounds[-1]])
        held, at = held + len(rows[-1]), at + 1
    text = np.concatenate(rows)[:room]
    place = int(depth * room)
    tokens = np.concatenate([text[:place], key, value, text[place:], key, value])
    labels = np.full(length, IGNORE_INDEX, dtype=np.int64)
    labels[-NEEDLE - 1 : -1] = value
    return torch.from_numpy(tokens)[None], torch.from_numpy(labels)[None]
