"""From records to samples: every token and every mask against a tokenisation by hand, and transformers'."""

import json

import numpy as np
import pytest

from chats import chat, encoder, learned, write_tokenizer
from longspan.config.keys.data import DatasetConfig
from longspan.data.chat import ChatTemplate
from longspan.data.instruct import ALPACA, Recipe
from longspan.data.text import load_tokenizer
from longspan.data.tokenizer_files import read_tokenizer_files, with_template
from longspan.data.turns import Turns
from longspan.errors import UserError


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizers")
    return {kind: write_tokenizer(root / kind, kind) for kind in ("bytes", "pieces")} | {
        "plain": write_tokenizer(root / "plain", begin=False)
    }


# --- instructions -------------------------------------------------------------------------------

PROMPT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a response that "
    "appropriately completes the request.\n\n### Instruction:\nAdd\n\n### Input:\ntwo and two\n\n### Response:\n"
)
PROMPT_ALONE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nAdd\n\n### Response:\n"
)


@pytest.mark.parametrize("kind", ["bytes", "pieces", "plain"])
@pytest.mark.parametrize("given", ["two and two", "", None])
def test_alpaca_is_prompt_then_answer_then_end(folders, kind, given):
    coder = encoder(folders[kind], type="alpaca")
    record = {"instruction": "Add", "input": given, "output": "four"}
    tokens, mask = coder("here", record)
    plain = load_tokenizer(folders[kind])
    prompt = plain.encode(PROMPT if given else PROMPT_ALONE, add_special_tokens=True).ids
    answer = [*plain.encode("four", add_special_tokens=False).ids, plain.token_to_id("</s>")]
    assert tokens.tolist() == prompt + answer
    assert mask.tolist() == [0] * len(prompt) + [1] * len(answer)
    assert (prompt[0] == plain.token_to_id("<s>")) == (kind != "plain")
    _, whole = encoder(folders[kind], True, type="alpaca")("here", record)
    assert whole.all()
    if given is None:
        assert np.array_equal(coder("here", {"instruction": "Add", "output": "four"})[0], tokens)


def test_an_empty_answer_is_its_end_token_alone(folders):
    tokens, mask = encoder(folders["bytes"], type="alpaca")("here", {"instruction": "Add", "output": ""})
    assert mask.sum() == 1
    assert tokens[mask == 1].tolist() == [2]
    assert tokens[-2] != 2


def test_an_answer_that_ends_with_the_end_token_gets_no_second(folders):
    tokens, _ = encoder(folders["bytes"], type="alpaca")("here", {"instruction": "Add", "output": "four</s>"})
    assert tokens[-1] == 2
    assert tokens[-2] != 2


def test_fields_and_formats_by_a_mapping(folders):
    kind = {
        "field_instruction": "question",
        "field_input": "context",
        "field_output": "answer",
        "field_system": "sys",
        "system_prompt": "be brief",
        "system_format": "[{system}] ",
        "format": "Q {instruction} C {input} A ",
        "no_input_format": "Q {instruction} {{}} A ",
    }
    coder = encoder(folders["plain"], type=kind)
    tokens, mask = coder("here", {"question": "a{b}", "context": "c", "answer": "yes", "sys": "hm"})
    assert coder.tokenizer.decode(tokens[mask == 0].tolist()) == "[hm] Q a{b} C c A "
    tokens, mask = coder("here", {"question": "a", "answer": "yes"})
    assert coder.tokenizer.decode(tokens[mask == 0].tolist()) == "[be brief] Q a {} A "


@pytest.mark.parametrize(
    "fmt", ["{question}", "{instruction!r}", "{instruction:>9}", "{instruction.x}", "{0}", "{}"]
)
def test_formats_hold_the_fields_alone(fmt):
    with pytest.raises(ValueError, match="instruction"):
        DatasetConfig(path="x", type={"format": fmt})


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"instruction": "a"}, "here: no field 'output'. The fields are 'instruction'"),
        ({"instruction": "a", "outputs": "b"}, "Did you mean outputs"),
        ({"instruction": 3, "output": "b"}, "the field 'instruction' holds a int"),
        ({"instruction": "a", "output": None}, "the field 'output' holds a NoneType"),
        ({"instruction": "a", "input": 5, "output": "b"}, "the field 'input' holds a int"),
    ],
)
def test_records_that_are_no_instructions(folders, record, message):
    with pytest.raises(UserError, match=message):
        encoder(folders["bytes"], type="alpaca")("here", record)


