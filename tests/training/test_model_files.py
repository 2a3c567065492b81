"""What lies beside the weights of every exit: all files name the tokens that were trained, and keep what the base model's say."""

import json
import os
import subprocess
import sys

import pytest

import tiny
from chats import write_tokenizer
from longspan.config.load import make_config
from longspan.data.tokenizer_files import read_tokenizer_files, write_tokenizer_files
from longspan.errors import UserError
from longspan.models.hf_weights import write_files
from longspan.runs.prepare import own_tokenizer
from longspan.training.model_files import (
    files_of_adapters,
    files_of_merged,
    files_of_run,
    trained_tokenizer,
)

BASE = {
    "model_type": "llama",
    "vocab_size": 420,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}
SAMPLING = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "_from_model_config": True}


def base_model(folder, config=None, generation=None, **settings):
    """A model folder without weights."""
    write_tokenizer(folder, **settings)
    (folder / "config.json").write_text(json.dumps(BASE | (config or {})))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def exit_of(folder, tmp_path, base=None, tokenizer=None, name="hf", **changes):
    """The files that a run leaves beside its weights, as a folder, and what they hold."""
    values = {"vocab_size": 420, "dataset_prepared_path": str(tmp_path / "cache"), "num_query_groups": 4}
    values |= {"base_model": str(base)} if base else {}
    config = make_config(tiny.values("data", **(values | changes))).config
    own = None if tokenizer is None else own_tokenizer(config, str(tokenizer))
    files = files_of_run(config, config, "float32", own)
    write_files(files, tmp_path / name)
    return read(tmp_path / name)


def read(folder):
    found = [json.loads((folder / f"{name}.json").read_text()) for name in ("config", "generation_config")]
    settings = folder / "tokenizer_config.json"
    return (*found, json.loads(settings.read_text()) if settings.exists() else {})


def check_with_transformers(folder):
    """transformers finds the same tokens in all three places; returns (tokenizer, config, generation config)."""
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    config = transformers.AutoConfig.from_pretrained(folder)
    generation = transformers.GenerationConfig.from_pretrained(folder)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        number = getattr(tokenizer, name)
        for found in (getattr(config, name), getattr(generation, name)):
            assert number is None or number == found or (isinstance(found, list) and number in found), name
    return tokenizer, config, generation


# --- from random weights --------------------------------------------------------------------


def test_random_weights_name_the_tokenizers_own_tokens(tmp_path):
    tokenizer = write_tokenizer(tmp_path / "tokenizer", begin=False, bos_token=None, eos_token="<|end|>")
    config, generation, _ = exit_of(None, tmp_path, tokenizer=tokenizer)
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (None, 5, None)
    assert generation == {"eos_token_id": 5}
    check_with_transformers(tmp_path / "hf")


