"""Every part of an assistant's turn is learned, its end included: by templates that write turns as models of the field do.

Each expected text is written out by hand.
"""

import json

import pytest
from tokenizers import AddedToken, Tokenizer

from chats import (
    ASK,
    CALL,
    NO_THOUGHT,
    TOOLS,
    call,
    chat,
    of,
    result,
    said,
    write_tokenizer,
)

# --- thoughts beside the content -----------------------------------------------------------------


@pytest.mark.parametrize("name", ["qwen3", "of the tokenizer"])
def test_thoughts_beside_the_content_are_learned(family, name):
    messages = [*chat("a"), said("four", reasoning_content="two\nand two")]
    texts, coder = of(family, messages, "qwen3")
    assert texts == ["<think>\ntwo\nand two\n</think>\n\nfour<|im_end|>"]
    if name != "qwen3":  # the same template, as a model brings it
        own = write_tokenizer(family.parent / "own", chat_template=coder.recipe.template.text)
        texts, coder = of(own, messages)
        assert texts == ["<think>\ntwo\nand two\n</think>\n\nfour<|im_end|>"]
    assert not coder.missing


def test_thoughts_that_a_template_takes_out_of_earlier_turns(family):
    """They are not in the text, so nothing of them can be learned; the turn around them is."""
    messages = [
        *chat("a"),
        said("b", reasoning_content="x"),
        *chat("c"),
        said("d", reasoning_content="y"),
    ]
    texts, coder = of(family, messages, "qwen3")
    assert texts == ["b<|im_end|>", "<think>\ny\n</think>\n\nd<|im_end|>"]
    assert not coder.missing
    text = coder.tokenizer.decode(
        coder("here", {"messages": messages})[0].tolist(), skip_special_tokens=False
    )
    assert text == (
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n<|im_start|>user\nc<|im_end|>\n"
        "<|im_start|>assistant\n<think>\ny\n</think>\n\nd<|im_end|>\n"
    )


def test_thoughts_and_calls_of_an_agent(family):
    """Thoughts after the last question stay, those before it go: a chat of two questions with calls in both."""
    step = [
        said("", reasoning_content="I must look", tool_calls=[call(city="Paris")]),
        result("sunny"),
        said("Sunny.", reasoning_content="it is sunny"),
    ]
    texts, coder = of(family, [*ASK, *step, *chat("And now?"), *step], "qwen3")
    assert texts == [
        f"{CALL}<|im_end|>",
        "Sunny.<|im_end|>",
        f"<think>\nI must look\n</think>\n\n{CALL}<|im_end|>",
        "<think>\nit is sunny\n</think>\n\nSunny.<|im_end|>",
    ]
    assert not coder.missing


# A prompt that begins the thought: the model goes on from there, so that the learned part begins there too.
STARTED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content and loop.last %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)


def test_a_prompt_that_begins_the_thought(family):
    texts, _ = of(family, [*chat("a", "<b>", "c"), said("d", reasoning_content="<think harder")], STARTED)
    assert texts == ["<b><|im_end|>", "<think harder\n</think>\n\nd<|im_end|>"]


def test_thoughts_that_look_like_a_header(family):
    fake = "<|im_start|>assistant\nno"
    texts, _ = of(family, [*chat("a"), said("d", reasoning_content=fake), *chat("b", "c")], "qwen3")
    assert texts == ["d<|im_end|>", f"{NO_THOUGHT}c<|im_end|>"]
    texts, _ = of(family, [*chat(fake), said("d", reasoning_content=fake)], "qwen3")
    assert texts == [f"<think>\n{fake}\n</think>\n\nd<|im_end|>"]


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_thoughts_without_a_place_are_counted(family, name):
    texts, coder = of(family, [*chat("a"), said("b", **{name: "x"})], "chatml")
    assert texts == ["b<|im_end|>"]
    assert coder.missing == {"thoughts": 1}


R1 = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n{{ m.content.split('</think>')[-1] }}<|im_end|>\n"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("thought", ["<think>why\n</think>", "why</think>"])
def test_thoughts_inside_a_content_that_are_cut_off_are_counted(family, thought):
    texts, coder = of(family, chat("a", f"{thought}b"), R1)
    assert texts == ["b<|im_end|>"]
    assert coder.missing == {"thoughts": 1}
    assert not of(family, chat("a", f"{thought}b"), "chatml")[1].missing
    assert not of(family, chat("a", "<think>\n</think>b"), R1)[1].missing  # no thought is in there
    assert not of(family, chat("a", f"{thought}b", "c", "d"), R1)[1].missing


