"""Finds the places of the answers in a chat's text.

A turn of the assistant is learned whole: from the end of its request (the prompt that the model gets
in use) to its end token. Between these are thoughts, contents and calls, in the template's order. Both
ends of a turn are found in the text exactly:

- if the template marks answers itself ({% generation %}), by its marks;
- otherwise by rendering the chat up to the turn with its request, and up to the turn's end; the whole
  text must begin with both;
- if it does not (a template may remove the thoughts from all turns but the last), by rendering the
  chat with a mark in place of the turn; the rest of the text must be unchanged.

An answer ends with the text that the template always puts after it, such as ``<|im_end|>``, whatever
message follows. White space after that text belongs to no turn. If a template writes no end, a model
stops at the mark of the next role (as GLM does), so this mark is learned as the end, and it is added
after the last answer of a chat. A chat for which none of these ways works is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import jinja2

from longspan.data.chat import ChatTemplate, Message, Span
from longspan.data.templates import WITH_CALLS
from longspan.errors import UserError

#: Names of the field for a turn's thoughts, in the data and in templates.
THOUGHTS = ("reasoning_content", "reasoning", "thinking")


class Found(NamedTuple):
    """A chat as text, and the parts of it that are learned.

    Attributes:
        text: the chat; if the template ends a turn only with the next turn, the last end is added.
        spans: the spans of the turns that count, in order, with end tokens.
        missing: parts that the template leaves out: "end", "thoughts", "content", "calls", "tools".
    """

    text: str
    spans: list[Span]
    missing: frozenset[str]


class Turns:
    """Finds the answers in the chats of one template."""

    def __init__(self, template: ChatTemplate):
        self.template = template
        eos = template.special_tokens.get("eos_token", "")
        self._ends = tuple(sorted({*template.atoms, eos} - {""}, key=len, reverse=True))

    def find(self, messages: Sequence[Message], counts: Sequence[bool], tools: Any = None) -> Found:
        """The chat as text, and the spans of the turns that count.

        Args:
            counts: for each message, whether it is an answer to learn.

        Raises:
            UserError: the template refuses this chat, leaves out calls that are to be learned, or the answers
                cannot be found in its text.
        """
        name = self.template.name
        try:
            whole, marked = self.template.render(messages, tools)
        except UserError:
            raise
        except jinja2.TemplateError as error:
            reason = str(error) or type(error).__name__
            raise UserError(f"the chat template {name} refuses this chat: {reason}.") from None
        # A template is a program, which may for example divide by zero.
        except Exception as error:
            raise UserError(f"the chat template {name} fails on this chat: {error!r}.") from None
        chat = _Chat(self.template, messages, tools, whole)
        missing = self._missing(chat, counts)
        assistants = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        answers = [i for i, count in enumerate(counts) if count]
        if marked and len(marked) == len(assistants) and set(answers) <= set(assistants):
            spans = {i: span for i, span in zip(assistants, marked) if counts[i]}
            missing |= {"end" for i, span in spans.items() if not self._is_ended(chat, i, span)}
            self._check_calls(chat, spans)
            return Found(whole, list(spans.values()), frozenset(missing))
        # There are several marked parts in one turn.
        if marked and answers == assistants:
            return Found(whole, marked, frozenset(missing))
        spans = _by_marks(chat, answers)
        for i in answers:
            if i not in spans:
                span = _turn(chat, i)
                if span is None:
                    raise UserError(
                        f"the chat template {name} does not show which part of this chat is an answer: it changes earlier turns "
                        "when later ones follow. Put {% generation %} and {% endgeneration %} around the answers in it "
                        f"(chat_template_jinja), or take another, such as chatml, or {' or '.join(WITH_CALLS)} for tool calls."
                    )
                spans[i] = span
        self._check_calls(chat, spans)
        text, ends = self._with_ends(chat, spans)
        return Found(text, [spans[i] for i in answers], frozenset(missing | ends))

    # --- parts that the template leaves out ------------------------------------------------

    def _missing(self, chat: _Chat, counts: Sequence[bool]) -> set[str]:
        messages, missing = chat.messages, set()
        if chat.tools and chat.text(messages, tools=None) == chat.whole:
            missing.add("tools")
        called = [i for i, message in enumerate(messages) if message.get("tool_calls")]
        if called and chat.text([_without(message, "tool_calls") for message in messages]) == chat.whole:
            if any(counts[i] for i in called):
                raise self._lost_calls()
            missing.add("calls")
        if any(counts[i] and any(message.get(k) for k in THOUGHTS) for i, message in enumerate(messages)):
            bare = [_without(message, *THOUGHTS) for message in messages]
            if chat.text(bare) == chat.whole:
                missing.add("thoughts")
        # Templates may remove thoughts inside a content, many in all turns but the last.
        last = max((i for i, count in enumerate(counts) if count), default=0)
        inner, end, rest = messages[last]["content"].partition("</think>")
        begin, tag, thought = inner.rpartition("<think>")
        if end and counts[last] and thought.strip():
            other = {**messages[last], "content": begin + tag + chat.mark + end + rest}
            if chat.text(chat.instead(last, other)) == chat.whole:
                missing.add("thoughts")
        marks = [
            f"{chat.mark}all{i}." if message["content"].strip() else "" for i, message in enumerate(messages)
        ]
        shown = chat.text(
            [m | {"content": mark} if mark else m for m, mark in zip(map(dict, messages), marks)]
        )
        if shown is not None and not all(mark in shown for mark in marks):
            missing.add("content")
        return missing

    def _check_calls(self, chat: _Chat, spans: Mapping[int, Span]) -> None:
        """Refuses a template that writes only some of the calls that are to be learned."""
        for i, (start, stop) in spans.items():
            message = chat.messages[i]
            calls = list(message.get("tool_calls") or ())
            names = [_name(call) for call in calls]
            for number, name in enumerate(names):
                if name and chat.whole.count(name, start, stop) >= names.count(name):
                    continue
                others = calls[:number] + calls[number + 1 :]
                fewer = {**message, "tool_calls": others} if others else _without(message, "tool_calls")
                if chat.text(chat.instead(i, fewer)) == chat.whole:
                    raise self._lost_calls()

    def _lost_calls(self) -> UserError:
        return UserError(
            f"the chat template {self.template.name} leaves out tool_calls, so calls of this chat would not be learned. Take a "
            "template that writes them: chat_template: tokenizer_default where the model's own does, or "
            f"{' or '.join(WITH_CALLS)}."
        )

    # --- ends ------------------------------------------------------------------------------

    def _with_ends(self, chat: _Chat, spans: dict[int, Span]) -> tuple[str, set[str]]:
        """Extends each answer without an end token by the mark that follows it.

        Args:
            spans: message -> the span of its turn; changed in place.

        Returns:
            The chat, with the mark of a next turn after it if its last answer needs one; and {"end"} if an
            answer has neither an end token nor a mark.
        """
        text, missing = chat.whole, set()
        for i, (start, stop) in spans.items():
            message, following = chat.messages[i], chat.messages[i + 1 : i + 2]
            if message["role"] != "assistant" or (self._closings and self._is_ended(chat, i, (start, stop))):
                continue
            if not following:
                mark = ""
                if not self._closings and not text[stop:].strip():
                    mark = self._next_mark(bool(message.get("tool_calls")))
                text = text[:stop] + mark if mark else text
            else:
                role, mark = following[0]["role"], self._leading(text[stop:])
                # If a template has ends of its own, the mark of the next turn is not an end.
                if self._closings and mark.strip() in self._beginnings(role):
                    mark = ""
                if role == "assistant" and not (mark and self._closings):
                    # The next message is also the assistant's, so the model does not stop here.
                    continue
            spans[i] = start, stop + len(mark)
            if not mark:
                missing.add("end")
        return text, missing

    def _is_ended(self, chat: _Chat, i: int, span: Span) -> bool:
        """Whether a turn ends with an end token: after calls any special token, else one of `_closings`."""
        ends = self._ends if chat.messages[i].get("tool_calls") else self._closings
        return chat.whole.endswith(ends, *span)

    @cached_property
    def _closings(self) -> tuple[str, ...]:
        """The special tokens that the template puts after an answer, at the end of a chat or inside it.

        Tokens of the next turn are left out. If the next turn marks the end, the result is empty.
        """
        last = self._sample({"role": "assistant", "content": _SAMPLE[1]})
        if last is None:
            return self._ends
        behind = last.partition(_SAMPLE[1])[2]
        inside = self._behind_answer("user").strip()
        found = {end for end in self._ends if end in behind}
        if found and inside not in self._beginnings("user"):
            found.add(inside)
        return tuple(found)

    def _beginnings(self, role: str) -> tuple[str, ...]:
        """The tokens with which a role's message may begin; all tokens if the template does not show it."""
        one, two = self._sample(), self._sample({"role": role, "content": _SAMPLE[1]})
        if one is None or two is None:
            return ("", *self._ends)
        end = one.partition(_SAMPLE[0])[2].rstrip()
        return ("", self._leading(two.partition(_SAMPLE[0])[2].removeprefix(end)).strip())

    def _next_mark(self, after_calls: bool) -> str:
        """The special token that begins the next turn, with the white space before it; "" without one."""
        marks = (self._behind_answer(role) for role in (("tool", "user") if after_calls else ("user",)))
        return next(filter(None, marks), "")

    def _behind_answer(self, role: str) -> str:
        """The special token between an answer and a role's message, with the white space before it; or ""."""
        texts = self._sample(
            {"role": "assistant", "content": _SAMPLE[1]}, {"role": role, "content": _SAMPLE[2]}
        )
        return self._leading(texts.partition(_SAMPLE[1])[2]) if texts else ""

    def _leading(self, text: str) -> str:
        """The special token at the beginning of a text, with the white space before it; "" without one."""
        gap = len(text) - len(text.lstrip())
        token = next((end for end in self._ends if text.startswith(end, gap)), None)
        return "" if token is None else text[:gap] + token

    def _sample(self, *turns: Message) -> str | None:
        return _Chat(self.template, [], None, "").text([{"role": "user", "content": _SAMPLE[0]}, *turns])