def test_without_a_tokenizer_no_end_token_is_made_up(tmp_path):
    """transformers takes 1 and 2 for a Llama whose config.json names none."""
    config, generation, settings = exit_of(None, tmp_path)
    assert [config[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [None, None, None]
    assert (generation, settings) == ({}, {})
    transformers = pytest.importorskip("transformers")
    read_back = transformers.AutoConfig.from_pretrained(tmp_path / "hf")
    assert (read_back.bos_token_id, read_back.eos_token_id) == (None, None)


def test_a_tokenizer_that_names_no_tokens_gets_those_that_training_took(tmp_path):
    """</s> ends documents, as the first of the usual names, and the post-processor puts <s> in front."""
    tokenizer = write_tokenizer(tmp_path / "tokenizer", bos_token=None, eos_token=None)
    config, _, settings = exit_of(None, tmp_path, tokenizer=tokenizer)
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)
    assert (settings["bos_token"], settings["eos_token"]) == ("<s>", "</s>")
    check_with_transformers(tmp_path / "hf")


# --- from a base model ----------------------------------------------------------------------


def test_special_tokens_reach_every_file_and_sampling_settings_stay(tmp_path):
    base = base_model(tmp_path / "base", generation=SAMPLING | {"eos_token_id": [2, 10], "bos_token_id": 1})
    (base / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "</s>"}, "bos_token": "<s>"}))  # fmt: skip
    tokens = {"eos_token": "<|im_end|>", "bos_token": "<|im_start|>", "pad_token": "<unk>"}
    config, generation, settings = exit_of(None, tmp_path, base, base, special_tokens=tokens)
    assert [config[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [3, 4, 0]
    assert generation == {"do_sample": True, "temperature": 0.6, "top_p": 0.9} | {
        "bos_token_id": 3,
        "eos_token_id": [4, 2, 10],
        "pad_token_id": 0,
    }
    assert tokens.items() <= settings.items()
    assert json.loads((tmp_path / "hf" / "special_tokens_map.json").read_text()) == tokens
    tokenizer, _, _ = check_with_transformers(tmp_path / "hf")
    # training put the config's bos in front, and so does the exported tokenizer
    assert tokenizer("the capital").input_ids[0] == 3
    assert tokenizer.eos_token == "<|im_end|>"


def test_one_end_token_that_changed_is_corrected_and_lists_that_hold_it_stay(tmp_path):
    base = base_model(tmp_path / "base", {"eos_token_id": [2, 10, 4]}, {"eos_token_id": 2})
    config, generation, _ = exit_of(None, tmp_path, base, base, special_tokens={"eos_token": "<|im_end|>"})
    assert config["eos_token_id"] == [2, 10, 4]
    assert generation["eos_token_id"] == 4
    config, generation, _ = exit_of(None, tmp_path, base, base, name="same")
    assert config["eos_token_id"] == [2, 10, 4]
    assert generation["eos_token_id"] == 2


def test_tokens_the_tokenizer_does_not_name_stay_those_of_the_base_model(tmp_path):
    """Qwen's bos is named by its config.json alone."""
    base = base_model(tmp_path / "base", {"bos_token_id": 6, "pad_token_id": -1}, {"pad_token_id": 7}, begin=False, bos_token=None)  # fmt: skip
    config, generation, _ = exit_of(None, tmp_path, base, base)
    assert [config[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [6, 2, None]
    assert [generation[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [6, 2, 7]


def test_numbers_of_another_vocabulary_are_not_kept(tmp_path):
    base = base_model(tmp_path / "base", generation=SAMPLING | {"eos_token_id": [2, 300]})
    other = write_tokenizer(tmp_path / "other", "pieces", eos_token="<|end|>")
    config, generation, _ = exit_of(None, tmp_path, base, other)
    assert config["eos_token_id"] == 5
    assert generation["eos_token_id"] == [5, 2]  # </s> is 2 in both, 300 is another piece
    assert generation["temperature"] == 0.6


def test_weights_that_are_drawn_anew_keep_no_sampling_settings(tmp_path):
    base = base_model(tmp_path / "base", generation=SAMPLING)
    _, generation, _ = exit_of(None, tmp_path, base, base, reinit_weights=True)
    assert "temperature" not in generation
    assert generation["eos_token_id"] == 2


def test_the_end_of_a_chats_turn_ends_generation_too(tmp_path):
    """Trained by chatml, a model ends its answers with <|im_end|>, whatever its tokenizer's eos_token is."""
    base = base_model(tmp_path / "base", generation={"eos_token_id": 2})
    chats = [{"path": "x.jsonl", "type": "chat_template", "chat_template": "chatml"}]
    config, generation, _ = exit_of(None, tmp_path, base, base, datasets=chats)
    assert config["eos_token_id"] == 2
    assert generation["eos_token_id"] == [2, 4]
    # the template that all chats were trained with is the exported one
    assert "<|im_start|>" in (tmp_path / "hf" / "chat_template.jinja").read_text()
    texts = [{"path": "x.jsonl", "type": "alpaca"}]
    assert exit_of(None, tmp_path, base, base, name="alpaca", datasets=texts)[1]["eos_token_id"] == 2


def test_transformers_stops_where_training_did(tmp_path):
    """A model that always writes the end of a chat's turn writes it once."""
    transformers = pytest.importorskip("transformers")
    import torch

    base = base_model(tmp_path / "base")
    chats = [{"path": "x.jsonl", "type": "chat_template", "chat_template": "chatml"}]
    exit_of(None, tmp_path, base, base, datasets=chats)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.from_pretrained(tmp_path / "hf")
    )
    model.generation_config = transformers.GenerationConfig.from_pretrained(tmp_path / "hf")
    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(1.0)
        for end, new in ((4, 1), (2, 1), (9, 6)):
            model.lm_head.weight.zero_()
            model.lm_head.weight[end] = (
                1.0 if (model.model(torch.tensor([[1]])).last_hidden_state.sum() > 0) else -1.0
            )
            written = model.generate(torch.tensor([[1]]), max_new_tokens=6, do_sample=False)
            assert written[0, 1:].tolist() == [end] * new


def test_further_templates_and_files_are_kept(tmp_path):
    named = [{"name": "default", "template": "{{ old }}"}, {"name": "tool_use", "template": "{{ tools }}"}]
    base = base_model(tmp_path / "base", chat_template=named)
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "rag.jinja").write_text("{{ documents }}")
    (base / "tokenizer.model").write_bytes(b"pieces")
    exit_of(None, tmp_path, base, base, chat_template="chatml")
    more = tmp_path / "hf" / "additional_chat_templates"
    assert {p.name: p.read_text() for p in more.iterdir()} == {
        "rag.jinja": "{{ documents }}",
        "tool_use.jinja": "{{ tools }}",
    }
    assert (tmp_path / "hf" / "tokenizer.model").read_bytes() == b"pieces"
    assert "chat_template" not in read(tmp_path / "hf")[2]
    tokenizer, _, _ = check_with_transformers(tmp_path / "hf")
    assert set(tokenizer.chat_template) == {"default", "tool_use", "rag"}
    # nothing to change: every byte is the base's
    exit_of(None, tmp_path, base, base, name="same")
    files = read_tokenizer_files(base)
    assert {name: (tmp_path / "same" / name).read_bytes() for name in files} == files


def test_a_model_of_the_hub_is_read_where_it_was_fetched_to(tmp_path):
    """Its architecture may be in the built-in table, which names no tokens; its own files are asked first."""
    # as the hub's library lays out what it fetched
    fetched = tmp_path / "cache" / "models--meta-llama--Llama-3.1-8B"
    base = base_model(fetched / "snapshots" / ("0" * 40), {"eos_token_id": [2, 10]}, SAMPLING)
    (fetched / "refs").mkdir()
    (fetched / "refs" / "main").write_text("0" * 40)
    code = (
        "import json; from longspan.training.model_files import origin_of\n"
        "for size in ('8B', '70B'):\n"
        "    origin = origin_of(f'meta-llama/Llama-3.1-{size}')\n"
        "    print(json.dumps([str(origin.folder), dict(origin.config), dict(origin.generation)]))"
    )
    env = os.environ | {"HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    here, nowhere = map(json.loads, done.stdout.splitlines())
    assert here[0] == str(base)
    assert (here[1]["eos_token_id"], here[2]["temperature"]) == ([2, 10], 0.6)
    # that one was never fetched
    assert (nowhere[0], nowhere[1]["model_type"], nowhere[2]) == ("None", "llama", {})


# --- adapters and merging -------------------------------------------------------------------


def test_merged_models_name_what_the_adapters_were_trained_with(tmp_path):
    base = base_model(tmp_path / "base", generation=SAMPLING | {"eos_token_id": [2, 10]})
    config = make_config(
        tiny.values(
            "data",
            base_model=str(base),
            special_tokens={"eos_token": "<|end|>"},
            dataset_prepared_path=str(tmp_path / "cache"),
            datasets=[{"path": "x.jsonl", "type": "chat_template", "chat_template": "chatml"}],
        )
    ).config
    own = own_tokenizer(config, str(base))
    beside = files_of_adapters(config, own)
    assert "config.json" not in beside
    write_files(beside, tmp_path / "adapters")
    assert json.loads(beside["generation_config.json"])["eos_token_id"] == [5, 2, 10, 4]
    write_files(files_of_merged(BASE, base, tmp_path / "adapters", None), tmp_path / "hf")
    merged, generation, settings = read(tmp_path / "hf")
    assert merged["eos_token_id"] == 5
    assert generation["eos_token_id"] == [5, 2, 10, 4]
    assert generation["temperature"] == 0.6
    assert settings["eos_token"] == "<|end|>"
    assert (tmp_path / "hf" / "chat_template.jinja").exists()
    check_with_transformers(tmp_path / "hf")
    # adapters without a tokenizer: the base model's own files
    (tmp_path / "bare").mkdir()
    write_files(files_of_merged(BASE, base, tmp_path / "bare", None), tmp_path / "plain")
    merged, generation, _ = read(tmp_path / "plain")
    assert (merged["eos_token_id"], generation["eos_token_id"]) == (2, [2, 10])


# --- what cannot be read --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("text", ["{", "[1]", "\xff"])
def test_files_that_are_no_json_are_refused_by_name(tmp_path, name, text):
    base = base_model(tmp_path / "base")
    (base / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=name):
        exit_of(None, tmp_path, base, base)


def test_files_without_read_permission_are_refused_by_name(tmp_path, monkeypatch):
    from pathlib import Path

    folder = write_tokenizer(tmp_path / "tokenizer")
    whole = Path.read_bytes

    def closed(path):
        if path.name == "tokenizer_config.json":
            raise PermissionError(13, "Permission denied", str(path))
        return whole(path)

    monkeypatch.setattr(Path, "read_bytes", closed)
    with pytest.raises(UserError, match=r"tokenizer_config.json cannot be read \(Permission denied\)"):
        trained_tokenizer(folder)


def test_a_tokenizer_given_by_its_file_is_read_whatever_its_name_is(tmp_path):
    folder = write_tokenizer(tmp_path / "tokenizer")
    (folder / "tokenizer.json").rename(folder / "mine.json")
    files = trained_tokenizer(folder / "mine.json").files
    write_tokenizer_files(files, tmp_path / "out")
    assert trained_tokenizer(tmp_path / "out").tokens == {"bos": 1, "eos": 2}