def test_a_thought_under_another_name(family):
    messages = [*chat("a"), said("b", thought="x")]
    mapping = {"role": "role", "content": "content", "reasoning_content": "thought"}
    texts, _ = of(family, messages, "qwen3", message_property_mappings=mapping)
    assert texts == ["<think>\nx\n</think>\n\nb<|im_end|>"]


# --- end tokens that take in white space ---------------------------------------------------------


@pytest.fixture(scope="module")
def phi(tmp_path_factory):
    """Phi-3's tokenizer.json: "rstrip": true at its special tokens."""
    path = write_tokenizer(tmp_path_factory.mktemp("phi"), eos_token="<|end|>")
    read = json.loads((path / "tokenizer.json").read_text())
    for token in read["added_tokens"]:
        token["rstrip"] = token["content"] in ("<|end|>", "<|user|>", "<|assistant|>")
    (path / "tokenizer.json").write_text(json.dumps(read))
    return path


def test_an_end_token_that_takes_in_the_line_break(phi):
    messages = chat("a", "b c", "d", " e\n")
    texts, coder = of(phi, messages, "phi_3")
    tokens, mask = coder("here", {"messages": messages})
    assert coder._plain.encode("<|end|>\n").offsets == [(0, 8)]  # the line break is in it
    assert texts == ["b c<|end|>", "e\n<|end|>"]  # the header takes in the blank before "e"
    header = coder.tokenizer.token_to_id("<|assistant|>")
    assert not mask[tokens == header].any()
    assert not coder.missing


def test_an_added_token_that_is_not_special_and_takes_in_white_space(phi, tmp_path):
    path = write_tokenizer(tmp_path / "t")
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer.add_tokens([AddedToken("<bot>", rstrip=True), AddedToken("<done>", lstrip=True, rstrip=True)])
    tokenizer.save(str(path / "tokenizer.json"))
    jinja = "{% for m in messages %}{{ '<bot>' if m.role == 'assistant' else '' }}{{ m.content }} <done>\n{% endfor %}"
    texts, _ = of(path, chat("a", " b"), jinja)
    assert texts == ["b<done>"]


# --- templates in which the next role's mark ends a turn -----------------------------------------

GLM = (
    "[gMASK]<sop>{% if tools %}<|system|>\n{{ tools | tojson }}{% endif %}"
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}"
    "{% endfor %}{% for m in messages %}"
    "{% if m.role == 'assistant' %}<|assistant|>{{ '\\n<think>' + (m.reasoning_content or '' if loop.index0 > ns.last else '') }}"
    "</think>{{ '\\n' + m.content.strip() if m.content.strip() }}"
    "{% for c in m.tool_calls or [] %}{{ '\\n<tool_call>' + c.function.name + '\\n' }}"
    "{% for k, v in c.function.arguments.items() %}{{ k }}: {{ v }}\n{% endfor %}</tool_call>{% endfor %}"
    "{% elif m.role == 'tool' %}{{ '' if messages[loop.index0 - 1].role == 'tool' else '<|observation|>' }}\n{{ m.content }}"
    "{% else %}{{ '<|' + m.role + '|>' }}\n{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def test_the_next_roles_mark_is_the_end(family):
    messages = [*chat("a", "b", "c"), said("d", reasoning_content="x"), *chat("e")]
    texts, coder = of(family, messages, GLM)
    assert texts == ["\n<think></think>\nb<|user|>", "\n<think></think>\nd<|user|>"]
    assert coder.missing == {"thoughts": 1}  # a question follows: nothing of them is written


def test_behind_the_last_answer_the_mark_is_added(family):
    messages = [*chat("a", "b", "c"), said("d", reasoning_content="x")]
    texts, coder = of(family, messages, GLM)
    assert texts == ["\n<think></think>\nb<|user|>", "\n<think>x</think>\nd<|user|>"]
    tokens, _ = coder("here", {"messages": messages})
    assert coder.tokenizer.decode(tokens.tolist(), skip_special_tokens=False) == (
        "[gMASK]<sop><|user|>\na<|assistant|>\n<think></think>\nb<|user|>\nc<|assistant|>\n<think>x</think>\nd<|user|>"
    )
    assert not coder.missing


