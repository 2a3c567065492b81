"""What a config says of its data: blends, splits, and which of its keys go together.

Megatron-LM's way to name token files (``data_path``, ``split``) and axolotl's (``datasets``) are two
doors to one house; a run goes through one of them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any, NamedTuple

from longspan.errors import Problem, UserError, did_you_mean

if TYPE_CHECKING:
    from longspan.config.schema import TrainConfig

DEFAULT_SPLIT = "969,30,1"
"""Megatron-LM's, in parts of a thousand: training, evaluation, test."""

MOCK_VOCAB_SIZE = 32768

PATHS = ("data_path", "train_data_path", "valid_data_path", "test_data_path")

#: names of special tokens, as tokenizer_config.json has them
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


class Member(NamedTuple):
    """One source of a blend; the weight is None where all are taken as they are."""

    path: str
    weight: Fraction | None


def read_blend(name: str, values: Sequence[str]) -> list[Member]:
    """``[prefix, ...]`` or ``[weight, prefix, weight, prefix, ...]``. Weights are exact: 0.1 is a tenth.

    Args:
        name: of the key, for messages.

    Raises:
        UserError: numbers and prefixes do not alternate, a weight is not above 0, or a prefix comes twice.
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
        UserError: not one to three numbers from 0 on, the first above 0.
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
    """Does the config hold anything out to evaluate on? A wrong split does: it has a message of its own."""
    if config.data_path or config.mock_data:
        try:
            return read_split(config.split or DEFAULT_SPLIT)[1] > 0
        except UserError:
            return True
    return bool(config.val_set_size or config.valid_data_path or config.test_datasets)


def evaluates(config: TrainConfig) -> bool:
    """Is anything held out to evaluate on?"""
    return has_validation(config) and config.eval_iters != 0


def keeps_documents_apart(config: TrainConfig) -> bool:
    """Do the documents of a sequence not see each other?"""
    return config.sample_packing or config.reset_attention_mask


#: what an end-of-document token does in the stream
STREAM_KEYS = ("reset_position_ids", "reset_attention_mask", "eod_mask_loss")


def marks_documents(config: TrainConfig) -> bool:
    """Does an end-of-document token of the stream do anything?"""
    return any(getattr(config, name) for name in STREAM_KEYS)


def data_problems(config: TrainConfig) -> list[Problem]:
    """The rules between the keys of data and tokenizers."""
    found: list[Problem] = []
    doors = [
        name for name in ("datasets", "data_path", "train_data_path", "mock_data") if getattr(config, name)
    ]
    if not doors:
        text = (
            "datasets: missing. A list such as 'datasets: [{path: my_texts}]'; or data_path, a .bin/.idx prefix; or mock_data: "
            "true."
        )
        found.append((("datasets",), text))
    if len(doors) > 1:
        text = f"{' and '.join(doors)} are given: each says what to train on. Keep one."
        if doors == ["datasets", "data_path"]:
            text += " (datasets take .bin/.idx prefixes too, and a weight each.)"
        found.append((tuple(doors), text))
    for name in PATHS:
        if (values := getattr(config, name)) is not None:
            _collect(found, (name,), lambda name=name, values=values: read_blend(name, values))
    for name in ("valid_data_path", "test_data_path"):
        if getattr(config, name) is not None and config.train_data_path is None:
            text = (
                f"{name} goes with train_data_path; data_path is cut by split, and datasets by val_set_size. "
            )
            found.append(((name, "train_data_path"), text + "Give train_data_path, or leave it out."))
    if config.split is not None:
        _collect(found, ("split",), lambda: read_split(config.split or ""))
        if not config.data_path and not config.mock_data:
            text = f"split {config.split!r} cuts data_path, which is not given. "
            other = (
                "val_set_size cuts datasets" if config.datasets else "valid_data_path is what to evaluate on"
            )
            found.append((("split", "data_path"), f"{text}Leave it out: {other}."))
    if doors and "datasets" not in doors:
        for name, rule in (
            ("val_set_size", "split or valid_data_path says what to evaluate on"),
            ("test_datasets", "split or valid_data_path says what to evaluate on"),
            ("tokenizer_train_vocab_size", "there is no text to train a tokenizer on"),
        ):
            if getattr(config, name):
                text = f"{name} goes with datasets; here ({doors[0]}) {rule}. Leave it out."
                found.append(((name, doors[0]), text))
    _held_out(config, found)
    _stream(config, found)
    _weights(config, found)
    _templates(config, found)
    _unused(config, found)
    _tokenizer(config, found)
    return found


def _collect(found: list[Problem], names: tuple[str, ...], read) -> None:
    try:
        read()
    except UserError as error:
        found.extend((names, problem) for problem in error.problems)


def _weights(config: TrainConfig, found: list[Problem]) -> None:
    without = [source.path for source in config.datasets if source.weight is None]
    if len(without) == len(config.datasets):
        return
    if without:
        text = f"datasets: {', '.join(without)} without a weight beside others with one. Give each a weight, or none."
        found.append((("datasets",), text))
    if config.val_set_size >= 1:
        text = f"val_set_size {config.val_set_size:g} is a number of documents; with weights give a share, which each dataset holds out."
        found.append((("val_set_size", "datasets"), text))
    paths = [source.path for source in config.datasets]
    for path in dict.fromkeys(p for p in paths if paths.count(p) > 1):
        text = (
            f"datasets: {path} is given {paths.count(path)} times. Give it once, with the sum of the weights."
        )
        found.append((("datasets",), text))


def _tokenizer(config: TrainConfig, found: list[Problem]) -> None:
    def wrong(names: str, text: str) -> None:
        found.append((tuple(names.split()), text))

    kind, files = config.tokenizer_type, ("vocab_file", "merge_file")
    given = [name for name in files if getattr(config, name) is not None]
    if len(given) == 1:
        other = files[1 - files.index(given[0])]
        wrong(
            "vocab_file merge_file",
            f"{given[0]} without {other}: a GPT-2 BPE tokenizer is both. Give {other} too.",
        )
    others = [n for n in ("tokenizer_config", "tokenizer_train_vocab_size") if getattr(config, n) is not None]
    if given and others:
        text = f"{' and '.join(given)} with {others[0]}: which tokenizer is it? Keep one."
        wrong(f"vocab_file merge_file {others[0]}", text)
    if len(others) == 2:
        text = (
            "tokenizer_config and tokenizer_train_vocab_size are both given. Load a tokenizer or train one."
        )
        wrong("tokenizer_config tokenizer_train_vocab_size", text)
    if kind == "GPT2BPETokenizer" and not given:
        wrong("tokenizer_type vocab_file", f"tokenizer_type {kind} needs vocab_file and merge_file.")
    if kind == "HuggingFaceTokenizer":
        if given:
            text = f"tokenizer_type {kind} takes tokenizer_config (--tokenizer-model), not {' and '.join(given)}: GPT2BPETokenizer does."
            wrong("tokenizer_type vocab_file merge_file", text)
        elif config.tokenizer_config is None and config.base_model is None:
            text = f"tokenizer_type {kind} needs tokenizer_config (--tokenizer-model): tokenizer.json or its folder."
            wrong("tokenizer_type tokenizer_config", text)
    if kind == "NullTokenizer":
        if given or others:
            text = f"tokenizer_type {kind} with {', '.join([*given, *others])}: it is no tokenizer at all. Keep one."
            wrong("tokenizer_type vocab_file merge_file tokenizer_config tokenizer_train_vocab_size", text)
        if config.vocab_size is None:
            wrong(
                "tokenizer_type vocab_size", f"tokenizer_type {kind} needs vocab_size: nothing else says it."
            )


def _held_out(config: TrainConfig, found: list[Problem]) -> None:
    if config.val_set_size > 1 and config.val_set_size != int(config.val_set_size):
        found.append(
            (
                ("val_set_size",),
                f"val_set_size {config.val_set_size}: below 1 it is a share of the documents, from 1 on a whole number of them.",
            )
        )
    if config.test_datasets and config.val_set_size > 0:
        found.append(
            (
                ("test_datasets", "val_set_size"),
                f"test_datasets and val_set_size {config.val_set_size} are both given. Evaluate on one of them.",
            )
        )


def _stream(config: TrainConfig, found: list[Problem]) -> None:
    """The keys of the stream of documents, beside what makes no stream."""
    samples = next((s for s in [*config.datasets, *config.test_datasets] if s.type != "completion"), None)
    for name in (name for name in STREAM_KEYS if getattr(config, name)):
        if config.sample_packing:
            text = (
                f"{name}: true is for the stream of documents (sample_packing: false). With sample_packing: true documents are kept "
                "apart, each with its own positions, and nothing is learned across a border. Keep one of the two."
            )
            found.append(((name, "sample_packing"), text))
        elif samples is not None:
            text = f"{name}: true is for a stream of documents; {samples.path} makes samples, and each has a row of its own. Leave it out."
            found.append(((name, "datasets"), text))
    if config.eod_token_id is not None and not marks_documents(config):
        text = f"eod_token_id {config.eod_token_id} has no effect without {', '.join(STREAM_KEYS[:-1])} or {STREAM_KEYS[-1]}. Leave it out."
        found.append((("eod_token_id",), text))
    if config.tokenizer_type != "NullTokenizer":
        found += [
            (("eod_token_id", "vocab_size"), text)
            for text in end_problems(config.eod_token_id, config.vocab_size)
        ]


def end_problems(end: int | None, vocab: int | None) -> list[str]:
    """What is wrong with the number of the token that ends a document, beside the size of the vocabulary."""
    if end is None or vocab is None or end < vocab:
        return []
    return [f"eod_token_id {end} is beyond vocab_size {vocab}: tokens are numbered from 0. Give its number."]


#: a dataset's keys that only its type reads
_OF_TYPE = {"completion": ("field",), "chat_template": (
    "field_messages",
    "message_property_mappings",
    "roles",
    "roles_to_train",
    "message_field_training",
    "field_system",
    "field_tools",
    "drop_system_message",
    "chat_template",
    "chat_template_jinja",
)}  # fmt: skip


def _unused(config: TrainConfig, found: list[Problem]) -> None:
    for name in ("datasets", "test_datasets"):
        for number, source in enumerate(getattr(config, name)):
            for kind, fields in _OF_TYPE.items():
                for key in fields:
                    if source.type != kind and getattr(source, key) != type(source).model_fields[key].default:
                        text = f"{name}.{number}.{key} has no effect without type: {kind}. Set it, or leave {key} out."
                        found.append(((name,), text))


def _templates(config: TrainConfig, found: list[Problem]) -> None:
    given: list[tuple[str, Any]] = [
        ("", config),
        *((f"datasets.{i}.", d) for i, d in enumerate(config.datasets)),
    ]
    given += [(f"test_datasets.{i}.", d) for i, d in enumerate(config.test_datasets)]
    for place, where in given:
        name, jinja = where.chat_template, where.chat_template_jinja
        key = place.split(".")[0] or "chat_template"
        if name == "jinja" and jinja is None:
            text = f"{place}chat_template: jinja needs chat_template_jinja: the template, or its file."
            found.append(((key, "chat_template_jinja"), text))
        elif name not in (None, "jinja") and jinja is not None:
            text = f"{place}chat_template {name!r} and chat_template_jinja are both given. Keep one."
            found.append(((key, "chat_template_jinja"), text))
    for name in config.special_tokens or {}:
        if name not in SPECIAL_TOKENS:
            text = f"special_tokens.{name}: unknown. The names are {', '.join(SPECIAL_TOKENS)}.{did_you_mean(name, SPECIAL_TOKENS)}"
            found.append((("special_tokens",), text))
