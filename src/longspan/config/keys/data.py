"""What to train on, and how text becomes sequences."""

from __future__ import annotations

import difflib
import os
import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from longspan.config.keys.declare import key
from longspan.errors import did_you_mean

#: Megatron-LM's tokenizer types there are here
TOKENIZER_TYPES = ("GPT2BPETokenizer", "HuggingFaceTokenizer", "NullTokenizer")
#: and those there are not; any other name of a tokenizer is one of transformers' classes, as axolotl says them
_NO_TOKENIZERS = (
    "BertWordPieceLowerCase",
    "BertWordPieceCase",
    "SentencePieceTokenizer",
    "GPTSentencePieceTokenizer",
    "Llama2Tokenizer",
    "TikTokenizer",
    "MultimodalTokenizer",
    "NullMultimodalTokenizer",
    "NullSFTTokenizer",
    "SFTTokenizer",
    "MegatronTokenizer",
)


class DatasetConfig(BaseModel):
    """One source of documents."""

    model_config = ConfigDict(extra="forbid")

    path: str = Field(
        description="A text or .jsonl file, a folder of text and code, a .bin/.idx prefix (Megatron's), or "
        "python-stdlib (the source of the running Python's standard library)."
    )
    type: Literal["completion"] = Field("completion", description="completion: whole documents, no prompt.")
    field: str = Field("text", description="The field of a .jsonl line that holds the text.")

    weight: float | None = Field(
        None,
        gt=0,
        description="Part of the samples that comes from here, beside the other weights; default: every source as it is.",
    )

    @field_validator("path")
    @classmethod
    def _path(cls, value: str) -> str:
        return os.path.expanduser(value)

    prepared: str | None = Field(
        None, description="The .bin/.idx prefix this source was tokenised to; filled in by longspan."
    )


class DataKeys(BaseModel):
    """What to train on, and how text becomes sequences."""

    datasets: list[DatasetConfig] = key([], "What to train on: a list of {path: ...}.")
    dataset_prepared_path: str = key(
        "./last_run_prepared",
        "Folder that keeps tokenised data for the next run.",
        flag="--data-cache-path",
    )
    tokenizer_config: str | None = key(
        None,
        "tokenizer.json or the folder that holds it; default: base_model's.",
        flag="--tokenizer-model",
    )
    tokenizer_train_vocab_size: int | None = key(
        None,
        "Train a byte-level BPE tokenizer of this size on the data, instead of loading one.",
        unit="tokens",
        ge=257,
    )
    sequence_len: int = key(4096, "Length of a training sequence.", unit="tokens", flag="--seq-length", gt=0)
    sample_packing: bool = key(
        True,
        "Pack whole documents into sequences and keep them apart in attention; false: one stream, cut every "
        "sequence_len tokens, in which documents see each other.",
        megatron_default=False,
    )
    val_set_size: float = key(
        0.0,
        "Documents held out for evaluation: a share below 1, a number from 1 on, 0 for none.",
        unit="share or documents",
        ge=0,
    )

    # --- Megatron's way of saying what to train on -------------------------------------------
    data_path: list[str] | None = key(
        None,
        "Token files: one .bin/.idx prefix, several taken as one, or a blend: weight prefix weight prefix ...",
    )
    train_data_path: list[str] | None = key(None, "Token files of training alone, as data_path.")
    valid_data_path: list[str] | None = key(None, "Token files of evaluation alone, as data_path.")
    test_data_path: list[str] | None = key(None, "Token files of the test at the end alone, as data_path.")
    split: str | None = key(
        None,
        "Shares of data_path's documents for training, evaluation and the test at the end, such as 99,1,0; default "
        "969,30,1.",
    )
    mock_data: bool = key(
        False,
        "Train on made-up tokens: no data and no tokenizer are needed (vocab_size: 32768 unless given).",
    )
    tokenizer_type: Literal["GPT2BPETokenizer", "HuggingFaceTokenizer", "NullTokenizer"] | None = key(
        None,
        "GPT2BPETokenizer: vocab_file and merge_file; HuggingFaceTokenizer (or a class of transformers): "
        "tokenizer_config; NullTokenizer: none, tokens 0 to vocab_size - 1 and vocab_size for the end of a document.",
    )
    vocab_file: str | None = key(None, "vocab.json of a GPT-2 BPE tokenizer.")
    merge_file: str | None = key(None, "merges.txt of a GPT-2 BPE tokenizer.")

    @field_validator("data_path", "train_data_path", "valid_data_path", "test_data_path", mode="before")
    @classmethod
    def _words(cls, value: Any) -> Any:
        """Weights and prefixes as text: a YAML file gives weights as numbers, and one prefix as no list."""
        if value is None:
            return None
        values = value if isinstance(value, list) else [value]
        return [
            os.path.expanduser(v) if isinstance(v, str) else v if isinstance(v, bool) else str(v)
            for v in values
        ]

    @field_validator("split", mode="before")
    @classmethod
    def _shares(cls, value: Any) -> Any:
        return (
            ",".join(map(str, value)) if isinstance(value, list) else value if value is None else str(value)
        )

    @field_validator("tokenizer_type", mode="before")
    @classmethod
    def _tokenizer_type(cls, value: Any) -> Any:
        if value in _NO_TOKENIZERS:
            raise ValueError(
                "is not supported; save the tokenizer as tokenizer.json (transformers' save_pretrained), and give "
                "HuggingFaceTokenizer with its folder as tokenizer_config (--tokenizer-model)"
            )
        if value in TOKENIZER_TYPES or not isinstance(value, str):
            return value
        slip = difflib.get_close_matches(value, TOKENIZER_TYPES, cutoff=0.9)
        if re.fullmatch(r"[A-Z]\w*Tokenizer(Fast)?", value) and not slip:
            return "HuggingFaceTokenizer"
        near = did_you_mean(value, TOKENIZER_TYPES)
        raise ValueError(f"must be one of {', '.join(TOKENIZER_TYPES)}.{near}".rstrip(".?"))

    # --- instructions and chats --------------------------------------------------------------
    train_on_inputs: bool = key(False, "Prompts count in the loss too, not only what is to be answered.")
    chat_template: str | None = key(
        None,
        "Template of chats: tokenizer_default, the name of a bundled one, or jinja (chat_template_jinja).",
    )
    chat_template_jinja: str | None = key(None, "The template itself, for chat_template: jinja.")
    test_datasets: list[DatasetConfig] = key(
        [], "What to evaluate on, instead of documents held out by val_set_size."
    )
    excess_length_strategy: Literal["drop", "truncate", "raise"] = key(
        "drop", "What becomes of an instruction or chat longer than sequence_len (a text is cut into pieces)."
    )
    special_tokens: dict[str, str] | None = key(
        None, "Tokens to use instead of the tokenizer's own: {eos_token: ..., pad_token: ..., ...}."
    )
    dataset_num_proc: int | None = key(
        None, "Processes that read and tokenise; default: the cores.", unit="processes", gt=0
    )
