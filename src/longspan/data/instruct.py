"""From a record to a sample: its tokens, and the mask of tokens that count in the loss.

A sample is a prompt and an answer (alpaca, or a mapping of fields and a format), a chat (``chat``), or
a document. Its mask has a 1 for each token that is learned: the answers with their end tokens.

Prompt and answer are tokenised separately, because a model in use gets the prompt and writes the
answer. A chat is tokenised as the one text that its template makes. A token of it counts if it
holds a character of an answer; an added token (such as <|im_end|>) counts only if it lies wholly
inside an answer.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, processors

from longspan.config.json_text import parse_json
from longspan.config.keys.data import DatasetConfig, InstructionType
from longspan.data.chat import ChatTemplate, find_template
from longspan.data.sources import plain
from longspan.data.text import begin_ids, eod_id, load_tokenizer, special_tokens
from longspan.data.turns import THOUGHTS, Turns
from longspan.errors import UserError, did_you_mean

_WITH_INPUT = "an instruction that describes a task, paired with an input that provides further context"
_WITHOUT = "an instruction that describes a task"
_TASK = "Below is {}. Write a response that appropriately completes the request.\n\n### Instruction:\n{{instruction}}\n\n"
#: The prompt with which Stanford's Alpaca was trained.
ALPACA = InstructionType(
    format=_TASK.format(_WITH_INPUT) + "### Input:\n{input}\n\n### Response:\n",
    no_input_format=_TASK.format(_WITHOUT) + "### Response:\n",
    system_format="",
)

#: Name of a role in the data -> the role.
ROLES = {"human": "user", "gpt": "assistant"} | {
    name: name for name in ("user", "assistant", "system", "tool", "developer", "function", "ipython")
}

#: Fields of a message, besides its role, that do not hold its content.
_NO_CONTENT = ("tool_calls", "tool_call_id", "name", *THOUGHTS)

#: The version of the samples, which is increased whenever the same records make other samples.
VERSION = 3

Sample = tuple[np.ndarray, np.ndarray | None]


@dataclass(frozen=True)
class Recipe:
    """All settings that turn records into samples; it can be sent to other processes.

    Attributes:
        tokenizer: the folder of the tokenizer.
        template: the template of chats.
    """

    source: DatasetConfig
    tokenizer: Path
    train_on_inputs: bool
    template: ChatTemplate | None

    @classmethod
    def make(
        cls,
        source: DatasetConfig,
        tokenizer: str | Path,
        train_on_inputs: bool = False,
        chat_template: str | None = None,
        chat_template_jinja: str | None = None,
    ) -> Recipe:
        """The recipe of a dataset.

        Args:
            chat_template, chat_template_jinja: the config's keys, used if the dataset has none of its own.

        Raises:
            UserError: there is no such template.
        """
        folder = Path(tokenizer).expanduser()
        folder = folder if folder.is_dir() else folder.parent
        template = None
        if source.type == "chat_template":
            own = source.chat_template is not None or source.chat_template_jinja is not None
            name, jinja = (
                (source.chat_template, source.chat_template_jinja)
                if own
                else (chat_template, chat_template_jinja)
            )
            added = load_tokenizer(folder).get_added_tokens_decoder().values()
            atoms = [token.content for token in added if token.special]
            template = find_template(name, jinja, folder, special_tokens(folder), atoms)
        return cls(source, folder, train_on_inputs, template)

    def describe(self) -> str:
        """A text that differs whenever the same records would make other samples."""
        source = self.source.model_dump(exclude={"prepared", "path", "chat_template", "chat_template_jinja"})
        template = None if self.template is None else [self.template.text, dict(self.template.special_tokens)]
        return json.dumps([VERSION, source, self.train_on_inputs, template], sort_keys=True)


class Encoder:
    """Makes samples of records.

    Attributes:
        missing: a part that the template left out (see `turns.Found`) -> number of such chats so far.
    """

    def __init__(self, recipe: Recipe):
        self.recipe, self.source = recipe, recipe.source
        self.missing: Counter[str] = Counter()
        self.tokenizer = load_tokenizer(recipe.tokenizer)
        self.begin = begin_ids(self.tokenizer, recipe.tokenizer)
        self.end = eod_id(self.tokenizer, recipe.tokenizer)
        kind = self.source.type
        self.prompt = ALPACA if kind == "alpaca" else kind if isinstance(kind, InstructionType) else None
        if self.prompt is not None and self.end is None:
            raise UserError(
                f"the tokenizer in {recipe.tokenizer} names no end token, which answers must end with. Say it: special_tokens: "
                "{eos_token: ...}."
            )

    def __call__(self, where: str, record: Mapping[str, Any]) -> Sample:
        """int64 tokens [t] and uint8 mask [t] of a record; None for a document, of which all tokens count.

        Args:
            where: the place of the record, for messages.

        Raises:
            UserError: the record does not fit the dataset's type.
        """
        try:
            record = {name: plain(value) for name, value in record.items()}
            if self.prompt is not None:
                return self._instruction(record, self.prompt)
            if self.source.type == "chat_template":
                return self._chat(record)
            text = _text(record, self.source.field)
            ids = self._ids(text)
            end = [] if self.end is None or not ids else [self.end]
            return np.array([*self.begin, *ids, *end] if ids else [], dtype=np.int64), None
        except UserError as error:
            raise UserError(f"{where}: {error}") from None

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def _instruction(self, record: Mapping[str, Any], kind: InstructionType) -> Sample:
        instruction = _text(record, kind.field_instruction)
        given = _text(record, kind.field_input, missing="")
        answer = self._ids(_text(record, kind.field_output))
        system = ""
        if kind.system_format:
            system = _text(record, kind.field_system, missing=kind.system_prompt)
        prompt = kind.system_format.format(system=system) if system else ""
        if given:
            prompt += kind.format.format(instruction=instruction, input=given)
        else:
            prompt += kind.no_input_format.format(instruction=instruction)
        ids = [*self.begin, *self._ids(prompt)]
        assert self.end is not None
        answer += [self.end] if answer[-1:] != [self.end] else []
        mask = np.ones(len(ids) + len(answer), dtype=np.uint8)
        if not self.recipe.train_on_inputs:
            mask[: len(ids)] = 0
        return np.array([*ids, *answer], dtype=np.int64), mask

    # --- chats ----------------------------------------------------------------------------

    def _chat(self, record: Mapping[str, Any]) -> Sample:
        messages, counts = self.messages(record)
        tools = record.get(self.source.field_tools)
        if isinstance(tools, str) and tools.strip():
            try:
                tools = plain(parse_json(tools))
            except ValueError:
                raise UserError(f"the field {self.source.field_tools!r} is no JSON list of tools.") from None
        text, spans, missing = self._turns.find(messages, counts, tools or None)
        self.missing.update(missing)
        encoding = self._plain.encode(text, add_special_tokens=False)
        tokens = np.array(encoding.ids, dtype=np.int64)
        offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
        first, last = offsets[:, 0], offsets[:, 1]
        mask = np.zeros(len(tokens), dtype=np.uint8)
        added = np.isin(tokens, list(self._added))
        for i in np.flatnonzero(added):
            # An added token may include the white space around it ("rstrip"); only its text counts here.
            own = self._added[int(tokens[i])]
            if (at := text.find(own, first[i], last[i])) >= 0:
                first[i], last[i] = at, at + len(own)
        for start, stop in spans:
            inside = (first >= start) & (last <= stop)
            touched = (first < stop) & (last > start)
            mask |= np.where(added, inside & touched, touched | (inside & (start < stop))).astype(np.uint8)
        return tokens, mask

    @cached_property
    def _turns(self) -> Turns:
        assert self.recipe.template is not None
        return Turns(self.recipe.template)

    @cached_property
    def _plain(self) -> Tokenizer:
        """The tokenizer without post-processor, which may cut white space off the tokens' offsets."""
        plain = load_tokenizer(self.recipe.tokenizer)
        plain.post_processor = processors.Sequence([])
        return plain

    @cached_property
    def _added(self) -> dict[int, str]:
        """The text of each token added to the vocabulary, special or not; no text is cut inside one."""
        return {n: token.content for n, token in self.tokenizer.get_added_tokens_decoder().items()}

    def messages(self, record: Mapping[str, Any]) -> tuple[list[dict[str, Any]], list[bool]]:
        """The messages of a record with the template's field names, and which of them are answers.

        Raises:
            UserError: there is no message, or one is invalid.
        """
        source = self.source
        name = source.field_messages or next(
            (n for n in ("messages", "conversations") if record.get(n) is not None), "messages"
        )
        given = _field(record, name)
        if isinstance(given, str):
            try:
                given = plain(parse_json(given))
            except ValueError:
                raise UserError(f"the field {name!r} holds text that is no JSON list of messages.") from None
        if not isinstance(given, list) or not given:
            what = "an empty list" if given == [] else f"a {type(given).__name__}"
            raise UserError(f"the field {name!r} holds {what}; it must be a list of messages.")
        messages, counts = [], []
        for number, one in enumerate(given):
            if not isinstance(one, Mapping):
                raise UserError(f"message {number} of {name!r} is a {type(one).__name__}, not an object.")
            message = self._message(one, f"message {number} of {name!r}")
            count = self.recipe.train_on_inputs or message["role"] in self._trained
            if source.message_field_training is not None and source.message_field_training in one:
                count = bool(one[source.message_field_training])
            messages.append(message)
            counts.append(count)
        if messages[0]["role"] != "system" and isinstance(record.get(source.field_system), str):
            messages.insert(0, {"role": "system", "content": record[source.field_system]})
            counts.insert(0, self.recipe.train_on_inputs)
        if source.drop_system_message and messages[0]["role"] == "system":
            messages, counts = messages[1:], counts[1:]
        return messages, counts

    @cached_property
    def _roles(self) -> dict[str, str]:
        own = self.source.roles or {}
        return (
            ROLES | {role: role for role in own} | {old: role for role, names in own.items() for old in names}
        )

    @cached_property
    def _trained(self) -> set[str]:
        return {self._roles.get(role, role) for role in self.source.roles_to_train}

    def _message(self, given: Mapping[str, Any], where: str) -> dict[str, Any]:
        names = self.source.message_property_mappings or {}
        role_name = names.get("role") or ("role" if "role" in given else "from")
        usual = "content" if "content" in given or "role" in given else "value"
        content_name = names.get("content") or usual
        message = {k: v for k, v in given.items() if v is not None and k not in (role_name, content_name)}
        message |= {new: given[old] for new, old in names.items() if given.get(old) is not None}
        if "tool_calls" in message:
            message["tool_calls"] = _calls(message["tool_calls"], where)
        # A turn may have only calls or thoughts. Its content is then empty or missing.
        silent = bool(message.get("tool_calls") or any(message.get(name) for name in THOUGHTS))
        for field in (role_name, content_name):
            if field not in given and not (silent and field == content_name):
                if field == content_name and not given.keys() - {role_name, *_NO_CONTENT}:
                    raise UserError(f"{where} is empty: it has no content, no calls and no thoughts.")
                have = ", ".join(map(repr, given)) or "none"
                raise UserError(
                    f"{where} has no field {field!r}. Its fields are {have}. Say which is which: message_property_mappings: "
                    "{role: ..., content: ...}."
                )
        role, content = given[role_name], given.get(content_name)
        if not isinstance(role, str) or role not in self._roles:
            raise UserError(
                f"{where}: the role {role!r} is none of {', '.join(self._roles)}. Say what it is: roles: {{assistant: [{role}]}}."
            )
        if isinstance(content, list) and all(
            isinstance(p, Mapping) and p.get("type") == "text" and isinstance(p.get("text", ""), str)
            for p in content
        ):
            content = "".join(part.get("text", "") for part in content)
        if content is None and silent:
            content = ""
        if not isinstance(content, str):
            raise UserError(
                f"{where}: {content_name!r} holds a {type(content).__name__}; only text is trained on."
            )
        return message | {"role": self._roles[role], "content": content}


def _calls(given: Any, where: str) -> list[Any]:
    """The calls of a message, which may be JSON text."""
    calls = given
    if isinstance(given, str):
        try:
            calls = plain(parse_json(given)) if given.strip() else []
        except ValueError:
            calls = given
    if not isinstance(calls, list):
        raise UserError(f"{where}: 'tool_calls' holds a {type(calls).__name__} that is no list of calls.")
    return calls


def _field(record: Mapping[str, Any], name: str) -> Any:
    if name not in record:
        have = ", ".join(map(repr, record)) or "none"
        raise UserError(f"no field {name!r}. The fields are {have}.{did_you_mean(name, record)}")
    return record[name]


def _text(record: Mapping[str, Any], name: str, missing: str | None = None) -> str:
    """The text in a field; ``missing``, if it is not None, replaces an absent or null field."""
    if missing is not None and record.get(name) is None:
        return missing
    text = _field(record, name)
    if not isinstance(text, str):
        raise UserError(f"the field {name!r} holds a {type(text).__name__}; it must be a string.")
    return text
