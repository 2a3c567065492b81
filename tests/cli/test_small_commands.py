"""init, validate, completion, env, generate from a checkpoint, and errors as JSON."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import tiny
from chats import write_tokenizer
from command import run as longspan
from longspan.cli import completion, main
from longspan.cli.init import examples
from longspan.config.schema import keys
from longspan.data.text import load_tokenizer, vocabulary_size
from longspan.runs.environment import VARIABLES, without_effect


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # validate sets it: put back afterwards
    return tmp_path


def write(folder, name="config.yaml", **changes):
    (folder / name).write_text(yaml.safe_dump(tiny.values("tiny", **changes)))
    return name


# --- help --------------------------------------------------------------------------------------


def test_all_commands_are_listed_and_none_needs_torch_to_say_what_it_takes():
    for name in main.COMMANDS:
        assert f"\n  {name}" in main.usage()
    code = (
        "import sys\nfrom longspan.cli.main import COMMANDS, main\n"
        "assert all(main([name, '--help']) == 0 for name in COMMANDS)\n"
        "assert 'torch' not in sys.modules, 'torch was imported'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(f"usage: longspan {name}" in done.stdout for name in main.COMMANDS if name != "pretrain")


# --- init --------------------------------------------------------------------------------------


def test_init_lists_and_copies_and_never_overwrites(folder, capsys):
    assert main.main(["init"]) == 0
    listed = capsys.readouterr().out
    assert listed.startswith("quickstart.yaml ")
    assert "scenarios/scenario-2.yaml" in listed
    assert "run_all" not in listed
    assert main.main(["init", "quickstart"]) == 0
    assert "longspan train quickstart.yaml" in capsys.readouterr().out
    assert (folder / "quickstart.yaml").read_text() == examples()["quickstart.yaml"].read_text()
    (folder / "quickstart.yaml").write_text("mine")
    assert main.main(["init", "quickstart"]) == 2
    assert "quickstart.yaml exists" in capsys.readouterr().err
    assert (folder / "quickstart.yaml").read_text() == "mine"
    assert main.main(["init", "scenario-2", "--output", "two.yaml"]) == 0
    assert (folder / "two.yaml").is_file()
    assert main.main(["init", "quikstart", "again"]) == 2
    err = capsys.readouterr().err
    assert "Did you mean quickstart?" in err
    assert "'again': one example at a time." in err


def test_the_examples_are_package_data():
    """The wheel takes the folder along, to where init looks first."""
    root = Path(__file__).parents[2]
    assert '"examples" = "longspan/examples"' in (root / "pyproject.toml").read_text()


# --- validate ----------------------------------------------------------------------------------


def test_validate_says_mesh_batch_and_what_has_no_effect(folder, capsys):
    write(folder, context_parallel_size=2, flash_attention=True)
    assert main.main(["validate", "config.yaml", "--num-processes", "4", "--use-flash-attn"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("config.yaml: valid\n")
    assert "tp 1 x cp 2 x dp_shard 2 x dp_replicate 1 x pp 1 = 4 processes\n" in shown
    assert "micro 1 x accumulation 2 x dp 2 = 4 sequences = 200 tokens a step" in shown
    assert "without effect here: flash_attention" in shown
    assert "--use-flash-attn" in shown
    assert "datasets: tiny is not on this machine" in shown


def test_validate_shows_all_problems_of_all_files(folder, capsys):
    write(folder, "good.yaml")
    write(folder, "bad.yaml", learning_rat=1, tensor_parallel_size=3)
    assert main.main(["validate", "good.yaml", "bad.yaml", "none.yaml", "--json"]) == 2
    shown = json.loads(capsys.readouterr().out)
    assert [c["valid"] for c in shown["configs"]] == [True, False, False]
    assert shown["valid"] is False
    text = "\n".join(shown["configs"][1]["problems"])
    assert "learning_rat: unknown key. Did you mean learning_rate?" in text
    assert "num_attention_heads 4 is not divisible by tensor_parallel_size 3" in text
    assert "none.yaml does not exist" in shown["configs"][2]["problems"][0]
    assert main.main(["validate", "bad.yaml"]) == 2
    assert capsys.readouterr().err.count("longspan: error: ") == len(shown["configs"][1]["problems"])
    assert main.main(["validate"]) == 2


def test_validate_of_megatrons_flags(folder, capsys):
    flags = "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --position-embedding-type rope --lr 1e-4"
    given = [*flags.split(), "--datasets", "[{path: tiny}]", "--tensor-model-parallel-size", "2"]
    assert main.main(["validate", "--megatron", *given, "--num-processes", "8"]) == 0
    assert "tp 2 x cp 1 x dp_shard 4" in capsys.readouterr().out


def test_a_model_that_is_elsewhere_is_noted_and_a_folder_that_is_missing_refused(folder, capsys):
    values = tiny.values("tiny", base_model="some-org/some-model")
    for name in ("num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "ffn_hidden_size"):
        del values[name]
    (folder / "hub.yaml").write_text(yaml.safe_dump(values))
    assert main.main(["validate", "hub.yaml", "--json"]) == 0
    (result,) = json.loads(capsys.readouterr().out)["configs"]
    assert result["not_checked"][0].startswith(
        "base_model some-org/some-model: its config.json is not on this machine"
    )
    (folder / "hub.yaml").write_text(yaml.safe_dump(values | {"base_model": "./nowhere"}))
    assert main.main(["validate", "hub.yaml"]) == 2


# --- errors as JSON ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ["config", "none.yaml", "--json"],
        ["env", "--json", "more"],
        ["layout", "none.yaml", "--json"],
        ["verify", "none.yaml", "--json"],
        ["eval", "none.yaml", "--json"],
    ],
)
def test_errors_are_json_where_json_was_asked_for(folder, capsys, arguments):
    assert main.main(arguments) == 2
    captured = capsys.readouterr()
    problems = json.loads(captured.out)["problems"]
    assert problems
    assert captured.err == "".join(f"longspan: error: {p}\n" for p in problems)


# --- env ---------------------------------------------------------------------------------------


def test_env_names_the_variables_that_are_set(monkeypatch, capsys):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NCCL_TIMEOUT", "3600")
    monkeypatch.setenv("NCCL_BLOCKING_WAIT", "1")
    assert main.main(["env", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["torch"].startswith("2.")
    found = {v["name"]: v for v in shown["environment"]}
    assert set(found) == {"NCCL_TIMEOUT", "NCCL_BLOCKING_WAIT"}
    assert "ddp_timeout" in found["NCCL_TIMEOUT"]["text"]
    assert "TORCH_NCCL_BLOCKING_WAIT" in found["NCCL_BLOCKING_WAIT"]["text"]
    assert main.main(["env"]) == 0
    assert "NCCL_TIMEOUT=3600\n      no effect: read by nobody" in capsys.readouterr().out


def test_what_has_no_effect_is_said_once():
    environ = {
        "NCCL_TIMEOUT": "1",
        "NCCL_ALGO": "Tree",
        "MASTER_ADDR": "x",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    }
    on_cpu = without_effect(environ, "cpu", joined=False)
    assert on_cpu[0].startswith("CUDA_DEVICE_MAX_CONNECTIONS, NCCL_ALGO: for CUDA and NCCL")
    assert [note.split(":")[0] for note in on_cpu[1:]] == ["NCCL_TIMEOUT", "MASTER_ADDR"]
    on_gpus = without_effect(environ, "cuda", joined=True)
    assert [note.split(":")[0] for note in on_gpus] == ["NCCL_TIMEOUT"]
    assert without_effect(environ | {"TORCHELASTIC_RUN_ID": "longspan"}, "cpu", joined=True) == []
    assert without_effect({}, "cpu", joined=False) == []


# --- completion --------------------------------------------------------------------------------

CASES = [
    (["tra"], {"train"}),
    (["val"], {"validate"}),
    (["train", "--context-par"], {"--context-parallel-size"}),
    (["train", "--tensor-model"], {"--tensor-model-parallel-size"}),
    (["validate", "c.yaml", "--num-proc"], {"--num-processes"}),
    (["train", "c.yaml", "--cp-layout", "z"], {"zigzag"}),
    (["pretrain", "--swig"], {"--swiglu"}),
    (["init", "quick"], {"quickstart.yaml"}),
    (["completion", "z"], {"zsh"}),
    (["verify", "--work"], set()),
]


def shell(name, script, body):
    if shutil.which(name) is None:
        pytest.skip(f"{name} is not installed")
    flags = {"bash": ["--norc"], "zsh": ["-f"], "fish": ["--no-config"]}[name]
    done = subprocess.run(
        [name, *flags, "-c", f"{script}\n{body}"],
        capture_output=True,
        text=True,
        env=os.environ | {"HOME": "/nowhere"},
    )
    assert done.stderr == ""
    return done.stdout


def test_bash_completes():
    script = completion.bash()
    assert subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True).stderr == ""
    lines = []
    for words, _ in CASES:
        quoted = " ".join(f"'{w}'" for w in words)
        lines.append(
            f'COMP_WORDS=(longspan {quoted}); COMP_CWORD={len(words)}; _longspan; echo "${{COMPREPLY[@]}}"'
        )
    found = shell("bash", script, "\n".join(lines)).splitlines()
    assert [set(line.split()) for line in found] == [expected for _, expected in CASES]


def test_zsh_completes():
    """Its builtins are replaced, to see what is offered; zsh itself keeps what begins with the word."""
    stubs = "compdef() { :; }; _files() { :; }\n_describe() { print -r -- ${all%%:*} }\ncompadd() { shift; print -r -- $@ }"
    lines = [
        f"words=(longspan {' '.join(w)}); CURRENT={len(w) + 1}; print -r -- $(_longspan)" for w, _ in CASES
    ]
    found = shell("zsh", f"{stubs}\n{completion.zsh()}", "\n".join(lines)).splitlines()
    for (words, expected), line in zip(CASES, found, strict=True):
        assert {w for w in line.split() if w.startswith(words[-1])} == expected, words


def test_fish_completes():
    lines = [f"complete -C 'longspan {' '.join(words)}'; echo ====" for words, _ in CASES]
    found = shell("fish", completion.fish(), "\n".join(lines)).split("====\n")[:-1]
    for (words, expected), text in zip(CASES, found, strict=True):
        assert {line.split("\t")[0] for line in text.splitlines()} == expected, words


def test_completion_knows_every_key_and_says_no():
    script = completion.bash()
    for k in keys():
        assert f"--{k.name.replace('_', '-')} " in script
    assert main.main(["completion", "tcsh"]) == 2
    assert main.main(["completion"]) == 2


def test_fields_of_a_config_json_that_nobody_reads_are_named(folder, capsys):
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "finetuned": True}
    (folder / "base").mkdir()
    (folder / "base" / "config.json").write_text(json.dumps({"model_type": "llama", "rope_scaling": yarn}))
    write(folder, base_model="base", reinit_weights=True)
    assert main.main(["validate", "config.yaml", "--json"]) == 0
    (result,) = json.loads(capsys.readouterr().out)["configs"]
    assert any("finetuned (transformers ignores it too)" in line for line in result["without_effect"])


# --- generate ----------------------------------------------------------------------------------


def test_generate_from_a_checkpoint_is_generate_from_its_export(folder, capsys):
    (folder / "texts").mkdir()
    for i in range(20):
        (folder / "texts" / f"{i}.txt").write_text(f"This is text number {i}. " * (i + 1))
    write(folder, datasets=[{"path": "texts"}], tokenizer_train_vocab_size=300, vocab_size=None, max_steps=1,
          params_dtype="float32", output_dir="out")  # fmt: skip
    done = longspan("train", "config.yaml", cwd=folder)
    assert done.returncode == 0, done.stderr
    capsys.readouterr()
    texts = []
    for model in ("out/hf", "out", "out/checkpoints/step_00000001"):
        assert (
            main.main(["generate", model, "--prompt", "This", "--max-new-tokens", "3", "--temperature", "0"])
            == 0
        )
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] == texts[2]
    shutil.rmtree(folder / "out" / "hf")
    (folder / "out" / "config.yaml").unlink()
    assert main.main(["generate", "out"]) == 2
    assert "Give --tokenizer FOLDER" in capsys.readouterr().err
    assert main.main(["generate", "nowhere"]) == 2


def test_a_tokenizer_larger_than_the_model_is_named_by_both_sizes(folder, capsys):
    """The vocabulary is the model's: nobody set it, and larger weights are not there."""
    write_tokenizer(folder / "tokenizer")
    size = vocabulary_size(load_tokenizer(folder / "tokenizer"))
    base = {"num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
    (folder / "base").mkdir()
    (folder / "base" / "config.json").write_text(
        json.dumps(base | {"model_type": "llama", "vocab_size": 40, "max_position_embeddings": 64})
    )
    (folder / "t.jsonl").write_text('{"text": "some words"}\n')
    write(folder, base_model="base", tokenizer_config="tokenizer", datasets=[{"path": "t.jsonl"}],
          **dict.fromkeys(("num_layers", "hidden_size", "num_attention_heads", "num_query_groups",
                           "ffn_hidden_size", "vocab_size", "sequence_len", "val_set_size")))  # fmt: skip
    for name in ("validate", "prepare"):
        assert main.main([name, "config.yaml", "--sequence-len", "16"]) == 2
        text = capsys.readouterr().err
        assert f"has {size} tokens, and base_model base has weights for 40" in text
        assert "Give the model's own tokenizer" in text
        assert "vocab_size" not in text
    # from random weights the vocabulary may be as large as the tokenizer's
    assert main.main(["validate", "config.yaml", "--sequence-len", "16", "--reinit-weights"]) == 2
    assert f"Set vocab_size to {size} or more" in capsys.readouterr().err
    arguments = ["--sequence-len", "16", "--reinit-weights", "--vocab-size", str(size)]
    assert main.main(["validate", "config.yaml", *arguments]) == 0


def test_validate_refuses_what_prepare_would_refuse_at_once(folder, capsys):
    def answer(*arguments, **changes):
        write(folder, **changes)
        code = main.main(["validate", "config.yaml", *arguments])
        out, err = capsys.readouterr()
        return code, out + err

    code, text = answer(tokenizer_config="nowhere")
    assert code == 0
    assert "not checked:         tokenizer_config: nowhere is not on this machine" in text
    for changes in (
        {"chat_template": "nope"},
        {"datasets": [{"path": "x.jsonl", "type": "chat_template", "chat_template": "nope"}]},
    ):
        code, text = answer(**changes)
        assert code == 2
        assert "nope" in text
    good = {"datasets": [{"path": "x.jsonl", "type": "chat_template", "chat_template": "chatml"}]}
    assert answer(tokenizer_config="nowhere", **good)[0] == 0
    stream = {"mock_data": True, "reset_position_ids": True, "sample_packing": False}
    stream |= {"datasets": None, "val_set_size": None}
    code, text = answer(**stream)
    assert code == 2
    assert "which token ends a document is not known: there is no tokenizer" in text
    assert answer(**stream, eod_token_id=1)[0] == 0


def test_an_end_of_document_beyond_the_tokenizer_is_refused(folder, capsys):
    size = vocabulary_size(load_tokenizer(write_tokenizer(folder / "tokenizer")))
    for end, code in ((size, 2), (size - 1, 0)):
        write(folder, datasets=None, val_set_size=None, mock_data=True, reset_position_ids=True, sample_packing=False,
              tokenizer_config="tokenizer", vocab_size=None, eod_token_id=end)  # fmt: skip
        assert main.main(["validate", "config.yaml"]) == code
    assert f"eod_token_id {size} is beyond the {size} tokens" in capsys.readouterr().err
