"""The data that a config names: blends and splits, and what the config's keys do with documents.

A config names token files with Megatron-LM's keys (``data_path``, ``split``) or with axolotl's key
(``datasets``). A run uses one of these two ways.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, NamedTuple

from longspan.errors import UserError

if TYPE_CHECKING:
    from longspan.config.schema import TrainConfig

DEFAULT_SPLIT = "969,30,1"
"""Megatron-LM's, in parts of a thousand: training, evaluation, test."""

MOCK_VOCAB_SIZE = 32768

PATHS = ("data_path", "train_data_path", "valid_data_path", "test_data_path")

#: the names of special tokens in tokenizer_config.json
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


class Member(NamedTuple):
    """One source of a blend; the weight is None if the blend has no weights."""

    path: str
    weight: Fraction | None


def read_blend(name: str, values: Sequence[str]) -> list[Member]:
    """Reads ``[prefix, ...]`` or ``[weight, prefix, weight, prefix, ...]``. Weights are exact: 0.1 is 1/10.

    Args:
        name: the name of the key, for messages.

    Raises:
        UserError: numbers and prefixes do not alternate, a weight is not above 0, a prefix comes twice or is
            empty, or there is none.
    """
    numbers = [_NUMBER.fullmatch(value) is not None for value in values]
    found = " ".join(values)
    if not values or "" in values:
        raise UserError(f"{name} {found!r}: empty. Give a .bin/.idx prefix.")
    if any(numbers) and numbers != [True, False] * (len(values) // 2):
        raise UserError(
            f"{name} {found!r}: weights and prefixes alternate: weight prefix weight prefix ...; or give prefixes alone, which "
            "are taken as one. (A prefix that is a number: ./7.)"
        )
    if any(numbers):
        members = [Member(path, Fraction(weight)) for weight, path in zip(values[::2], values[1::2])]
    else:
        members = [Member(path, None) for path in values]
    for member in members:
        if member.weight is not None and member.weight <= 0:
            raise UserError(
                f"{name}: {member.path} has weight {member.weight}; it must be above 0. Leave it out."
            )
    paths = [member.path for member in members]
    for path in dict.fromkeys(p for p in paths if paths.count(p) > 1):
        raise UserError(
            f"{name}: {path} is given {paths.count(path)} times. Give it once, with the sum of the weights."
        )
    return members


def read_split(text: str) -> list[float]:
    """``"99,1,0"`` -> shares of training, evaluation and test, which add up to 1; missing ones are 0.

    Raises:
        UserError: the text is not one to three numbers from 0 on, of which the first is above 0.
    """
    parts = [part for part in re.split(r"[,/\s]+", text.strip()) if part]
    rule = "give one to three shares for training, evaluation and test, such as 99,1,0."
    if not 1 <= len(parts) <= 3 or not all(_NUMBER.fullmatch(part) for part in parts):
        raise UserError(f"split {text!r}: {rule}")
    shares = [float(part) for part in parts] + [0.0] * (3 - len(parts))
    if min(shares) < 0 or shares[0] == 0 or sum(shares) == float("inf"):
        raise UserError(f"split {text!r}: shares are 0 or more, and training's is above 0: {rule}")
    return [share / sum(shares) for share in shares]


def has_validation(config: TrainConfig) -> bool:
    """Whether the config holds out data to evaluate on. An invalid split, reported elsewhere, counts too."""
    if config.data_path or config.mock_data:
        try:
            return read_split(config.split or DEFAULT_SPLIT)[1] > 0
        except UserError:
            return True
    return bool(config.val_set_size or config.valid_data_path or config.test_datasets)


def evaluates(config: TrainConfig) -> bool:
    """Whether a run evaluates: data is held out, and eval_iters is not 0."""
    return has_validation(config) and config.eval_iters != 0


def keeps_documents_apart(config: TrainConfig) -> bool:
    """Whether the documents of a sequence do not attend to each other."""
    return config.sample_packing or config.reset_attention_mask


#: the keys that give an end-of-document token an effect in the stream of documents
STREAM_KEYS = ("reset_position_ids", "reset_attention_mask", "eod_mask_loss")


def marks_documents(config: TrainConfig) -> bool:
    """Whether an end-of-document token has an effect in the stream of documents."""
    return any(getattr(config, name) for name in STREAM_KEYS)


def end_problems(end: int | None, vocab: int | None) -> list[str]:
    """A message if the end-of-document token ``end`` lies outside a vocabulary of ``vocab`` tokens."""
    if end is None or vocab is None or end < vocab:
        return []
    return [f"eod_token_id {end} is beyond vocab_size {vocab}: tokens are numbered from 0. Give its number."]