#: Contents of a sample chat, whose text shows how a template writes turns.
_SAMPLE = ("longspan asks.", "longspan answers.", "longspan goes on.")


class _Chat:
    """One chat, and the texts that its template makes from parts and variations of it."""

    def __init__(self, template: ChatTemplate, messages: Sequence[Message], tools: Any, whole: str):
        self.template, self.messages, self.tools, self.whole = template, messages, tools, whole
        self.mark = _unlike(whole)
        self._first: dict[tuple[int, bool], str | None] = {}

    def text(self, messages: Sequence[Message], prompt: bool = False, tools: Any = ...) -> str | None:
        """The text of other messages; None if the template refuses them."""
        try:
            return self.template.render(messages, self.tools if tools is ... else tools, prompt)[0]
        except UserError:
            raise
        # A template is a program, which can raise any error.
        except Exception:
            return None

    def first(self, number: int, prompt: bool = False) -> str | None:
        """The text of the first ``number`` messages; None if the template refuses them."""
        key = (number, prompt)
        if key not in self._first:
            self._first[key] = self.text(self.messages[:number], prompt)
        return self._first[key]

    def instead(self, i: int, message: Message) -> list[Message]:
        """The messages, with message i replaced."""
        return [*self.messages[:i], message, *self.messages[i + 1 :]]

    def request(self, i: int) -> str:
        """The request for turn i: the text that the prompt adds to the chat before it; "" if it adds none."""
        before, asked = self.first(i), self.first(i, prompt=True)
        if before is None or asked is None:
            return ""
        return asked[_shared(before, asked) :]

    def marked(self, i: int) -> list[list[Message]]:
        """The chat with a mark in place of turn i, and in place of its content alone."""
        message = self.messages[i]
        plain = {"role": message["role"], "content": self.mark}
        return [self.instead(i, plain), self.instead(i, {**message, "content": self.mark})]

    def behind(self, marked: Sequence[Message], i: int, mark: str, after: str) -> str:
        """The text after turn i's mark if the chat ends with it; ``after`` is that text in the whole chat."""
        if i + 1 == len(marked):
            return after
        alone = self.text(marked[: i + 1])
        return alone.rpartition(mark)[2] if alone is not None and mark in alone else ""

    def end(self, alone: str, whole: str) -> int:
        """The number of characters after a turn's content that belong to the turn.

        Args:
            alone: the text after the content if the chat ends with this turn.
            whole: the text after the content in the whole chat.
        """
        same = alone[: _shared(alone, whole)]
        if same == alone:
            return len(same.rstrip())
        # A chat may end differently than a turn. Text after the last special token may be equal by chance.
        return max((same.rfind(a) + len(a) for a in self.template.atoms if a in same), default=0)


