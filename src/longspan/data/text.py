"""Documents from text files, tokenizers, and tokens into ``.bin``/``.idx`` files.

`prepare_dataset` does all steps: sources -> documents -> (a trained) tokenizer -> token
files in a cache, made once. Only plain text and JSON lines are read here; other formats
and datasets of a hub are read by `sources`.
"""

from __future__ import annotations

import hashlib
import json
import os
import sysconfig
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from longspan.config.json_text import read_object
from longspan.data.cache import is_whole, only_here
from longspan.data.indexed import IndexedDatasetWriter, best_dtype
from longspan.data.json_lines import json_records, text_of
from longspan.data.tokenizer_files import SETTINGS, TOKENS_MAP, read_tokenizer_files, write_tokenizer_files
from longspan.errors import UserError, did_you_mean
from longspan.files import write_whole

STDLIB = "python-stdlib"
"""The name of a corpus everybody has: the source of the running Python's standard library."""

END_OF_TEXT = "<|endoftext|>"
END_TOKENS = (END_OF_TEXT, "</s>", "<|end_of_text|>")

LINES = frozenset({".jsonl", ".json"})
# .json is missing, because in a folder of code it holds settings and not documents.
_SUFFIXES = (
    ".txt .md .rst .tex .html .jsonl .py .pyi .c .h .cc .cpp .cxx .hpp .cu .cuh .js .jsx .ts .tsx .java .kt "
    ".go .rs .rb .php .swift .scala .cs .lua .pl .r .jl .hs .ml .sh .sql .css .toml .yaml .yml"
)
TEXT_SUFFIXES = frozenset(_SUFFIXES.split())
SKIPPED_FOLDERS = frozenset({"__pycache__", "site-packages", "dist-packages", "node_modules"})

# A batch of long documents is cut at this size, to limit memory.
BATCH_CHARACTERS = 4_000_000

Progress = Callable[[int, int], None]


def find_sources(path: str | Path, suffixes: Collection[str] = TEXT_SUFFIXES) -> list[Path]:
    """The files that documents come from.

    Args:
        path: a text file, a ``.jsonl``/``.json`` file, a folder, or the name ``python-stdlib``.
        suffixes: suffixes of the files to take from a folder and all folders in it, except hidden
            folders, caches and installed packages.

    Returns:
        Paths, sorted by their name relative to the folder.

    Raises:
        UserError: there is no such file, it is not text, or the folder has no such files.
    """
    if not str(path).strip():
        raise UserError("an empty path: give a file or a folder; . is the current folder.")
    root = _root(path)
    if root.is_file():
        with root.open("rb") as file:
            if b"\0" in file.read(8192):
                raise UserError(f"{root}: not a text file: it has zero bytes. Give UTF-8 or JSON lines.")
        return [root]
    if not root.is_dir():
        raise UserError(
            f"{path}: no such file or folder. Give a text file, a .jsonl file, a folder of them, "
            f"or the name {STDLIB}.{_near(root)}"
        )
    found = []
    for folder, inside, files in os.walk(root):
        inside[:] = [name for name in inside if name[0] != "." and name not in SKIPPED_FOLDERS]
        paths = (Path(folder, name) for name in files if Path(name).suffix.lower() in suffixes)
        # A link may lead to a missing file.
        found += [p for p in paths if p.is_file()]
    if not found:
        raise UserError(
            f"{path}: no text file in this folder. Looked for {' '.join(sorted(suffixes))}; name a file of "
            "another kind itself."
        )
    return sorted(found, key=lambda p: p.relative_to(root).as_posix())


def iter_documents(path: str | Path, field: str = "text") -> Iterator[str]:
    """The documents of a path (see `find_sources`): one for each file, or for each line of JSON lines.

    A ``.json`` file may also be one list of objects. Bytes that are not UTF-8 are replaced;
    empty documents are skipped.

    Args:
        field: the field of a JSON object that holds the text.

    Raises:
        UserError: a line is not a JSON object with this field; the message names the file and the line.
    """
    for source in find_sources(path):
        if source.suffix.lower() in LINES:
            texts: Iterator[str] = (text_of(record, field, where) for where, record in json_records(source))
        else:
            texts = iter([source.read_bytes().decode("utf-8-sig", errors="replace")])
        yield from (text for text in texts if text)


