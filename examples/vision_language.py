"""Trains a small vision-language model to name shapes: "a red circle". Three to four minutes on two CPU cores.

    python -m torch.distributed.run --nproc-per-node 2 examples/vision_language.py [--tp 2]

A sequence is 16 image tokens (the patches of a picture) and the caption. The processes that are no tensor
parallel ranks cut each sequence among them, zigzag: with two of them, rank 1 holds image tokens alone, and
rank 0 all words. So no picture can be named without attention across the ranks. Every rank computes the
encoder on whole pictures.

Pictures have 6 colours x 5 shapes, at random positions and in random sizes, on noise. Step k draws its
pictures from seed k; the 1000 pictures of the last test are drawn from seed 10 000 000, which no step uses.
The model writes each caption by itself, greedily, word by word, from the picture alone. The exit code is 1 if
less than 95 % of the captions are exactly right.
"""

import argparse
import sys
import time

import torch
import torch.distributed as dist

from longspan import TransformerConfig, finalize_model_grads, parallel_state
from longspan.context_parallel import (
    SequenceLayout,
    expand_image_tokens,
    get_image_index,
    get_shifted_labels,
)
from longspan.models import VisionLanguageModel
from longspan.tensor_parallel import model_parallel_seed
from longspan.training.optimizer import LocalAdamW

SIZE, PATCH, IMAGE = 24, 6, -200  # pixels of a picture's and of a patch's side; the image token
COLOURS = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1),
           "yellow": (1, 1, 0), "purple": (1, 0, 1), "white": (1, 1, 1)}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "cross", "ring")
WORDS = ("<end>", "a", *COLOURS, *SHAPES)
CAPTION = 4  # words: a, the colour, the shape, <end>
MOST_STEPS, BATCH, LEARNING_RATE, WARMUP = 500, 64, 3e-3, 50
VALIDATION_SEED, TEST_SEED, NEEDED = 9_000_000, 10_000_000, 0.95


