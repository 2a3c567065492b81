"""Chats as text, by templates.

A template (jinja) turns messages into one text. It is tokenised as a whole, so that training has
the same tokens as the later use of the model. ``turns`` finds the answers in the text.
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
from longspan.data.limited import TIME_S, LimitError, limited
from longspan.data.templates import TEMPLATES
from longspan.data.tokenizer_files import SETTINGS, TEMPLATE, named_templates
from longspan.errors import UserError, did_you_mean

# Rendering puts these around the content of {% generation %}: private characters, which no text contains.
_OPEN, _CLOSE = "\ue0a1\ue0b2\ue0c3", "\ue0c3\ue0b2\ue0a1"

_BUNDLED = frozenset(TEMPLATES.values())
#: The most characters of a template. The longest templates of known models have a tenth of this.
MAX_TEMPLATE = 200_000

Span = tuple[int, int]
Message = Mapping[str, Any]


class _Generation(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %}: the part of a template that the model must learn to write."""

    tags = {"generation"}

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
    """A template, compiled as in transformers, but without strftime_now: samples do not depend on the day."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    # jinja's own tojson escapes HTML.
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    return environment.from_string(text)


def _check(text: str) -> None:
    _compiled(text)


def _render(text: str, names: Mapping[str, Any]) -> str:
    return _compiled(text).render(names)


def _within_limits(seconds: float, function: Callable[..., Any], text: str, *more: Any) -> Any:
    """Calls a function with a template's text, within limits of time and memory unless it is bundled.

    Args:
        seconds: the limit of time.

    Raises:
        jinja2.TemplateError: a limit was exceeded, or the function raised it.
    """
    if text in _BUNDLED:
        return function(text, *more)
    try:
        return limited(function, text, *more, seconds=seconds)
    except LimitError as error:
        raise jinja2.TemplateError(str(error)) from None


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template.

    Attributes:
        name: the name in messages.
        text: the template's jinja text.
        special_tokens: bos_token, eos_token ... -> the token's text.
        atoms: all special tokens of the vocabulary; a text is never cut inside one.
        seconds: of computing that each use of the template may take, unless it is bundled.
    """

    name: str
    text: str
    special_tokens: Mapping[str, str]
    atoms: tuple[str, ...] = ()
    seconds: float = TIME_S

    def check(self) -> None:
        """Raises UserError if the text is not a jinja template."""
        if len(self.text) > MAX_TEMPLATE:
            raise UserError(
                f"chat template {self.name}: {len(self.text):,} characters; a template has {MAX_TEMPLATE:,} at most."
            )
        try:
            _within_limits(self.seconds, _check, self.text)
        except jinja2.TemplateError as error:
            raise UserError(f"chat template {self.name}: not a jinja template: {error}.") from None
        # One example is a template nested more deeply than Python can parse.
        except Exception as error:
            raise UserError(f"chat template {self.name}: cannot be compiled: {error!r}.") from None

    def render(
        self, messages: Sequence[Message], tools: Any = None, prompt: bool = False
    ) -> tuple[str, list[Span]]:
        """The chat as text, and the spans that the template itself marks as answers.

        Args:
            prompt: the text ends with the prompt for the next answer.

        Raises:
            jinja2.TemplateError: the template refuses this chat.
        """
        names = {
            "messages": messages,
            "tools": tools,
            "documents": None,
            "add_generation_prompt": prompt,
            **self.special_tokens,
        }
        found = _within_limits(self.seconds, _render, self.text, names)
        parts = found.split(_OPEN)
        text, spans = parts[0], []
        for part in parts[1:]:
            answer, close, rest = part.partition(_CLOSE)
            if not close or _CLOSE in rest:
                raise jinja2.TemplateError("{% generation %} inside {% generation %}")
            spans.append((len(text), len(text) + len(answer)))
            text += answer + rest
        return text, spans


def find_template(
    name: str | None, jinja: str | None, folder: Path, special_tokens: Mapping[str, str], atoms: Iterable[str]
) -> ChatTemplate:
    """The template that the keys chat_template and chat_template_jinja name.

    Args:
        folder: the tokenizer's folder.
        special_tokens, atoms: see `ChatTemplate`.

    Raises:
        UserError: there is no such template, or it is not a jinja template.
    """
    if jinja is not None or (name is not None and ("{%" in name or "{{" in name)):
        text = jinja if jinja is not None else name
        assert text is not None
        file = Path(text).expanduser() if "{" not in text and "\n" not in text else None
        if file is not None:
            if not file.is_file():
                raise UserError(f"chat_template_jinja {text!r}: no such file, and no jinja template.")
            text = _read(file)
        found = "jinja" if file is None else str(file), text
    elif name in TEMPLATES:
        found = name, TEMPLATES[name]
    elif name in (None, "tokenizer_default") or name.startswith("tokenizer_default_fallback_"):
        other = (name or "").removeprefix("tokenizer_default_fallback_")
        own = own_template(folder)
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
    """The template in a tokenizer's folder.

    Raises:
        UserError: the template is not text.
    """
    if (folder / TEMPLATE).is_file():
        return _read(folder / TEMPLATE)
    return named_templates(read_object(folder / SETTINGS), folder / SETTINGS).get("default")


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"chat template {file}: cannot be read as UTF-8 text ({error}).") from None