def train_tokenizer(documents: Iterable[str], vocab_size: int, folder: str | Path) -> Path:
    """Trains a byte-level BPE tokenizer and writes it; the same documents give the same tokenizer.

    Token 0 is ``<|endoftext|>``, then come the 256 bytes, then merges up to `vocab_size`
    (fewer if the documents do not contain enough).

    Returns:
        The folder, now with ``tokenizer.json`` and a ``tokenizer_config.json`` that
        transformers reads.
    """
    smallest = 257
    if vocab_size < smallest:
        raise UserError(
            f"a vocabulary of {vocab_size} tokens; byte-level BPE needs at least {smallest}: 256 bytes and "
            f"{END_OF_TEXT}."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    folder = Path(folder).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
    }
    write_whole(folder / "tokenizer_config.json", json.dumps(settings, indent=2) + "\n")
    # This file is written last, because its presence shows that all files are there.
    write_whole(folder / "tokenizer.json", tokenizer.to_str(pretty=True))
    return folder


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Loads a ``tokenizer.json``, given by its path or its folder.

    Truncation and padding that were saved with it are switched off, because documents are
    tokenised whole.

    Raises:
        UserError: the file is missing or cannot be read.
    """
    file = _tokenizer_file(path)
    try:
        tokenizer = Tokenizer.from_file(str(file))
    # tokenizers raises plain Exception.
    except Exception as error:
        raise UserError(
            f"{file}: not a tokenizer of the Hugging Face `tokenizers` library ({error}). Save it again with "
            "transformers' save_pretrained()."
        ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """One more than the largest token number; not the number of tokens, because numbers may have gaps."""
    return max(tokenizer.get_vocab().values()) + 1


def eod_id(tokenizer: Tokenizer, folder: str | Path | None) -> int | None:
    """The number of the token that ends a document, or None.

    It is eos_token of the settings (see `special_tokens`) in `folder` (which may also be the path of a
    ``tokenizer.json``), or else the first of the usual names that is in the vocabulary.
    """
    own = special_tokens(folder).get("eos_token") if folder is not None else None
    names = list(END_TOKENS) if own is None else [own, *END_TOKENS]
    numbers = (tokenizer.token_to_id(name) for name in names)
    return next((number for number in numbers if number is not None), None)


def begin_ids(tokenizer: Tokenizer, folder: str | Path | None) -> list[int]:
    """The tokens that begin a sample: those that the tokenizer's post-processor puts before a text, if any.

    If this is one token, and the settings in `folder` name another bos_token, the result is that bos_token.
    """
    alone = tokenizer.encode("a", add_special_tokens=False).ids
    whole = tokenizer.encode("a", add_special_tokens=True).ids
    begin = next((i for i in range(len(whole)) if whole[i : i + len(alone)] == alone), 0)
    named = tokenizer.token_to_id(special_tokens(folder).get("bos_token", "")) if folder is not None else None
    return [named] if begin == 1 and named is not None else whole[:begin]


def special_tokens(folder: str | Path) -> dict[str, str]:
    """bos_token, eos_token and the other special tokens in the settings of a tokenizer's folder.

    They come from ``tokenizer_config.json`` and ``special_tokens_map.json``. If the two files differ, the
    former counts if it has ``added_tokens_decoder``, otherwise the latter, as in transformers.

    Raises:
        UserError: one of the files is not a JSON object.
    """
    folder = Path(folder).expanduser()
    folder = folder if folder.is_dir() else folder.parent
    config, older = (read_object(folder / name) for name in (SETTINGS, TOKENS_MAP))
    if "added_tokens_decoder" in config:
        return _tokens(older) | _tokens(config)
    return _tokens(config) | _tokens(older)


def _tokens(settings: Mapping[str, object]) -> dict[str, str]:
    pairs = ((k, v.get("content") if isinstance(v, dict) else v) for k, v in settings.items())
    return {k: v for k, v in pairs if k.endswith("_token") and isinstance(v, str)}


def tokenize_to_indexed(
    documents: Iterable[str],
    tokenizer: Tokenizer,
    prefix: str | Path,
    eod: int | None,
    vocab_size: int,
    progress: Progress | None = None,
    batch: int = 256,
    begin: Sequence[int] = (),
    batch_characters: int = BATCH_CHARACTERS,
) -> dict[str, int]:
    """Tokenises documents, on all cores, into ``prefix.bin`` and ``prefix.idx``.

    The only special tokens added are `begin` and `eod` at the two ends of each document. Documents
    without a token are left out.

    Args:
        vocab_size: decides the type on disk; at least the tokenizer's size.
        progress: called with (documents, tokens) done so far.
        batch, batch_characters: documents are tokenised at once up to so many, or so many characters.

    Returns:
        ``{"documents": ..., "tokens": ...}``: the numbers of documents and tokens that were written.

    Raises:
        UserError: there is nothing to write. No file is left in this case.
    """
    with IndexedDatasetWriter(prefix, best_dtype(vocab_size)) as writer:
        for texts in _batches(documents, batch, batch_characters):
            for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False):
                if not encoding.ids:
                    continue
                ids = [*begin, *encoding.ids]
                tokens = np.array(ids if eod is None else [*ids, eod], dtype=np.int64)
                if tokens.max() >= vocab_size:
                    raise UserError(
                        f"the tokenizer gave token {tokens.max()}, but the vocabulary size is {vocab_size}; "
                        f"it must be at least {vocabulary_size(tokenizer)}."
                    )
                writer.add_document(tokens)
            if progress is not None:
                progress(writer.num_documents, writer.num_tokens)
        if not writer.num_documents:
            raise UserError(f"no document with any text to write to {prefix}. Check the path and the field.")
    return {"documents": writer.num_documents, "tokens": writer.num_tokens}


def prepare_dataset(
    path: str | Path,
    *,
    cache_dir: str | Path,
    tokenizer_path: str | Path | None = None,
    train_vocab_size: int | None = None,
    field: str = "text",
    progress: Progress | None = None,
) -> tuple[Path, Path]:
    """Tokenises a path once; later calls find the result in the cache.

    The files are in ``cache_dir/<name>-<fingerprint>/``. The fingerprint covers the paths,
    sizes and times of the sources, the field and the tokenizer. If several processes call this
    at the same time, one prepares and the others wait for it.

    Args:
        path: see `find_sources`.
        tokenizer_path: a ``tokenizer.json`` or its folder; it is copied to the cache.
        train_vocab_size: without `tokenizer_path`, the size of a tokenizer trained on the documents.
        field: the field of JSON objects that holds the text.
        progress: called with (documents, tokens) done so far while tokenising.

    Returns:
        (prefix of the token files, folder of the tokenizer).
    """
    if tokenizer_path is None and train_vocab_size is None:
        raise UserError(
            f"{path}: no tokenizer. Give a tokenizer.json or its folder, or a vocabulary size to train one."
        )
    given = None if tokenizer_path is None else _tokenizer_file(tokenizer_path)
    root = _root(path)
    sources = find_sources(path)
    fingerprint = _fingerprint(sources, field, given, train_vocab_size)
    name = STDLIB if str(path) == STDLIB else (root.stem if root.is_file() else root.resolve().name)
    folder = Path(cache_dir).expanduser() / f"{name}-{fingerprint}"
    prefix, tokenizer_folder = folder / "text_document", folder / "tokenizer"

    def is_there() -> bool:
        return is_whole(prefix) and (tokenizer_folder / "tokenizer.json").is_file()

    if not is_there():
        with only_here(folder):
            # Another process may have made the files while this process waited.
            if not is_there():
                _prepare(path, field, prefix, tokenizer_folder, given, train_vocab_size, progress)
    return prefix, tokenizer_folder


def _prepare(
    path: str | Path,
    field: str,
    prefix: Path,
    tokenizer_folder: Path,
    given: Path | None,
    train_vocab_size: int | None,
    progress: Progress | None,
) -> None:
    if given is None:
        assert train_vocab_size is not None
        train_tokenizer(iter_documents(path, field), train_vocab_size, tokenizer_folder)
    else:
        # This checks the tokenizer before it is copied.
        load_tokenizer(given)
        write_tokenizer_files(read_tokenizer_files(given), tokenizer_folder)
    tokenizer = load_tokenizer(tokenizer_folder)
    vocab_size = vocabulary_size(tokenizer)
    end = eod_id(tokenizer, tokenizer_folder)
    begin = begin_ids(tokenizer, tokenizer_folder)
    tokenize_to_indexed(
        iter_documents(path, field), tokenizer, prefix, end, vocab_size, progress, begin=begin
    )


def _root(path: str | Path) -> Path:
    """The file or folder of a path, or of a corpus's name."""
    return Path(sysconfig.get_paths()["stdlib"]) if str(path) == STDLIB else Path(path).expanduser()


