"""Runs of several processes from start to end: what listens, who holds the folder, what a kill or a signal leaves."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import yaml

import command
import tiny
from processes import children, ranks_of, wait_for, wait_until_gone

LOOPBACK = {"0100007F", "00000000000000000000000001000000"}  # as the kernel writes 127.0.0.1 and ::1


@pytest.fixture
def folder(prefix, tmp_path):
    values = tiny.values(prefix, output_dir="out", num_layers=1, max_steps=10**6, context_parallel_size=2)
    values |= {"val_set_size": 0, "export_hf": False, "save_total_limit": 1, "global_batch_size": 1}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    return tmp_path


def steps(folder):
    """The steps recorded in the run's folder."""
    path = folder / "out" / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return sum('"kind": "train"' in line for line in lines)


def listening(pid):
    """The addresses on which a process listens."""
    sockets, found = set(), set()
    for name in os.listdir(f"/proc/{pid}/fd"):
        try:
            sockets |= set(re.findall(r"^socket:\[(\d+)\]$", os.readlink(f"/proc/{pid}/fd/{name}")))
        except FileNotFoundError:  # one that was just looked at
            continue
    for name in ("tcp", "tcp6"):
        with open(f"/proc/{pid}/net/{name}") as file:
            for line in file.readlines()[1:]:
                columns = line.split()
                if columns[3] == "0A" and columns[9] in sockets:
                    found.add(columns[1].rpartition(":")[0])
    return found


@pytest.mark.slow
def test_a_killed_run_leaves_nothing_and_can_go_on_at_once(folder):
    process = command.start("train", "config.yaml", "--save-steps", "5", cwd=folder, new_ranks=True)
    wait_for(lambda: (folder / "out" / "checkpoints" / "latest").exists(), process)
    ranks = ranks_of(process.pid)
    assert sorted(ranks) == [0, 1]

    # nobody but this machine can reach the run
    for pid in (process.pid, *ranks.values()):
        assert listening(pid)
        assert listening(pid) <= LOOPBACK

    # a second run is refused, and nothing in the folder changes
    config = (folder / "out" / "config.yaml").read_text()
    refused = command.run("train", "config.yaml", "--max-steps", "2", cwd=folder)
    assert refused.returncode == 2
    assert f"another run writes there (process {process.pid} on host {os.uname().nodename}, since " in (
        refused.stderr
    )
    assert (folder / "out" / "config.yaml").read_text() == config
    assert not list((folder / "out").glob("*.1"))

    # killed without a chance to tell its ranks, of which one is stopped and cannot notice anything
    os.kill(ranks[1], signal.SIGSTOP)
    os.kill(process.pid, signal.SIGKILL)
    wait_until_gone(ranks.values())
    again = command.start("train", "config.yaml", "--resume", "auto", cwd=folder)
    wait_for(lambda: "resume     out/checkpoints/step_" in again.output, again)

    # a hangup is a stop like others
    before = steps(folder)
    wait_for(lambda: steps(folder) > before + 2, again)
    os.kill(again.pid, signal.SIGHUP)
    done = again.wait()
    assert done.returncode == 1
    assert "longspan: SIGHUP: waiting for the ranks; a second signal stops them at once" in done.stderr
    assert re.search(r"SIGHUP: step \d+ is finished and saved \(within 1800 s: stop_timeout\)", done.stderr)
    assert "stopped: " in done.stdout
    last = json.loads((folder / "out" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["kind"] == "summary"
    assert f"saved out/checkpoints/step_{last['step']:08d}" in done.stdout


@pytest.mark.slow
def test_a_rank_that_does_not_answer_is_waited_for_as_long_as_asked(folder):
    process = command.start("train", "config.yaml", "--ddp-timeout", "5", cwd=folder)
    wait_for(lambda: steps(folder) > 2, process)
    # A rank writes once a second where it is.
    time.sleep(2)
    ranks = children(process.pid)
    os.kill(ranks[1], signal.SIGSTOP)
    done = process.wait()
    assert done.returncode == 1
    found = re.search(
        r"longspan: error: rank [01] waited 5 s \(ddp_timeout\) for another rank in step (\d+), (.*)\. Look at",
        done.stderr,
    )
    assert found, done.stderr
    assert int(found[1]) >= steps(folder)
    assert any(what in found[2] for what in ("forward and backward", "gradient norm", "end of the step"))
    # the one that is late is named, with the place where it was seen last
    assert re.search(
        r"rank 1 did not answer: its process is stopped \(SIGSTOP\); it was last seen in step \d+, ",
        done.stderr,
    )
    assert "out of memory" not in done.stderr
    assert "Traceback" not in done.stderr
    wait_until_gone(ranks)


#: runs the command after it in which a hangup is ignored, as nohup does
NOHUP = [
    sys.executable,
    "-c",
    "import os, signal, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN); os.execv(sys.argv[1], sys.argv[1:])",
]


def started(*arguments, folder):
    """A command started under nohup, with its output in a file."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(
            [*NOHUP, sys.executable, *arguments], cwd=folder, env=environment, stdout=log, stderr=log
        )
    process.output = "see log"
    return process


def test_torchruns_handlers_leave_an_ignored_hangup_ignored_and_its_ranks_end_with_it(folder):
    process = started(
        *["-m", "longspan", "train", "config.yaml", "--launcher", "torchrun", "--", "--max-restarts=0"],
        *["--standalone", "--nproc-per-node", "2"],
        folder=folder,
    )
    try:
        wait_for(lambda: steps(folder) > 0, process)
        ranks = ranks_of(process.pid)
        assert sorted(ranks) == [0, 1]
        for pid in (process.pid, *ranks.values()):
            os.kill(pid, signal.SIGHUP)
        before = steps(folder)
        wait_for(lambda: steps(folder) > before + 3, process)

        # the first rank holds the folder
        refused = command.run("train", "config.yaml", "--context-parallel-size", "1", cwd=folder)
        assert refused.returncode == 2
        assert f"(process {ranks[0]} on host" in refused.stderr
    finally:
        process.kill()
        process.wait()
    wait_until_gone(ranks.values())


def test_a_launcher_that_has_ended_leaves_no_rank_that_starts_late(folder):
    """A rank that comes to life after its launcher was killed ends at once."""
    environment = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    environment |= {"LONGSPAN_LAUNCHER": str(2**22 + 1)}
    command.run("train", "config.yaml", cwd=folder, env=environment)
    assert not (folder / "out").exists()
