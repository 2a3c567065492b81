"""Samples prepared once: token files and, beside them, files of masks.

    <name>-<fingerprint>/samples.bin, .idx              the tokens, one document for each sample
    <name>-<fingerprint>/samples_mask.bin, .idx         uint8, 1 where a token is learned
    <name>-<fingerprint>/samples_missing.json           part left out by the chat template -> number of chats

Tokens and masks have the format of ``indexed``. Documents (type: completion) have no mask. The token files
are written last, so that their presence shows that all files are there.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from longspan.config.json_text import read_object
from longspan.data.cache import is_whole, only_here
from longspan.data.indexed import IndexedDataset, IndexedDatasetWriter, best_dtype, bin_and_idx
from longspan.data.instruct import Encoder, Recipe, Sample
from longspan.data.sources import iter_records, stamp
from longspan.data.text import Progress, load_tokenizer, special_tokens, vocabulary_size
from longspan.errors import UserError
from longspan.parent import end_with_pool

#: Number of records that a process takes at a time.
CHUNK = 512


def mask_prefix(prefix: str | Path) -> Path:
    """The prefix of the masks of token files."""
    tokens, _ = bin_and_idx(prefix)
    return tokens.with_name(tokens.name.removesuffix(".bin") + "_mask")


def open_masks(prefix: str | Path) -> IndexedDataset | None:
    """The masks of token files; None for documents, of which every token counts.

    Raises:
        UserError: tokens and masks belong to different samples.
    """
    place = mask_prefix(prefix)
    if not any(path.is_file() for path in bin_and_idx(place)):
        return None
    tokens, masks = IndexedDataset(prefix), IndexedDataset(place)
    if not np.array_equal(tokens.document_lengths, masks.document_lengths):
        raise UserError(
            f"{place}.bin: does not belong to {prefix}.bin: their samples differ in length. Write both again."
        )
    return masks


#: A part of a chat that a template may leave out (`turns.Found`) -> the end of the message about it.
MISSING = {
    "end": "hold an answer that ends with no special token, so a model does not learn to stop there. Take a template whose "
    "end token the tokenizer has (special_tokens, chat_template)",
    "thoughts": "hold thoughts (reasoning_content) that it does not write: they are not trained on. qwen3 writes them, and so do "
    "the templates of models that think",
    "content": "hold a message whose content it does not write: that is not trained on, and not seen",
    "calls": "hold tool calls that it does not write: they are not seen",
    "tools": "hold tools that it does not write: the model learns to answer without seeing them. qwen3 and qwen_25 write them",
}


def prepare_samples(
    recipe: Recipe,
    cache_dir: str | Path,
    processes: int | None = None,
    progress: Progress | None = None,
    remark: Callable[[str], None] | None = None,
    chunk: int = CHUNK,
) -> Path:
    """Makes the samples of a dataset once; later calls find them.

    Args:
        processes: number of processes that tokenise; None means one for each core. For a small dataset this
            process tokenises.
        progress: called with (samples, tokens) done so far.
        remark: called with a line for each part that the chat template left out of the samples, also if the
            samples were made earlier.
        chunk: records that a process tokenises at a time.

    Returns:
        The prefix of the token files.

    Raises:
        UserError: a record does not fit the dataset's type, or there is no record.
    """
    digest = hashlib.blake2b(digest_size=6)
    digest.update(json.dumps(stamp(recipe.source)).encode())
    digest.update(recipe.describe().encode())
    digest.update((recipe.tokenizer / "tokenizer.json").read_bytes())
    digest.update(json.dumps(special_tokens(recipe.tokenizer), sort_keys=True).encode())
    name = Path(recipe.source.path).stem or "data"
    prefix = Path(cache_dir).expanduser() / f"{name}-{digest.hexdigest()}" / "samples"
    masked = recipe.source.type != "completion"
    if not _is_whole(prefix, masked):
        with only_here(prefix.parent):
            # Another process may have written the samples while this process waited.
            if not _is_whole(prefix, masked):
                _write_samples(recipe, prefix, masked, processes or os.cpu_count() or 1, progress, chunk)
    if remark is not None and recipe.template is not None:
        count = len(IndexedDataset(prefix))
        for what, chats in sorted(read_object(_missing_file(prefix)).items()):
            remark(
                f"{recipe.source.path}, chat template {recipe.template.name}: {chats:,} of {count:,} chats {MISSING[what]}."
            )
    return prefix


def _missing_file(prefix: Path) -> Path:
    return prefix.with_name(f"{prefix.name}_missing.json")


def _write_samples(
    recipe: Recipe, prefix: Path, masked: bool, processes: int, progress: Progress | None, chunk: int
) -> None:
    """Writes the samples, and before them the file of the parts that the chat template left out."""
    missing: Counter[str] = Counter()
    vocab_size = vocabulary_size(load_tokenizer(recipe.tokenizer))
    writer = IndexedDatasetWriter(prefix, best_dtype(vocab_size))
    with writer, IndexedDatasetWriter(mask_prefix(prefix), np.uint8) if masked else nullcontext() as masks:
        for samples, left_out in _encoded(recipe, processes, chunk):
            missing += left_out
            for tokens, mask in samples:
                if not len(tokens):
                    continue
                writer.add_document(tokens)
                if masks is not None and mask is not None:
                    masks.add_document(mask)
            if progress is not None:
                progress(writer.num_documents, writer.num_tokens)
        if not writer.num_documents:
            raise UserError(
                f"{recipe.source.path}: no record with any text in it. Look at the data, its split and its fields."
            )
        _missing_file(prefix).write_text(json.dumps(missing))


def _is_whole(prefix: Path, masked: bool) -> bool:
    try:
        whole = is_whole(prefix) and _missing_file(prefix).is_file()
        return whole and (open_masks(prefix) is not None) == masked
    except UserError:
        return False


Encoded = tuple[list[Sample], Counter[str]]


def _encoded(recipe: Recipe, processes: int, size: int) -> Iterator[Encoded]:
    """Yields chunks of so many samples in order, with what the template left out of each; holds few in memory."""
    # The encoder is made here too, so that an error of the tokenizer is reported once.
    encoder = Encoder(recipe)
    records = iter_records(recipe.source)
    first = list(islice(records, 2 * size))
    # For few records, starting processes would take longer.
    if processes == 1 or len(first) < 2 * size:
        while first:
            yield _chunk(encoder, first)
            first = list(islice(records, size))
        return
    # Processes are spawned, because a fork of a process with threads (tokenizers, torch) may hang.
    with ProcessPoolExecutor(processes, get_context("spawn"), _begin, (recipe,)) as pool:
        ahead = deque([pool.submit(_encode, first[:size]), pool.submit(_encode, first[size:])])
        try:
            while ahead:
                while len(ahead) <= 2 * processes and (chunk := list(islice(records, size))):
                    ahead.append(pool.submit(_encode, chunk))
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()


# The encoder of a worker process.
_OWN: dict[str, Encoder] = {}


def _begin(recipe: Recipe) -> None:
    end_with_pool()
    _OWN["encoder"] = Encoder(recipe)


def _encode(records: list[tuple[str, dict[str, Any]]]) -> Encoded:
    return _chunk(_OWN["encoder"], records)


def _chunk(encoder: Encoder, records: list[tuple[str, dict[str, Any]]]) -> Encoded:
    encoder.missing = Counter()
    return [encoder(*record) for record in records], encoder.missing