def test_half_a_surrogate_pair_is_replaced(folders):
    tokens, _ = encoder(folders["bytes"], type="alpaca")("here", {"instruction": "a\ud800", "output": "b"})
    assert len(tokens)


def test_a_tokenizer_without_an_end_token(tmp_path):
    folder = write_tokenizer(tmp_path / "t", eos_token=None)
    text = (folder / "tokenizer.json").read_text().replace('"</s>"', '"<nil>"')
    (folder / "tokenizer.json").write_text(text)
    with pytest.raises(UserError, match="names no end token"):
        encoder(folder, type="alpaca")


# --- chats --------------------------------------------------------------------------------------

TWO = chat("Hello there", "Hi,  how are you?", "fine 😀", " \n naïve answer \n", system="be kind")
#: template -> (what is learned of TWO, whether white space at the ends of an answer is kept)
BUNDLED = {
    "chatml": ["Hi,  how are you?<|im_end|>", " \n naïve answer \n<|im_end|>"],
    "qwen": ["Hi,  how are you?<|im_end|>", " \n naïve answer \n<|im_end|>"],
    "llama3": ["Hi,  how are you?<|eot_id|>", "naïve answer<|eot_id|>"],
    "mistral": ["Hi,  how are you?</s>", " \n naïve answer \n</s>"],
    "gemma": ["Hi,  how are you?<end_of_turn>", "naïve answer<end_of_turn>"],
    "phi_3": ["Hi,  how are you?<|end|>", " \n naïve answer \n<|end|>"],
    "alpaca": ["Hi,  how are you?</s>", " \n naïve answer \n</s>"],
}


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_templates_learn_the_answers_with_their_ends(folders, name):
    coder = encoder(folders["bytes"], type="chat_template", chat_template=name)
    sample = coder("here", {"messages": TWO})
    found = learned(coder, sample)
    if name == "mistral":  # the space before an answer is one token with its first letters, or stands alone
        found = [text.removeprefix(" ") if text != BUNDLED[name][i] else text for i, text in enumerate(found)]
    assert found == BUNDLED[name]
    text, _ = coder.recipe.template.render(TWO)
    assert coder.tokenizer.decode(sample[0].tolist(), skip_special_tokens=False) == text


@pytest.mark.parametrize("name", BUNDLED)
@pytest.mark.parametrize("kind", ["bytes", "pieces"])
def test_tokens_are_those_of_transformers(folders, name, kind):
    transformers = pytest.importorskip("transformers")
    coder = encoder(folders[kind], type="chat_template", chat_template=name)
    theirs = transformers.AutoTokenizer.from_pretrained(folders[kind])
    theirs.chat_template = coder.recipe.template.text
    for messages in (TWO, chat("a", "b"), chat("a", "", "c", "d")):
        tokens, _ = coder("here", {"messages": messages})
        assert tokens.tolist() == theirs.apply_chat_template(messages, tokenize=True, return_dict=False)


MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}\n"
    "{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
)


def test_generation_marks_in_a_template_are_the_answers(folders):
    transformers = pytest.importorskip("transformers")
    coder = encoder(folders["bytes"], type="chat_template", chat_template_jinja=MARKED)
    tokens, mask = coder("here", {"messages": TWO})
    assert learned(coder, (tokens, mask)) == BUNDLED["chatml"]
    theirs = transformers.AutoTokenizer.from_pretrained(folders["plain"])
    theirs.chat_template = MARKED
    got = theirs.apply_chat_template(TWO, return_assistant_tokens_mask=True, return_dict=True)
    assert got["input_ids"] == tokens.tolist()


