"""Every part of an assistant's turn is learned, its end included: by templates that write turns as models of the field do.

Each expected text is written out by hand.
"""

import json

import pytest
from tokenizers import AddedToken, Tokenizer

from chats import chat, encoder, learned, write_tokenizer
from longspan.data.chat import ChatTemplate
from longspan.data.templates import TEMPLATES
from longspan.data.turns import Turns
from longspan.errors import UserError

GLM_TOKENS = ["[gMASK]", "<sop>", "<|system|>", "<|observation|>"]
HARMONY_TOKENS = ["<|start|>", "<|channel|>", "<|message|>", "<|return|>", "<|call|>"]
DEEPSEEK_TOKENS = ["<U>", "<A>", "<calls>", "</calls>", "<output>", "</output>"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tokenizer with the special tokens of several families; <|end|> and <|assistant|> take in white space, as Phi-3's do."""
    path = write_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    file = str(path / "tokenizer.json")
    tokenizer = Tokenizer.from_file(file)
    tokenizer.add_special_tokens([*GLM_TOKENS, *DEEPSEEK_TOKENS, *HARMONY_TOKENS])
    tokenizer.add_tokens(["<think>", "</think>", "<tool_call>", "</tool_call>"])  # not special, as with Qwen3
    tokenizer.save(file)
    return path


def of(folder, record, template=None, train_on_inputs=False, **source):
    """What is learned of a record, as texts; and the coder."""
    key = "chat_template_jinja" if template and "{" in template else "chat_template"
    source |= {key: template} if template else {}
    coder = encoder(folder, train_on_inputs, type="chat_template", **source)
    record = record if isinstance(record, dict) else {"messages": record}
    return learned(coder, coder("here", record)), coder


def said(content=None, **more):
    return {"role": "assistant", **({} if content is None else {"content": content}), **more}


def call(name="weather", **arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def result(text):
    return {"role": "tool", "content": text}


ASK = chat("Weather in Paris?")
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
NO_THOUGHT = "<think>\n\n</think>\n\n"

# --- thoughts beside the content -----------------------------------------------------------------


@pytest.mark.parametrize("name", ["qwen3", "of the tokenizer"])
def test_thoughts_beside_the_content_are_learned(folder, name):
    messages = [*chat("a"), said("four", reasoning_content="two\nand two")]
    texts, coder = of(folder, messages, "qwen3")
    assert texts == ["<think>\ntwo\nand two\n</think>\n\nfour<|im_end|>"]
    if name != "qwen3":  # the same template, as a model brings it
        own = write_tokenizer(folder.parent / "own", chat_template=coder.recipe.template.text)
        texts, coder = of(own, messages)
        assert texts == ["<think>\ntwo\nand two\n</think>\n\nfour<|im_end|>"]
    assert not coder.missing


def test_thoughts_that_a_template_takes_out_of_earlier_turns(folder):
    """They are not in the text, so nothing of them can be learned; the turn around them is."""
    messages = [
        *chat("a"),
        said("b", reasoning_content="x"),
        *chat("c"),
        said("d", reasoning_content="y"),
    ]
    texts, coder = of(folder, messages, "qwen3")
    assert texts == ["b<|im_end|>", "<think>\ny\n</think>\n\nd<|im_end|>"]
    assert not coder.missing
    text = coder.tokenizer.decode(
        coder("here", {"messages": messages})[0].tolist(), skip_special_tokens=False
    )
    assert text == (
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n<|im_start|>user\nc<|im_end|>\n"
        "<|im_start|>assistant\n<think>\ny\n</think>\n\nd<|im_end|>\n"
    )


def test_thoughts_and_calls_of_an_agent(folder):
    """Thoughts after the last question stay, those before it go: a chat of two questions with calls in both."""
    step = [
        said("", reasoning_content="I must look", tool_calls=[call(city="Paris")]),
        result("sunny"),
        said("Sunny.", reasoning_content="it is sunny"),
    ]
    texts, coder = of(folder, [*ASK, *step, *chat("And now?"), *step], "qwen3")
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


def test_a_prompt_that_begins_the_thought(folder):
    texts, _ = of(folder, [*chat("a", "<b>", "c"), said("d", reasoning_content="<think harder")], STARTED)
    assert texts == ["<b><|im_end|>", "<think harder\n</think>\n\nd<|im_end|>"]


def test_thoughts_that_look_like_a_header(folder):
    fake = "<|im_start|>assistant\nno"
    texts, _ = of(folder, [*chat("a"), said("d", reasoning_content=fake), *chat("b", "c")], "qwen3")
    assert texts == ["d<|im_end|>", f"{NO_THOUGHT}c<|im_end|>"]
    texts, _ = of(folder, [*chat(fake), said("d", reasoning_content=fake)], "qwen3")
    assert texts == [f"<think>\n{fake}\n</think>\n\nd<|im_end|>"]


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_thoughts_without_a_place_are_counted(folder, name):
    texts, coder = of(folder, [*chat("a"), said("b", **{name: "x"})], "chatml")
    assert texts == ["b<|im_end|>"]
    assert coder.missing == {"thoughts": 1}


R1 = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n{{ m.content.split('</think>')[-1] }}<|im_end|>\n"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("thought", ["<think>why\n</think>", "why</think>"])
def test_thoughts_inside_a_content_that_are_cut_off_are_counted(folder, thought):
    texts, coder = of(folder, chat("a", f"{thought}b"), R1)
    assert texts == ["b<|im_end|>"]
    assert coder.missing == {"thoughts": 1}
    assert not of(folder, chat("a", f"{thought}b"), "chatml")[1].missing
    assert not of(folder, chat("a", "<think>\n</think>b"), R1)[1].missing  # no thought is in there
    assert not of(folder, chat("a", f"{thought}b", "c", "d"), R1)[1].missing


def test_a_thought_under_another_name(folder):
    messages = [*chat("a"), said("b", thought="x")]
    mapping = {"role": "role", "content": "content", "reasoning_content": "thought"}
    texts, _ = of(folder, messages, "qwen3", message_property_mappings=mapping)
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


def test_the_next_roles_mark_is_the_end(folder):
    messages = [*chat("a", "b", "c"), said("d", reasoning_content="x"), *chat("e")]
    texts, coder = of(folder, messages, GLM)
    assert texts == ["\n<think></think>\nb<|user|>", "\n<think></think>\nd<|user|>"]
    assert coder.missing == {"thoughts": 1}  # a question follows: nothing of them is written


def test_behind_the_last_answer_the_mark_is_added(folder):
    messages = [*chat("a", "b", "c"), said("d", reasoning_content="x")]
    texts, coder = of(folder, messages, GLM)
    assert texts == ["\n<think></think>\nb<|user|>", "\n<think>x</think>\nd<|user|>"]
    tokens, _ = coder("here", {"messages": messages})
    assert coder.tokenizer.decode(tokens.tolist(), skip_special_tokens=False) == (
        "[gMASK]<sop><|user|>\na<|assistant|>\n<think></think>\nb<|user|>\nc<|assistant|>\n<think>x</think>\nd<|user|>"
    )
    assert not coder.missing


def test_calls_end_with_the_mark_of_their_results(folder):
    messages = [*ASK, said(tool_calls=[call(city="Paris")]), result("sunny"), result("dry"), said("Sunny.")]
    made = "\n<think></think>\n<tool_call>weather\ncity: Paris\n</tool_call><|observation|>"
    texts, coder = of(folder, {"messages": messages, "tools": TOOLS}, GLM)
    assert texts == [made, "\n<think></think>\nSunny.<|user|>"]
    assert of(folder, {"messages": messages[:2], "tools": TOOLS}, GLM)[0] == [made]
    assert not coder.missing


def test_a_speaker_who_goes_on_does_not_stop(folder):
    texts, coder = of(folder, [*chat("a"), said("b"), said("c")], GLM)
    assert texts == ["\n<think></think>\nb", "\n<think></think>\nc<|user|>"]
    assert not coder.missing


def test_questions_that_are_learned_get_no_mark(folder):
    texts, _ = of(folder, chat("a", "b", "c", "d"), GLM, train_on_inputs=True)
    assert texts == ["a", "\n<think></think>\nb<|user|>", "c", "\n<think></think>\nd<|user|>"]


def test_no_end_at_all_is_counted(folder):
    jinja = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    texts, coder = of(folder, chat("a", "b", "c", "d"), jinja)
    assert [text.strip() for text in texts] == ["b", "d"]
    assert coder.missing == {"end": 1}  # chats, not turns
    # an end that is no token of this tokenizer
    assert of(folder, chat("a", "b"), "gemma")[1].missing == {"end": 1}


@pytest.mark.parametrize("role", ["system", "developer"])
def test_the_mark_of_any_other_role_is_the_end(folder, role):
    messages = [*chat("a", "b"), {"role": role, "content": "be brief"}, *chat("c", "d")]
    jinja = (
        "{% for m in messages %}<|{{ m.role if m.role in ('user', 'assistant') else 'system' }}|>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    texts, coder = of(folder, messages, jinja)
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
def test_an_end_inside_a_chat_that_differs_from_the_last(folder, first):
    texts, coder = of(folder, chat("a", first, "c", "d"), HARMONY)
    start = "<|channel|>final<|message|>"
    assert texts == [f"{start}{first}<|end|>", f"{start}d<|return|>"]
    texts, coder = of(folder, [*chat("a"), said(first), said("c")], HARMONY)
    assert texts[0] == f"{start}{first}<|end|>"
    assert texts[1].endswith("c<|return|>")
    messages = [*ASK, said(tool_calls=[call(city="Paris")]), result("sunny"), said("Sunny.")]
    texts, _ = of(folder, messages, HARMONY)
    assert texts == [
        '<|channel|>commentary to=weather<|message|>{"city": "Paris"}<|call|>',
        f"{start}Sunny.<|return|>",
    ]
    assert not coder.missing


def test_an_end_behind_the_last_answer_alone(folder):
    """What follows the first is the next turn's own beginning, which is no end here; nor is the header's last token."""
    jinja = (
        "{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}"
        "{{ '<|return|>' if loop.last and m.role == 'assistant' }}{% endfor %}{% if add_generation_prompt %}<|start|>{% endif %}"
    )
    for first in ("b", ""):
        texts, coder = of(folder, chat("a", first, "c", "d"), jinja)
        assert texts == [f"assistant<|message|>{first}", "assistant<|message|>d<|return|>"]
        assert coder.missing == {"end": 1}


# --- calls ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [{}, {"content": ""}, {"content": None}])
@pytest.mark.parametrize("names", ["role", "from"])
def test_calls_with_empty_content_or_none(folder, content, names):
    """The commonest record of an agent, by its key names and ShareGPT's."""
    turn = said(tool_calls=[call(city="Paris")]) | content
    messages = [*ASK, turn, result("sunny"), *[said("Sunny.")]]
    if names == "from":
        keys = {"role": "from", "content": "value"}
        messages = [{keys.get(key, key): value for key, value in message.items()} for message in messages]
    record = {"messages": messages, "tools": TOOLS}
    texts, coder = of(folder, record, "qwen3")
    assert texts == [f"{CALL}<|im_end|>", f"{NO_THOUGHT}Sunny.<|im_end|>"]
    assert not coder.missing
    assert of(folder, record | {"messages": messages[:2]}, "qwen3")[0] == [f"{NO_THOUGHT}{CALL}<|im_end|>"]
    assert of(folder, record, "qwen_25")[0] == [f"{CALL}<|im_end|>", "Sunny.<|im_end|>"]


def test_a_call_behind_a_content_and_two_at_once(folder):
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
        texts, coder = of(folder, messages, name)
        assert texts == [f"I look.\n{CALL}\n{second}<|im_end|>", f"{last}Sunny at noon.<|im_end|>"]
        assert not coder.missing


def test_calls_as_json_text_and_calls_without_arguments(folder):
    texts, _ = of(folder, [*ASK, said(tool_calls=json.dumps([call(city="Paris")]))], "qwen3")
    assert texts == [f"{NO_THOUGHT}{CALL}<|im_end|>"]
    for arguments in ({}, {"arguments": None}):
        texts, coder = of(folder, [*ASK, said(tool_calls=[{"name": "time", **arguments}])], "qwen_25")
        assert texts == ['<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call><|im_end|>']
        assert not coder.missing


def test_calls_without_content_cost_the_other_turns_no_renders(monkeypatch):
    """A turn with a content is found by the marks, at one render each; a call alone takes five of its own."""
    qwen3 = ChatTemplate("qwen3", TEMPLATES["qwen3"], {"eos_token": "<|im_end|>"}, ("<|im_end|>",))
    step = [said("", tool_calls=[call(city="Paris")]), result("sunny")]
    step += [said("I look.", tool_calls=[call(city="Paris")]), result("dry")] * 4
    messages = [*ASK, *step * 2, said("Sunny.")]
    renders = []
    render = ChatTemplate.render
    monkeypatch.setattr(ChatTemplate, "render", lambda *given: renders.append(1) or render(*given))
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


def test_an_answer_without_a_header(folder):
    made = [{"function": {"name": "weather", "arguments": '{"city": "Paris"}'}}]
    messages = [
        *ASK,
        said(tool_calls=made),
        result("sunny"),
        said(tool_calls=made),
        result("dry"),
        said("Sunny."),
    ]
    texts, coder = of(folder, messages, DEEPSEEK)
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


def test_a_call_in_place_of_the_content(folder):
    made = '{"name": "weather", "arguments": {"city": "Paris"}}<|eot_id|>'
    messages = [*ASK, said(tool_calls=[call(city="Paris")]), result("sunny"), said(" Sunny. ")]
    texts, coder = of(folder, messages, LLAMA)
    assert texts == [made, "Sunny.<|eot_id|>"]
    assert not coder.missing
    # a content beside the call has no place
    texts, coder = of(folder, [*ASK, said("I look.", tool_calls=[call(city="Paris")])], LLAMA)
    assert texts == [made]
    assert coder.missing == {"content": 1}
    with pytest.raises(UserError, match="one call at a time"):
        of(folder, [*ASK, said(tool_calls=[call(), call()])], LLAMA)


# Mistral's: no prompt asks for an answer, and results must follow calls.
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]"
    "{% elif m.role == 'tool' %}{% if not messages[loop.index0 - 1].tool_calls %}{{ raise_exception('no call') }}{% endif %}"
    "[RESULT]{{ m.content }}[/RESULT]{% elif m.tool_calls %}[CALLS]{{ m.tool_calls | tojson }}{{ eos_token }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)


def test_a_template_without_a_prompt_for_answers(folder):
    messages = [*ASK, said(tool_calls=[{"f": 1}]), result("sunny"), said("Sunny."), *chat("Thanks", "Bye")]
    texts, coder = of(folder, messages, MISTRAL)
    assert texts == ['[CALLS][{"f": 1}]</s>', "Sunny.</s>", "Bye</s>"]
    assert not coder.missing


def test_calls_that_a_template_leaves_out_are_refused(folder):
    messages = [*ASK, said(tool_calls=[call(city="Paris")]), result("sunny"), said("Sunny.")]
    for name in ("chatml", "llama3", "qwen", "phi_3"):
        with pytest.raises(
            UserError, match=rf"here: the chat template {name} leaves out tool_calls, .* qwen3 or qwen_25"
        ):
            of(folder, messages, name)
    # one of two is left out, in a chat whose other calls are written
    first = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{{ m.tool_calls[0] | tojson if m.tool_calls }}<|im_end|>\n{% endfor %}"
    assert of(folder, messages, first)[0][1] == "Sunny.<|im_end|>"
    for second in (call("time"), call(city="Paris")):
        two = [*messages[:3], said(tool_calls=[call(city="Paris"), second])]
        with pytest.raises(UserError, match="here: the chat template jinja leaves out tool_calls"):
            of(folder, two, first)
    # calls that are only read are counted
    chosen = [m | {"train": i == 3} for i, m in enumerate(messages)]
    texts, coder = of(folder, chosen, "chatml", message_field_training="train")
    assert texts == ["Sunny.<|im_end|>"]
    assert coder.missing == {"calls": 1}


def test_tools_that_a_template_leaves_out_are_counted(folder):
    record = {"messages": chat("a", "b"), "tools": TOOLS}
    assert of(folder, record, "chatml")[1].missing == {"tools": 1}
    assert of(folder, record | {"tools": []}, "chatml")[1].missing == {}
    for name in ("qwen3", "qwen_25"):
        assert of(folder, record, name)[1].missing == {}


def test_a_turn_that_a_template_leaves_out_is_counted(folder):
    jinja = (
        "{% for m in messages %}{% if m.role in ('user', 'assistant') %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
        "{% endif %}{% endfor %}"
    )
    texts, coder = of(folder, [*chat("a", "b"), result("x"), said("c")], jinja)
    assert texts == ["b<|im_end|>", "c<|im_end|>"]
    assert coder.missing == {"content": 1}


# --- which turns count ---------------------------------------------------------------------------


def test_marks_of_a_template_for_some_of_its_turns(folder):
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
    assert of(folder, messages, jinja)[0] == ["<think>x</think>b<|im_end|>", "<think>y</think>d<|im_end|>"]
    texts, _ = of(folder, messages, jinja, message_field_training="train")
    assert texts == ["<think>y</think>d<|im_end|>"]


def test_chosen_turns_with_thoughts_and_calls(folder):
    messages = [
        *ASK,
        said("", reasoning_content="look", tool_calls=[call(city="Paris")], train=True),
        result("sunny"),
        said("Sunny.", reasoning_content="so", train=False),
    ]
    texts, _ = of(folder, messages, "qwen3", message_field_training="train")
    assert texts == [f"<think>\nlook\n</think>\n\n{CALL}<|im_end|>"]
    texts, _ = of(folder, messages, "qwen3", roles_to_train=["tool"])
    assert texts[0].startswith("sunny")
    assert len(texts) == 1
    texts, _ = of(folder, messages, "qwen3", train_on_inputs=True)
    assert texts[0] == "Weather in Paris?<|im_end|>"
    assert texts[1] == f"<think>\nlook\n</think>\n\n{CALL}<|im_end|>"
    assert texts[3] == "<think>\nso\n</think>\n\nSunny.<|im_end|>"


def test_answers_one_after_another(folder):
    for name, ends in {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "alpaca": "</s>"}.items():
        texts, coder = of(folder, [*chat("a"), said("b"), said("c"), *chat("d", "e")], name)
        assert texts == [f"{x}{ends}" for x in "bce"], name
        assert not coder.missing


def test_a_chat_that_begins_with_an_answer(folder):
    assert of(folder, [said("b"), *chat("c", "d")], "chatml")[0] == ["b<|im_end|>", "d<|im_end|>"]


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
def test_the_bundled_templates_with_calls_as_text(folder, system):
    messages = [
        *ASK,
        said("", tool_calls=[call(city="Paris")]),
        result("sunny"),
        result("dry"),
        said("Sunny."),
    ]
    messages = [{"role": "system", "content": system}, *messages] if system else messages

    def text(name, **arguments):
        return of(folder, chat("a", "b"), name)[1].recipe.template.render(messages, TOOLS, **arguments)[0]

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
