"""The Slurm script and the Kubernetes manifest: the commands that each machine would run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import tiny
from longspan.cli import env
from longspan.cli.launch import OPTIONS, read_launch
from longspan.cli.options import take_options
from longspan.cli.train import read_checked
from longspan.runs.start import Launch

EXAMPLES = Path(__file__).parents[1] / "examples"

#: srun, as far as the script uses it: runs the command once for each task of each machine
SRUN = """
import os, subprocess, sys
given = sys.argv[1:]
options = dict(word.lstrip("-").split("=") for word in given[: next(i for i, w in enumerate(given) if w[:1] != "-")])
for machine in range(int(options["nodes"])):
    for task in range(int(options["ntasks-per-node"])):
        environment = os.environ | {"SLURM_NODEID": str(machine), "TASK_OPTIONS": str(options)}
        subprocess.run(given[len(options):], env=environment, check=True)
"""
SCONTROL = """
import sys
assert sys.argv[1:] == ["show", "hostnames", "node-[3-4]"], sys.argv
print("\\n".join(f"node-{number}" for number in range(3, 20000)))
"""
LONGSPAN = """
import json, os, sys
with open(os.environ["RECORD"], "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
"""


def commands_of(tmp_path, *arguments, **environment):
    """The arguments of each longspan that the script starts in a job of 2 machines with 4 GPUs."""
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "longspan": LONGSPAN}.items():
        path = tmp_path / name
        path.write_text(f"#!{sys.executable}\n{text}")
        path.chmod(0o755)
    job = {"SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "4", "SLURM_JOB_NODELIST": "node-[3-4]"}
    job |= {"SLURM_JOB_ID": "1234567", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    record = tmp_path / "record"
    record.unlink(missing_ok=True)
    done = subprocess.run(
        ["bash", EXAMPLES / "slurm" / "longspan.sbatch", *arguments],
        env={**os.environ, **job, "RECORD": str(record), **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in record.read_text().splitlines()]


def read(arguments):
    """(the launcher's options of a command, its other arguments)."""
    problems = []
    taken, rest, _ = take_options(arguments, OPTIONS)
    launch = read_launch(taken, [], problems)
    assert not problems
    return launch, rest


def test_slurm_starts_one_launcher_on_each_machine(tmp_path):
    commands = commands_of(tmp_path, "train", "my config.yaml", "--resume", "auto")
    read_commands = [read(command) for command in commands]
    assert [launch for launch, _ in read_commands] == [
        Launch(processes=8, machines=2, machine_rank=rank, ip="node-3", port=24567) for rank in (0, 1)
    ]
    assert [rest for _, rest in read_commands] == [["train", "my config.yaml", "--resume", "auto"]] * 2


def test_slurm_runs_the_check_of_the_machines(tmp_path):
    for rank, command in enumerate(commands_of(tmp_path, "env", "--check")):
        assert command[:2] == ["env", "--check"]
        taken, rest, problems = take_options(command[1:], env.OPTIONS)
        assert not rest
        assert not problems
        assert taken["--machine-rank"] == str(rank)


def test_the_slurm_scripts_requests_fit_one_launcher_a_machine():
    text = (EXAMPLES / "slurm" / "longspan.sbatch").read_text()
    requests = [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")]
    assert "--ntasks-per-node=1" in requests
    assert "--requeue" in requests
    # A signal with B: would reach the batch script alone.
    assert "--signal=USR1@120" in requests


@pytest.fixture
def manifest():
    service, job = yaml.safe_load_all((EXAMPLES / "kubernetes" / "job.yaml").read_text())
    return service, job


def test_the_kubernetes_manifest_counts_right_and_its_command_is_accepted(manifest, prefix, tmp_path):
    service, job = manifest
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    gpus = container["resources"]["limits"]["nvidia.com/gpu"]
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(tiny.values(prefix, global_batch_size=16)))
    machines = spec["completions"]
    assert spec["completionMode"] == "Indexed"
    for number in range(machines):
        words = [*container["command"], *container["args"]]
        assert all(isinstance(word, str) for word in words)
        words = [word.replace("$(JOB_COMPLETION_INDEX)", str(number)) for word in words]
        assert words[:3] == ["longspan", "train", "/config/config.yaml"]
        checked, launch = read_checked("train", [str(config), *words[3:]])
        assert checked.sizes.world_size == launch.processes == gpus * machines
        assert launch.machines == machines == spec["parallelism"]
        assert launch.machine_rank == number
        # The pod's host name in the headless Service.
        assert launch.ip == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
        assert not launch.torchrun_arguments
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"] is True
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}


def test_the_kubernetes_manifest_replaces_failed_pods_and_gives_time_and_memory(manifest):
    _, job = manifest
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    # A podFailurePolicy requires that pods are not restarted in place.
    assert pod["restartPolicy"] == "Never"
    fatal = spec["podFailurePolicy"]["rules"][0]
    assert (fatal["action"], fatal["onExitCodes"]["values"]) == ("FailJob", [2])
    assert pod["terminationGracePeriodSeconds"] >= 300
    (container,) = pod["containers"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
    assert mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory"
    assert "persistentVolumeClaim" in mounts["/outputs"]
    assert set(volumes) == {mount["name"] for mount in container["volumeMounts"]}
