"""The files beside the weights of every written model, for train's export, for conversions and for merging.

config.json, generation_config.json and the tokenizer's files name the same tokens: those that the run trained
with. Other content of the base model's files (sampling settings, more end tokens and templates) is kept.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from longspan.config.architecture import Architecture
from longspan.config.families.config_json import hugging_face_config
from longspan.config.families.hub import model_config, model_file
from longspan.config.run import Run
from longspan.config.schema import DatasetConfig, TrainConfig
from longspan.data.instruct import Encoder, Recipe
from longspan.data.text import begin_ids, eod_id, load_tokenizer, special_tokens
from longspan.data.tokenizer_files import (
    SETTINGS,
    VOCABULARY,
    folder_of,
    json_object,
    read_tokenizer_files,
    to_bytes,
    with_begin,
    with_tokens,
)
from longspan.errors import UserError

GENERATION = "generation_config.json"
TOKEN_NAMES = ("bos", "eos", "pad")

Files = dict[str, bytes]


@dataclass(frozen=True)
class Origin:
    """The files of the model from which the weights came.

    Attributes:
        config: its config.json.
        generation: its generation_config.json; empty if there is none.
        folder: the folder in which its tokenizer may lie; None if it is not on this machine.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    generation: Mapping[str, Any] = field(default_factory=dict)
    folder: Path | None = None


def origin_of(base_model: str | None, pretrained: bool = True) -> Origin:
    """The files of base_model that are on this machine; without ``pretrained`` no generation_config.json.

    Raises:
        UserError: its config.json is not on this machine, or one of its files cannot be read.
    """
    if base_model is None:
        return Origin()
    folder = Path(base_model)
    if not folder.is_dir():
        # A config.json fetched from the hub before has more fields than the table of known architectures.
        try:
            folder = model_file(base_model, "config.json", network=False).parent
        except UserError:
            return Origin(model_config(base_model, network=False)[0])
    config = model_config(str(folder))[0]
    return Origin(config, read_json(folder / GENERATION) if pretrained else {}, folder)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a model's file; empty if there is no file.

    Raises:
        UserError: the file cannot be read, or is not a JSON object.
    """
    try:
        found = json.loads(path.read_bytes()) if path.exists() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path} cannot be read ({error}), and an export needs it. Put it right or remove it."
        ) from None
    if not isinstance(found, dict):
        raise UserError(f"{path} holds {type(found).__name__}, not an object. Put it right or remove it.")
    return found


# --- which tokens ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Trained:
    """The tokenizer that a run trained with.

    Attributes:
        files: as of ``read_tokenizer_files``, changed to name the tokens below.
        tokens: bos, eos and pad -> number, if the tokenizer has such a token.
        tokenizer: None if there is no ``tokenizer.json``.
    """

    files: Files = field(default_factory=dict)
    tokens: Mapping[str, int] = field(default_factory=dict)
    tokenizer: Tokenizer | None = None


def trained_tokenizer(path: str | Path | None) -> Trained:
    """Reads a tokenizer; where its files name no bos or eos, it gets the tokens that training put there.

    Raises:
        UserError: a file cannot be read.
    """
    if path is None:
        return Trained()
    files = read_tokenizer_files(path)
    if VOCABULARY not in files:
        return Trained(files)
    tokenizer, folder = load_tokenizer(path), folder_of(path)
    named = special_tokens(folder)
    found = {name: tokenizer.token_to_id(named.get(f"{name}_token", "")) for name in TOKEN_NAMES}
    if found["eos"] is None:
        found["eos"] = eod_id(tokenizer, folder)
    begin = begin_ids(tokenizer, folder)
    if len(begin) == 1:
        found["bos"] = begin[0] if found["bos"] is None else found["bos"]
        put = tokenizer.encode("", add_special_tokens=True).ids[:1]
        if put and put != begin:
            files = with_begin(files, put[0], (tokenizer.id_to_token(begin[0]) or "", begin[0]))
    tokens = {name: number for name, number in found.items() if number is not None}
    texts = {f"{name}_token": tokenizer.id_to_token(number) or "" for name, number in tokens.items()}
    files = with_tokens(files, {k: v for k, v in texts.items() if k not in named})
    settings = json_object(files, SETTINGS)
    # Without a class transformers uses the model's, which may add special tokens of its own.
    if "tokenizer_class" not in settings:
        files = files | {SETTINGS: to_bytes({"tokenizer_class": "PreTrainedTokenizerFast"} | settings)}
    return Trained(files, tokens, tokenizer)


def turn_ends(config: TrainConfig, tokenizer: str | Path) -> list[int]:
    """The special tokens that end an answer in the run's chats, according to its templates."""
    found: list[int] = []
    record = {"messages": [{"role": role, "content": "word"} for role in ("user", "assistant") * 2]}
    for source in config.datasets:
        if source.type != "chat_template":
            continue
        template = {"chat_template": source.chat_template, "chat_template_jinja": source.chat_template_jinja}
        plain = DatasetConfig.model_validate({"path": source.path, "type": "chat_template"} | template)
        try:
            recipe = Recipe.make(plain, tokenizer, False, config.chat_template, config.chat_template_jinja)
            encoder = Encoder(recipe)
            tokens, mask = encoder("", record)
        # This template refuses the chat made up here; it has accepted those of the data.
        except UserError:
            continue
        assert mask is not None
        special = {n for n, t in encoder.tokenizer.get_added_tokens_decoder().items() if t.special}
        last = [int(t) for t, now, after in zip(tokens, mask, [*mask[1:], 0]) if now and not after]
        found += [token for token in last if token in special]
    return list(dict.fromkeys(found))