def _by_marks(chat: _Chat, answers: Sequence[int]) -> dict[int, Span]:
    """The turns that are a content and its end, found by rendering with marks for all contents at once.

    A turn of the assistant is included only if its content follows its request directly. The result is
    empty if a content does not stand unchanged in the whole text.
    """
    messages, whole, found = chat.messages, chat.whole, {}
    # A mark in place of an empty content would change how calls are separated from it.
    answers = [i for i in answers if messages[i]["content"] or not messages[i].get("tool_calls")]
    marks = {i: f"{chat.mark}turn{i}." for i in answers}
    masked = [{**m, "content": marks[i]} if i in marks else m for i, m in enumerate(messages)]
    around = chat.text(masked)
    speaks = next((i for i in answers if messages[i]["role"] == "assistant"), None)
    request = chat.request(speaks) if speaks is not None and around is not None else ""
    at = 0
    for i, mark in marks.items():
        before, there, around = (around or "").partition(mark)
        if not there or not whole.startswith(before, at):
            return {}
        at += len(before)
        after = next((around.partition(m)[0] for j, m in marks.items() if j > i), around)
        text = messages[i]["content"]
        stripped = (text, text.rstrip(), text.lstrip(), text.strip())
        fits = (t for t in stripped if whole.startswith(t, at) and whole.startswith(after, at + len(t)))
        content = next(fits, None)
        if content is None:
            return {}
        alone = (
            not any(messages[i].get(name) for name in THOUGHTS) if not request else before.endswith(request)
        )
        if messages[i]["role"] != "assistant" or alone:
            found[i] = (at, at + len(content))
        at += len(content)
    if whole[at:] != around:
        return {}
    return {
        i: (start, stop + chat.end(chat.behind(masked, i, marks[i], whole[stop:]), whole[stop:]))
        for i, (start, stop) in found.items()
    }


