"""``longspan prepare``: text to ``.bin/.idx``; and the same for the datasets of a config."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from longspan.cli.config import number
from longspan.cli.options import read_config, take_options
from longspan.cli.preprocess import FILE_OPTIONS, Counter, prepare_files
from longspan.config.architecture import model_folder
from longspan.config.data_rules import MOCK_VOCAB_SIZE
from longspan.config.resolve import Run, resolve
from longspan.config.schema import DatasetConfig, TrainConfig
from longspan.errors import UserError

USAGE = """\
usage: longspan prepare CONFIG [--show N] [--json] [--any-key value]
       longspan prepare --input PATH ... --output-prefix PREFIX TOKENIZER [options]

Tokenises into Megatron's .bin/.idx. With a config: its datasets, into dataset_prepared_path.
  --show N              the first N samples of the run: what of their text is learned, where documents begin
  --json                the same for scripts, with every token; without --show the numbers of tokens alone
With files:
  --input PATH ...      text and .jsonl files, patterns ('*.jsonl'), folders of text and code, or python-stdlib
  --output-prefix P     writes P_KEY_document.bin and .idx for each key
  --json-keys KEY ...   the fields of a .jsonl line that hold text (default text); --json-key KEY is the same
  --append-eod          put the end-of-document token behind each document (the default)
  --no-append-eod       do not
  --workers N           processes that tokenise (default 1, with a thread a core)
  --split-sentences     a sequence for each sentence, by nltk, into P_KEY_sentence (--lang LANGUAGE, default english)
  --keep-newlines       sentences keep the blanks and line ends behind them
  --log-interval N      a line every N documents
  --partitions N        accepted, without effect
TOKENIZER is one of
  --tokenizer T         tokenizer.json or the folder that holds it (also --tokenizer-model T)
  --train-vocab-size N  train a byte-level BPE tokenizer of N tokens into P_tokenizer/
  --vocab-file V --merge-file M                  GPT-2's BPE (--tokenizer-type GPT2BPETokenizer)
  --tokenizer-type NullTokenizer --vocab-size N  the text is numbers below N; N ends a document
