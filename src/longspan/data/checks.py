"""Checks of prepared data: data that cannot be trained on is refused before any process starts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from longspan.config.data import PATHS, read_blend
from longspan.config.run import Run
from longspan.config.schema import DatasetConfig
from longspan.errors import UserError

if TYPE_CHECKING:
    from longspan.data.loader import TokenDataset

#: Number of tokens that are checked before a run; later tokens are not checked.
SCANNED_TOKENS = 1 << 28


def check_data(run: Run) -> TokenDataset:
    """Opens a prepared config's data, and refuses data that cannot be trained on before processes start.

    Raises:
        UserError: a part of the split has no document, no token counts in the loss, or a token number is too
            large.
    """
    # These modules are imported here, because they need torch, and missing sources are found without torch.
    from longspan.data.splits import PARTS, named_files, open_datasets

    train, *others = open_datasets(run)
    names, sources = zip(*named_files(run.config))
    for data, name in zip((train, *others), PARTS):
        if data is not None and not data.has_targets(SCANNED_TOKENS):
            raise UserError(_nothing_counts(run, data, name))
    if (most := run.batch.most_tokens) is not None:
        ranks = run.sizes.dp * run.sizes.cp
        tokens = max(data.longest_document for data in (train, *others) if data is not None)
        if tokens > ranks * most:
            number = max(range(len(sources)), key=lambda i: int(sources[i].document_lengths.max(initial=0)))
            document = int(sources[number].document_lengths.argmax())
            raise UserError(
                f"hybrid_context_parallel: document {document} of {names[number]} makes a sample of "
                f"{tokens} tokens, but {ranks} ranks x max_seqlen_per_dp_cp_rank {most} hold {ranks * most}. "
                "Raise max_seqlen_per_dp_cp_rank, lower sequence_len, or use more ranks."
            )
    vocab, left = run.vocab_size, SCANNED_TOKENS
    for source, name in zip(sources, names):
        smallest, largest = source.token_range(left)
        left = max(0, left - source.num_tokens)
        if largest >= vocab or smallest < 0:
            raise UserError(
                f"{name} holds token {largest if largest >= vocab else smallest}, but vocab_size is {vocab}. "
                "It was made with another tokenizer: give that tokenizer (tokenizer_config), or its vocab_size."
            )
    return train


def _nothing_counts(run: Run, data: TokenDataset, name: str) -> str:
    """The message for a training, evaluation or test set without a target: the reason and the remedy."""
    text = f"{name} data: no token counts in the loss"
    if not data.has_samples:
        return (
            f"{text}: no document has two tokens, so no token has a next one to learn. Look at the data, or tokenise it "
            "again."
        )
    if data.num_excess and run.config.excess_length_strategy == "truncate":
        return (
            f"{text}: {data.num_excess} of {data.num_documents} samples are longer than sequence_len {run.config.sequence_len}, and "
            "what is left of them after truncation holds no answer. Raise sequence_len, or shorten the prompts."
        )
    return f"{text}: no sample has an answer to learn. Look at the data, roles_to_train and message_field_training."


def missing_sources(config) -> list[str]:
    """Messages for missing datasets, found before anything is tokenised or started."""
    from longspan.data.sources import check_source

    problems = []
    for name in PATHS:
        try:
            for member in read_blend(name, values) if (values := getattr(config, name)) else []:
                problems += [f"{name}: {problem}" for problem in missing_files(member.path)]
        # The blend itself is wrong, which the rules between keys report.
        except UserError:
            continue
    for source in [*config.datasets, *config.test_datasets]:
        stem = source.path[:-4] if source.path.endswith((".bin", ".idx")) else source.path
        if source.prepared:
            continue
        if any(Path(stem + suffix).exists() for suffix in (".bin", ".idx")):
            problems += unused_of_tokens(source)
            continue
        try:
            check_source(source)
        except UserError as error:
            problems += [f"datasets: {problem}" for problem in error.problems]
    return problems


def unused_of_tokens(source: DatasetConfig) -> list[str]:
    """Keys that select records and texts, which have no effect on token files."""
    given = [
        name
        for name in ("split", "field", "name", "data_files", "ds_type", "revision")
        if getattr(source, name) != DatasetConfig.model_fields[name].default
    ]
    text = "{}: {} has no effect on token files, which are taken whole (val_set_size holds documents out). Leave it out."
    return [f"datasets: {text.format(source.path, name)}" for name in given]


def missing_files(prefix: str) -> list[str]:
    """Messages for the missing files of a .bin/.idx pair."""
    from longspan.data.indexed import bin_and_idx, missing_file

    missing = next((path for path in reversed(bin_and_idx(prefix)) if not path.is_file()), None)
    if missing is None:
        return []
    # The name has neither ending, because a file with one of them would have been found before.
    if Path(prefix).is_file():
        return [
            f"{prefix} is no .bin/.idx pair. Make one: longspan prepare --input {prefix} --output-prefix PREFIX, or train on "
            "it by datasets."
        ]
    return [missing_file(missing)]
