"""Finds and checks what a run needs before its processes start: tokens, tokenizer, weights and checkpoint."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from longspan.config.data import MOCK_VOCAB_SIZE, STREAM_KEYS, end_problems, marks_documents
from longspan.config.families.hub import model_folder
from longspan.config.run import Checked, Run
from longspan.config.schema import DatasetConfig, TrainConfig
from longspan.errors import UserError
from longspan.runs.counter import Counter
from longspan.training.lock import unwritable


def prepare(checked: Checked, show: bool) -> Run:
    """Makes the Run of a checked config: tokenises and checks its data, and finds its checkpoint.

    Args:
        show: print progress and notes to stderr.

    Raises:
        UserError: something that the run needs is missing or does not fit.
    """
    from longspan.data.checks import check_data
    from longspan.training.export import check_export

    run = prepare_data(checked, show=show)
    config = run.config
    check_data(run)
    check_weights(run)
    check_export(run)
    if config.use_tensorboard and config.tensorboard_dir is not None:
        try:
            Path(config.tensorboard_dir).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unwritable(Path(config.tensorboard_dir), error, "tensorboard_dir") from None
    resume = resume_point(run, show)
    if resume is None and config.resume is not None:
        if show and config.resume != "auto":
            print(f"no checkpoint at {config.resume}: the run starts anew", file=sys.stderr)
        return run.with_keys(resume=None, no_load_optim=False, no_load_rng=False)
    return run.with_keys(resume=resume)


def resume_point(run: Run, show: bool = True) -> str | None:
    """The checkpoint that ``resume`` names, compared with the config; None if there is none.

    Args:
        show: print a line if another checkpoint is used, or if the checkpoint has no checksums.

    Raises:
        UserError: a required checkpoint is absent, or the checkpoint is incomplete, or belongs to another
            model, batch or data.
    """
    config = run.config
    if config.resume is None:
        if config.no_load_optim or config.no_load_rng:
            raise UserError(
                "no_load_optim and no_load_rng say what to leave out of a resume: give resume too."
            )
        return None
    from longspan.data.splits import open_datasets
    from longspan.training.checkpoint import check_fits, find, newest, refuse_megatron
    from longspan.training.checkpoint_folder import to_stderr
    from longspan.training.description import describe_run

    given = Path(config.resume)
    look: dict[str, Any] = {
        "verify": config.verify_checkpoint,
        "say": to_stderr if show else (lambda line: None),
    }
    if config.resume == "auto":
        path = newest(Path(config.output_dir) / "checkpoints", **look)
    elif config.exit_on_missing_checkpoint or given.name.startswith("step_"):
        path = find(given, **look)
    else:
        refuse_megatron(given)
        path = newest(given, **look) or newest(given / "checkpoints", **look)
    if path is None:
        return None
    check_fits(path, describe_run(run, open_datasets(run)[0]), weights_only=config.no_load_optim)
    return str(path)


def is_indexed(path: str) -> bool:
    """Whether this is the prefix (or one of the files) of a ``.bin/.idx`` pair."""
    stem = path[:-4] if path.endswith((".bin", ".idx")) else path
    return Path(stem + ".idx").is_file() or Path(stem + ".bin").is_file()


def check_weights(run: Run) -> None:
    """Finds (if needed downloads) the weights from which a run starts; compares their names with the model's.

    Raises:
        UserError: the weights are not available, or belong to another model.
    """
    if run.pretrained is None:
        return
    from longspan.models.hf_weights import Names, SafetensorsFolder, check_tensors

    source = SafetensorsFolder(model_folder(run.pretrained))
    if run.by_class:
        from longspan.training.class_model import check_class

        check_class(run, source)
        return
    check_tensors(source, Names(run.model, run.vocab_size, source.model_type))


def prepare_data(checked: Checked, show: bool) -> Run:
    """Tokenises the datasets of a config that are not tokenised yet.

    Returns:
        The run; its config has each dataset's ``prepared`` prefix, the tokenizer's folder, ``vocab_size``
        and, if the data needs it, ``eod_token_id`` filled in.

    Raises:
        UserError: a missing or broken source, no tokenizer, or a vocabulary that does not fit.
    """
    from longspan.data import prepare_dataset
    from longspan.data.sources import is_text

    config = checked.config
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
        # A tokenizer that is trained on the first dataset serves the other datasets too.
        folder = folder or str(tokenizer_folder)
        sources.append(source.model_copy(update={"prepared": str(prefix)}))
    vocab = config.vocab_size
    if config.tokenizer_type == "NullTokenizer" and vocab is not None:
        # Megatron-LM's NullTokenizer has one more token, which ends a document.
        vocab += 1
    if folder is not None:
        vocab = check_vocabulary(config.model_copy(update={"vocab_size": vocab}), folder)
    if vocab is None and config.mock_data:
        vocab = MOCK_VOCAB_SIZE
    end = config.eod_token_id
    if end is None and marks_documents(config):
        end = end_of_document(config, folder)
    if vocab is None:
        raise UserError(
            "vocab_size: missing. The datasets are tokenised already and there is no tokenizer to ask."
        )
    if problems := end_problems(end, vocab):
        raise UserError(problems)
    prepared = config.model_copy(
        update={
            "datasets": sources[: len(config.datasets)],
            "test_datasets": sources[len(config.datasets) :],
            # The folder replaces all keys that describe the tokenizer.
            "tokenizer_config": folder,
            "tokenizer_train_vocab_size": None,
            "tokenizer_type": None,
            "vocab_file": None,
            "merge_file": None,
            "vocab_size": vocab,
            "eod_token_id": end,
        }
    )
    return Run.of(prepared)


def check_vocabulary(config: TrainConfig, folder: str) -> int:
    """The size of the vocabulary: the config's (which base_model may give), or else the tokenizer's.

    Args:
        folder: the tokenizer's folder, or its tokenizer.json.

    Raises:
        UserError: the tokenizer has more tokens than the model, or eod_token_id is not in the vocabulary.
    """
    from longspan.data.text import load_tokenizer, vocabulary_size

    size, vocab = vocabulary_size(load_tokenizer(folder)), config.vocab_size
    if vocab is None or vocab >= size:
        whole, end = vocab or size, config.eod_token_id
        if end is not None and end >= whole:
            raise UserError(
                f"eod_token_id {end} is beyond the {whole} tokens of the tokenizer in {folder}, numbered from 0. Give its number, "
                "or leave it out where the tokenizer names one."
            )
        return whole
    if config.base_model is not None and not config.reinit_weights:
        raise UserError(
            f"the tokenizer in {folder} has {size} tokens, and base_model {config.base_model} has weights for {vocab}. Give the "
            "model's own tokenizer (leave tokenizer_config out), or make the model larger first (transformers' "
            f"resize_token_embeddings({size}))."
        )
    if config.base_model is not None:
        raise UserError(
            f"the tokenizer in {folder} has {size} tokens, and the model {vocab} (vocab_size, which base_model gives where the "
            f"config does not). Set vocab_size to {size} or more."
        )
    raise UserError(
        f"vocab_size {vocab} is smaller than the tokenizer's {size} tokens. Leave vocab_size out, or make it at "
        f"least {size}."
    )


def end_of_document(config: TrainConfig, folder: str | None) -> int:
    """The number of the token that ends a document, in the tokenizer in ``folder`` or in NullTokenizer.

    Raises:
        UserError: there is no tokenizer, or it has no such token.
    """
    from longspan.data.text import eod_id, load_tokenizer

    if config.tokenizer_type == "NullTokenizer" and config.vocab_size is not None:
        # Megatron-LM's NullTokenizer ends a document with the token after all other tokens.
        return config.vocab_size
    end = eod_id(load_tokenizer(folder), folder) if folder is not None else None
    if end is None:
        names = " and ".join(name for name in STREAM_KEYS if getattr(config, name))
        found = f"the tokenizer in {folder} names none" if folder is not None else "there is no tokenizer"
        raise UserError(
            f"{names}: which token ends a document is not known: {found}. Give its number, eod_token_id, or a tokenizer that has one."
        )
    return end


def check_indexed(source: DatasetConfig, prefix: str) -> None:
    """Raises a UserError if token files are missing, or lack the masks that the dataset's type needs."""
    from longspan.data import IndexedDataset, open_masks

    IndexedDataset(prefix)
    if open_masks(prefix) is None and not source.prepared and source.type != "completion":
        raise UserError(
            f"datasets: {source.path} holds tokens, and no masks that say which of them are answers. Give the records (json, "
            "parquet ...) as path, or leave type out to train on every token."
        )


