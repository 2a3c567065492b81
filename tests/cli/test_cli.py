"""The command line as a user meets it: whole processes, exit codes, messages, files."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import yaml

import tiny
from cli_folder import records, write, write_folder
from command import run as longspan
from command import start
from llamas import OWN
from longspan.config.schema import TrainConfig
from longspan.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("cli"))


# --- help, versions, small commands ---------------------------------------------------------


def imported(folder, *arguments):
    """The output of ``python ARGUMENTS``, and the names of all modules that it imports."""
    command = [sys.executable, "-X", "importtime", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0
    return done.stdout, {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}


def test_help_imports_little(tmp_path):
    """Imports are nearly all that a short command takes time for."""
    _, before = imported(tmp_path, "-c", "")
    text, after = imported(tmp_path, "-m", "longspan", "--help")
    assert "longspan init quickstart && longspan train quickstart.yaml" in text
    own = {name for name in after - before if name.partition(".")[0] not in sys.stdlib_module_names}
    assert own == {"longspan", "longspan.cli", "longspan.cli.main", "longspan.errors"}
    assert len(after - before) < 100


@pytest.mark.parametrize("command", ["train", "verify", "prepare", "config", "env"])
def test_every_command_has_help(command, tmp_path):
    done = longspan(command, "--help", cwd=tmp_path)
    assert done.returncode == 0
    assert done.stdout.startswith(f"usage: longspan {command}")


def test_help_of_train_lists_every_key_with_its_flag(tmp_path):
    text = longspan("train", "--help", cwd=tmp_path).stdout
    assert "--learning-rate, --lr" in text
    assert "--sequence-len, --seq-length [tokens] (default 4096)" in text


def test_unknown_command_has_a_near_miss(tmp_path):
    done = longspan("trian", cwd=tmp_path)
    assert done.returncode == 2
    assert (
        done.stderr
        == "longspan: error: 'trian' is no command of longspan. Did you mean train? See longspan --help.\n"
    )


def test_env_prints_versions(tmp_path):
    done = longspan("env", cwd=tmp_path)
    assert done.returncode == 0
    assert re.search(r"^torch +2\.", done.stdout, re.M)


def test_config_prints_the_arithmetic_done_and_the_schema(folder):
    done = longspan(
        "config", "config.yaml", "--context-parallel-size", "2", "--num-processes", "4", cwd=folder
    )
    assert done.returncode == 0, done.stderr
    values = yaml.safe_load(done.stdout)
    assert (values["dp_shard_size"], values["gradient_accumulation_steps"]) == (2, 1)
    schema = json.loads(longspan("config", "--schema", cwd=folder).stdout)
    assert "context_parallel_size" in schema["properties"]


# --- mistakes -------------------------------------------------------------------------------


def refused(folder, *arguments, out="out-refused"):
    before = sorted(p for p in folder.rglob("*"))
    done = longspan("train", *arguments, "--output-dir", out, cwd=folder)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(p for p in folder.rglob("*")) == before, "something was written"
    lines = [line for line in done.stderr.splitlines() if line]
    assert all(line.startswith("longspan: error: ") for line in lines), done.stderr
    return [line.removeprefix("longspan: error: ") for line in lines]


def test_unknown_keys_and_options_are_refused_together(folder):
    name = write(folder, "typo.yaml", contxt_parallel_size=2)
    assert refused(folder, name, "--learning-rat", "1") == [
        "--learning-rat: unknown option. Did you mean --learning-rate?",
        "contxt_parallel_size: unknown key. Did you mean context_parallel_size?",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--context-parallel-size", 2, "--num-processes", 3], "= 2, but there are 3 processes"),
        (["--tensor-parallel-size", 3], "num_attention_heads 4 is not divisible by tensor_parallel_size 3"),
        (["--datasets", "[{path: txts}]"], "txts"),
        (["--datasets", "[{path: texts}]"], "there is no tokenizer"),
        (["--device", "cuda"], "there are 0"),
        (["--num-processes", "two"], "--num-processes 'two': a whole number from 1 on"),
        (["--num-machines", 2, "--num-processes", 2], "needs --main-process-ip"),
        (["--launcher", "torchrn"], "Did you mean torchrun?"),
        (["again.yaml"], "unexpected argument"),
        (["--", "--nproc-per-node", "2"], "add --launcher torchrun"),
        (["--launcher", "torchrun", "--", "--nonexistflag"], "torchrun does not take it: unrecognized"),
        (["--launcher", "torchrun", "--", "script.py"], "'script.py' is no option of torchrun"),
        (["--datasets", "[{path: tiny, split: 'train[:5]'}]"], "split has no effect on token files"),
        (
            ["--datasets", "[{path: tiny, field: x, roles_to_train: [y]}]"],
            "field has no effect on token files",
        ),
        (
            ["--datasets", "[{path: tiny, roles_to_train: [y]}]"],
            "roles_to_train has no effect without type: chat",
        ),
        (
            ["--tensorboard-dir", "config.yaml", "--use-tensorboard"],
            "tensorboard_dir config.yaml: cannot write",
        ),
        (["--attention-backend", "cuda-flash"], "cuda-flash"),
    ],
)
def test_each_mistake_is_one_clear_message(folder, arguments, message):
    found = refused(folder, "config.yaml", *arguments)
    assert any(message in problem for problem in found), found


def test_torchruns_own_arguments_say_how_many(monkeypatch):
    """They were once dropped where one process was enough, and not reckoned with elsewhere."""
    from longspan.cli.launch import read_launch
    from longspan.errors import UserError
    from longspan.runs.start import launched_world

    problems = []
    launch = read_launch({"--launcher": "torchrun"}, ["--nproc_per_node=2", "--nnodes", "3"], problems)
    assert (launch.processes, launch.machines, problems) == (6, 3, [])
    read_launch({"--launcher": "torchrun", "--num-processes": "4"}, ["--nproc_per_node=2"], problems)
    assert problems[0].endswith(
        "--num-processes 4 and torchrun's --nproc-per-node 2 on 1 machines: give one."
    )
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for rank, world, found in (
        ("x", "2", "RANK=x"),
        ("5", "2", "from 0 to WORLD_SIZE - 1"),
        ("0", "2", "MASTER_ADDR"),
    ):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", world)
        with pytest.raises(UserError, match=found):
            launched_world()


def test_missing_and_truncated_data_are_refused(folder):
    import shutil

    for suffix in (".bin", ".idx"):
        shutil.copy(folder / f"tiny{suffix}", folder / f"short{suffix}")
    data = (folder / "short.bin").read_bytes()
    (folder / "short.bin").write_bytes(data[: len(data) // 2])
    (message,) = refused(folder, "config.yaml", "--datasets", "[{path: short}]")
    assert "short.bin" in message
    assert str(len(data)) in message.replace(",", "")
    (folder / "short.bin").unlink()
    (message,) = refused(folder, "config.yaml", "--datasets", "[{path: short}]")
    assert "short.bin" in message
    (message,) = refused(folder, "config.yaml", "--datasets", "[{path: tny}]")
    assert "tny" in message


def test_a_missing_config_file(folder):
    assert refused(folder, "confg.yaml") == [
        "config file confg.yaml does not exist. Did you mean config.yaml?"
    ]


# --- training -------------------------------------------------------------------------------


def test_train_launches_the_processes_the_config_asks_for(folder):
    done = longspan("train", "config.yaml", "--context-parallel-size", 2, "--eval-steps", 2, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tp 1 x cp 2 x dp_shard 1 x dp_replicate 1 x pp 1 = 2 processes on cpu" in done.stdout
    assert "micro 1 x accumulation 2 x dp 1 = 2 sequences = 100 tokens a step" in done.stdout
    assert "step 3/3 | loss" in done.stdout
    assert "done: 3 steps" in done.stdout
    out = folder / "out"
    assert [r["step"] for r in records(out)] == [1, 2, 3]
    assert len(records(out, "eval")) == 2
    assert yaml.safe_load((out / "config.yaml").read_text())["context_parallel_size"] == 2
    assert (out / "checkpoints" / "step_00000003").is_dir()

    alone = longspan("train", "config.yaml", "--output-dir", "alone", cwd=folder)
    assert alone.returncode == 0, alone.stderr
    for a, b in zip(records(out), records(folder / "alone")):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-10)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-10)


@pytest.mark.slow
def test_train_joins_under_torchrun(folder):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [
        "-m",
        "longspan",
        "train",
        "config.yaml",
        "--output-dir",
        "joined",
        "--tokenizer-train-vocab-size",
        "300",
    ]
    command += ["--datasets", "[{path: texts}]", "--dataset-prepared-path", "prepared", "--vocab-size", "320"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "dp_shard 2" in done.stdout
    assert [r["step"] for r in records(folder / "joined")] == [1, 2, 3]
    # the same by processes of longspan's own, with the tokenised data found again
    args = ["config.yaml", "--output-dir", "launched", "--datasets", "[{path: texts}]", "--vocab-size", 320]
    args += ["--tokenizer-train-vocab-size", 300, "--dataset-prepared-path", "prepared", "--num-processes", 2]
    again = longspan("train", *args, cwd=folder)
    assert again.returncode == 0, again.stderr
    assert [r["loss"] for r in records(folder / "launched")] == [
        r["loss"] for r in records(folder / "joined")
    ]


def test_a_mistake_under_torchrun_is_one_message_too(folder):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [
        "-m",
        "longspan",
        "train",
        "config.yaml",
        "--tensor-parallel-size",
        "3",
        "--output-dir",
        "never",
    ]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    errors = [
        line for line in done.stderr.splitlines() if line.startswith("longspan: error: num_attention_heads 4")
    ]
    assert len(errors) == 1, done.stderr
    assert not (folder / "never").exists()


def test_a_second_run_keeps_the_metrics_of_the_first(folder):
    for _ in range(2):
        done = longspan("train", "config.yaml", "--output-dir", "twice", "--max-steps", 1, cwd=folder)
        assert done.returncode == 0
    assert "an earlier run's metrics.jsonl.1, checkpoints.1, hf.1 are kept beside" in done.stdout
    assert (folder / "twice" / "metrics.jsonl.1").exists()
    assert len(records(folder / "twice")) == 1


# --- what a hostile reader found: each failed before -----------------------------------------


def test_a_config_of_the_users_own_is_never_overwritten(folder, tmp_path):
    own = tmp_path / "own"
    own.mkdir()
    text = "# my comment\n" + (folder / "config.yaml").read_text().replace("tiny", str(folder / "tiny"))
    (own / "config.yaml").write_text(text)
    done = longspan("train", "config.yaml", "--output-dir", ".", cwd=own)
    assert done.returncode == 2
    assert "longspan did not write" in done.stderr
    assert (own / "config.yaml").read_text() == text


def test_a_refused_run_leaves_an_earlier_one_as_it_was(folder):
    assert (
        longspan("train", "config.yaml", "--output-dir", "kept", "--max-steps", 1, cwd=folder).returncode == 0
    )
    before = (folder / "kept" / "config.yaml").read_text()
    done = longspan(
        "train",
        "config.yaml",
        "--output-dir",
        "kept",
        "--val-set-size",
        1000,
        "--num-processes",
        2,
        cwd=folder,
    )
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert (folder / "kept" / "config.yaml").read_text() == before


def test_a_second_run_sets_the_first_ones_checkpoints_aside(folder):
    for seed in (1, 2):
        done = longspan(
            "train", "config.yaml", "--output-dir", "aside", "--max-steps", 1, "--seed", seed, cwd=folder
        )
        assert done.returncode == 0, done.stderr
    assert (folder / "aside" / "checkpoints.1" / "step_00000001").is_dir()
    assert (folder / "aside" / "hf.1" / "config.json").is_file()


def test_a_loss_that_is_no_number_ends_the_run_before_the_weights_change(folder):
    done = longspan(
        "train",
        "config.yaml",
        "--learning-rate",
        "1e18",
        "--max-grad-norm",
        0,
        "--output-dir",
        "nan",
        cwd=folder,
    )
    assert done.returncode == 1, done.stdout
    assert "the weights were not updated" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (folder / "nan" / "checkpoints").exists()
    for line in (folder / "nan" / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_data_that_teaches_nothing_or_does_not_fit_is_refused(folder):
    import numpy as np

    from longspan.data import IndexedDatasetWriter

    for name, tokens in (("ones", [5]), ("big", [5, 400, 7]), ("negative", [5, -1, 7])):
        with IndexedDatasetWriter(folder / name, np.int32) as writer:
            for _ in range(40):
                writer.add_document(np.array(tokens))
    for name, message in (
        ("ones", "no document has two tokens"),
        ("big", "holds token 400"),
        ("negative", "token -1"),
    ):
        (found,) = refused(folder, "config.yaml", "--datasets", f"[{{path: {name}}}]", "--num-processes", 2)
        assert message in found


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-epochs", ".inf"], "num_epochs"),
        (["--learning-rate", "true"], "learning_rate: True must be a number, not true or false"),
        (["--rope-scaling", "{rope_type: linear, factor: 0}"], "factor 0: a number above 0"),
        (["--rope-scaling", "{rope_type: [a]}"], "rope_scaling type ['a']"),
        (["--val-set-size", "1.5"], "a whole number of them"),
        (["--main-process-port", "99999"], "from 1 to 65535"),
        (["--num-machines", 2, "--main-process-ip", "127.0.0.1"], "1 processes do not divide by 2 machines"),
        (["--cp-comm-type", "[]"], "empty list"),
    ],
)
def test_more_mistakes_that_are_one_message(folder, arguments, message):
    found = refused(folder, "config.yaml", *arguments)
    assert any(message in problem for problem in found), found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 2024-13-45\n", "not valid YAML"),
        ("seed: 1\nseed: 2\n", "seed is given twice"),
        ("a: &a [*a]\n", "the alias *a stands inside what it names"),
    ],
)
def test_yaml_that_is_none(tmp_path, text, message):
    (tmp_path / "c.yaml").write_text(text)
    done = longspan("config", "c.yaml", cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_text_values_on_the_command_line_stay_text(folder):
    done = longspan("config", "config.yaml", "--output-dir", "2024", cwd=folder)
    assert yaml.safe_load(done.stdout)["output_dir"] == "2024"


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ([], "holds list, not an object"),
        ({"model_type": "llama"}, "num_layers, hidden_size, num_attention_heads: missing"),
        ({"model_type": "llama", "hidden_size": -32}, "sets hidden_size -32: a whole number from 1"),
        ({"model_type": "llama", "hidden_act": "selu"}, "hidden_act 'selu'"),
        ({"model_type": "mamba"}, "(mamba) has recurrent or convolutional layers"),
    ],
)
def test_a_broken_base_model_is_refused(folder, tmp_path, base, message):
    (tmp_path / "config.json").write_text(json.dumps(base))
    name = write(folder, "base.yaml", remove=OWN, base_model=str(tmp_path))
    done = longspan("config", name, cwd=folder)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_killed_worker_is_named(folder):
    given = ["config.yaml", "--context-parallel-size", 2, "--output-dir", "killed", "--max-steps", 9999]
    process = start("train", *given, cwd=folder)
    metrics, end = folder / "killed" / "metrics.jsonl", time.monotonic() + 60
    while not (metrics.exists() and metrics.read_text()) and time.monotonic() < end:
        time.sleep(0.05)
    children = subprocess.run(
        ["ps", "--ppid", str(process.pid), "-o", "pid="], capture_output=True, text=True
    ).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    done = process.wait(60)
    assert done.returncode == 1
    assert "was ended by SIGKILL" in done.stderr


def test_more_processes_than_a_machine_can_start_are_refused():
    from longspan.runs.start import Launch, choose_device

    cores = os.cpu_count() or 1
    config = TrainConfig(**tiny.values("prefix", device="cpu", context_parallel_size=2**20))
    with pytest.raises(UserError, match=f"1,048,576 processes on this machine, which has {cores} cores"):
        choose_device(config, Launch())
    assert choose_device(config, Launch(machines=2**20)) == ("cpu", 2**20)
    assert choose_device(config, Launch(processes=64)) == ("cpu", 64)
