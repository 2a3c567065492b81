"""Calls of tools in an assistant's turns, and which turns count: what is learned of them by the templates of the field."""

import json

import pytest

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
)
from longspan.data.chat import ChatTemplate
from longspan.data.templates import TEMPLATES
from longspan.data.turns import Turns
from longspan.errors import UserError

# --- calls ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [{}, {"content": ""}, {"content": None}])
@pytest.mark.parametrize("names", ["role", "from"])
def test_calls_with_empty_content_or_none(family, content, names):
    """The commonest record of an agent, by its key names and ShareGPT's."""
    turn = said(tool_calls=[call(city="Paris")]) | content
    messages = [*ASK, turn, result("sunny"), *[said("Sunny.")]]
    if names == "from":
        keys = {"role": "from", "content": "value"}
        messages = [{keys.get(key, key): value for key, value in message.items()} for message in messages]
    record = {"messages": messages, "tools": TOOLS}
    texts, coder = of(family, record, "qwen3")
    assert texts == [f"{CALL}<|im_end|>", f"{NO_THOUGHT}Sunny.<|im_end|>"]
    assert not coder.missing
    assert of(family, record | {"messages": messages[:2]}, "qwen3")[0] == [f"{NO_THOUGHT}{CALL}<|im_end|>"]
    assert of(family, record, "qwen_25")[0] == [f"{CALL}<|im_end|>", "Sunny.<|im_end|>"]


def test_a_call_behind_a_content_and_two_at_once(family):
    two = [call(city="Paris"), call("time", zone="CET")]
    messages = [
        *ASK,
        said("I look.", tool_calls=two),
        result("sunny"),
        result("noon"),
        said("Sunny at noon."),
    ]
    second = '<tool_call>\n{"name": "time", "arguments": {"zone": "CET"}}\n</tool_call>'
    for name, last in {"qwen3": NO_THOUGHT, "qwen_25": ""}.items():
        texts, coder = of(family, messages, name)
        assert texts == [f"I look.\n{CALL}\n{second}<|im_end|>", f"{last}Sunny at noon.<|im_end|>"]
        assert not coder.missing


def test_calls_as_json_text_and_calls_without_arguments(family):
    texts, _ = of(family, [*ASK, said(tool_calls=json.dumps([call(city="Paris")]))], "qwen3")
    assert texts == [f"{NO_THOUGHT}{CALL}<|im_end|>"]
    for arguments in ({}, {"arguments": None}):
        texts, coder = of(family, [*ASK, said(tool_calls=[{"name": "time", **arguments}])], "qwen_25")
        assert texts == ['<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call><|im_end|>']
        assert not coder.missing


def test_calls_without_content_cost_the_other_turns_no_renders():
    """A turn with a content is found by the marks, at one render each; a call alone takes five of its own."""
    renders = []

    class Counted(ChatTemplate):
        def render(self, *given):
            renders.append(1)
            return super().render(*given)

    qwen3 = Counted("qwen3", TEMPLATES["qwen3"], {"eos_token": "<|im_end|>"}, ("<|im_end|>",))
    step = [said("", tool_calls=[call(city="Paris")]), result("sunny")]
    step += [said("I look.", tool_calls=[call(city="Paris")]), result("dry")] * 4
    messages = [*ASK, *step * 2, said("Sunny.")]
    found = Turns(qwen3).find(messages, [m["role"] == "assistant" for m in messages])
    turns = [f"{CALL}<|im_end|>", *[f"I look.\n{CALL}<|im_end|>"] * 4] * 2
    assert [found.text[a:b] for a, b in found.spans] == [*turns, f"{NO_THOUGHT}Sunny.<|im_end|>"]
    assert len(renders) <= 8 + 5 * 3 + 10


# Calls in special tokens, arguments as text, and no header for the answer that follows the results.
DEEPSEEK = (
    "{{ bos_token }}{% set ns = namespace(asked=false) %}{% for m in messages %}"
    "{% if m.role == 'user' %}<U>{{ m.content }}{% set ns.asked = true %}"
    "{% elif m.role == 'tool' %}<output>{{ m.content }}</output>"
    "{% else %}{{ '<A></think>' if ns.asked }}{% set ns.asked = false %}{{ m.content }}"
    "{% if m.tool_calls is defined %}<calls>{% for c in m.tool_calls %}{{ c.function.name + ' ' + c.function.arguments }}{% endfor %}"
    "</calls>{% endif %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt and ns.asked %}<A></think>{% endif %}"
)


