"""GPT-2's byte-level BPE from its two files, ``vocab.json`` and ``merges.txt``, as a ``tokenizer.json``.

Megatron-LM names a GPT-2 tokenizer by these files; longspan reads ``tokenizer.json`` everywhere.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from longspan.config.json_text import parse_json
from longspan.data.text import END_OF_TEXT
from longspan.errors import UserError, did_you_mean
from longspan.files import write_whole


def gpt2_tokenizer(vocab_file: str | Path, merge_file: str | Path, cache_dir: str | Path) -> Path:
    """Writes the tokenizer into ``cache_dir/gpt2-<fingerprint>``, once.

    Returns:
        The folder, with ``tokenizer.json`` and a ``tokenizer_config.json`` that transformers reads.

    Raises:
        UserError: a file is missing or invalid, or there is no ``<|endoftext|>``.
    """
    contents = [_read(name, path) for name, path in (("vocab_file", vocab_file), ("merge_file", merge_file))]
    digest = hashlib.blake2b("\0".join(contents).encode(), digest_size=6).hexdigest()
    folder = Path(cache_dir).expanduser() / f"gpt2-{digest}"
    if (folder / "tokenizer.json").is_file():
        return folder
    vocab = _vocabulary(vocab_file, contents[0])
    merges = _merges(merge_file, contents[1], vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "tokenizer_class": "GPT2Tokenizer",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "unk_token": END_OF_TEXT,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
    }
    files = {
        "tokenizer_config.json": json.dumps(settings, indent=2) + "\n",
        "tokenizer.json": tokenizer.to_str(),
    }
    # tokenizer.json is written last, because its presence shows that all files are there.
    for name, text in files.items():
        write_whole(folder / name, text)
    return folder


def _read(name: str, path: str | Path) -> str:
    path = Path(path).expanduser()
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "does not exist"
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(f"{name} {path} {found}.{did_you_mean(path.name, siblings)}")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{name} {path} is not a text file in UTF-8.") from None


def _vocabulary(path: str | Path, text: str) -> dict[str, int]:
    try:
        vocab = parse_json(text)
    except ValueError as error:
        raise UserError(f"vocab_file {path}: not JSON ({error}). Give GPT-2's vocab.json.") from None
    if not isinstance(vocab, dict) or not all(isinstance(number, int) for number in vocab.values()):
        raise UserError(f"vocab_file {path}: not a mapping of tokens to numbers. Give GPT-2's vocab.json.")
    if END_OF_TEXT not in vocab:
        raise UserError(
            f"vocab_file {path}: no {END_OF_TEXT}, which ends a document. Give GPT-2's vocab.json."
        )
    return vocab


def _merges(path: str | Path, text: str, vocab: dict[str, int]) -> list[tuple[str, str]]:
    merges = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or (number == 1 and line.startswith("#version")):
            continue
        pair = line.split()
        if len(pair) != 2 or any(token not in vocab for token in (*pair, "".join(pair))):
            raise UserError(
                f"merge_file {path}, line {number}: {line!r} is no merge of two tokens of vocab_file. The two files belong "
                "together: give GPT-2's merges.txt."
            )
        merges.append((pair[0], pair[1]))
    return merges
