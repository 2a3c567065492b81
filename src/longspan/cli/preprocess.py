"""The part of ``longspan prepare`` that turns files into .bin/.idx: Megatron-LM's ``preprocess_data.py``."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from longspan.cli.options import number, take_lists, take_options
from longspan.config.load import make_config
from longspan.errors import UserError, did_you_mean
from longspan.runs.counter import Counter

OPTIONS = {
    "--output-prefix": True,
    "--tokenizer": True,
    "--train-vocab-size": True,
    "--append-eod": False,
    "--no-append-eod": False,
    "--workers": True,
    "--partitions": True,
    "--keep-sequential-samples": False,
    "--log-interval": True,
    "--split-sentences": False,
    "--keep-newlines": False,
    "--lang": True,
    "--tokenizer-type": True,
    "--tokenizer-model": True,
    "--vocab-file": True,
    "--merge-file": True,
    "--vocab-size": True,
}
#: options that take several values
LISTS = ("--input", "--json-keys", "--json-key")
#: Options that are not keys of a config: with one of them the command prepares files, not a config's data.
_KEYS = {"--tokenizer-type", "--tokenizer-model", "--vocab-file", "--merge-file", "--vocab-size"}
FILE_OPTIONS = {*OPTIONS, *LISTS} - _KEYS


def prepare_files(arguments: Sequence[str]) -> int:
    """Reads the options, and writes a pair of files for each field."""
    problems: list[str] = []
    lists, others = take_lists(arguments, LISTS, problems)
    taken, rest, more = take_options(others, OPTIONS)
    problems += more
    known = [*OPTIONS, *LISTS]
    problems += [
        f"{a}: unknown option.{did_you_mean(a, known)}"
        if a.startswith("--")
        else f"{a!r}: unexpected argument."
        for a in rest
    ]
    given = {**taken, **lists}
    problems += [f"{name} is missing." for name in ("--input", "--output-prefix") if name not in given]
    if "--json-key" in lists and "--json-keys" in lists:
        problems.append("--json-key and --json-keys are both given. Keep one.")
    keys = lists.get("--json-keys") or lists.get("--json-key") or ["text"]
    if len(set(keys)) < len(keys):
        problems.append(f"--json-keys {' '.join(keys)}: a key is given twice.")
    numbers = {o: number(taken, o, problems) for o in ("--workers", "--log-interval", "--partitions")}
    size = number(taken, "--train-vocab-size", problems, least=257)
    vocab_size = number(taken, "--vocab-size", problems)
    if "--append-eod" in taken and "--no-append-eod" in taken:
        problems.append("--append-eod and --no-append-eod are both given. Keep one.")
    for option in ("--keep-newlines", "--lang"):
        if option in taken and "--split-sentences" not in taken:
            problems.append(f"{option} goes with --split-sentences.")
    kind = _tokenizer_type(taken, problems)
    if problems:
        raise UserError(problems)
    for option in ("--partitions", "--keep-sequential-samples"):
        if option in taken:
            print(
                f"without effect here: {option}: files are read as one stream, in their order, and tokenised by --workers.",
                file=sys.stderr,
            )
    return _write(taken, lists["--input"], keys, kind, size, vocab_size, numbers)


def _tokenizer_type(taken: dict[str, str], problems: list[str]) -> str:
    """``null``, ``gpt2``, ``train`` or ``load``."""
    # Training accepts the same names.
    reading = make_config({"tokenizer_type": taken.get("--tokenizer-type")})
    problems += reading.problems
    kind = reading.config.tokenizer_type if reading.config else None
    if reading.problems:
        return "load"
    ways: dict[str, list[str]] = {
        "load": [o for o in ("--tokenizer", "--tokenizer-model") if o in taken],
        "train": [o for o in ("--train-vocab-size",) if o in taken],
        "gpt2": [o for o in ("--vocab-file", "--merge-file") if o in taken],
        "null": [],
    }
    wanted = {"GPT2BPETokenizer": "gpt2", "HuggingFaceTokenizer": "load", "NullTokenizer": "null"}.get(
        kind or ""
    )
    said = [way for way, options in ways.items() if options]
    if wanted is None and len(said) == 1:
        wanted = said[0]
    if len(ways["gpt2"]) == 1:
        problems.append(
            f"{ways['gpt2'][0]}: a GPT-2 BPE tokenizer is --vocab-file and --merge-file. Give both."
        )
    elif len(ways["load"]) == 2:
        problems.append("--tokenizer and --tokenizer-model are the same. Keep one.")
    elif wanted is None:
        problems.append(
            "give one of --tokenizer FOLDER (load it), --train-vocab-size N (train one), --vocab-file with --merge-file "
            "(GPT-2 BPE), and --tokenizer-type NullTokenizer with --vocab-size."
        )
    elif wanted == "null" and "--vocab-size" not in taken:
        problems.append("--tokenizer-type NullTokenizer needs --vocab-size.")
    elif wanted != "null" and not ways[wanted]:
        needs = "--vocab-file and --merge-file" if wanted == "gpt2" else "--tokenizer-model FOLDER"
        problems.append(f"--tokenizer-type {taken['--tokenizer-type']} needs {needs}.")
    if wanted is not None and (odd := [o for way in said if way != wanted for o in ways[way]]):
        problems.append(f"{', '.join(odd)}: another tokenizer than the one that is asked for. Keep one.")
    return wanted or "load"


def _write(
    taken: dict[str, str],
    inputs: list[str],
    keys: list[str],
    kind: str,
    train_size: int | None,
    vocab_size: int | None,
    numbers: dict[str, int | None],
) -> int:
    from longspan.data import eod_id, load_tokenizer, train_tokenizer, vocabulary_size
    from longspan.data.gpt2 import gpt2_tokenizer
    from longspan.data.preprocess import Encoding, documents_of, input_files, preprocess, sentence_splitter

    files = input_files(inputs)
    language = taken.get("--lang", "english") if "--split-sentences" in taken else None
    if language is not None:
        # This finds a missing language before a tokenizer is trained.
        sentence_splitter(language, False)
    prefix = taken["--output-prefix"]
    level = "document" if language is None else "sentence"
    prefixes = [Path(f"{prefix}_{key}_{level}") for key in keys]
    final = folder = None
    if kind == "train":
        # The tokenizer gets its final name when the tokens are whole, so that both always belong together.
        final = Path(prefix + "_tokenizer")
        folder = final.with_name(f".{final.name}.partial")
        texts = (t for fields in documents_of(files, keys) for sequences in fields for t in sequences if t)
        train_tokenizer(texts, train_size or 0, folder)
    elif kind == "gpt2":
        folder = gpt2_tokenizer(taken["--vocab-file"], taken["--merge-file"], Path(prefix + "_tokenizer"))
    elif kind == "load":
        folder = Path(taken.get("--tokenizer") or taken["--tokenizer-model"])
    eod = None
    if folder is None:
        size = vocab_size or 0
        # As in Megatron-LM, the end-of-document token is one more token after the vocabulary.
        eod = size
    else:
        tokenizer = load_tokenizer(folder)
        size = vocabulary_size(tokenizer)
        if vocab_size is not None and vocab_size < size:
            raise UserError(
                f"--vocab-size {vocab_size} is smaller than the tokenizer's {size} tokens. Leave it out."
            )
        size = max(size, vocab_size or 0)
        eod = eod_id(tokenizer, folder)
    if "--no-append-eod" in taken:
        eod = None
    elif eod is None:
        raise UserError(f"the tokenizer in {folder} names no end-of-document token. Add --no-append-eod.")
    encoding = Encoding(str(folder) if folder else None, size, eod, language, "--keep-newlines" in taken)
    with Counter(", ".join(inputs), numbers["--log-interval"]) as counter:
        done = preprocess(
            documents_of(files, keys), prefixes, encoding, numbers["--workers"] or 1, progress=counter
        )
    if final is not None and folder is not None:
        shutil.rmtree(final, ignore_errors=True)
        folder.rename(final)
    for path, count in zip(prefixes, done):
        print(f"{count['documents']:,} documents, {count['tokens']:,} tokens -> {path}.bin, {path}.idx")
    return 0