def _turn(chat: _Chat, i: int) -> Span | None:
    """The span of one turn; None if the text does not show it."""
    start = _start(chat, i) if chat.messages[i]["role"] == "assistant" else _content(chat, i)
    if start is None:
        return None
    stop = _stop(chat, i, start)
    return None if stop is None else (start, stop)


def _start(chat: _Chat, i: int) -> int | None:
    """The beginning of a turn of the assistant, which is the end of its request."""
    whole, before, asked = chat.whole, chat.first(i), chat.first(i, prompt=True)
    request = chat.request(i)
    if asked is not None and request and whole.startswith(asked):
        return len(asked)
    for marked in chat.marked(i):
        head, found, _ = (chat.text(marked) or "").partition(chat.mark)
        if not found:
            continue
        at = len(head)
        alone, found, _ = (chat.text(marked[: i + 1]) or "").partition(chat.mark)
        if found and request and before is not None and asked is not None:
            # The header is the text that request and turn share. In the whole chat less text may follow it.
            end = _shared(asked, alone)
            header = alone[_shared(before, asked) : end]
            place = head.rfind(header) + len(header) if header and header in head else 0
            if len(head) - place <= len(alone) - end:
                at = place
        if whole.startswith(head[:at]):
            return at
        if before is not None and not request and whole.startswith(before):
            return max(len(before), _shared(head, whole))
    return len(asked) if asked is not None and whole.startswith(asked) else None


def _content(chat: _Chat, i: int) -> int | None:
    """The beginning of the content in a turn of another role."""
    for marked in chat.marked(i):
        head, found, _ = (chat.text(marked) or "").partition(chat.mark)
        if found and chat.whole.startswith(head):
            return len(head)
    before = chat.first(i)
    return len(before) if i and before is not None and chat.whole.startswith(before) else None


def _stop(chat: _Chat, i: int, start: int) -> int | None:
    """The end of a turn that begins at ``start``."""
    whole, until = chat.whole, chat.first(i + 1)
    if until is not None and not until.startswith(whole[:start]):
        until = None
    if until is not None and whole.startswith(until.rstrip()):
        return max(start, len(until.rstrip()))
    for marked in chat.marked(i):
        _, found, after = (chat.text(marked) or "").partition(chat.mark)
        stop = len(whole) - len(after)
        if found and stop >= start and whole.endswith(after):
            return stop + chat.end(chat.behind(marked, i, chat.mark, after), after)
    length = 0 if until is None else chat.end(until[start:], whole[start:])
    return start + length if length else None


def _name(call: Any) -> str:
    """The name of the function in a call; "" without a name."""
    inner = call.get("function", call) if isinstance(call, Mapping) else None
    name = inner.get("name") if isinstance(inner, Mapping) else None
    return name if isinstance(name, str) else ""


def _without(message: Message, *names: str) -> dict[str, Any]:
    return {name: value for name, value in message.items() if name not in names}


def _shared(one: str, other: str) -> int:
    """The number of characters that two texts share at their beginning."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one.startswith(other[low:middle], low):
            low = middle
        else:
            high = middle - 1
    return low


def _unlike(text: str) -> str:
    """A word that is not in the text."""
    word = "longspan"
    while word in text:
        word += "x"
    return word
