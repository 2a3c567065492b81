"""Where in a chat's text the answers are.

A turn of the assistant is learned whole: from the end of what asks for it (the prompt that the model
gets when it is used) to its end token. Thoughts, contents and calls lie in between, in whatever order
the template writes them. Both ends are found in the text, exactly:

- where the template marks answers itself ({% generation %}), there;
- else by rendering the chat up to the turn with the prompt that asks for it, and up to the turn's end;
  each must be how the whole begins;
- where it is not (a template may take the thoughts out of all turns but the last), by rendering the
  chat with a mark in place of the turn: all else must be as it was.

An answer ends with what the template puts behind it that does not depend on what follows, such as
``<|im_end|>``. White space that comes after that belongs to nobody. Where a template writes no end,
the mark of the next role is what a model stops at (GLM's way), so it is learned as the end; behind
the last answer of a chat it is added. A chat for which none of this holds is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import jinja2

from longspan.data.chat import ChatTemplate, Message, Span
from longspan.data.templates import WITH_CALLS
from longspan.errors import UserError

#: names that a turn's thoughts have in the data and in templates
THOUGHTS = ("reasoning_content", "reasoning", "thinking")


class Found(NamedTuple):
    """A chat as text, and what of it is learned.

    Attributes:
        text: the chat; an end that the template leaves to the next turn is added.
        spans: of the turns that count, in their order, end tokens included.
        missing: what the template leaves out of this chat: "end", "thoughts", "content", "calls", "tools".
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
            UserError: the template does not take this chat, leaves out calls that are to be learned, or
                does not show where the chat's answers are.
        """
        name = self.template.name
        try:
            whole, marked = self.template.render(messages, tools)
        except UserError:
            raise
        except jinja2.TemplateError as error:
            reason = str(error) or type(error).__name__
            raise UserError(f"the chat template {name} refuses this chat: {reason}.") from None
        except Exception as error:  # a template is a program: it may divide by zero
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
        if marked and answers == assistants:  # several to a turn
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

    # --- what the template leaves out ------------------------------------------------------

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
        # Thoughts inside a content: templates may cut them off. Many do so in all turns but the last.
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
        """Refuses a template that writes some of the calls that are to be learned, and leaves out others."""
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
        """Gives each answer without an end token the mark that follows it; "end" where there is none.

        Args:
            spans: message -> its turn; changed in place.

        Returns:
            The chat, with the mark of a next turn behind it where its last answer needs one.
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
                # A template that has ends of its own does not leave them to the next turn.
                if self._closings and mark.strip() in self._beginnings(role):
                    mark = ""
                if role == "assistant" and not (mark and self._closings):
                    continue  # the same speaker goes on: nothing stops here
            spans[i] = start, stop + len(mark)
            if not mark:
                missing.add("end")
        return text, missing

    def _is_ended(self, chat: _Chat, i: int, span: Span) -> bool:
        """Whether a turn ends with an end token: behind calls any special one, else one that stands behind contents."""
        ends = self._ends if chat.messages[i].get("tool_calls") else self._closings
        return chat.whole.endswith(ends, *span)

    @cached_property
    def _closings(self) -> tuple[str, ...]:
        """The special tokens that the template puts behind an answer, at the end of a chat or inside one.

        Those of the next turn are not among them; none where the template leaves the end to the next turn.
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
        """What a message of a role may begin with itself: a special token, or any where the template does not show it."""
        one, two = self._sample(), self._sample({"role": role, "content": _SAMPLE[1]})
        if one is None or two is None:
            return ("", *self._ends)
        end = one.partition(_SAMPLE[0])[2].rstrip()
        return ("", self._leading(two.partition(_SAMPLE[0])[2].removeprefix(end)).strip())

    def _next_mark(self, after_calls: bool) -> str:
        """The special token that a next turn begins with, and the white space before it; "" without one."""
        marks = (self._behind_answer(role) for role in (("tool", "user") if after_calls else ("user",)))
        return next(filter(None, marks), "")

    def _behind_answer(self, role: str) -> str:
        """The special token behind an answer that a message of a role follows, and the white space before it; or ""."""
        texts = self._sample(
            {"role": "assistant", "content": _SAMPLE[1]}, {"role": role, "content": _SAMPLE[2]}
        )
        return self._leading(texts.partition(_SAMPLE[1])[2]) if texts else ""

    def _leading(self, text: str) -> str:
        """The special token at the beginning of a text, and the white space before it; "" without one."""
        gap = len(text) - len(text.lstrip())
        token = next((end for end in self._ends if text.startswith(end, gap)), None)
        return "" if token is None else text[:gap] + token

    def _sample(self, *turns: Message) -> str | None:
        return _Chat(self.template, [], None, "").text([{"role": "user", "content": _SAMPLE[0]}, *turns])


#: contents of a chat that shows how a template writes turns
_SAMPLE = ("longspan asks.", "longspan answers.", "longspan goes on.")


class _Chat:
    """One chat, and what its template makes of parts and variations of it."""

    def __init__(self, template: ChatTemplate, messages: Sequence[Message], tools: Any, whole: str):
        self.template, self.messages, self.tools, self.whole = template, messages, tools, whole
        self.mark = _unlike(whole)
        self._first: dict[tuple[int, bool], str | None] = {}

    def text(self, messages: Sequence[Message], prompt: bool = False, tools: Any = ...) -> str | None:
        """Other messages as text; None where the template does not take them."""
        try:
            return self.template.render(messages, self.tools if tools is ... else tools, prompt)[0]
        except UserError:
            raise
        except Exception:  # of any kind: a template is a program
            return None

    def first(self, number: int, prompt: bool = False) -> str | None:
        """The first messages as text."""
        key = (number, prompt)
        if key not in self._first:
            self._first[key] = self.text(self.messages[:number], prompt)
        return self._first[key]

    def instead(self, i: int, message: Message) -> list[Message]:
        """The messages with another in place of message i."""
        return [*self.messages[:i], message, *self.messages[i + 1 :]]

    def request(self, i: int) -> str:
        """What asks for turn i: what the prompt for it has and the chat before it has not; "" without such a thing."""
        before, asked = self.first(i), self.first(i, prompt=True)
        if before is None or asked is None:
            return ""
        return asked[_shared(before, asked) :]

    def marked(self, i: int) -> list[list[Message]]:
        """The chat with a mark for turn i: for all of it, and for its content alone."""
        message = self.messages[i]
        plain = {"role": message["role"], "content": self.mark}
        return [self.instead(i, plain), self.instead(i, {**message, "content": self.mark})]

    def behind(self, marked: Sequence[Message], i: int, mark: str, after: str) -> str:
        """What follows turn i's mark where the chat ends with it; ``after`` is what follows in the whole."""
        if i + 1 == len(marked):
            return after
        alone = self.text(marked[: i + 1])
        return alone.rpartition(mark)[2] if alone is not None and mark in alone else ""

    def end(self, alone: str, whole: str) -> int:
        """How much of what follows in the whole belongs to the turn.

        Args:
            alone: what follows where the chat ends with this turn.
        """
        same = alone[: _shared(alone, whole)]
        if same == alone:
            return len(same.rstrip())
        # The end of a chat differs from that of a turn. What they share after the last special token may be by chance.
        return max((same.rfind(a) + len(a) for a in self.template.atoms if a in same), default=0)


