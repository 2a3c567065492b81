"""Chats as text, and where in the text the answers are.

A template (jinja) turns messages into one text, which is tokenised as a whole: the tokens are
those the model sees when it is used. Which of them are answers is found in the text, exactly:

- where the template marks answers itself ({% generation %}), there;
- else by rendering the chat again with marks in place of the answers: what stands around a mark
  must stand around the answer, character by character;
- else, for templates that look into an answer (and take a thought out of it, say), by one mark at
  a time, around which all else must be as it was; or by rendering the chat up to the answer, which
  must be how the whole begins.

An answer ends with what the template puts behind it that does not depend on what follows, such
as ``<|im_end|>``: rendered up to this answer, and rendered whole, it is the same. White space
that comes after that belongs to nobody. A chat for which none of this holds is refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from longspan.config.json_text import read_object
from longspan.data.limited import LimitError, limited
from longspan.data.templates import TEMPLATES
from longspan.errors import UserError, did_you_mean

# Around what {% generation %} holds, while it is rendered: private characters, which text has not.
_OPEN, _CLOSE = "\ue0a1\ue0b2\ue0c3", "\ue0c3\ue0b2\ue0a1"

_BUNDLED = frozenset(TEMPLATES.values())
#: characters of a template; the longest of known models have a tenth of it
MAX_TEMPLATE = 200_000

Span = tuple[int, int]
Message = Mapping[str, Any]


class _Generation(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %}: the part of a template that the model is to write."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    @staticmethod
    def _marked(caller) -> str:
        return f"{_OPEN}{caller()}{_CLOSE}"


def _refuse(message: str):
    raise jinja2.TemplateError(message)


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


@lru_cache(maxsize=16)
def _compiled(text: str) -> jinja2.Template:
    """A template as transformers compiles one; but strftime_now is missing: samples do not depend on the day."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json  # jinja's own escapes HTML
    environment.globals["raise_exception"] = _refuse
    return environment.from_string(text)


def _check(text: str) -> None:
    _compiled(text)


def _render(text: str, names: Mapping[str, Any]) -> str:
    return _compiled(text).render(names)


def _within_limits(function: Callable[..., Any], text: str, *more: Any) -> Any:
    """Calls a function of a template's text: in limits of time and memory, unless the template is one of this package.

    Raises:
        jinja2.TemplateError: a limit was passed, or what the function itself raises.
    """
    if text in _BUNDLED:
        return function(text, *more)
    try:
        return limited(function, text, *more)
    except LimitError as error:
        raise jinja2.TemplateError(
            f"{error}, where milliseconds are usual; look for a loop without an end"
        ) from None


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template.

    Attributes:
        name: for messages.
        text: jinja.
        special_tokens: what bos_token, eos_token ... stand for in it.
        atoms: all special tokens of the vocabulary, which text is never cut inside.
    """

    name: str
    text: str
    special_tokens: Mapping[str, str]
    atoms: tuple[str, ...] = ()

    def check(self) -> None:
        """UserError for what is no jinja."""
        if len(self.text) > MAX_TEMPLATE:
            raise UserError(
                f"chat template {self.name}: {len(self.text):,} characters; a template has {MAX_TEMPLATE:,} at most."
            )
        try:
            _within_limits(_check, self.text)
        except jinja2.TemplateError as error:
            raise UserError(f"chat template {self.name}: not a jinja template: {error}.") from None
        except Exception as error:  # nested more deeply than Python reads, for one
            raise UserError(f"chat template {self.name}: cannot be compiled: {error!r}.") from None

    def render(
        self, messages: Sequence[Message], tools: Any = None, prompt: bool = False
    ) -> tuple[str, list[Span]]:
        """The chat as text, and the spans that the template itself marks as answers.

        Args:
            prompt: end with what asks for the next answer.

        Raises:
            jinja2.TemplateError: the template does not take this chat.
        """
        names = {
            "messages": messages,
            "tools": tools,
            "documents": None,
            "add_generation_prompt": prompt,
            **self.special_tokens,
        }
        found = _within_limits(_render, self.text, names)
        parts = found.split(_OPEN)
        text, spans = parts[0], []
        for part in parts[1:]:
            answer, close, rest = part.partition(_CLOSE)
            if not close or _CLOSE in rest:
                raise jinja2.TemplateError("{% generation %} inside {% generation %}")
            spans.append((len(text), len(text) + len(answer)))
            text += answer + rest
        return text, spans

    def answers(
        self, messages: Sequence[Message], counts: Sequence[bool], tools: Any = None
    ) -> tuple[str, list[Span]]:
        """The chat as text, and the spans of the turns that count, end tokens included.

        Args:
            counts: for each message, whether it is an answer to learn.

        Raises:
            UserError: the template does not take this chat, or does not show where its answers are.
        """
        try:
            whole, marked = self.render(messages, tools)
            assistants = [message["role"] == "assistant" for message in messages]
            if marked and assistants == list(counts):
                return whole, marked
            if not any(counts):
                return whole, []
            spans: list[Span | None] = self._by_marks(messages, counts, tools, whole) or [
                self._by_mark(messages, i, tools, whole) or self._by_prefix(messages, i, tools, whole)
                for i, count in enumerate(counts)
                if count
            ]
        except jinja2.TemplateError as error:
            reason = str(error) or type(error).__name__
            raise UserError(f"the chat template {self.name} refuses this chat: {reason}.") from None
        except Exception as error:  # a template is a program: it may divide by zero
            raise UserError(f"the chat template {self.name} fails on this chat: {error!r}.") from None
        found = [span for span in spans if span is not None]
        if len(found) < len(spans):
            raise UserError(
                f"the chat template {self.name} does not show which part of this chat is an answer: it changes earlier turns "
                "when later ones follow. Put {% generation %} and {% endgeneration %} around the answers in it "
                "(chat_template_jinja), or take another, such as chat_template: chatml."
            )
        return whole, found

    def _by_marks(self, messages, counts, tools, whole: str) -> list[Span | None]:
        """All spans, found by rendering with marks for contents; none where a content is not in the whole as it is."""
        stem = _unlike(whole)
        marks = {i: f"{stem}turn{i}." for i, count in enumerate(counts) if count}
        masked = [{**m, "content": marks[i]} if i in marks else m for i, m in enumerate(messages)]
        around, _ = self.render(masked, tools)
        contents: dict[int, Span] = {}
        at = 0
        for i, mark in marks.items():
            before, found, around = around.partition(mark)
            if not found or not whole.startswith(before, at):
                return []
            at += len(before)
            after = next((around.partition(m)[0] for j, m in marks.items() if j > i), around)
            text = messages[i]["content"]
            stripped = (text, text.rstrip(), text.lstrip(), text.strip())
            fits = (t for t in stripped if whole.startswith(t, at) and whole.startswith(after, at + len(t)))
            content = next(fits, None)
            if content is None:
                return []
            contents[i] = (at, at + len(content))
            at += len(content)
        if whole[at:] != around:
            return []
        return [
            (start, stop + self._end(self._behind(masked, i, tools, marks[i], whole[stop:]), whole[stop:]))
            for i, (start, stop) in contents.items()
        ]

    def _by_mark(self, messages, i: int, tools, whole: str) -> Span | None:
        """The span of one turn: what stands where the mark stands when it is rendered with one for its content."""
        mark = _unlike(whole)
        masked = [*messages[:i], {**messages[i], "content": mark}, *messages[i + 1 :]]
        before, found, after = self.render(masked, tools)[0].partition(mark)
        start, stop = len(before), len(whole) - len(after)
        if not found or stop < start or not whole.startswith(before) or not whole.endswith(after):
            return None
        return start, stop + self._end(self._behind(masked, i, tools, mark, after), after)

    def _behind(self, masked, i: int, tools, mark: str, after: str) -> str:
        """What follows turn i's content where the chat ends with it; ``after`` is what follows in the whole."""
        if i + 1 == len(masked):
            return after
        alone, _ = self.render(masked[: i + 1], tools)
        return alone.rpartition(mark)[2] if mark in alone else ""

    def _by_prefix(self, messages, i: int, tools, whole: str) -> Span | None:
        """The span of one turn: what follows the chat before it; None where the whole does not begin like that."""
        if i == 0:
            return None
        before, _ = self.render(messages[:i], tools, prompt=messages[i]["role"] == "assistant")
        until, _ = self.render(messages[: i + 1], tools)
        if not (whole.startswith(before) and until.startswith(before)):
            return None
        start = len(before)
        length = self._end(until[start:], whole[start:])
        return (start, start + length) if length else None

    def _end(self, alone: str, whole: str) -> int:
        """How much of what follows in the whole belongs to the turn.

        Args:
            alone: what follows where the chat ends with this turn.
        """
        differs = (i for i, (a, b) in enumerate(zip(alone, whole)) if a != b)
        same = alone[: next(differs, min(len(alone), len(whole)))]
        if same == alone:
            return len(same.rstrip())
        # The end of a chat differs from that of a turn. What they share after the last special token may be by chance.
        return max((same.rfind(atom) + len(atom) for atom in self.atoms if atom in same), default=0)


