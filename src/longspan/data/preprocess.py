"""Text into token files, like Megatron-LM's ``preprocess_data.py``: several fields, sentences, workers.

    files -> lines -> {key: text} -> (workers) {key: sequences of tokens} -> PREFIX_KEY_document.bin/.idx

A document is one sequence, or one sequence for each sentence if text is split into sentences
or the field is a list of texts. Documents keep their order with any number of workers.
"""

from __future__ import annotations

import glob
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from longspan.data.indexed import IndexedDatasetWriter, best_dtype
from longspan.data.json_lines import json_records, text_of
from longspan.data.text import (
    BATCH_CHARACTERS,
    LINES,
    Progress,
    find_sources,
    load_tokenizer,
)
from longspan.errors import UserError
from longspan.parent import end_with_pool

BATCH = 256
"""Documents a worker tokenises at a time."""

Texts = list[str]
"""One field of one document: its sequences, as text."""


@dataclass(frozen=True)
class Encoding:
    """A worker's settings.

    Attributes:
        tokenizer: the folder of a ``tokenizer.json``; None reads numbers separated by blanks (Megatron-LM's
            NullTokenizer).
        vocab_size: upper bound of the tokens; without a tokenizer the end-of-document token is not included.
        eod: the token put after each document, or None.
        language: the language of the sentences into which a text is split; None does not split.
        keep_newlines: a sentence keeps the blanks and line ends after it.
    """

    tokenizer: str | None
    vocab_size: int
    eod: int | None
    language: str | None = None
    keep_newlines: bool = False


def input_files(given: Sequence[str]) -> list[Path]:
    """The files of paths, patterns (``*.jsonl``) and folders, in that order, each sorted.

    Raises:
        UserError: there is no file for one of the names.
    """
    found: list[Path] = []
    for path in given:
        if any(mark in path for mark in "*?[") and not Path(path).exists():
            matches = sorted(
                p for p in glob.glob(os.path.expanduser(path), recursive=True) if os.path.isfile(p)
            )
            if not matches:
                raise UserError(f"{path}: no file matches this pattern.")
            found += map(Path, matches)
        else:
            found += find_sources(path)
    return list(dict.fromkeys(found))


def documents_of(files: Sequence[Path], keys: Sequence[str]) -> Iterator[list[Texts]]:
    """Yields the fields of each document. A field is a list of sequences: one text, or a JSON list's texts.

    Raises:
        UserError: a line lacks a field (the message names file and line), or keys are given for a text file.
    """
    for file in files:
        if file.suffix.lower() in LINES:
            for where, record in json_records(file):
                yield [_texts(record, key, where) for key in keys]
            continue
        if list(keys) != ["text"]:
            raise UserError(
                f"{file}: not .jsonl or .json, so it has no fields {', '.join(keys)}. Leave --json-keys out."
            )
        yield [[file.read_bytes().decode("utf-8-sig", errors="replace")]]


def preprocess(
    documents: Iterable[list[Texts]],
    prefixes: Sequence[Path],
    encoding: Encoding,
    workers: int = 1,
    progress: Progress | None = None,
) -> list[dict[str, int]]:
    """Tokenises the fields of documents, each into its own pair of files.

    Args:
        documents: the result of `documents_of`.
        prefixes: one for each field.
        workers: number of processes that tokenise; with 1 this process does it, on all cores.
        progress: called with (documents, tokens of all fields) done so far.

    Returns:
        For each field ``{"documents": ..., "tokens": ...}``, the numbers that were written. A document
        without a token stays as an empty document, as in Megatron-LM, so that line n is document n of every
        field.

    Raises:
        UserError: a field has no token at all, or text cannot be encoded. No file is left in this case.
    """
    size = encoding.vocab_size + (encoding.tokenizer is None)
    done = 0
    with ExitStack() as stack:
        writers = [stack.enter_context(IndexedDatasetWriter(p, best_dtype(size))) for p in prefixes]
        if workers > 1:
            encoded = _in_processes(_batches(documents), encoding, workers, stack)
        else:
            encoded = map(make_encoder(encoding), _batches(documents))
        for batch in encoded:
            for fields in batch:
                for writer, (tokens, lengths) in zip(writers, fields):
                    writer.add_document(tokens, lengths)
            done += len(batch)
            if progress is not None:
                progress(done, sum(writer.num_tokens for writer in writers))
        for prefix, writer in zip(prefixes, writers):
            if not writer.num_tokens:
                raise UserError(
                    f"no document with any text to write to {prefix}. Check the path and the field."
                )
        return [{"documents": w.num_documents, "tokens": w.num_tokens} for w in writers]


Encoded = list[list[tuple[np.ndarray, list[int]]]]
"""For each document and field: tokens, and how many are in each sequence."""