def prepare_records(config: TrainConfig, source: DatasetConfig, folder: str | None, show: bool) -> Path:
    """Makes the samples of a dataset of records unless they exist. Returns the prefix of their files."""
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
    """The tokenizer's folder with the config's special_tokens and chat_template: a copy if it lacks them.

    Raises:
        UserError: a special token is not in the vocabulary.
    """
    from longspan.data.chat import find_template, own_template
    from longspan.data.text import load_tokenizer, special_tokens
    from longspan.data.tokenizer_files import changed_copy, folder_of

    chosen = config.special_tokens or {}
    tokenizer, now = load_tokenizer(folder), special_tokens(folder)
    missing = [token for token in chosen.values() if tokenizer.token_to_id(token) is None]
    if missing:
        raise UserError(
            f"special_tokens: {', '.join(map(repr, missing))}: not in the vocabulary of {folder}. Add tokens to the tokenizer "
            "and to base_model first, with transformers."
        )
    template = None
    name, jinja = trained_template(config)
    if name is not None or jinja is not None:
        template = find_template(name, jinja, folder_of(folder), now | chosen, []).text
        if template == own_template(folder_of(folder)):
            template = None
    return str(changed_copy(Path(folder), chosen, template, now, Path(config.dataset_prepared_path)))


def trained_template(config: TrainConfig) -> tuple[str | None, str | None]:
    """The run's chat_template and chat_template_jinja, or else those that all its datasets of chats share."""
    own = (config.chat_template, config.chat_template_jinja)
    chats = {(d.chat_template, d.chat_template_jinja) for d in config.datasets if d.type == "chat_template"}
    return chats.pop() if own == (None, None) and len(chats) == 1 else own
