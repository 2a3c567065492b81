"""Placeholders, embeddings and labels of text and image tokens in one sequence."""

import pytest
import torch

from longspan.context_parallel import (
    expand_image_tokens,
    get_image_index,
    get_packed_seq_params,
    get_shifted_labels,
)

IMAGE = -200


def test_a_placeholder_becomes_one_for_each_embedding():
    tokens = torch.tensor([5, IMAGE, 6, IMAGE, IMAGE])
    assert expand_image_tokens(tokens, IMAGE, 2).tolist() == [5, *[IMAGE] * 2, 6, *[IMAGE] * 4]
    rows = torch.tensor([[IMAGE, 1], [2, IMAGE]])
    assert expand_image_tokens(rows, IMAGE, 3).tolist() == [[*[IMAGE] * 3, 1], [2, *[IMAGE] * 3]]
    assert torch.equal(expand_image_tokens(rows, IMAGE, 1), rows)
    assert expand_image_tokens(torch.tensor([[1, 2]]), IMAGE, 3).tolist() == [[1, 2]]


def test_embeddings_are_numbered_through_all_rows():
    tokens = torch.tensor([[1, IMAGE, IMAGE, IMAGE, IMAGE, 2], [IMAGE, IMAGE, 3, 4, 5, 6]])
    assert get_image_index(tokens, IMAGE, 3, 2).tolist() == [[-1, 0, 1, 2, 3, -1], [4, 5, -1, -1, -1, -1]]
    text = torch.ones(1, 3, dtype=torch.int64)
    assert get_image_index(text, IMAGE, 0, 7).tolist() == [[-1, -1, -1]]


def test_image_tokens_and_ends_of_documents_have_no_label():
    tokens = torch.tensor([[IMAGE, IMAGE, 3, 4, 5, IMAGE, 6]])
    assert get_shifted_labels(tokens, IMAGE).tolist() == [[-100, 3, 4, 5, -100, 6, -100]]
    cu = torch.tensor([0, 4, 4, 7])
    assert get_shifted_labels(tokens, IMAGE, cu).tolist() == [[-100, 3, 4, -100, -100, 6, -100]]
    assert get_shifted_labels(tokens.expand(2, -1), IMAGE)[1].tolist() == [-100, 3, 4, 5, -100, 6, -100]


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("img_seq_len=0: an image has at least one", lambda x: expand_image_tokens(x, IMAGE, 0)),
        (r"hold \[2, 1\] images.*pad the rows", lambda x: expand_image_tokens(x, IMAGE, 2)),
        (
            r"hold 3 image tokens \(id -200\), but 2 images.*2 have 4",
            lambda x: get_image_index(x, IMAGE, 2, 2),
        ),
        (r"a run of 2 image tokens.*img_seq_len 3", lambda x: get_image_index(x, IMAGE, 1, 3)),
        ("cu_seqlens with 2 rows", lambda x: get_shifted_labels(x, IMAGE, torch.tensor([0, 3]))),
        ("cu_seqlens ends at 2", lambda x: get_shifted_labels(x[:1], IMAGE, torch.tensor([0, 2]))),
        ("img_seq_len=-1: the number of image tokens", lambda x: get_packed_seq_params(x, -1, 0, 2)),
    ],
)
def test_what_does_not_fit_is_refused(message, call):
    with pytest.raises(ValueError, match=message):
        call(torch.tensor([[IMAGE, IMAGE, 1], [2, 3, IMAGE]]))