def test_calls_end_with_the_mark_of_their_results(family):
    messages = [*ASK, said(tool_calls=[call(city="Paris")]), result("sunny"), result("dry"), said("Sunny.")]
    made = "\n<think></think>\n<tool_call>weather\ncity: Paris\n</tool_call><|observation|>"
    texts, coder = of(family, {"messages": messages, "tools": TOOLS}, GLM)
    assert texts == [made, "\n<think></think>\nSunny.<|user|>"]
    assert of(family, {"messages": messages[:2], "tools": TOOLS}, GLM)[0] == [made]
    assert not coder.missing


def test_a_speaker_who_goes_on_does_not_stop(family):
    texts, coder = of(family, [*chat("a"), said("b"), said("c")], GLM)
    assert texts == ["\n<think></think>\nb", "\n<think></think>\nc<|user|>"]
    assert not coder.missing


def test_questions_that_are_learned_get_no_mark(family):
    texts, _ = of(family, chat("a", "b", "c", "d"), GLM, train_on_inputs=True)
    assert texts == ["a", "\n<think></think>\nb<|user|>", "c", "\n<think></think>\nd<|user|>"]


def test_no_end_at_all_is_counted(family):
    jinja = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    texts, coder = of(family, chat("a", "b", "c", "d"), jinja)
    assert [text.strip() for text in texts] == ["b", "d"]
    assert coder.missing == {"end": 1}  # chats, not turns
    # an end that is no token of this tokenizer
    assert of(family, chat("a", "b"), "gemma")[1].missing == {"end": 1}


@pytest.mark.parametrize("role", ["system", "developer"])
def test_the_mark_of_any_other_role_is_the_end(family, role):
    messages = [*chat("a", "b"), {"role": role, "content": "be brief"}, *chat("c", "d")]
    jinja = (
        "{% for m in messages %}<|{{ m.role if m.role in ('user', 'assistant') else 'system' }}|>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    texts, coder = of(family, messages, jinja)
    assert texts == ["b<|system|>", "d<|user|>"]
    assert not coder.missing


# Harmony's: an answer inside a chat ends otherwise than the last one, and a header has special tokens behind the role.
HARMONY = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% for c in m.tool_calls or [] %}"
    "<|start|>assistant<|channel|>commentary to={{ c.function.name }}<|message|>{{ c.function.arguments | tojson }}<|call|>"
    "{% else %}<|start|>assistant<|channel|>final<|message|>{{ m.content }}{{ '<|return|>' if m == messages[-1] else '<|end|>' }}"
    "{% endfor %}{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)


@pytest.mark.parametrize("first", ["b", ""])
def test_an_end_inside_a_chat_that_differs_from_the_last(family, first):
    texts, coder = of(family, chat("a", first, "c", "d"), HARMONY)
    start = "<|channel|>final<|message|>"
    assert texts == [f"{start}{first}<|end|>", f"{start}d<|return|>"]
    texts, coder = of(family, [*chat("a"), said(first), said("c")], HARMONY)
    assert texts[0] == f"{start}{first}<|end|>"
    assert texts[1].endswith("c<|return|>")
    messages = [*ASK, said(tool_calls=[call(city="Paris")]), result("sunny"), said("Sunny.")]
    texts, _ = of(family, messages, HARMONY)
    assert texts == [
        '<|channel|>commentary to=weather<|message|>{"city": "Paris"}<|call|>',
        f"{start}Sunny.<|return|>",
    ]
    assert not coder.missing


def test_an_end_behind_the_last_answer_alone(family):
    """What follows the first is the next turn's own beginning, which is no end here; nor is the header's last token."""
    jinja = (
        "{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}"
        "{{ '<|return|>' if loop.last and m.role == 'assistant' }}{% endfor %}{% if add_generation_prompt %}<|start|>{% endif %}"
    )
    for first in ("b", ""):
        texts, coder = of(family, chat("a", first, "c", "d"), jinja)
        assert texts == [f"assistant<|message|>{first}", "assistant<|message|>d<|return|>"]
        assert coder.missing == {"end": 1}
