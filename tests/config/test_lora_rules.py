"""The rules between the keys of adapters: all at once, each with its remedy."""

import json

import pytest

import tiny
from longspan.config.load import make_config
from longspan.config.lora import Lora, lora_of, read_peft_config
from longspan.config.resolve import resolve
from longspan.config.rules.lora import lora_problems
from longspan.errors import UserError

GOOD = {
    "adapter": "lora",
    "base_model": "somewhere",
    "lora_r": 8,
    "lora_target_modules": ["v_proj", "q_proj"],
}


def problems(**changes):
    values = {k: v for k, v in (tiny.values("data") | GOOD | changes).items() if v is not None}
    read = make_config(values)
    return "\n".join([*read.problems, *(text for _, text in lora_problems(read.config))])


def test_what_is_asked_for():
    def lora(**changes):
        return lora_of(make_config(tiny.values("data") | GOOD | changes).config)

    assert problems() == ""
    assert lora() == Lora(8, 8, ("q_proj", "v_proj"))
    assert lora(lora_alpha=16).scale == 2
    assert lora(lora_r=4, lora_alpha=16, peft_use_rslora=True).scale == 8
    assert len(lora(lora_target_modules=None, lora_target_linear=True).targets) == 7
    assert lora(adapter=None) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_model": None}, "adapter: lora needs base_model"),
        ({"reinit_weights": True}, "with reinit_weights: true would leave random weights"),
        ({"position_embedding_type": "learned_absolute"}, "lie in one layer"),
        ({"lora_r": None}, "lora_r: missing. adapter: lora needs the rank"),
        ({"lora_target_modules": None}, "needs to know which layers get adapters. Give lora_target_linear: true"),
        ({"lora_target_modules": []}, "needs to know which layers get adapters"),
        ({"lora_target_linear": True}, "lora_target_modules and lora_target_linear are both given"),
        ({"lora_target_modules": ["q_prj"]}, "'q_prj' is none of q_proj, .* Did you mean q_proj?"),
        ({"lora_target_modules": ["lm_head"]}, "'lm_head' is none of q_proj"),
        ({"lora_dropout": 0.05}, "lora_dropout 0.05: only 0 is supported. What is dropped would depend on how"),
        ({"adapter": "qlora"}, r"adapter: 'qlora' needs quantised weights \(load_in_4bit\), which are not supported. Use lora"),
        ({"adapter": "lra"}, "Did you mean lora?"),
        ({"lora_model_dir": "nowhere"}, "lora_model_dir: nowhere: there is no adapter_config.json in it"),
    ],
)  # fmt: skip
def test_each_rule(changes, message):
    import re

    assert re.search(message, problems(**changes)), problems(**changes)


def test_all_at_once_and_keys_without_an_adapter():
    text = problems(base_model=None, lora_r=None, lora_dropout=0.1, lora_target_modules=["up", "down_prj"])
    assert len(text.splitlines()) == 5
    text = problems(adapter=None, lora_alpha=2, peft_use_rslora=True, lora_model_dir="x")
    for key in (
        "lora_r 8",
        "lora_alpha 2.0",
        "lora_target_modules [",
        "peft_use_rslora True",
        "lora_model_dir 'x'",
    ):
        assert f"{key}" in text
    assert text.count("has no effect without adapter: lora") == 5
    with pytest.raises(UserError, match="adapter: lora needs base_model"):
        resolve(
            make_config(
                tiny.values("data") | {"adapter": "lora", "lora_r": 2, "lora_target_linear": True}
            ).config
        )


def test_pefts_config_in_and_out(tmp_path):
    file = tmp_path / "adapter_config.json"

    def read(**changes):
        file.write_text(json.dumps(Lora(8, 16, ("q_proj", "v_proj")).peft_config("org/model") | changes))
        return read_peft_config(tmp_path)

    assert read() == (Lora(8, 16, ("q_proj", "v_proj")), "org/model")
    assert len(read(target_modules="all-linear")[0].targets) == 7
    for changes, message in (
        ({"peft_type": "IA3"}, "of the kind IA3; only LORA"),
        ({"use_dora": True, "bias": "all"}, "sets use_dora True, bias 'all', which is not supported"),
        ({"modules_to_save": ["lm_head"]}, "sets modules_to_save"),
        ({"target_modules": ["c_attn"]}, "has target_modules c_attn; supported: q_proj"),
        ({"target_modules": "q.*"}, r"has target_modules q\.\*; supported"),
        ({"r": None}, "cannot be read"),
        ({"r": 0}, "cannot be read"),
        ({"lora_alpha": float("inf")}, "cannot be read"),
        ({"target_modules": {"q_proj": 1}}, "cannot be read"),
        ({"base_model_name_or_path": 7}, "cannot be read"),
        ({"alora_invocation_tokens": [5]}, r"sets alora_invocation_tokens \[5\], which is not supported"),
        ({"trainable_token_indices": [5]}, "sets trainable_token_indices"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "sets layer_replication"),
        ({"use_qalora": True}, "sets use_qalora"),
    ):
        with pytest.raises(UserError, match=message):
            read(**changes)
    read()
    text = problems(lora_model_dir=str(tmp_path), lora_r=4, lora_alpha=16, lora_target_modules=["q_proj"])
    assert "lora_r there: 8, in the config: 4. Give its own value." in text
    assert "the targets there: ['q_proj', 'v_proj'], in the config: ['q_proj']" in text
    assert len(text.splitlines()) == 2


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_16", "corda", "OLoRA", "loftq", "lora_ga"])
def test_adapters_that_moved_the_base_weights_are_refused_with_the_remedy(tmp_path, start):
    data = Lora(8, 16, ("q_proj",)).peft_config("org/model") | {"init_lora_weights": start}
    (tmp_path / "adapter_config.json").write_text(json.dumps(data))
    remedy = "merge_and_unload" if start == "loftq" else "path_initial_model_for_weight_conversion"
    with pytest.raises(UserError, match=f"init_lora_weights '{start}'.*{remedy}"):
        read_peft_config(tmp_path)
    text = problems(lora_model_dir=str(tmp_path), lora_alpha=16, lora_target_modules=["q_proj"])
    assert "lora_model_dir: " in text
    assert f"init_lora_weights '{start}'" in text


@pytest.mark.parametrize("start", [True, False, None, "gaussian", "eva", "orthogonal", "mica"])
def test_adapters_beside_unmoved_base_weights_are_read(tmp_path, start):
    data = Lora(8, 16, ("q_proj",)).peft_config("org/model") | {"init_lora_weights": start}
    (tmp_path / "adapter_config.json").write_text(json.dumps(data))
    assert read_peft_config(tmp_path)[0] == Lora(8, 16, ("q_proj",))