def _unlike(text: str) -> str:
    """A word that is not in the text."""
    word = "longspan"
    while word in text:
        word += "x"
    return word


def find_template(
    name: str | None, jinja: str | None, folder: Path, special_tokens: Mapping[str, str], atoms: Iterable[str]
) -> ChatTemplate:
    """The template of the keys chat_template and chat_template_jinja.

    Args:
        folder: of the tokenizer.
        special_tokens, atoms: see `ChatTemplate`.

    Raises:
        UserError: no such template, or no jinja.
    """
    own = own_template(folder)
    if jinja is not None or (name is not None and ("{%" in name or "{{" in name)):
        text = jinja if jinja is not None else name
        assert text is not None
        file = Path(text).expanduser() if "{" not in text and "\n" not in text else None
        if file is not None:
            if not file.is_file():
                raise UserError(f"chat_template_jinja {text!r}: no such file, and no jinja template.")
            text = file.read_text(encoding="utf-8")
        found = "jinja" if file is None else str(file), text
    elif name in TEMPLATES:
        found = name, TEMPLATES[name]
    elif name in (None, "tokenizer_default") or name.startswith("tokenizer_default_fallback_"):
        other = (name or "").removeprefix("tokenizer_default_fallback_")
        if own is not None:
            found = f"of the tokenizer in {folder}", own
        elif other in TEMPLATES:
            found = other, TEMPLATES[other]
        else:
            raise UserError(
                f"the tokenizer in {folder} has no chat template. Give chat_template: one of {', '.join(TEMPLATES)}, or jinja "
                "with chat_template_jinja."
            )
    else:
        raise UserError(
            f"chat_template {name!r}: none of that name. The bundled ones are {', '.join(TEMPLATES)}; a model's own is "
            f"tokenizer_default; jinja takes chat_template_jinja.{did_you_mean(name, TEMPLATES)}"
        )
    template = ChatTemplate(*found, special_tokens, tuple(atom for atom in atoms if atom))
    template.check()
    return template


def own_template(folder: Path) -> str | None:
    """The template a tokenizer's folder holds."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    found = read_object(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(found, list):  # several, by name
        found = {one.get("name"): one.get("template") for one in found}.get("default")
    return found