# The two hard cases of real templates: the thoughts of all answers but the last are taken away, and a chat that ends
# with an answer ends otherwise than a turn inside one.
THINKING = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}"
    "{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n{% set c = m.content %}"
    "{% if m.role == 'assistant' %}{% set t = '' %}{% if '</think>' in c %}{% set t = c.split('</think>')[0].split('<think>')[-1] %}"
    "{% set c = c.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
    "{% if loop.index0 > ns.last %}<think>\n{{ t.strip('\\n') }}\n</think>\n\n{% endif %}{% endif %}"
    "{{ c }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ENDING = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)


def test_a_template_that_looks_into_answers(folders):
    coder = encoder(folders["bytes"], type="chat_template", chat_template_jinja=THINKING)
    plain = coder("here", {"messages": chat("a", "b", "c", "d")})
    assert learned(coder, plain) == ["b<|im_end|>", "<think>\n\n</think>\n\nd<|im_end|>"]
    thought = coder(
        "here", {"messages": chat("a", "<think>\nx\n</think>\n\nb", "c", "<think>\ny\n</think>\n\nd")}
    )
    assert learned(coder, thought) == ["b<|im_end|>", "<think>\ny\n</think>\n\nd<|im_end|>"]


def test_a_chat_that_ends_otherwise_than_a_turn(folders):
    coder = encoder(folders["bytes"], type="chat_template", chat_template_jinja=ENDING)
    assert learned(coder, coder("here", {"messages": chat("a", "b", "c", "d")})) == [
        "b<|end|>",
        "d<|end|>\n</s>",
    ]


def test_a_template_whose_answers_cannot_be_told_is_refused(folders):
    # each message is preceded by how many there are
    jinja = "{% for m in messages %}{{ messages | length }}{{ m.content | upper }}{% endfor %}"
    coder = encoder(folders["bytes"], type="chat_template", chat_template_jinja=jinja)
    with pytest.raises(UserError, match=r"here: the chat template jinja does not show .*{% generation %}"):
        coder("here", {"messages": chat("a", "b", "c", "d")})


def test_a_template_that_refuses_a_chat(folders):
    coder = encoder(folders["bytes"], type="chat_template", chat_template="mistral")
    with pytest.raises(UserError, match="here: the chat template mistral refuses this chat: no role tool"):
        coder("here", {"messages": [*chat("a"), {"role": "tool", "content": "b"}, *chat("c")]})
    today = encoder(folders["bytes"], type="chat_template", chat_template_jinja="{{ strftime_now('%d') }}")
    with pytest.raises(UserError, match="strftime_now"):
        today("here", {"messages": chat("a", "b")})


def test_roles_and_names_of_sharegpt(folders):
    expected = encoder(folders["bytes"], type="chat_template", chat_template="chatml")("x", {"messages": TWO})
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    talk = [{"from": names[m["role"]], "value": m["content"]} for m in TWO]
    found = encoder(folders["bytes"], type="chat_template", chat_template="chatml")(
        "x", {"conversations": talk}
    )
    assert [a.tolist() for a in found] == [a.tolist() for a in expected]
    own = [{"who": {"human": "q", "gpt": "a"}.get(m["from"], "system"), "what": m["value"]} for m in talk]
    mapped = encoder(
        folders["bytes"],
        type="chat_template",
        chat_template="chatml",
        field_messages="talk",
        message_property_mappings={"role": "who", "content": "what"},
        roles={"user": ["q"], "assistant": ["a"]},
    )
    assert [a.tolist() for a in mapped("x", {"talk": own})] == [a.tolist() for a in expected]
    text = mapped("x", {"talk": json.dumps(own)})  # CSV holds text
    assert text[0].tolist() == expected[0].tolist()


def test_which_turns_count(folders):
    def of(record=None, train_on_inputs=False, **changes):
        coder = encoder(
            folders["bytes"], train_on_inputs, type="chat_template", chat_template="chatml", **changes
        )
        return learned(coder, coder("x", record or {"messages": chat("a", "b", "c", "d", system="s")}))

    assert of(train_on_inputs=True) == [f"{x}<|im_end|>" for x in "sabcd"]
    assert of(roles_to_train=["human"]) == ["a<|im_end|>", "c<|im_end|>"]
    assert of(roles_to_train=["system", "gpt"]) == ["s<|im_end|>", "b<|im_end|>", "d<|im_end|>"]
    chosen = [m | {"train": i == 3} for i, m in enumerate(chat("a", "b", "c", "d"))]
    assert of({"messages": chosen}, message_field_training="train") == ["d<|im_end|>"]
    assert of({"messages": chat("a")}) == []
    alone = {"messages": chat("a", "b"), "system": "s"}
    assert of(alone, train_on_inputs=True) == [f"{x}<|im_end|>" for x in "sab"]
    assert of(alone, train_on_inputs=True, drop_system_message=True) == [f"{x}<|im_end|>" for x in "ab"]


