"""How axolotl's types and fields of a dataset that longspan does not have are handled, and old spellings.

The fields that longspan shares with axolotl have axolotl's names: see ``DatasetConfig``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from longspan.config.dialects.external import ExternalName, choice, no_effect, refused
from longspan.config.keys.data import DatasetConfig
from longspan.errors import did_you_mean

#: the keys of a config that hold lists of datasets
LISTS = ("datasets", "test_datasets")

TYPES = ("completion", "alpaca", "chat_template")

_MAPPING = "Say its fields and its prompt as a mapping: type: {field_instruction: %s, field_output: %s, format: '%s'}."
_RL = "Only pretraining and supervised fine-tuning are supported."
_OTHER = "Turn it into alpaca (instruction, input, output) or chats (messages) first."
#: type of axolotl -> why it is not supported, or what to write instead
OTHER_TYPES = {
    "alpaca_chat": _MAPPING % ("instruction", "output", "USER: {instruction}\\n{input}\\nASSISTANT:"),
    "alpaca_chat.load_qa": _MAPPING % ("question", "answer", "USER: {instruction}\\nASSISTANT:"),
    "alpaca_chat.load_concise": _MAPPING % ("instruction", "output", "USER: {instruction}\\nASSISTANT:"),
    "alpaca_chat.load_camel_ai": _MAPPING % ("message_1", "message_2", "USER: {instruction}\\nASSISTANT:"),
    "alpaca_w_system": _MAPPING
    % ("instruction", "output", "### Instruction:\\n{instruction}\\n\\n### Response:\\n")
    + " Add field_system: system and system_format: '### System:\\n{system}\\n\\n'.",
    "alpaca_w_system.load_open_orca": _MAPPING
    % ("question", "response", "### Human:\\n{instruction}\\n### Assistant:\\n")
    + " Add field_system: system_prompt and system_format: '### System:\\n{system}\\n'.",
    "context_qa": _MAPPING % ("question", "answer", "{input}\\nQuestion: {instruction}\\nAnswer:")
    + " Add field_input: article.",
    "context_qa.load_v2": _MAPPING
    % ("question", "answer", "Context: {input}\\nQuestion: {instruction}\\nAnswer:")
    + " Add field_input: context.",
    "gpteacher": _MAPPING % ("instruction", "response", "{instruction}\\n{input}\\n"),
    "oasst": _MAPPING % ("INSTRUCTION", "RESPONSE", "{instruction}\\n"),
    "jeopardy": _MAPPING % ("question", "answer", "{instruction}\\n"),
    "summarizetldr": _MAPPING % ("article", "summary", "{instruction}\\nTL;DR:"),
    "metharme": _MAPPING % ("prompt", "generation", "<|user|>{instruction}<|model|>"),
    "input_output": "Segments with a label each have no prompt to tell from an answer. " + _OTHER,
    "pygmalion": "Write type: chat_template with message_property_mappings: {role: role, content: value}.",
    "chat_template.argilla": _RL,
    "pretrain": "Write type: completion; the text is tokenised once, into a cache.",
    "chatml.intel": _RL,
    "llama3.intel": _RL,
    "stepwise_supervised": _RL,
    "synthetic": "Made-up tokens are mock_data: true.",
}

_SHAREGPT = {
    "field_messages": "conversations",
    "message_property_mappings": {"role": "from", "content": "value"},
}
_END = "An answer's end token counts with the answer, a prompt's never: turn. For all turns use train_on_inputs: true."
_THINKING = "What stands in a message is handed to the template under its own name."

FIELDS: dict[str, ExternalName] = {
    "train_on_eos": choice({"turn": {}}, _END),
    "train_on_eot": choice({"turn": {}}, _END),
    "shards": refused("Take a part of the data with split: train[:10%]."),
    "shards_idx": refused("Take a part of the data with split: train[10%:20%]."),
    "preprocess_shards": no_effect("Samples are prepared one by one; memory does not grow with the data."),
    "trust_remote_code": refused("Code from a dataset's repository is never run; its files are read."),
    "conversation": refused("It is chat_template: chatml, llama3, ..."),
    "message_field_training_detail": refused("Whole turns count or do not: message_field_training."),
    "field_thinking": refused(_THINKING),
    "template_thinking_key": refused(_THINKING),
    "split_thinking": refused(_THINKING),
    "input_transform": refused("Change the data first."),
    "input_format": refused("Say the format in type: {format: ...}."),
    "field_human": refused("Say it in message_property_mappings."),
    "field_model": refused("Say it in message_property_mappings."),
    "logprobs_field": refused("Only text is trained on."),
    "temperature": refused("Only text is trained on."),
    "skip": refused("Take a part of the data with split: train[1000:]."),
    "text_column": refused("It is field."),
    **{
        name: refused("It belongs to the type: type: {field_instruction: ..., format: ...}.")
        for name in (
            *("field_instruction", "field_input", "field_output", "format", "no_input_format"),
            *("system_prompt", "system_format"),
        )
    },
}


def read_datasets(name: str, value: Any) -> tuple[Any, list[str], list[str]]:
    """Reads the list of datasets that the user wrote.

    Args:
        name: the key of the list.

    Returns:
        (the list for ``DatasetConfig``, problems, notes). A value that is not a list is returned unchanged.
    """
    problems: list[str] = []
    notes: list[str] = []
    if not isinstance(value, list):
        return value, problems, notes
    read = []
    for number, one in enumerate(value):
        place = f"{name}.{number}"
        one = one.model_dump() if isinstance(one, DatasetConfig) else one
        read.append(_read(place, one, problems, notes) if isinstance(one, Mapping) else one)
    return read, problems, notes


def _read(place: str, values: Mapping[str, Any], problems: list[str], notes: list[str]) -> dict[str, Any]:
    kept = {str(k): v for k, v in values.items() if v is not None}
    for field in [f for f in kept if f in FIELDS and f not in DatasetConfig.model_fields]:
        try:
            found = FIELDS[field].read(f"{place}.{field}", kept.pop(field))
        except ValueError as error:
            problems.append(str(error))
            continue
        if found is None:
            notes.append(f"{place}.{field}: {FIELDS[field].why}")
    for old, prop in (("message_field_role", "role"), ("message_field_content", "content")):
        if old in kept:
            kept.setdefault("message_property_mappings", {})
            kept["message_property_mappings"] = {prop: kept.pop(old), **kept["message_property_mappings"]}
            notes.append(
                f"{place}.{old}: the old name of message_property_mappings: {{{prop}: ...}}, and taken for it."
            )
    for field in [f for f in kept if f not in DatasetConfig.model_fields]:
        problems.append(
            f"{place}.{field}: unknown key.{did_you_mean(field, (*DatasetConfig.model_fields, *FIELDS))}"
        )
        kept.pop(field)
    kind = kept.get("type")
    if kind == "sharegpt":
        kept = {**_SHAREGPT, **kept, "type": "chat_template"}
        notes.append(
            f"{place}.type sharegpt: the old name of type: chat_template with field_messages: conversations and "
            "message_property_mappings: {role: from, content: value}, and taken for it."
        )
    elif isinstance(kind, str) and kind not in TYPES:
        near = did_you_mean(kind, (*TYPES, "sharegpt", *OTHER_TYPES))
        why = OTHER_TYPES.get(
            kind, f"The types are {', '.join(TYPES)}, or a mapping of fields and a format.{near}"
        )
        problems.append(f"{place}.type: {kind!r} is not supported. {why}")
        kept.pop("type")
    return kept