def _kept(given: Any, vocab_size: int, before: Tokenizer | None, now: Tokenizer | None) -> list[int]:
    """The base model's token numbers that mean the same token in its tokenizer and in the trained one."""
    numbers = given if isinstance(given, list) else [given]
    numbers = [n for n in numbers if isinstance(n, int) and not isinstance(n, bool) and 0 <= n < vocab_size]
    if before is None or now is None:
        return numbers
    texts = {n: before.id_to_token(n) for n in numbers}
    return [n for n in numbers if texts[n] is not None and texts[n] == now.id_to_token(n)]


def model_files(config: dict[str, Any], origin: Origin, trained: Trained, ends: Iterable[int] = ()) -> Files:
    """config.json, generation_config.json and the tokenizer's files of a model.

    Args:
        config: config.json without its tokens.
        ends: further tokens that end an answer.
    """
    vocab = config.get("vocab_size")
    vocab = vocab if isinstance(vocab, int) else 1 << 31
    own = origin.folder / VOCABULARY if origin.folder is not None else None
    before = load_tokenizer(own) if own is not None and own.is_file() else None

    def ids(given: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
        """bos, eos and pad for a file; None keeps transformers from using a default of the architecture."""
        found: dict[str, Any] = {}
        for name in TOKEN_NAMES:
            key, number = f"{name}_token_id", trained.tokens.get(name)
            said = given[key] if given.get(key) is not None else other.get(key)
            kept = _kept(said, vocab, before, trained.tokenizer)
            if isinstance(said, list) and name == "eos":
                found[key] = kept if number is None or number in kept else [number, *kept]
            else:
                found[key] = number if number is not None else next(iter(kept), None)
        return found

    config = config | ids(origin.config, {})
    generation = {k: v for k, v in origin.generation.items() if k != "_from_model_config"}
    generation |= ids(origin.generation, origin.config)
    eos = generation["eos_token_id"]
    all_ends = eos if isinstance(eos, list) else [] if eos is None else [eos]
    all_ends = [*all_ends, *(end for end in ends if end not in all_ends and end < vocab)]
    generation["eos_token_id"] = all_ends if len(all_ends) > 1 else next(iter(all_ends), None)
    generation = {k: v for k, v in generation.items() if v is not None or k in origin.generation}
    return trained.files | {"config.json": to_bytes(config), GENERATION: to_bytes(generation)}


# --- the files of each kind of model --------------------------------------------------------


def files_of_run(config: TrainConfig, described: TrainConfig, dtype: str, tokenizer: Path | None) -> Files:
    """The files of a whole model that a run trained.

    Args:
        config: of the run: the base model and the data it names.
        described: a config with the model's own keys, as a checkpoint's description has them.
        dtype: of the written weights, such as ``bfloat16``.
    """
    pretrained = config.base_model is not None and not config.reinit_weights
    origin = origin_of(config.base_model, pretrained)
    # A base model without a tokenizer.json may still have other files of a tokenizer.
    trained = trained_tokenizer(tokenizer or (origin.folder if pretrained else None))
    ends = turn_ends(config, tokenizer) if tokenizer is not None else []
    assert described.vocab_size is not None
    if config.model_implementation == "transformers":
        # auto_map names Python files, which are not exported.
        made = {k: v for k, v in origin.config.items() if k not in ("dtype", "torch_dtype", "auto_map")}
        return model_files(made | {"torch_dtype": dtype}, origin, trained, ends)
    made = hugging_face_config(
        Architecture.of(described),
        vocab_size=described.vocab_size,
        sequence_len=described.sequence_len,
        dtype=dtype,
        base=origin.config,
    )
    return model_files(made, origin, trained, ends)


def files_of_adapters(config: TrainConfig, tokenizer: Path | None) -> Files:
    """The files beside adapters: the tokenizer, and the merged model's settings for generation."""
    if tokenizer is None:
        return {}
    origin, ends = origin_of(config.base_model), turn_ends(config, tokenizer)
    files = model_files(dict(origin.config), origin, trained_tokenizer(tokenizer), ends)
    del files["config.json"]
    return files


def files_of_merged(config: dict[str, Any], base: Path, adapters: Path, tokenizer: Path | None) -> Files:
    """The files of a base model with adapters merged into it.

    Args:
        config: the base model's config.json, with the dtype of the written weights.
        tokenizer: None takes the adapters' tokenizer, or else the base model's.
    """
    beside = read_json(adapters / GENERATION)
    own = adapters if (adapters / VOCABULARY).is_file() else base
    # The token numbers in the adapters' files belong to the tokenizer beside them.
    origin = Origin(config, beside or read_json(base / GENERATION), own if beside else base)
    return model_files(config, origin, trained_tokenizer(tokenizer or own))


def files_beside(run: Run, dtype: str) -> Files:
    """The files that a run's export writes beside its weights or adapters.

    Raises:
        UserError: a file that the export needs cannot be read.
    """
    tokenizer = run.config.tokenizer_config
    path = Path(tokenizer) if tokenizer else None
    if run.lora is not None:
        return files_of_adapters(run.config, path)
    return files_of_run(run.config, run.config, dtype, path)