def test_tools_reach_the_template(folders):
    jinja = "{% if tools %}{{ tools | tojson }}\n{% endif %}" + MARKED.replace(
        "{{ m.content }}<|im_end|>{% endg",
        "{{ m.content }}{{ m.tool_calls | tojson if m.tool_calls }}<|im_end|>{% endg",
    )
    coder = encoder(folders["bytes"], type="chat_template", chat_template_jinja=jinja)
    call = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": None, "tool_calls": [{"f": "é<"}]},
    ]
    tools = [{"name": "f"}]
    sample = coder("x", {"messages": call, "tools": tools})
    assert learned(coder, sample) == ['[{"f": "é<"}]<|im_end|>']
    assert sample[0].tolist() == coder("x", {"messages": call, "tools": json.dumps(tools)})[0].tolist()
    assert len(coder("x", {"messages": call})[0]) < len(sample[0])
    # a call behind the content is part of the answer, without marks too
    marks = jinja.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    coder = encoder(folders["bytes"], type="chat_template", chat_template_jinja=marks)
    assert learned(coder, coder("x", {"messages": call + chat("z", "y")})) == [
        '[{"f": "é<"}]<|im_end|>',
        "y<|im_end|>",
    ]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "a"}, "here: no field 'messages'. The fields are 'text'"),
        ({"messages": []}, "holds an empty list"),
        ({"messages": "hello"}, "no JSON list"),
        ({"messages": [3]}, "message 0 of 'messages' is a int"),
        ({"messages": [{"role": "user"}]}, "message 0 of 'messages' is empty: it has no content, no calls"),
        ({"messages": [{"role": "user", "text": "a"}]}, "message 0 of 'messages' has no field 'content'"),
        ({"messages": [{"from": "user", "text": "a"}]}, "message 0 of 'messages' has no field 'value'"),
        ({"messages": [{"role": "assistant", "content": None, "tool_calls": []}]}, "message 0 .* is empty"),
        (
            {"messages": [{"role": "assistant", "tool_calls": "{"}]},
            "'tool_calls' holds a str that is no list",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": {}}]},
            "'tool_calls' holds a dict that is no list",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]},
            "holds a list; only text",
        ),
        ({"messages": [{"role": "bot", "content": "a"}]}, r"the role 'bot' .* roles: {assistant: \[bot\]}"),
        ({"messages": [{"role": "user", "content": 4}]}, "'content' holds a int; only text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "'content' holds a list; only text",
        ),
        ({"messages": chat("a", "b"), "tools": "["}, "no JSON list of tools"),
    ],
)
def test_records_that_are_no_chats(folders, record, message):
    with pytest.raises(UserError, match=message):
        encoder(folders["bytes"], type="chat_template", chat_template="chatml")("here", record)


def test_content_in_parts_of_text_is_joined(folders):
    coder = encoder(folders["bytes"], type="chat_template", chat_template="chatml")
    parts = [
        *chat("a"),
        {"role": "assistant", "content": [{"type": "text", "text": "b"}, {"type": "text", "text": "c"}]},
    ]
    assert learned(coder, coder("x", {"messages": parts})) == ["bc<|im_end|>"]


# --- templates by name --------------------------------------------------------------------------