def test_an_answer_without_a_header(family):
    made = [{"function": {"name": "weather", "arguments": '{"city": "Paris"}'}}]
    messages = [
        *ASK,
        said(tool_calls=made),
        result("sunny"),
        said(tool_calls=made),
        result("dry"),
        said("Sunny."),
    ]
    texts, coder = of(family, messages, DEEPSEEK)
    calls = '<calls>weather {"city": "Paris"}</calls></s>'
    assert texts == [calls, calls, "Sunny.</s>"]
    assert not coder.missing


# Llama 3.1's: a turn is a call or a content; one call at most.
LLAMA = (
    "{{ bos_token }}{% for m in messages %}{% if m.tool_calls %}"
    "{% if m.tool_calls | length != 1 %}{{ raise_exception('one call at a time') }}{% endif %}"
    "<|start_header_id|>assistant<|end_header_id|>\n\n{{ m.tool_calls[0].function | tojson }}<|eot_id|>"
    "{% else %}<|start_header_id|>{{ 'ipython' if m.role == 'tool' else m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


def test_a_call_in_place_of_the_content(family):
    made = '{"name": "weather", "arguments": {"city": "Paris"}}<|eot_id|>'
    messages = [*ASK, said(tool_calls=[call(city="Paris")]), result("sunny"), said(" Sunny. ")]
    texts, coder = of(family, messages, LLAMA)
    assert texts == [made, "Sunny.<|eot_id|>"]
    assert not coder.missing
    # a content beside the call has no place
    texts, coder = of(family, [*ASK, said("I look.", tool_calls=[call(city="Paris")])], LLAMA)
    assert texts == [made]
    assert coder.missing == {"content": 1}
    with pytest.raises(UserError, match="one call at a time"):
        of(family, [*ASK, said(tool_calls=[call(), call()])], LLAMA)


# Mistral's: no prompt asks for an answer, and results must follow calls.
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]"
    "{% elif m.role == 'tool' %}{% if not messages[loop.index0 - 1].tool_calls %}{{ raise_exception('no call') }}{% endif %}"
    "[RESULT]{{ m.content }}[/RESULT]{% elif m.tool_calls %}[CALLS]{{ m.tool_calls | tojson }}{{ eos_token }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)


def test_a_template_without_a_prompt_for_answers(family):
    messages = [*ASK, said(tool_calls=[{"f": 1}]), result("sunny"), said("Sunny."), *chat("Thanks", "Bye")]
    texts, coder = of(family, messages, MISTRAL)
    assert texts == ['[CALLS][{"f": 1}]</s>', "Sunny.</s>", "Bye</s>"]
    assert not coder.missing


def test_calls_that_a_template_leaves_out_are_refused(family):
    messages = [*ASK, said(tool_calls=[call(city="Paris")]), result("sunny"), said("Sunny.")]
    for name in ("chatml", "llama3", "qwen", "phi_3"):
        with pytest.raises(
            UserError, match=rf"here: the chat template {name} leaves out tool_calls, .* qwen3 or qwen_25"
        ):
            of(family, messages, name)
    # one of two is left out, in a chat whose other calls are written
    first = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{{ m.tool_calls[0] | tojson if m.tool_calls }}<|im_end|>\n{% endfor %}"
    assert of(family, messages, first)[0][1] == "Sunny.<|im_end|>"
    for second in (call("time"), call(city="Paris")):
        two = [*messages[:3], said(tool_calls=[call(city="Paris"), second])]
        with pytest.raises(UserError, match="here: the chat template jinja leaves out tool_calls"):
            of(family, two, first)
    # calls that are only read are counted
    chosen = [m | {"train": i == 3} for i, m in enumerate(messages)]
    texts, coder = of(family, chosen, "chatml", message_field_training="train")
    assert texts == ["Sunny.<|im_end|>"]
    assert coder.missing == {"calls": 1}


def test_tools_that_a_template_leaves_out_are_counted(family):
    record = {"messages": chat("a", "b"), "tools": TOOLS}
    assert of(family, record, "chatml")[1].missing == {"tools": 1}
    assert of(family, record | {"tools": []}, "chatml")[1].missing == {}
    for name in ("qwen3", "qwen_25"):
        assert of(family, record, name)[1].missing == {}


def test_a_turn_that_a_template_leaves_out_is_counted(family):
    jinja = (
        "{% for m in messages %}{% if m.role in ('user', 'assistant') %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
        "{% endif %}{% endfor %}"
    )
    texts, coder = of(family, [*chat("a", "b"), result("x"), said("c")], jinja)
    assert texts == ["b<|im_end|>", "c<|im_end|>"]
    assert coder.missing == {"content": 1}


