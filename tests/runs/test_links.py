"""Links between GPUs from what ``nvidia-smi topo -m`` prints, and the warnings of ``longspan env CONFIG``."""

import json
import os

import pytest
import yaml

import tiny
from longspan.cli.main import main
from longspan.runs.machine.links import Links, context_parallel_groups, parse, slow_groups, visible_gpus

#: 8 x Tesla V100 (HugeCTR's benchmark report, driver 470)
V100 = """\
\tGPU0\tGPU1\tGPU2\tGPU3\tGPU4\tGPU5\tGPU6\tGPU7\tmlx5_0\tmlx5_1\tCPU Affinity\tNUMA Affinity
GPU0\tX\tNV1\tNV2\tNV1\tSYS\tSYS\tSYS\tNV2\tNODE\tSYS\t0-23,48-71\t0
GPU1\tNV1\tX\tNV1\tNV2\tSYS\tSYS\tNV2\tSYS\tNODE\tSYS\t0-23,48-71\t0
GPU2\tNV2\tNV1\tX\tNV2\tSYS\tNV1\tSYS\tSYS\tPIX\tSYS\t0-23,48-71\t0
GPU3\tNV1\tNV2\tNV2\tX\tNV1\tSYS\tSYS\tSYS\tPIX\tSYS\t0-23,48-71\t0
GPU4\tSYS\tSYS\tSYS\tNV1\tX \tNV2\tNV2\tNV1\tSYS\tNODE\t24-47,72-95\t1
GPU5\tSYS\tSYS\tNV1\tSYS\tNV2\tX \tNV1\tNV2\tSYS\tNODE\t24-47,72-95\t1
GPU6\tSYS\tNV2\tSYS\tSYS\tNV2\tNV1\tX \tNV1\tSYS\tPIX\t24-47,72-95\t1
GPU7\tNV2\tSYS\tSYS\tSYS\tNV1\tNV2\tNV1\tX \tSYS\tPIX\t24-47,72-95\t1
mlx5_0\tNODE\tNODE\tPIX\tPIX\tSYS\tSYS\tSYS\tSYS\tX\tSYS\t\t
mlx5_1\tSYS\tSYS\tSYS\tSYS\tNODE\tNODE\tPIX\tPIX\tSYS\tX \t\t

Legend:

  X    = Self
  SYS  = Connection traversing PCIe as well as the SMP interconnect between NUMA nodes (e.g., QPI/UPI)
  NODE = Connection traversing PCIe as well as the interconnect between PCIe Host Bridges within a NUMA node
"""
#: 4 x A100-SXM4 (driver 580), with the underlined header that a terminal gets
A100 = """\
\t\x1b[4mGPU0\tGPU1\tGPU2\tGPU3\tNIC0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m
GPU0\t X \tNV12\tNV12\tNV12\tSYS\t32-63,96-127\t1\t\tN/A
GPU1\tNV12\t X \tNV12\tNV12\tSYS\t32-63,96-127\t1\t\tN/A
GPU2\tNV12\tNV12\t X \tNV12\tSYS\t32-63,96-127\t1\t\tN/A
GPU3\tNV12\tNV12\tNV12\t X \tSYS\t32-63,96-127\t1\t\tN/A
NIC0\tSYS\tSYS\tSYS\tSYS\t X \t\t\t\t

NIC Legend:

  NIC0: rocep49s0
"""
#: 2 x A100-PCIE (driver 565), and a machine with one GPU
PCIE = """\
\tGPU0\tGPU1\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID
GPU0\t X \tNODE\t28-55,84-111\t1\t\tN/A
GPU1\tNODE\t X \t28-55,84-111\t1\t\tN/A
"""
ONE = "\tGPU0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\nGPU0\t X \t0-19\t0\t\tN/A\n"


def test_the_matrix_is_read_without_network_cards():
    links = parse(V100)
    assert links.gpus == 8
    assert len(links.between) == 28
    assert [links.of(0, other) for other in range(1, 8)] == ["NV1", "NV2", "NV1", "SYS", "SYS", "SYS", "NV2"]
    assert links.of(7, 6) == links.of(6, 7) == "NV1"
    assert links.lines()[0].startswith("NV2 (2 NVLinks): GPUs 0-2, 0-7, 1-3, 1-6")
    assert links.lines()[-1].startswith("SYS (PCIe and the link between CPU sockets): GPUs 0-4, 0-5")
    assert parse(A100).lines() == ["NV12 between all 4 GPUs: 12 NVLinks"]
    assert parse(PCIE).between == {(0, 1): "NODE"}
    assert parse(ONE).lines() == ["one GPU"]


@pytest.mark.parametrize(
    "text", ["", "NVIDIA-SMI has failed", "\tGPU0\tGPU1\nGPU0\t X \tNV1\n", "\tGPU0\tGPU1\n"]
)
def test_what_is_no_matrix_is_said(text):
    with pytest.raises(ValueError, match="nvidia-smi topo -m"):
        parse(text)