def _by_marks(chat: _Chat, answers: Sequence[int]) -> dict[int, Span]:
    """The turns that are a content and its end, found by rendering with marks for all contents at once.

    A turn of the assistant is among them only where its content follows at once what asks for it. None is where
    a content is not in the whole as it is.
    """
    messages, whole, found = chat.messages, chat.whole, {}
    # A mark in place of nothing would change how calls are set apart from a content.
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
    """The span of one turn; None where the template does not show it."""
    start = _start(chat, i) if chat.messages[i]["role"] == "assistant" else _content(chat, i)
    if start is None:
        return None
    stop = _stop(chat, i, start)
    return None if stop is None else (start, stop)


def _start(chat: _Chat, i: int) -> int | None:
    """Where a turn of the assistant begins: behind what asks for it."""
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
            # The header is what the request and the turn share. In the chat as a whole a turn may have less behind it.
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
    """Where the content of another's turn begins."""
    for marked in chat.marked(i):
        head, found, _ = (chat.text(marked) or "").partition(chat.mark)
        if found and chat.whole.startswith(head):
            return len(head)
    before = chat.first(i)
    return len(before) if i and before is not None and chat.whole.startswith(before) else None


def _stop(chat: _Chat, i: int, start: int) -> int | None:
    """Where a turn that begins at ``start`` ends."""
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
    """The name of the function that a call calls; "" where it has none."""
    inner = call.get("function", call) if isinstance(call, Mapping) else None
    name = inner.get("name") if isinstance(inner, Mapping) else None
    return name if isinstance(name, str) else ""


def _without(message: Message, *names: str) -> dict[str, Any]:
    return {name: value for name, value in message.items() if name not in names}


def _shared(one: str, other: str) -> int:
    """How many characters two texts begin with in common."""
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
