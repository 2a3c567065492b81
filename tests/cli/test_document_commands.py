"""The shell commands of the users' documents, each shrunk to 2 layers, 2 steps and at most 4 processes: it runs, or is
refused for the stated reason.

Data is made up (``--mock-data``), but where a command is about data.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import command
import tiny
from longspan.cli import main

ROOT = Path(__file__).parents[2]

#: what the documents' short commands leave out, and sizes instead of theirs
SIZES = [
    "--num-layers",
    "2",
    "--hidden-size",
    "32",
    "--num-attention-heads",
    "4",
    "--ffn-hidden-size",
    "48",
    "--lr",
    "1e-3",
    "--train-iters",
    "2",
]
SMALL = {"--seq-length": "64", "--max-position-embeddings": "64", "--global-batch-size": "2", "--train-iters": "2",
         "--num-layers": "2", "--hidden-size": "32", "--num-attention-heads": "4", "--ffn-hidden-size": "48",
         "--max-seqlen-per-dp-cp-rank": "64", "--log-interval": "1"}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("commands")
    tiny.write_data(path)
    values = tiny.values(
        "tiny", params_dtype="float32", sequence_len=64, export_hf=False, output_dir="axolotl"
    )
    (path / "config.yaml").write_text(yaml.safe_dump(values))
    (path / "texts").mkdir()
    for i in range(20):
        line = json.dumps({"text": f"This is text number {i}. " * (i + 1)})
        (path / "texts" / f"{i}.jsonl").write_text(line + "\n")
    return path


def problems_of(flags, processes, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code = main.main(["validate", "--megatron", *flags, "--num-processes", str(processes), "--json"])
    shown = json.loads(capsys.readouterr().out)
    assert code == (0 if shown["valid"] else 2)
    return shown["configs"][0]["problems"]


def shrunk(flags: list[str]) -> list[str]:
    """The flags with small sizes; those that are missing are added."""
    out, given = [], set()
    left = list(flags)
    while left:
        flag = left.pop(0)
        given.add(flag)
        out.append(flag)
        if flag in SMALL and left:
            left.pop(0)
            out.append(SMALL[flag])
    for i in range(0, len(SIZES), 2):
        if SIZES[i] not in given:
            out += SIZES[i : i + 2]
    return out


def start(command, cwd, env=None):
    environ = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} | (env or {})
    return subprocess.Popen(
        list(map(str, command)),
        cwd=cwd,
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ran(*processes):
    """Waits for processes of :func:`start` or of ``command``; all end with 0. Returns what the first printed."""
    done = []
    for process in processes:
        if isinstance(process, command.Command):
            done.append(process.wait())
        else:
            out, err = process.communicate(timeout=240)
            done.append(subprocess.CompletedProcess(process.args, process.returncode, out, err))
    for each in done:
        assert each.returncode == 0, each.stdout + each.stderr
    return done[0]


def losses(path: Path) -> list[float]:
    lines = map(json.loads, (path / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if line["kind"] == "train"]


# --- the flags as they stand on the page -----------------------------------------------------

NEEDED = "--num-layers, --hidden-size, --num-attention-heads: missing."
PAGES = {
    # document -> (flags, processes, what is missing or refused; nothing where it is whole)
    "slide and quick start": (
        "--tensor-model-parallel-size 4 --context-parallel-size 2 --cp-comm-type p2p --sequence-parallel "
        "--seq-length 8192 --bf16",
        8,
        [NEEDED, "--lr: missing"],
    ),
    "basic use": (
        "--tensor-model-parallel-size 4 --pipeline-model-parallel-size 1 --context-parallel-size 2 --cp-comm-type p2p "
        "--seq-length 8192 --micro-batch-size 1 --global-batch-size 64",
        8,
        [NEEDED, "--lr: missing"],
    ),
    "types by layer": (
        "--context-parallel-size 8 --num-layers 24 --hidden-size 64 --num-attention-heads 8 --lr 1e-4 "
        "--cp-comm-type p2p p2p a2a a2a a2a+p2p a2a+p2p",
        8,
        ["--cp-comm-type 'a2a+p2p' needs --hierarchical-context-parallel-sizes"],
    ),
    "hierarchical": (
        "--context-parallel-size 8 --hierarchical-context-parallel-sizes 4 2 --cp-comm-type a2a+p2p --seq-length 65536 "
        "--num-layers 2 --hidden-size 64 --num-attention-heads 8 --lr 1e-4",
        8,
        [],
    ),
    "context and pipeline": (
        "--context-parallel-size 2 --pipeline-model-parallel-size 4 --num-layers 4 --hidden-size 64 "
        "--num-attention-heads 8 --lr 1e-4",
        8,
        [],
    ),
    "tensor parallel": (
        "--tensor-model-parallel-size 8 --sequence-parallel --num-layers 96 --hidden-size 12288 "
        "--num-attention-heads 96 --lr 1e-4",
        8,
        [],
    ),
    "custom script": (
        "--tensor-model-parallel-size 4 --pipeline-model-parallel-size 1 --context-parallel-size 2 --cp-comm-type p2p "
        "--sequence-parallel --seq-length 8192 --micro-batch-size 1 --global-batch-size 64 --train-iters 10000 "
        "--lr 1.0e-4 --bf16",
        8,
        [NEEDED],
    ),
}


@pytest.mark.parametrize("name", PAGES)
def test_flags_as_on_the_page(name, monkeypatch, capsys):
    flags, processes, expected = PAGES[name]
    given = [*flags.split(), "--mock-data"]
    found = problems_of(given, processes, monkeypatch, capsys)
    assert len(found) == len(expected), found
    for problem, start_of in zip(found, expected):
        assert problem.startswith(start_of)


# --- runs ------------------------------------------------------------------------------------

FULL = """--tensor-model-parallel-size 2 --pipeline-model-parallel-size 1 --context-parallel-size 2 --cp-comm-type p2p
    --sequence-parallel --num-layers 32 --hidden-size 4096 --num-attention-heads 32 --ffn-hidden-size 13696
    --seq-length 8192 --max-position-embeddings 8192 --micro-batch-size 1 --global-batch-size 64 --train-iters 500000
    --lr 1.0e-4 --min-lr 1.0e-5 --lr-decay-style cosine --weight-decay 0.1 --clip-grad 1.0 --adam-beta1 0.9
    --adam-beta2 0.95 --init-method-std 0.01 --bf16 --no-load-optim --no-load-rng --save full --load full
    --tensorboard-dir full/tb --log-interval 1 --eval-interval 1000 --save-interval 2000 --eval-iters 10 --split 99,1,0"""


def small(text: str) -> list[str]:
    return [*shrunk(text.split()), "--mock-data"]


def test_python_pretrain_gpt_starts_its_processes(folder):
    """Document 2, 5.1, with the advice for too little memory; document 5, 1.5, by the same words: tensor parallel."""
    text = """--tensor-model-parallel-size 2 --sequence-parallel --pipeline-model-parallel-size 1
        --context-parallel-size 1 --cp-comm-type p2p --seq-length 8192 --micro-batch-size 1 --global-batch-size 64
        --recompute-activations --save basic"""
    flags = small(text)
    ran(command.script(ROOT / "pretrain_gpt.py", *flags, cwd=folder))
    assert len(losses(folder / "basic")) == 2


def test_hierarchical_and_types_by_layer(folder):
    text = """--context-parallel-size 4 --hierarchical-context-parallel-sizes 2 2 --cp-comm-type a2a a2a+p2p
        --seq-length 65536 --ckpt-activations --save levels"""
    flags = small(text)
    ran(command.start("pretrain", *flags, cwd=folder))
    assert len(losses(folder / "levels")) == 2


def test_hybrid_context_parallel(folder):
    text = """--context-parallel-size 2 --hybrid-context-parallel --max-seqlen-per-dp-cp-rank 8192
        --calculate-per-token-loss --dataloader-type single --seq-length 64 --save hybrid"""
    flags = small(text)
    done = ran(command.start("pretrain", *flags, cwd=folder))
    assert "hybrid" in done.stdout
    assert len(losses(folder / "hybrid")) == 2


def test_axolotl_train(folder):
    """Its three basic forms and the debugging one, in one run."""
    given = ["config.yaml", "--num-processes", 2, "--launcher", "torchrun", "--max-steps", 2]
    done = ran(command.start("train", *given, cwd=folder, env={"NCCL_DEBUG": "INFO"}))
    assert "NCCL_DEBUG: for CUDA and NCCL; this run is on CPU, over gloo." in done.stderr
    assert done.stderr.count("NCCL_DEBUG") == 1, "said once, not by every process"
    assert len(losses(folder / "axolotl")) == 2


def test_axolotl_train_on_two_machines(folder):
    """Two launches on one machine."""
    port = free_port()

    def machine(rank):
        given = ["config.yaml", "--num-processes", 2, "--num-machines", 2, "--machine-rank", rank]
        given += ["--main-process-ip", "127.0.0.1", "--main-process-port", port]
        return command.start("train", *given, "--max-steps", 2, "--output-dir", "machines", cwd=folder)

    ran(machine(0), machine(1))
    assert len(losses(folder / "machines")) == 2


def test_the_whole_list_of_flags(folder):
    """Documents 1, 2 and 4: a first start, so --load finds nothing."""
    environ = {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "6000",
               "NCCL_ALGO": "Tree", "NCCL_PROTO": "Simple", "NCCL_IB_DISABLE": "0"}  # fmt: skip
    ran(command.script(ROOT / "pretrain_gpt.py", *small(FULL), cwd=folder, env=environ))
    assert len(losses(folder / "full")) == 2


@pytest.mark.slow
def test_torchrun_pretrain_gpt_on_two_machines(folder):
    """The same documents' start by slurm, of one process a machine.

    The documents' script lacks --node_rank, without which every machine takes itself for the first.
    """
    text = """--tensor-model-parallel-size 2 --sequence-parallel --seq-length 8192 --micro-batch-size 1
        --global-batch-size 64 --bf16 --save torchruns"""
    flags = small(text)
    port = free_port()

    def machine(rank):
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=1", "--nnodes=2"]
        torchrun += [f"--node_rank={rank}", "--master_addr=127.0.0.1", f"--master_port={port}"]
        return start([*torchrun, ROOT / "pretrain_gpt.py", *flags], folder, {"MASTER_PORT": "6000"})

    ran(machine(0), machine(1))
    assert len(losses(folder / "torchruns")) == 2


def free_port() -> int:
    """A port that is free now."""
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


# --- data, and calls without a run -----------------------------------------------------------


def test_the_data_tools(folder, monkeypatch, capsys):
    """The documents give raw text to merge_datasets.py, with the options of another tool."""
    monkeypatch.chdir(folder)
    given = ["--input", "texts", "--output-prefix", "made/set", "--json-keys", "text"]
    assert main.main(["merge", *given, "--split-sentences"]) == 2
    assert "that is longspan prepare, which makes .bin/.idx from text" in capsys.readouterr().err
    assert main.main(["prepare", *given, "--train-vocab-size", "300"]) == 0
    assert "20 documents" in capsys.readouterr().out
    assert (folder / "made" / "set_text_document.idx").is_file()


def test_asking_for_groups_where_there_are_none(tmp_path):
    code = "from longspan import parallel_state; print(parallel_state.get_context_parallel_global_ranks())"
    (tmp_path / "script.py").write_text(code)
    done = command.script("script.py", cwd=tmp_path).wait()
    assert done.returncode == 1
    assert "initialize_model_parallel" in done.stderr
