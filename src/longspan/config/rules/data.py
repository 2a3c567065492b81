"""The rules between the keys of data and tokenizers."""

from __future__ import annotations

from typing import Any

from longspan.config.data import (
    PATHS,
    SPECIAL_TOKENS,
    STREAM_KEYS,
    end_problems,
    marks_documents,
    read_blend,
    read_split,
)
from longspan.config.schema import TrainConfig
from longspan.errors import Problem, UserError, did_you_mean


def data_problems(config: TrainConfig) -> list[Problem]:
    """(keys, message) for each broken rule between the keys of data and tokenizers."""
    found: list[Problem] = []
    given = [
        name for name in ("datasets", "data_path", "train_data_path", "mock_data") if getattr(config, name)
    ]
    if not given:
        text = (
            "datasets: missing. A list such as 'datasets: [{path: my_texts}]'; or data_path, a .bin/.idx prefix; or mock_data: "
            "true."
        )
        found.append((("datasets",), text))
    if len(given) > 1:
        text = f"{' and '.join(given)} are given: each says what to train on. Keep one."
        if given == ["datasets", "data_path"]:
            text += " (datasets take .bin/.idx prefixes too, and a weight each.)"
        found.append((tuple(given), text))
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
    if given and "datasets" not in given:
        for name, rule in (
            ("val_set_size", "split or valid_data_path says what to evaluate on"),
            ("test_datasets", "split or valid_data_path says what to evaluate on"),
            ("tokenizer_train_vocab_size", "there is no text to train a tokenizer on"),
        ):
            if getattr(config, name):
                text = f"{name} goes with datasets; here ({given[0]}) {rule}. Leave it out."
                found.append(((name, given[0]), text))
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
    """Problems with keys of the stream of documents, if other keys make no stream."""
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


#: type of a dataset -> the dataset's keys that only this type reads
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
