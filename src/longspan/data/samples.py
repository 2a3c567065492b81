"""Samples prepared once: token files and, beside them, files of masks.

    <name>-<fingerprint>/samples.bin, .idx              the tokens, a document a sample
    <name>-<fingerprint>/samples_mask.bin, .idx         uint8, 1 where a token is learned

Both are in the format of ``indexed``. Documents (type: completion) have no mask. The token files
come last: where they are, all is there.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from longspan.data.cache import is_whole, only_here
from longspan.data.indexed import IndexedDataset, IndexedDatasetWriter, best_dtype, bin_and_idx
from longspan.data.instruct import Encoder, Recipe, Sample
from longspan.data.sources import iter_records, stamp
from longspan.data.text import Progress, load_tokenizer, special_tokens, vocabulary_size
from longspan.errors import UserError
from longspan.parent import end_with_pool

#: records a process takes at a time
CHUNK = 512


def mask_prefix(prefix: str | Path) -> Path:
    """Where the masks of token files are."""
    tokens, _ = bin_and_idx(prefix)
    return tokens.with_name(tokens.name.removesuffix(".bin") + "_mask")


def open_masks(prefix: str | Path) -> IndexedDataset | None:
    """The masks of token files; None where they are documents, all of which counts.

    Raises:
        UserError: the two are not of the same samples.
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


def prepare_samples(
    recipe: Recipe, cache_dir: str | Path, processes: int | None = None, progress: Progress | None = None
) -> Path:
    """Makes the samples of a dataset once; later calls find them.

    Args:
        processes: that tokenise; default: the cores. A small dataset is done without.
        progress: called with (samples, tokens) done so far.

    Returns:
        The prefix of the token files.

    Raises:
        UserError: a record is not what the type asks for, or there is none.
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
            if not _is_whole(prefix, masked):  # while this process waited
                _write_samples(recipe, prefix, masked, processes or os.cpu_count() or 1, progress)
    return prefix


def _write_samples(
    recipe: Recipe, prefix: Path, masked: bool, processes: int, progress: Progress | None
) -> None:
    vocab_size = vocabulary_size(load_tokenizer(recipe.tokenizer))
    writer = IndexedDatasetWriter(prefix, best_dtype(vocab_size))
    with writer, IndexedDatasetWriter(mask_prefix(prefix), np.uint8) if masked else nullcontext() as masks:
        for samples in _encoded(recipe, processes):
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


def _is_whole(prefix: Path, masked: bool) -> bool:
    try:
        return is_whole(prefix) and (open_masks(prefix) is not None) == masked
    except UserError:
        return False


def _encoded(recipe: Recipe, processes: int) -> Iterator[list[Sample]]:
    """The samples in the records' order, a chunk at a time; memory holds a few chunks."""
    encoder = Encoder(recipe)  # here too: what is wrong with the tokenizer is said once
    records = iter_records(recipe.source)
    first = list(islice(records, 2 * CHUNK))
    if processes == 1 or len(first) < 2 * CHUNK:  # starting processes takes longer
        while first:
            yield [encoder(*record) for record in first]
            first = list(islice(records, CHUNK))
        return
    # spawned: a fork of a process with threads (tokenizers, torch) may hang
    with ProcessPoolExecutor(processes, get_context("spawn"), _begin, (recipe,)) as pool:
        ahead = deque([pool.submit(_encode, first[:CHUNK]), pool.submit(_encode, first[CHUNK:])])
        try:
            while ahead:
                while len(ahead) <= 2 * processes and (chunk := list(islice(records, CHUNK))):
                    ahead.append(pool.submit(_encode, chunk))
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()


_OWN: dict[str, Encoder] = {}  # of a worker process


def _begin(recipe: Recipe) -> None:
    end_with_pool()
    _OWN["encoder"] = Encoder(recipe)


def _encode(records: list[tuple[str, dict[str, Any]]]) -> list[Sample]:
    return [_OWN["encoder"](*record) for record in records]
