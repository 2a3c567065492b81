"""What to train on, and how text becomes sequences."""

from __future__ import annotations

import difflib
import os
import re
import string
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from longspan.config.keys.declare import key
from longspan.errors import did_you_mean

#: Megatron-LM's tokenizer types that longspan has
TOKENIZER_TYPES = ("GPT2BPETokenizer", "HuggingFaceTokenizer", "NullTokenizer")
#: those that it does not have; any other name is one of transformers' classes, as in axolotl
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


class InstructionType(BaseModel):
    """An instruction's fields, and the prompt made of them."""

    model_config = ConfigDict(extra="forbid")

    field_instruction: str = "instruction"
    field_input: str = "input"
    field_output: str = "output"
    field_system: str = "system"
    # for records without field_system
    system_prompt: str = ""
    system_format: str = "{system}"
    format: str = "{instruction} {input} "
    # for records whose input is empty or missing
    no_input_format: str = "{instruction} "

    @field_validator("format", "no_input_format", "system_format")
    @classmethod
    def _format(cls, value: str, info) -> str:
        names = {
            "format": {"instruction", "input"},
            "no_input_format": {"instruction"},
            "system_format": {"system"},
        }
        allowed = names[info.field_name]
        shown = ", ".join(f"{{{name}}}" for name in sorted(allowed))
        for _, field, spec, conversion in string.Formatter().parse(value):
            if field is not None and (field not in allowed or spec or conversion):
                raise ValueError(f"may hold {shown}; write other braces twice, {{{{ and }}}}")
        return value


class DatasetConfig(BaseModel):
    """One source of documents or samples."""

    model_config = ConfigDict(extra="forbid")

    path: str = Field(
        description="A text, .jsonl, .json, .parquet, .csv or .arrow file, a folder of them, a folder of text and code, a "
        ".bin/.idx prefix (Megatron's), python-stdlib (the source of the running Python's standard library), or the name of a "
        "dataset on the Hugging Face hub."
    )
    type: Literal["completion", "alpaca", "chat_template"] | InstructionType = Field(
        "completion",
        description="completion: whole documents, no prompt. alpaca: instruction, input, output. chat_template: messages. "
        "Or a mapping of an instruction's fields and its format.",
    )
    field: str = Field("text", description="completion: the field that holds the text.")
    split: str = Field("train", description="Which part of the data: train, or a slice such as train[:10%].")
    name: str | None = Field(None, description="The configuration of a dataset of the hub that has several.")
    data_files: str | list[str] | None = Field(
        None, description="Files of the folder (or the hub's dataset) to read."
    )
    ds_type: Literal["json", "csv", "parquet", "arrow", "text"] | None = Field(
        None, description="What kind of file it is, where the name does not say."
    )
    revision: str | None = Field(None, description="Commit, tag or branch of a dataset of the hub.")
    field_messages: str | None = Field(
        None,
        description="chat_template: the field of the messages; default: messages or conversations, as found.",
    )
    message_property_mappings: dict[str, str] | None = Field(
        None,
        description="chat_template: what the template asks for -> the name it has in a message; default: role and content, or "
        "from and value, as found.",
    )
    roles: dict[str, list[str]] | None = Field(
        None,
        description="chat_template: role -> the names it has in the data; default: human and gpt are known.",
    )
    roles_to_train: list[str] = Field(
        ["assistant"], description="chat_template: whose turns are answers.", min_length=1
    )
    message_field_training: str | None = Field(
        None, description="chat_template: the field of a message that says whether it counts, true or false."
    )
    field_system: str = Field(
        "system", description="chat_template: the field of a record with a system message."
    )
    field_tools: str = Field("tools", description="chat_template: the field of a record with the tools.")
    drop_system_message: bool = Field(False, description="chat_template: leave system messages out.")
    chat_template: str | None = Field(None, description="As the key of that name, for this dataset alone.")
    chat_template_jinja: str | None = Field(
        None, description="As the key of that name, for this dataset alone."
    )

    weight: float | None = Field(
        None,
        gt=0,
        description="Part of the samples that comes from here, beside the other weights; default: every source as it is.",
    )

    @field_validator("path")
    @classmethod
    def _path(cls, value: str) -> str:
        if not value.strip():
            raise ValueError("must not be empty; . is the current folder")
        return os.path.expanduser(value)

    @field_validator("data_files")
    @classmethod
    def _data_files(cls, value: str | list[str] | None) -> str | list[str] | None:
        if value is not None and not all(
            file.strip() for file in ([value] if isinstance(value, str) else value)
        ):
            raise ValueError("must not be empty")
        return value

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
        le=1 << 24,
    )
    sequence_len: int = key(4096, "Length of a training sequence.", unit="tokens", flag="--seq-length", gt=0)
    sample_packing: bool = key(
        True,
        "Pack whole documents into sequences and keep them apart in attention; false: one stream, cut every "
        "sequence_len tokens, in which documents see each other.",
        megatron_default=False,
    )
    reset_position_ids: bool = key(
        False,
        "With sample_packing: false: positions begin anew after each end-of-document token of the stream; attention stays "
        "as it is.",
    )
    reset_attention_mask: bool = key(
        False,
        "With sample_packing: false: attention is cut after each end-of-document token of the stream; positions stay as "
        "they are.",
    )
    eod_mask_loss: bool = key(
        False,
        "With sample_packing: false: what follows an end-of-document token in the stream is not learned.",
    )
    eod_token_id: int | None = key(
        None,
        "The end-of-document token that reset_position_ids, reset_attention_mask and eod_mask_loss look for; default: the "
        "tokenizer's.",
        ge=0,
    )
    val_set_size: float = key(
        0.0,
        "Documents held out for evaluation: a share below 1, a number from 1 on, 0 for none.",
        unit="share or documents",
        ge=0,
    )

    # --- Megatron's way to name the data -----------------------------------------------------
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
        """Weights and prefixes as a list of texts; in YAML weights may be numbers, and one prefix no list."""
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
        "Template of chats: tokenizer_default (the tokenizer's own, the default), the name of a bundled one, "
        "tokenizer_default_fallback_NAME, jinja (chat_template_jinja), or the template itself.",
    )
    chat_template_jinja: str | None = key(None, "The template itself or its file, for chat_template: jinja.")
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
        None,
        "Processes that tokenise instructions and chats; default: the cores. Text is tokenised by threads.",
        unit="processes",
        gt=0,
    )