def test_where_a_template_comes_from(tmp_path):
    none = write_tokenizer(tmp_path / "none")
    own = write_tokenizer(tmp_path / "own", chat_template="own")
    named = write_tokenizer(
        tmp_path / "named",
        chat_template=[{"name": "rag", "template": "x"}, {"name": "default", "template": "named"}],
    )
    (write_tokenizer(tmp_path / "file", chat_template="old") / "chat_template.jinja").write_text("file")
    (tmp_path / "mine.jinja").write_text("{{ mine }}")

    def text(folder, *top, **source):
        return Recipe.make(
            DatasetConfig(path="x", type="chat_template", **source), folder, False, *top
        ).template.text

    assert (
        text(own) == text(own, "tokenizer_default") == text(own, "tokenizer_default_fallback_chatml") == "own"
    )
    assert text(named) == "named"
    assert text(tmp_path / "file") == text(tmp_path / "file" / "tokenizer.json") == "file"
    chatml = text(own, "chatml")
    assert "im_start" in chatml
    assert text(none, "tokenizer_default_fallback_chatml") == chatml
    assert text(own, "llama3", chat_template="chatml") == chatml
    assert text(own, "jinja", "{{ a }}") == text(own, None, "{{ a }}") == text(own, "{{ a }}") == "{{ a }}"
    assert text(own, "chatml", chat_template_jinja="{{ a }}") == "{{ a }}"
    assert text(own, "jinja", str(tmp_path / "mine.jinja")) == "{{ mine }}"
    for arguments, message in {
        (None,): "has no chat template. Give chat_template: one of alpaca, chatml",
        ("chatlm",): "Did you mean chatml",
        ("jinja", "nowhere.jinja"): "no such file",
        ("jinja", "{% for %}"): "not a jinja template",
    }.items():
        with pytest.raises(UserError, match=message):
            text(none, *arguments)


@pytest.mark.parametrize(
    "given", [[1], 5, {"default": "x"}, [{"name": "default", "template": 5}], [{"name": [], "template": "x"}]]
)
def test_a_template_of_the_tokenizer_that_is_no_text(tmp_path, given):
    folder = write_tokenizer(tmp_path / "t", chat_template=given)
    with pytest.raises(UserError, match=r"tokenizer_config.json: chat_template is neither text nor a list"):
        encoder(folder, type="chat_template")
    with pytest.raises(UserError, match=r"tokenizer_config.json: chat_template is neither text nor a list"):
        with_template(read_tokenizer_files(folder), "x")
    encoder(folder, type="chat_template", chat_template="chatml")  # which does not need it
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"chat_template.jinja: cannot be read as UTF-8"):
        encoder(folder, type="chat_template")


def test_templates_cannot_reach_python():
    evil = ChatTemplate("evil", "{{ messages.__class__.__mro__ }}", {})
    with pytest.raises(UserError, match="evil"):
        Turns(evil).find(chat("a", "b"), [False, True])


def test_the_alpaca_prompt():
    assert ALPACA.format.format(instruction="Add", input="two and two") == PROMPT
    assert ALPACA.no_input_format.format(instruction="Add") == PROMPT_ALONE


def test_a_null_beside_a_filled_field_of_messages(folders):
    coder = encoder(folders["bytes"], type="chat_template", chat_template="chatml")
    turns = chat("Hi", "Hello")
    expected = coder("here", {"messages": turns})
    for record in ({"messages": None, "conversations": turns}, {"messages": turns, "conversations": None}):
        assert coder("here", record)[0].tolist() == expected[0].tolist()
    with pytest.raises(UserError, match="'messages' holds a NoneType"):
        coder("here", {"messages": None})


def test_half_a_surrogate_pair_in_a_chat_is_a_question_mark(folders):
    coder = encoder(folders["bytes"], type="chat_template", chat_template="chatml")
    tokens, mask = coder("here", {"messages": chat("Hi", "Hel?lo")})
    for messages in (chat("Hi", "Hel\ud800lo"), json.dumps(chat("Hi", "Hel\ud800lo"))):
        found, found_mask = coder("here", {"messages": messages})
        assert found.tolist() == tokens.tolist()
        assert found_mask.tolist() == mask.tolist()


def test_a_null_that_says_whether_a_message_counts_is_no_answer_to_that(folders):
    coder = encoder(
        folders["bytes"], type="chat_template", chat_template="chatml", message_field_training="train"
    )
    messages = [
        {"role": "user", "content": "Hi", "train": None},
        {"role": "assistant", "content": "a", "train": None},
    ]
    assert learned(coder, coder("here", {"messages": messages})) == ["a<|im_end|>"]
