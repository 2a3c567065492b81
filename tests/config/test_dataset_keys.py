"""What axolotl's users write on a dataset: each is taken, has no effect and says so, or is refused by name."""

import itertools

import pytest

from longspan.config.dialects.axolotl_datasets import FIELDS, OTHER_TYPES
from longspan.config.load import make_config, to_yaml
from longspan.config.resolve import resolve
from longspan.errors import UserError

MODEL = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 1, "learning_rate": 1e-3}


def read(place="datasets", /, **dataset):
    values = {**MODEL, "datasets": [{"path": "a.jsonl"}], place: [{"path": "a.jsonl", **dataset}]}
    return make_config(values)


def one(**dataset):
    reading = read(**dataset)
    assert not reading.problems
    return reading.config.datasets[0], reading.notes


def test_what_axolotl_calls_a_dataset():
    source, notes = one(
        type="chat_template",
        field_messages="conversations",
        message_property_mappings={"role": "from", "content": "value"},
        roles={"user": ["human"], "assistant": ["gpt"]},
        roles_to_train=["assistant"],
        train_on_eos="turn",
        train_on_eot="turn",
        trust_remote_code=False,
        chat_template="chatml",
        split="train",
        name=None,
        ds_type="json",
        shards=None,
    )
    assert not notes
    assert source.field_messages == "conversations"
    assert source.name is None


def test_the_old_names():
    source, notes = one(type="sharegpt")
    assert source.type == "chat_template"
    assert source.message_property_mappings == {"role": "from", "content": "value"}
    assert "sharegpt" in notes[0]
    source, notes = one(type="sharegpt", field_messages="talk")
    assert source.field_messages == "talk"
    source, notes = one(type="chat_template", message_field_role="from", message_field_content="value")
    assert source.message_property_mappings == {"role": "from", "content": "value"}
    assert len(notes) == 2


def test_what_has_no_effect_says_so():
    _, notes = one(preprocess_shards=4)
    assert notes == [
        "datasets.0.preprocess_shards: Samples are prepared one by one; memory does not grow with the data."
    ]


def test_other_types_are_refused_with_the_way():
    wrong = {}
    for name, kind in itertools.product(("datasets", "test_datasets"), OTHER_TYPES):
        reading = read(name, type=kind)
        message = f"{name}.0.type: {kind!r} is not supported. "
        if [p[: len(message)] for p in reading.problems] != [message] or name not in reading.bad:
            wrong[name, kind] = reading.problems
    assert not wrong


def test_the_way_that_is_shown_works():
    reading = read(type="alpaca_chat.load_qa")
    assert "type: {field_instruction: question, field_output: answer, format: 'USER:" in reading.problems[0]
    one(
        type={
            "field_instruction": "question",
            "field_output": "answer",
            "format": "USER: {instruction}\nASSISTANT:",
        }
    )


def test_other_fields_are_refused_or_have_no_effect():
    wrong = {}
    for field in FIELDS:
        reading = read(**{field: "something"})
        lines = [*reading.problems, *reading.notes]
        if len(lines) != 1 or f"datasets.0.{field}" not in lines[0]:
            wrong[field] = lines
    assert not wrong


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ({"typ": "alpaca"}, "datasets.0.typ: unknown key. Did you mean type?"),
        ({"type": "alpacca"}, "'alpacca' is not supported. The types are completion, alpaca, chat_template"),
        ({"type": "alpacca"}, "Did you mean alpaca?"),
        ({"type": {"fmt": "a"}}, "datasets.0.type.fmt: unknown key."),
        ({"type": {"format": "{x}"}}, "datasets.0.type.format: '{x}' may hold {input}, {instruction}"),
        ({"type": "chat_template", "roles_to_train": []}, "datasets.0.roles_to_train: [] "),
        ({"ds_type": "xml"}, "datasets.0.ds_type: 'xml' must be 'json'"),
        (
            {"train_on_eos": "all"},
            "datasets.0.train_on_eos: 'all' is not supported. An answer's end token counts",
        ),
    ],
)
def test_each_mistake_is_one_message(dataset, message):
    reading = read(**dataset)
    assert len(reading.problems) == 1
    assert message in reading.problems[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chat_template": "jinja"}, "chat_template: jinja needs chat_template_jinja"),
        (
            {"chat_template": "chatml", "chat_template_jinja": "x"},
            "'chatml' and chat_template_jinja are both given",
        ),
        ({"special_tokens": {"end_token": "x"}}, "special_tokens.end_token: unknown.*Did you mean .*token"),
        ({"test_datasets": [{"path": "b.jsonl"}], "val_set_size": 0.1}, "both given. Evaluate on one"),
        ({"eval_steps": 5}, "or give test_datasets"),
    ],
)
def test_rules_between_keys(changes, message):
    reading = make_config({**MODEL, "datasets": [{"path": "a"}], **changes})
    with pytest.raises(UserError, match=message):
        resolve(reading.config, 1, bad_keys=reading.bad, earlier=reading.problems)


def test_what_is_written_is_read_again():
    import yaml

    reading = read("test_datasets", type={"format": "{instruction}"}, roles={"user": ["q"]})
    again = make_config(yaml.safe_load(to_yaml(reading.config)))
    assert not again.problems
    assert not again.notes
    assert again.config == reading.config
