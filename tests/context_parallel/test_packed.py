"""Megatron's packed API: parameters, padding, a rank's slices of a batch."""

import pytest
import torch

from longspan.context_parallel import (
    check_sequence_alignment,
    get_batch_on_this_cp_rank,
    get_packed_seq_params,
    get_padding,
)


@pytest.mark.parametrize(
    ("arguments", "padding"),
    [
        ((13, 1, 1, False), 0),
        ((13, 2, 1, False), 3),  # to a multiple of 2 cp
        ((13, 1, 4, True), 3),  # of tp
        ((13, 2, 4, True), 3),  # of 2 cp tp
        ((17, 2, 4, True), 15),
        ((16, 2, 4, True), 0),
        ((17, 2, 4, False), 3),  # without sequence parallelism tp has no say
        ((13, 1, 1, False, False, None, True), 3),  # fp8 alone: of 16
        ((13, 1, 1, False, False, None, True, "mxfp8"), 19),  # of 32
        ((13, 2, 1, False, False, None, True, "mxfp8"), 3),  # context parallelism has the say
        ((13, 2, 4, True, True, 40), 27),  # overlap: to the decoder's length
        ((13, 2, 4, False, True, 40), 3),
    ],
)
def test_padding(arguments, padding):
    assert get_padding(*arguments) == padding


def test_padding_to_a_decoder_length_needs_one():
    with pytest.raises(ValueError, match="give the padded length, at least seq_len"):
        get_padding(13, 2, 4, True, True)


def test_padded_rows_are_thd_where_context_parallelism_needs_it():
    tokens = torch.zeros(3, 12)
    params = get_packed_seq_params(tokens, 8, 5, 2)
    assert params.qkv_format == "thd"
    assert params.cu_seqlens_q.tolist() == params.cu_seqlens_kv.tolist() == [0, 15, 30, 45]
    assert params.cu_seqlens_q_padded.tolist() == params.cu_seqlens_kv_padded.tolist() == [0, 20, 40, 60]
    assert params.cu_seqlens_q.dtype == torch.int32
    assert params.max_seqlen_q == params.max_seqlen_kv == 20
    assert get_packed_seq_params(tokens, 8, 0, 2, use_packed_sequence=True).qkv_format == "thd"
    for cp, padding, packed in ((1, 5, True), (1, 5, False), (2, 0, False)):
        params = get_packed_seq_params(tokens, 8, padding, cp, packed)
        assert params.qkv_format == "sbhd"
        assert params.cu_seqlens_q_padded is None
    with pytest.raises(ValueError, match="at least one token must be left"):
        get_packed_seq_params(tokens, 0, 12, 2)


def test_alignment():
    assert check_sequence_alignment(64, 4) == 16
    assert check_sequence_alignment(7, 1) == 7
    with pytest.raises(ValueError, match="sequence_len 60 does not divide by 2 x cp_size = 8 .* is 64"):
        check_sequence_alignment(60, 4)
    with pytest.raises(ValueError, match="at least 1"):
        check_sequence_alignment(60, 0)


def test_zigzag_slices_of_a_batch():
    tokens = torch.arange(16).view(2, 8)
    batch = {
        "tokens": tokens,
        "labels": None,
        "hidden": torch.zeros(2, 8, 3),
        "attention_mask": torch.zeros(2, 1, 8, 8),
    }
    first, second = (get_batch_on_this_cp_rank(batch, 2, rank) for rank in range(2))
    assert first["tokens"].tolist() == [[0, 1, 6, 7], [8, 9, 14, 15]]
    assert second["tokens"].tolist() == [[2, 3, 4, 5], [10, 11, 12, 13]]
    assert first["labels"] is None
    assert first["hidden"].shape == (2, 4, 3)
    assert first["attention_mask"].shape == (2, 1, 4, 8)
    assert get_batch_on_this_cp_rank(batch, 1, 0) is batch
    with pytest.raises(ValueError, match=r"'tokens'\] has 6 tokens .* SequenceLayout.zigzag"):
        get_batch_on_this_cp_rank({"tokens": torch.zeros(1, 6)}, 2, 0)
    with pytest.raises(ValueError, match="from 0 to 1"):
        get_batch_on_this_cp_rank(batch, 2, 2)


def test_what_describes_a_batch_is_not_cut():
    """cu_seqlens and its kin, 1-D or [1, n], and single numbers stay; at every size of the group."""
    described = {
        "cu_seqlens": torch.tensor([[0, 3, 8]]),
        "cu_seqlens_padded": torch.tensor([0, 4, 8]),
        "max_seqlen": torch.tensor([5]),
        "max_seqlen_q": 5,
        "local_cp_size": torch.tensor([[2]]),
        "count": torch.tensor(8),
    }
    tokens = torch.arange(8).view(1, 8)
    for cp, expected in ((1, tokens.tolist()), (2, [[0, 1, 6, 7]])):
        cut = get_batch_on_this_cp_rank({"tokens": tokens, "labels": tokens + 1} | described, cp, 0)
        assert list(cut) == ["tokens", "labels", *described]
        assert cut["tokens"].tolist() == expected
        assert (cut["labels"] - 1).tolist() == expected
        assert all(cut[name] is described[name] for name in described)
    with pytest.raises(ValueError, match=r"batch\['weights'\] has shape \(3,\)"):
        get_batch_on_this_cp_rank({"tokens": tokens, "weights": torch.zeros(3)}, 2, 0)


@pytest.mark.parametrize("cp", [1, 2])
def test_tensors_of_different_lengths_are_refused(cp):
    batch = {
        "tokens": torch.zeros(1, 8),
        "labels": torch.zeros(1, 4),
        "attention_mask": torch.zeros(1, 1, 8, 8),
    }
    with pytest.raises(ValueError, match="tokens 8, labels 4, attention_mask 8 tokens a row"):
        get_batch_on_this_cp_rank(batch, cp, 0)