def test_the_gpus_that_ranks_see():
    links = parse(V100)
    assert visible_gpus(links, None) == visible_gpus(links, "") == list(range(8))
    assert visible_gpus(links, "3, 1") == [3, 1]
    assert visible_gpus(links, "GPU-5d8aba68,GPU-4497e145") == list(range(8))


def test_slow_links_of_groups():
    v100, a100 = parse(V100), parse(A100)
    assert slow_groups([[0, 1], [2, 3]], v100, range(8)) == []
    (text,) = slow_groups([[0, 1, 2, 3, 4]], v100, range(8))
    assert text.startswith(
        "ranks 0 and 4 exchange over SYS (PCIe and the link between CPU sockets): GPUs 0 and 4"
    )
    # The order of the GPUs decides.
    assert slow_groups([[0, 1]], v100, [0, 7]) == []
    assert "GPUs 0 and 5" in slow_groups([[0, 1]], v100, [0, 5])[0]
    assert slow_groups([[0, 1, 2, 3]], a100, range(4)) == []
    (text,) = slow_groups([[0, 1], [2, 4], [3, 5]], a100, range(4))
    assert text == "2 of 3 groups cross machines of 4 GPUs, such as ranks 2, 4"
    assert slow_groups([[0, 1]], Links(2, {(0, 1): "PIX"}), range(2)) == []


def test_the_groups_that_are_checked():
    def groups(world, **keys):
        return context_parallel_groups(tiny.checked("nowhere", world, **keys))

    assert groups(4, tensor_parallel_size=2, context_parallel_size=2) == [[0, 2], [1, 3]]
    hierarchy = dict(cp_comm_type="a2a+p2p", hierarchical_context_parallel_sizes=[2, 2])
    assert groups(4, context_parallel_size=4, **hierarchy) == [[0, 1], [2, 3]]
    hybrid = dict(sample_packing=True, hybrid_context_parallel=True, max_seqlen_per_dp_cp_rank=25)
    assert groups(4, context_parallel_size=2, **hybrid) == [[0, 1, 2, 3]]


# --- longspan env -----------------------------------------------------------------------------


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Puts a nvidia-smi that prints a text on the PATH, and a config in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    values = tiny.values("nowhere", context_parallel_size=4)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))

    def with_output(text, code=0):
        script = tmp_path / "bin" / "nvidia-smi"
        script.parent.mkdir(exist_ok=True)
        (tmp_path / "topo").write_text(text)
        script.write_text(
            f'#!/bin/sh\n[ "$*" = "topo -m" ] || exit 9\ncat "{tmp_path / "topo"}"\nexit {code}\n'
        )
        script.chmod(0o755)
        monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")

    return with_output


def ask(capsys, *arguments):
    code = main(["env", *arguments, "--json"])
    out, err = capsys.readouterr()
    assert code == 0, err
    return json.loads(out)


def test_env_warns_of_a_context_parallel_group_over_slow_links(machine, capsys):
    machine(A100)
    assert ask(capsys)["links"] == ["NV12 between all 4 GPUs: 12 NVLinks"]
    shown = ask(capsys, "config.yaml")
    assert shown["slow_links"] == ["none in context parallel groups"]
    assert shown["attention"].startswith("cpu-flash for float64, head size 8 on cpu: ")
    shown = ask(
        capsys, "config.yaml", "--context-parallel-size", "8", "--sequence-len", "96", "--num-processes", "8"
    )
    warning, remedy = shown["slow_links"]
    assert warning == "WARNING: 1 of 1 groups cross machines of 4 GPUs, such as ranks 0, 1, 2, 3, 4, 5, 6, 7"
    assert "hierarchical_context_parallel_sizes: [4, 2]" in remedy
    machine(V100)
    warning, remedy = ask(capsys, "config.yaml", "--tensor-parallel-size", "2")["slow_links"]
    assert warning.startswith("WARNING: ranks 0 and 4 exchange over SYS")
    assert "CUDA_VISIBLE_DEVICES" in remedy
    assert main(["env", "config.yaml"]) == 0
    assert "slow_links     none in context parallel groups" in capsys.readouterr().out


def test_env_without_links_says_why(machine, capsys):
    machine("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.", code=9)
    shown = ask(capsys, "config.yaml")
    assert shown["links"][0].startswith("not known: nvidia-smi topo -m fails: NVIDIA-SMI has failed because")
    assert shown["slow_links"][0].startswith("not checked, because the links are not known (tp 1 x cp 4")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--num-processes", "2"], "--num-processes is for longspan env --check."),
        (["--jsn"], "Did you mean --json?"),
        (["config.yaml", "--timeout", "3"], "--timeout is for longspan env --check."),
        (["config.yaml", "--context-parallel-sise", "2"], "context"),
        (["config.yaml", "--num-processes", "3"], "but there are 3 processes"),
        (["none.yaml"], "none.yaml does not exist"),
        (["--check", "config.yaml"], "takes no such option"),
    ],
)
def test_mistakes(machine, capsys, arguments, text):
    machine(ONE)
    assert main(["env", *arguments]) == 2
    assert text in capsys.readouterr().err