def draw(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures [count, 3, SIZE, SIZE] and their captions [count, CAPTION]."""
    g = torch.Generator().manual_seed(seed)
    colour = torch.randint(len(COLOURS), (count,), generator=g)
    shape = torch.randint(len(SHAPES), (count,), generator=g)
    radius = 6 + 4 * torch.rand(count, 1, 1, generator=g)
    centre = radius + (SIZE - 1 - 2 * radius) * torch.rand(2, count, 1, 1, generator=g)
    y, x = (
        torch.arange(SIZE).view(1, -1, 1) - centre[0],
        torch.arange(SIZE).view(1, 1, -1) - centre[1],
    )
    distance, far, near = (x**2 + y**2).sqrt(), x.abs().maximum(y.abs()), x.abs().minimum(y.abs())
    inside = torch.stack(
        [
            distance <= radius,
            far <= 0.9 * radius,
            (2 * x.abs() <= y + radius) & (y <= radius),
            (far <= radius) & (near <= radius / 3),
            (distance <= radius) & (distance >= 0.55 * radius),
        ]
    )[shape, torch.arange(count)]
    paint = torch.tensor(list(COLOURS.values()), dtype=torch.float32)[colour].view(count, 3, 1, 1)
    strength = 0.7 + 0.3 * torch.rand(count, 1, 1, 1, generator=g)
    noise = 0.05 * torch.randn(count, 3, SIZE, SIZE, generator=g)
    words = torch.stack(
        [torch.ones_like(colour), 2 + colour, 2 + len(COLOURS) + shape, torch.zeros_like(colour)], 1
    )
    return torch.where(inside.unsqueeze(1), paint * strength, 0.0) + noise, words


class Cut:
    """Whole sequences [b, s] of a picture and some words -> this rank's rows of them."""

    def __init__(self, model: VisionLanguageModel, words: torch.Tensor, tp: int):
        group = parallel_state.get_context_parallel_group()
        picture = torch.full((len(words), 1), IMAGE)
        whole = expand_image_tokens(torch.cat([picture, words], 1), IMAGE, model.img_seq_len)
        labels = get_shifted_labels(whole, IMAGE)
        index = get_image_index(whole, IMAGE, len(words), model.img_seq_len)
        self.targets = (labels != -100).sum()
        self.layout = SequenceLayout.zigzag(whole.shape[1], dist.get_world_size(group), multiple_of=tp)
        self.tokens, self.labels, self.index = (
            self.layout.shard(x, dist.get_rank(group), dim=1, pad_value=value)
            for x, value in ((whole, 0), (labels, -100), (index, -1))
        )


@torch.no_grad()
def captions(model: VisionLanguageModel, pictures: torch.Tensor, tp: int) -> torch.Tensor:
    """The words [n, CAPTION] that the model writes, each the most probable one after the words before it."""
    words = torch.empty(len(pictures), 0, dtype=torch.int64)
    group = parallel_state.get_context_parallel_group()
    for _ in range(CAPTION):
        cut = Cut(model, words, tp)
        logits = model(pictures, cut.tokens, layout=cut.layout, image_index=cut.index)
        last = cut.layout.unshard(logits, group, dim=1)[:, -1]
        words = torch.cat([words, last.argmax(-1, keepdim=True)], 1)
    return words


def share_right(model: VisionLanguageModel, count: int, seed: int, tp: int) -> float:
    """The share of pictures whose whole caption is right."""
    pictures, words = draw(count, seed)
    return (captions(model, pictures, tp) == words).all(1).float().mean().item()


def make_model(tp: int, cp: int) -> VisionLanguageModel:
    common = dict(
        num_layers=2,
        hidden_size=64,
        num_attention_heads=4,
        tensor_model_parallel_size=tp,
        init_method_std=0.1,  # about 1 / sqrt(64): a narrow model learns slowly from the usual 0.02
    )
    language = TransformerConfig(**common, context_parallel_size=cp, sequence_parallel=tp > 1)
    # The encoder's rows are whole on every rank, so its config has no context and no sequence parallelism.
    vision = TransformerConfig(**common, position_embedding_type="learned_absolute")
    model_parallel_seed(1234)
    arguments = (language, vision, len(WORDS), 64, SIZE, PATCH, IMAGE)
    return VisionLanguageModel(*arguments, parallel_output=False)


def main(tp: int) -> int:
    dist.init_process_group("gloo")
    cp = dist.get_world_size() // tp
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp, context_parallel_size=cp)
    model, began, first = make_model(tp, cp), time.monotonic(), dist.get_rank() == 0
    if first:
        size = sum(p.numel() for p in model.parameters())
        print(f"naming {len(COLOURS)} colours x {len(SHAPES)} shapes: {size:,} parameters, tp {tp} x cp {cp}")
    optimizer = LocalAdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), fused=True)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / WARMUP) * (1 - step / MOST_STEPS)
    )
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    for step in range(1, MOST_STEPS + 1):
        pictures, words = draw(BATCH, step)  # the same on every rank
        cut = Cut(model, words, tp)
        loss = model(pictures, cut.tokens, labels=cut.labels, layout=cut.layout, image_index=cut.index).sum()
        (loss / cut.targets).backward()
        finalize_model_grads(model)  # the sum over the ranks, each of which has the gradient of its own rows
        optimizer.step()
        optimizer.zero_grad()
        rate.step()
        if step % 100 == 0:
            right = share_right(model, 200, VALIDATION_SEED, tp)
            dist.all_reduce(shown := loss.detach(), group=group)
            if first:
                seconds = time.monotonic() - began
                mean = shown / cut.targets
                print(
                    f"step {step:4}  loss {mean:.4f}  captions right {right:6.1%}  {seconds:4.0f} s",
                    flush=True,
                )
            if right >= 0.985:
                break
    pictures, words = draw(6, TEST_SEED + 1)
    shown = captions(model, pictures, tp)
    right = share_right(model, 1000, TEST_SEED, tp)
    if first:
        for written, true in zip(shown.tolist(), words.tolist()):
            is_right = "right" if written == true else "it was " + " ".join(WORDS[i] for i in true[:-1])
            print(f"  {' '.join(WORDS[i] for i in written[:-1]):20} {is_right}")
        print(
            f"held-out pictures: {right:.1%} of 1000 captions right (needed: {NEEDED:.0%}), "
            f"{time.monotonic() - began:.0f} s on {dist.get_world_size()} processes"
        )
    dist.barrier()
    dist.destroy_process_group()
    # gloo's threads let go of the last tensors; an interpreter that ends before them aborts (torch 2.13)
    time.sleep(0.5)
    return 0 if right >= NEEDED else 1


parser = argparse.ArgumentParser()
parser.add_argument("--tp", type=int, default=1)
sys.exit(main(parser.parse_args().tp))