"""

OPTIONS = {"--show": True, "--json": False}


def run(arguments: Sequence[str]) -> int:
    if not arguments or "--help" in arguments or "-h" in arguments:
        print(USAGE)
        return 0 if arguments else 2
    if any(argument.partition("=")[0] in FILE_OPTIONS for argument in arguments):
        return prepare_files(arguments)
    own, rest, problems = take_options(arguments, OPTIONS)
    show, as_json = number(own, "--show", problems), "--json" in own
    reading = read_config("prepare", rest, list(OPTIONS), problems)
    assert reading.config is not None
    config = resolve(reading.config, bad_keys=reading.bad, earlier=reading.problems).config
    config = prepare_config(config, show=not as_json)
    if as_json:
        from longspan.cli.show_samples import describe

        print(json.dumps(describe(config, show or 0), ensure_ascii=False))
        return 0
    for source in [*config.datasets, *config.test_datasets]:
        print(f"{source.path} -> {source.prepared}")
    print(f"tokenizer: {config.tokenizer_config or 'none'}, vocabulary {config.vocab_size}")
    if show:
        from longspan.cli.show_samples import describe, show_samples

        show_samples(describe(config, show))
    return 0


def is_indexed(path: str) -> bool:
    """Is this the prefix (or one of the files) of a ``.bin/.idx`` pair?"""
    stem = path[:-4] if path.endswith((".bin", ".idx")) else path
    return Path(stem + ".idx").is_file() or Path(stem + ".bin").is_file()


def check_weights(run: Run) -> None:
    """Finds the weights a run starts from, fetching them where that is needed, and holds their names against the model.

    Raises:
        UserError: they cannot be had, or are those of another model.
    """
    if not run.pretrained:
        return
    from longspan.models.huggingface import Names, SafetensorsFolder, check_tensors

    assert run.config.base_model is not None
    assert run.config.vocab_size is not None
    source = SafetensorsFolder(model_folder(run.config.base_model))
    check_tensors(source, Names(run.transformer_config(), run.config.vocab_size))


def prepare_config(config: TrainConfig, show: bool) -> TrainConfig:
    """Tokenises the datasets of a config where that is not done yet.

    Returns:
        The config with each dataset's ``prepared`` prefix, the tokenizer's folder and
        ``vocab_size`` filled in.

    Raises:
        UserError: a missing or broken source, no tokenizer, or a vocabulary that does not fit.
    """
    from longspan.data import load_tokenizer, prepare_dataset, vocabulary_size
    from longspan.data.sources import is_text

    folder, train_size = config.tokenizer_config, config.tokenizer_train_vocab_size
    if config.vocab_file is not None and config.merge_file is not None:
        from longspan.data.gpt2 import gpt2_tokenizer

        folder = str(gpt2_tokenizer(config.vocab_file, config.merge_file, config.dataset_prepared_path))
    if folder is None and train_size is None and config.base_model is not None:
        own = model_folder(config.base_model) if not config.reinit_weights else Path(config.base_model)
        folder = str(own) if (own / "tokenizer.json").is_file() else None
    if folder is not None:
        folder = own_tokenizer(config, folder)
    sources = []
    for source in [*config.datasets, *config.test_datasets]:
        given = source.prepared or source.path
        if source.prepared or is_indexed(given):
            check_indexed(source, given)
            sources.append(source.model_copy(update={"prepared": given}))
            continue
        if not is_text(source):
            prefix = prepare_records(config, source, folder, show)
            sources.append(source.model_copy(update={"prepared": str(prefix)}))
            continue
        if folder is None and train_size is None:
            raise UserError(
                f"datasets: {source.path!r} is text and there is no tokenizer. Give tokenizer_config (a folder with "
                "tokenizer.json), or tokenizer_train_vocab_size to train one."
            )
        counter = Counter(source.path) if show else None
        prefix, tokenizer_folder = prepare_dataset(
            source.path,
            cache_dir=config.dataset_prepared_path,
            tokenizer_path=folder,
            train_vocab_size=None if folder is not None else train_size,
            field=source.field,
            progress=counter,
        )
        if counter is not None:
            counter.__exit__()
        folder = str(tokenizer_folder)  # a tokenizer trained on the first dataset serves the others
        sources.append(source.model_copy(update={"prepared": str(prefix)}))
    vocab = config.vocab_size
    if config.tokenizer_type == "NullTokenizer" and vocab is not None:
        vocab += 1  # Megatron-LM's: one more token, which ends a document
    if folder is not None:
        size = vocabulary_size(load_tokenizer(folder))
        if vocab is not None and vocab < size:
            raise UserError(
                f"vocab_size {vocab} is smaller than the tokenizer's {size} tokens. Leave vocab_size out, or make it at "
                f"least {size}."
            )
        vocab = vocab or size
    if vocab is None and config.mock_data:
        vocab = MOCK_VOCAB_SIZE
    if vocab is None:
        raise UserError(
            "vocab_size: missing. The datasets are tokenised already and there is no tokenizer to ask."
        )
    return config.model_copy(
        update={
            "datasets": sources[: len(config.datasets)],
            "test_datasets": sources[len(config.datasets) :],
            # what is resolved is not resolved again
            "tokenizer_config": folder,
            "tokenizer_train_vocab_size": None,
            "tokenizer_type": None,
            "vocab_file": None,
            "merge_file": None,
            "vocab_size": vocab,
        }
    )


def check_indexed(source: DatasetConfig, prefix: str) -> None:
    """Refuses token files that are not there, and those whose type says what they cannot know."""
    from longspan.data import IndexedDataset, open_masks

    IndexedDataset(prefix)
    if open_masks(prefix) is None and not source.prepared and source.type != "completion":
        raise UserError(
            f"datasets: {source.path} holds tokens, and no masks that say which of them are answers. Give the records (json, "
            "parquet ...) as path, or leave type out to train on every token."
        )


def prepare_records(config: TrainConfig, source: DatasetConfig, folder: str | None, show: bool) -> Path:
    """Makes the samples of a dataset of records where that is not done yet; returns their prefix."""
    from longspan.data.instruct import Recipe
    from longspan.data.samples import prepare_samples

    if folder is None:
        raise UserError(
            f"datasets: {source.path!r} holds records and there is no tokenizer. Give tokenizer_config (a folder with "
            "tokenizer.json), or a base_model that has one; a tokenizer is trained on text alone."
        )
    recipe = Recipe.make(
        source, folder, config.train_on_inputs, config.chat_template, config.chat_template_jinja
    )
    with Counter(source.path, units="samples") if show else nullcontext() as counter:
        return prepare_samples(
            recipe,
            config.dataset_prepared_path,
            config.dataset_num_proc,
            counter,
            remark=lambda line: print(line, file=sys.stderr),
        )


def own_tokenizer(config: TrainConfig, folder: str) -> str:
    """The tokenizer's folder, with the config's special_tokens and chat_template in it: a copy where they are not."""
    from longspan.data.chat import find_template, own_template
    from longspan.data.text import copy_tokenizer, load_tokenizer, special_tokens

    chosen = config.special_tokens or {}
    tokenizer, now = load_tokenizer(folder), special_tokens(folder)
    missing = [token for token in chosen.values() if tokenizer.token_to_id(token) is None]
    if missing:
        raise UserError(
            f"special_tokens: {', '.join(map(repr, missing))}: not in the vocabulary of {folder}. Add tokens to the tokenizer "
            "and to base_model first, with transformers."
        )
    path = Path(folder)
    template = None
    if config.chat_template is not None or config.chat_template_jinja is not None:
        template = find_template(
            config.chat_template,
            config.chat_template_jinja,
            path if path.is_dir() else path.parent,
            now | chosen,
            [],
        ).text
        if template == own_template(path if path.is_dir() else path.parent):
            template = None
    return str(copy_tokenizer(path, chosen, template, Path(config.dataset_prepared_path)))
