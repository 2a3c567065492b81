"""``longspan prepare CONFIG --show N``: samples as the run uses them, and which tokens are learned."""

from __future__ import annotations

import sys
from itertools import pairwise
from typing import Any

from longspan.config.schema import TrainConfig

#: the most characters that are printed of a piece of text; the middle of a longer piece is left out
SHOWN = 2_000


def describe(config: TrainConfig, count: int) -> dict[str, Any]:
    """The training data of a prepared config, and its first samples in the order of training.

    Returns:
        The content of ``--json``: see docs/data.md.

    Raises:
        UserError: the data holds nothing to train on.
    """
    from longspan.data import load_tokenizer
    from longspan.data.splits import open_parts

    data = open_parts(config)[0]
    tokenizer = None if config.tokenizer_config is None else load_tokenizer(config.tokenizer_config)
    samples = []
    for sample in data.global_batch(0, min(count, len(data))):
        row, documents, begin = data.row(sample), [], 0
        # The label of a token is the next token; the label of the last token may lie in another sample.
        counts = row.labels >= 0
        for source, number, start, stop in data.sources(sample):
            end = begin + stop - start
            tokens = row.tokens[begin:end].tolist()
            apart = config.sample_packing or data.has_samples
            learned = [bool(begin and not apart and counts[begin - 1]), *counts[begin : end - 1].tolist()]
            documents.append(
                {
                    "source": source,
                    "document": number,
                    "start": start,
                    "tokens": tokens,
                    "learned": [int(flag) for flag in learned],
                    **({} if tokenizer is None else {"pieces": _pieces(tokenizer, tokens, learned)}),
                }
            )
            begin = end
        samples.append(
            {
                "sample": sample,
                "num_tokens": begin,
                "num_learned": int(counts.sum()),
                "num_padding": len(row.tokens) - begin,
                "documents": documents,
            }
        )
    return {
        "datasets": [
            {"path": s.path, "prepared": s.prepared} for s in [*config.datasets, *config.test_datasets]
        ],
        "tokenizer": config.tokenizer_config,
        "vocab_size": config.vocab_size,
        "num_samples": len(data),
        "num_documents": data.num_documents,
        "num_tokens": data.num_tokens,
        "num_learned": data.num_learned,
        "samples": samples,
    }


def _pieces(tokenizer, tokens: list[int], learned: list[bool]) -> list[dict[str, Any]]:
    """The text of a document in pieces of tokens that are all learned or not; special tokens are separate."""
    special = {n for n, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    kinds = [
        (flag, token in special, token in special and i)
        for i, (token, flag) in enumerate(zip(tokens, learned))
    ]
    edges = [0, *(i for i in range(1, len(kinds)) if kinds[i] != kinds[i - 1]), len(kinds)]
    pieces, before = [], ""
    for start, stop in pairwise(edges):
        # A decoder may remove the space at a text's beginning, so a piece is what its tokens add to the text
        # before it.
        text = tokenizer.decode(tokens[:stop], skip_special_tokens=False)
        part = (
            text.removeprefix(before)
            if text.startswith(before)
            else tokenizer.decode(tokens[start:stop], skip_special_tokens=False)
        )
        pieces.append(
            {
                "text": part,
                "learned": int(learned[start]),
                "special": int(kinds[start][1]),
                "tokens": stop - start,
            }
        )
        before = text
    return pieces


def show_samples(described: dict[str, Any]) -> None:
    """Prints the samples: learned text in colour after a ">", special tokens in another colour."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 140)
    d = described
    console.print(
        f"data: {d['num_learned']:,} of {d['num_tokens']:,} tokens learned; documents: {d['num_documents']:,}; samples an epoch: "
        f'{d["num_samples"]:,}. What is learned stands behind a ">".'
    )
    for number, sample in enumerate(d["samples"], start=1):
        documents = sample["documents"]
        padding = f", {sample['num_padding']:,} of padding" if sample["num_padding"] else ""
        console.print(
            f"\nsample {number}: {sample['num_learned']:,} of {sample['num_tokens']:,} tokens learned, in {len(documents)} "
            f"document{'s' * (len(documents) != 1)}{padding}",
            style="bold",
        )
        for document in documents:
            learned, total = sum(document["learned"]), len(document["tokens"])
            part = f" from token {document['start']:,} on" if document["start"] else ""
            console.print(
                f"--- document {document['document']:,} of {document['source'] or 'the data'}{part}: {learned:,} of {total:,} tokens "
                "learned",
                style="dim",
                markup=False,
            )
            for line in _lines(document):
                console.print(Text.assemble(*line))


def _lines(document: dict[str, Any]) -> list[list[tuple[str, str]]]:
    """The lines of a document as (text, style); a line is wholly learned or not at all."""
    # These are token files without a tokenizer, of which every token but the first is learned.
    if "pieces" not in document:
        return [[("> ", ""), (" ".join(map(str, document["tokens"][: SHOWN // 8])), "green")]]
    lines: list[list[tuple[str, str]]] = []
    # Whether the last line is learned; None if the last line is finished.
    open_line = None
    for piece in document["pieces"]:
        learned, text = bool(piece["learned"]), piece["text"]
        if len(text) > SHOWN:
            half = SHOWN // 2
            text = f"{text[:half]} [... {len(text) - 2 * half:,} characters ...] {text[-half:]}"
        style = {(0, 0): "", (0, 1): "cyan", (1, 0): "green", (1, 1): "bold green"}[
            piece["learned"], piece["special"]
        ]
        for part in text.splitlines(keepends=True):
            if open_line is not learned:
                lines.append([("> " if learned else "  ", style)])
            body = part.rstrip("\r\n")
            lines[-1] += [(body, style), *([("\u21b5", "dim")] if body != part else [])]
            open_line = learned if body == part else None
    return lines