def _near(path: Path) -> str:
    """A hint with the most similar name in the same folder, or an empty string."""
    return did_you_mean(path.name, [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else [])


def _batches(documents: Iterable[str], batch: int, most_characters: int) -> Iterator[list[str]]:
    texts: list[str] = []
    characters = 0
    for text in documents:
        texts.append(text)
        characters += len(text)
        if len(texts) >= batch or characters >= most_characters:
            yield texts
            texts, characters = [], 0
    if texts:
        yield texts


def _tokenizer_file(path: str | Path) -> Path:
    """The ``tokenizer.json`` of a path or folder."""
    path = Path(path).expanduser()
    file = path / "tokenizer.json" if path.is_dir() else path
    if file.is_file():
        return file
    if path.is_dir():
        raise UserError(
            f"{path}: no tokenizer.json in this folder. Save one with transformers' save_pretrained() of a "
            "fast tokenizer."
        )
    raise UserError(
        f"{path}: no such tokenizer. Give a tokenizer.json or a folder with one; nothing is downloaded."
        f"{_near(path)}"
    )


def _fingerprint(
    sources: list[Path], field: str, tokenizer: Path | None, train_vocab_size: int | None
) -> str:
    """12 hexadecimal digits that change with anything that would change the tokens."""
    digest = hashlib.blake2b(digest_size=6)
    for source in sources:
        stat = source.stat()
        line = [str(source.resolve()), stat.st_size, stat.st_mtime_ns]
        digest.update(json.dumps(line).encode() + b"\n")
    digest.update(json.dumps(["field", field]).encode() + b"\n")
    if tokenizer is None:
        digest.update(f"train:{train_vocab_size}".encode())
    else:
        digest.update(tokenizer.read_bytes())
        # These files name the end-of-document token, and are copied to the cache with the tokenizer.
        for settings in map(tokenizer.with_name, (SETTINGS, TOKENS_MAP)):
            digest.update(settings.read_bytes() if settings.is_file() else b"")
        if begin := begin_ids(load_tokenizer(tokenizer), tokenizer.parent):
            digest.update(json.dumps(["begin", begin]).encode())
    return digest.hexdigest()