# --- which turns count ---------------------------------------------------------------------------


def test_marks_of_a_template_for_some_of_its_turns(family):
    jinja = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}"
        "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}<|im_end|>{% endgeneration %}\n"
        "{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    )
    messages = [
        *chat("a"),
        said("b", reasoning_content="x", train=False),
        *chat("c"),
        said("d", reasoning_content="y"),
    ]
    assert of(family, messages, jinja)[0] == ["<think>x</think>b<|im_end|>", "<think>y</think>d<|im_end|>"]
    texts, _ = of(family, messages, jinja, message_field_training="train")
    assert texts == ["<think>y</think>d<|im_end|>"]


def test_chosen_turns_with_thoughts_and_calls(family):
    messages = [
        *ASK,
        said("", reasoning_content="look", tool_calls=[call(city="Paris")], train=True),
        result("sunny"),
        said("Sunny.", reasoning_content="so", train=False),
    ]
    texts, _ = of(family, messages, "qwen3", message_field_training="train")
    assert texts == [f"<think>\nlook\n</think>\n\n{CALL}<|im_end|>"]
    texts, _ = of(family, messages, "qwen3", roles_to_train=["tool"])
    assert texts[0].startswith("sunny")
    assert len(texts) == 1
    texts, _ = of(family, messages, "qwen3", train_on_inputs=True)
    assert texts[0] == "Weather in Paris?<|im_end|>"
    assert texts[1] == f"<think>\nlook\n</think>\n\n{CALL}<|im_end|>"
    assert texts[3] == "<think>\nso\n</think>\n\nSunny.<|im_end|>"


def test_answers_one_after_another(family):
    for name, ends in {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "alpaca": "</s>"}.items():
        texts, coder = of(family, [*chat("a"), said("b"), said("c"), *chat("d", "e")], name)
        assert texts == [f"{x}{ends}" for x in "bce"], name
        assert not coder.missing


def test_a_chat_that_begins_with_an_answer(family):
    assert of(family, [said("b"), *chat("c", "d")], "chatml")[0] == ["b<|im_end|>", "d<|im_end|>"]


# --- the bundled templates that write calls ------------------------------------------------------

TOOL_PROMPT = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
    '{"type": "function", "function": {"name": "weather", "parameters": {}}}\n</tools>\n\n'
    "For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:\n"
    '<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n'
)
USED = (
    "<|im_start|>user\nWeather in Paris?<|im_end|>\n"
    f"<|im_start|>assistant\n{CALL}<|im_end|>\n"
    "<|im_start|>user\n<tool_response>\nsunny\n</tool_response>\n<tool_response>\ndry\n</tool_response><|im_end|>\n"
)


@pytest.mark.parametrize("system", [None, "be kind"])
def test_the_bundled_templates_with_calls_as_text(family, system):
    messages = [
        *ASK,
        said("", tool_calls=[call(city="Paris")]),
        result("sunny"),
        result("dry"),
        said("Sunny."),
    ]
    messages = [{"role": "system", "content": system}, *messages] if system else messages

    def text(name, **arguments):
        return of(family, chat("a", "b"), name)[1].recipe.template.render(messages, TOOLS, **arguments)[0]

    start = "<|im_start|>system\n"
    first = system or "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
    assert text("qwen_25") == (
        f"{start}{first}\n\n{TOOL_PROMPT}{USED}<|im_start|>assistant\nSunny.<|im_end|>\n"
    )
    assert text("qwen3") == (
        f"{start}{system + chr(10) * 2 if system else ''}{TOOL_PROMPT}{USED}<|im_start|>assistant\n{NO_THOUGHT}Sunny.<|im_end|>\n"
    )
    assert text("qwen3", prompt=True).endswith("Sunny.<|im_end|>\n<|im_start|>assistant\n")


def test_a_template_that_fails_on_parts_of_a_chat_alone():
    """It takes the whole chat and none of its beginnings: the marks find the turn."""
    jinja = (
        "{% if messages | length < 4 %}{{ 1 // 0 }}{% endif %}"
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>\n{% endfor %}"
    )
    found = Turns(ChatTemplate("x", jinja, {"eos_token": "</s>"}, ("</s>",))).find(
        chat("a", "b", "c", "d"), [False, True] * 2
    )
    assert [found.text[a:b].strip() for a, b in found.spans] == ["b", "d</s>"]
    assert found.missing == {"end"}
