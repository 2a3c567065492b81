"""Text and image tokens in one sequence: placeholders, the image embedding of each token, and labels.

    [text, image, text]                        one placeholder for an image, as a tokenizer writes it
    [text, image x img_seq_len, text]          expand_image_tokens: one placeholder for each embedding
    [  -1, 0 .. img_seq_len - 1,  -1]          get_image_index: which embedding each token takes

These functions work on whole sequences, before anything is cut over context parallel ranks, because only
there the placeholders can be counted. Their results are [b, s] like the tokens, and are cut as the tokens are
cut (``get_batch_on_this_cp_rank``, or ``layout.shard`` with the pad_value that each function names). The
padding and the boundaries of such sequences are in ``packed`` (``get_padding``, ``get_packed_seq_params``).
"""

from __future__ import annotations

import torch
from torch import Tensor

from longspan.config.model import IGNORE_INDEX
from longspan.context_parallel.layout import SequenceLayout


def expand_image_tokens(tokens: Tensor, image_token_id: int, img_seq_len: int) -> Tensor:
    """[s] or [b, s] -> the same with ``img_seq_len`` placeholders in the place of each one.

    Args:
        tokens: one placeholder stands for each image.
        image_token_id: the placeholder; any number that no text token has.
        img_seq_len: number of embeddings of an image.

    Returns:
        [s + images x (img_seq_len - 1)], or [b, ..] for images of one row.

    Raises:
        ValueError: img_seq_len is below 1, or the rows of a batch have different numbers of images.
    """
    if img_seq_len < 1:
        raise ValueError(f"img_seq_len={img_seq_len}: an image has at least one embedding.")
    placeholder = tokens == image_token_id
    images = placeholder.sum(-1)
    if tokens.dim() == 2 and len(images.unique()) > 1:
        raise ValueError(
            f"the rows of a batch hold {images.tolist()} images: expanded rows would have different lengths. Expand "
            "each row by itself, and pad the rows or join them to one pack."
        )
    repeats = torch.where(placeholder, img_seq_len, 1)
    expanded = tokens.flatten().repeat_interleave(repeats.flatten())
    return expanded.view(*tokens.shape[:-1], -1)


def get_image_index(tokens: Tensor, image_token_id: int, num_images: int, img_seq_len: int) -> Tensor:
    """For each token the number of the image embedding that stands in its place; -1 for text.

    Embeddings are numbered in the order of the placeholders, through all rows of the batch: image i has the
    numbers i x img_seq_len to (i + 1) x img_seq_len - 1.

    Args:
        tokens: [b, s], whole sequences, with ``img_seq_len`` placeholders for each image.
        image_token_id: the placeholder.
        num_images: number of images that go with these tokens.

    Returns:
        int64 [b, s]. Cut it as the tokens are cut; its pad_value is -1.

    Raises:
        ValueError: the numbers of embeddings and of placeholders differ, or the placeholders of an image do
            not stand together.
    """
    placeholder = tokens == image_token_id
    found, needed = int(placeholder.sum()), num_images * img_seq_len
    if found != needed:
        raise ValueError(
            f"tokens hold {found} image tokens (id {image_token_id}), but {num_images} images of img_seq_len {img_seq_len} "
            f"have {needed} embeddings: every image token takes one. Give as many images as the text names, with img_seq_len "
            "image tokens for each (expand_image_tokens)."
        )
    # The edges of a run of placeholders are the places where this differs from the token before.
    edges = torch.nn.functional.pad(placeholder.to(torch.int8), (1, 1)).diff(dim=-1)
    runs = (edges == -1).nonzero()[:, 1] - (edges == 1).nonzero()[:, 1]
    broken = runs[runs % img_seq_len != 0]
    if len(broken):
        raise ValueError(
            f"tokens hold a run of {int(broken[0])} image tokens, which is no multiple of img_seq_len {img_seq_len}: the "
            "tokens of an image stand together, in one row. Was an image cut, or another token set between its tokens?"
        )
    numbers = placeholder.flatten().cumsum(0) - 1
    return numbers.view(tokens.shape).masked_fill(~placeholder, -1)


def get_shifted_labels(tokens: Tensor, image_token_id: int, cu_seqlens: Tensor | None = None) -> Tensor:
    """The label of each token: the token after it, or -100 where that is an image token or another document.

    So image tokens are never predicted. The last token of an image predicts the text after it.

    Args:
        tokens: [b, s], whole sequences.
        cu_seqlens: [d + 1], the documents of a pack (then b is 1); None takes each row as one document.

    Returns:
        int64 [b, s]. Cut it as the tokens are cut; its pad_value is -100.

    Raises:
        ValueError: ``cu_seqlens`` does not fit the tokens, or is given with several rows.
    """
    labels = torch.full_like(tokens, IGNORE_INDEX, dtype=torch.int64)
    labels[:, :-1] = tokens[:, 1:]
    labels[labels == image_token_id] = IGNORE_INDEX
    if cu_seqlens is not None:
        if tokens.shape[0] != 1:
            raise ValueError(
                f"cu_seqlens with {tokens.shape[0]} rows: the documents of a pack come as one row [1, t]. Leave cu_seqlens out "
                "if each row is one document."
            )
        bounds = SequenceLayout.contiguous(tokens.shape[1], 1, cu_seqlens=cu_seqlens).cu_seqlens
        labels[:, torch.tensor(bounds[1:]) - 1] = IGNORE_INDEX
    return labels