def make_encoder(encoding: Encoding) -> Callable[[list[list[Texts]]], Encoded]:
    """The function that encodes a batch of documents."""
    split = (
        _whole if encoding.language is None else sentence_splitter(encoding.language, encoding.keep_newlines)
    )
    tokenizer = None if encoding.tokenizer is None else load_tokenizer(encoding.tokenizer)

    def encode(texts: list[str]) -> list[list[int]]:
        if tokenizer is None:
            return _numbers(texts, encoding.vocab_size)
        return [e.ids for e in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def run(documents: list[list[Texts]]) -> Encoded:
        pieces = [[[s for text in texts for s in split(text)] for texts in fields] for fields in documents]
        tokens = iter(encode([s for fields in pieces for sequences in fields for s in sequences]))
        return [
            [_joined([next(tokens) for _ in sequences], encoding.eod) for sequences in fields]
            for fields in pieces
        ]

    return run


def sentence_splitter(language: str, keep_newlines: bool) -> Callable[[str], list[str]]:
    """A function that splits text with nltk's Punkt (Kiss & Strunk 2006), as Megatron-LM does.

    Raises:
        UserError: nltk or its model for this language is not installed.
    """
    try:
        from nltk.tokenize.punkt import PunktTokenizer
    except ImportError:
        raise UserError(
            "--split-sentences needs nltk, which is not installed: pip install 'longspan[sentences]'. "
            "Leave --split-sentences out to keep each document one sequence, as GPT training wants it."
        ) from None
    try:
        punkt = PunktTokenizer(language)
    except LookupError:
        raise UserError(
            f"--split-sentences: nltk is installed, its model of {language!r} is not: python -m nltk.downloader punkt_tab "
            "(or set NLTK_DATA to the folder that has it); --lang names another language."
        ) from None

    def split(text: str) -> list[str]:
        spans = list(punkt.span_tokenize(text))
        if not keep_newlines:
            return [text[start:stop] for start, stop in spans]
        starts = [start for start, _ in spans]
        return [text[start:stop] for start, stop in zip(starts, [*starts[1:], len(text)])]

    return split


def _whole(text: str) -> list[str]:
    return [text]


def _numbers(texts: list[str], vocab_size: int) -> list[list[int]]:
    found = []
    for text in texts:
        try:
            found.append([int(word) for word in text.split()])
        except ValueError:
            raise UserError(
                f"NullTokenizer reads numbers apart by blanks, found {text[:40]!r}. Give a tokenizer."
            ) from None
        if found[-1] and not 0 <= min(found[-1]) <= max(found[-1]) < vocab_size:
            raise UserError(
                f"NullTokenizer: tokens {min(found[-1])} to {max(found[-1])} with --vocab-size {vocab_size}."
            )
    return found


def _joined(sequences: list[list[int]], eod: int | None) -> tuple[np.ndarray, list[int]]:
    """One document: its tokens with the end token, and its sequences' lengths without empty sequences."""
    full = [sequence for sequence in sequences if sequence]
    if full and eod is not None:
        full[-1] = [*full[-1], eod]
    return np.array([token for sequence in full for token in sequence], dtype=np.int64), [
        len(s) for s in full
    ]


def _texts(record: object, key: str, where: str) -> Texts:
    if isinstance(record, dict) and isinstance(record.get(key), list):
        return [text_of({key: text}, key, where) for text in record[key]]
    return [text_of(record, key, where)]


def _batches(documents: Iterable[list[Texts]]) -> Iterator[list[list[Texts]]]:
    batch: list[list[Texts]] = []
    characters = 0
    for fields in documents:
        batch.append(fields)
        characters += sum(len(text) for texts in fields for text in texts)
        if len(batch) >= BATCH or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _in_processes(
    batches: Iterator[list[list[Texts]]], encoding: Encoding, workers: int, stack: ExitStack
) -> Iterator[Encoded]:
    """Like ``map``, in order; few batches are read in advance, so memory does not grow with the input."""
    # Processes are spawned, because a fork would inherit the tokenizer's threads.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), end_with_pool)
    stack.callback(pool.shutdown, wait=True, cancel_futures=True)
    ahead: deque[Future[Encoded]] = deque()
    for batch in batches:
        ahead.append(pool.submit(_encode, encoding, batch))
        if len(ahead) >= 2 * workers:
            yield ahead.popleft().result()
    while ahead:
        yield ahead.popleft().result()


@lru_cache(maxsize=1)
def _encoder(encoding: Encoding) -> Callable[[list[list[Texts]]], Encoded]:
    """The encoder, made once in each process because a tokenizer takes time to load."""
    return make_encoder(encoding)


def _encode(encoding: Encoding, batch: list[list[Texts]]) -> Encoded:
    return _encoder(encoding)(batch)
