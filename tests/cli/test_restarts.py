"""Runs that lose a process, and come back by themselves."""

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
import yaml

import command
import tiny
from longspan.runs import machines, restarts
from longspan.runs.notes import Failure, Notes
from longspan.runs.ranks import Ending
from longspan.training.stopping import Heard
from processes import children, ranks_of, wait_for, wait_until_gone

#: rounds of the test with random kills; 50 have been run, see docs/benchmarks.md
KILLS = int(os.environ.get("LONGSPAN_TEST_KILLS", "5"))
CURVE = ("step", "loss", "grad_norm", "learning_rate", "tokens")


@pytest.fixture
def folder(prefix, tmp_path):
    values = tiny.values(prefix, num_layers=1, max_steps=40, context_parallel_size=2, global_batch_size=2)
    values |= {
        "val_set_size": 0,
        "export_hf": False,
        "save_total_limit": 2,
        "save_steps": 4,
        "max_restarts": 3,
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    return tmp_path


def records(output):
    path = output / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def curve(output):
    return [tuple(r[name] for name in CURVE) for r in records(output) if r["kind"] == "train"]


def wait_for_steps(output, steps, process):
    """Waits for some steps after the last checkpoint, from which the run goes on."""
    latest = output / "checkpoints" / "latest"
    saved = int(latest.read_text().strip().removeprefix("step_")) if latest.exists() else 0
    wait_for(lambda: len(curve(output)) >= saved + steps, process)


def hidden(output):
    """What a killed process may have left half written."""
    return [path for path in output.rglob(".*") if path.name not in (".longspan.lock", ".metadata")]


@pytest.mark.slow
def test_random_kills_change_nothing(folder):
    steps = 8 * KILLS
    four = ["config.yaml", "--dp-shard-size", "2", "--max-steps", str(steps)]
    done = command.run("train", *four, "--output-dir", "undisturbed", cwd=folder)
    assert done.returncode == 0, done.stderr

    drawn = random.Random(KILLS)
    process = command.start("train", *four, "--output-dir", "out", "--max-restarts", "20", cwd=folder)
    seen = set()
    kills = 0
    while kills < KILLS:
        if kills % 5 == 4:  # while it starts
            wait_for(lambda: children(process.pid), process)
            time.sleep(drawn.uniform(0, 1.5))
        elif kills % 5 == 3:  # while it saves
            wait_for(lambda: list((folder / "out" / "checkpoints").glob(".step_*.partial")), process)
        else:
            wait_for_steps(folder / "out", drawn.randrange(1, 9), process)
            time.sleep(drawn.uniform(0, 0.1))
        ranks = children(process.pid)
        seen |= set(ranks)
        if ranks:  # there is none between two attempts
            os.kill(drawn.choice(ranks), signal.SIGKILL)
            kills += 1
        wait_until_gone(ranks)
    done = process.wait(240 + 10 * KILLS)
    assert done.returncode == 0, done.stderr
    # Two kills may fall into one attempt, while its ranks are still being started.
    restarts_done = done.stderr.count("was ended by SIGKILL (out of memory?); restart ")
    assert 0.8 * KILLS <= restarts_done <= KILLS
    assert curve(folder / "out") == curve(folder / "undisturbed")
    assert len(curve(folder / "out")) == steps
    assert not list((folder / "out").glob("*.1"))
    assert not hidden(folder / "out")
    assert not [pid for pid in seen if os.path.exists(f"/proc/{pid}")]


#: a rank that raises an exception in a step: the first time in each, for as often as TIMES says
FAILS = """
import os
from longspan.training.trainer import Trainer
step = Trainer.train_step
def train_step(self, batches):
    restarts = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    if os.environ["RANK"] == "1" and self.step == {steps}[min(restarts, len({steps}) - 1)]:
        raise ZeroDivisionError("by a test")
    return step(self, batches)
Trainer.train_step = train_step
"""


def test_the_same_error_twice_in_a_row_ends_the_run(folder):
    fails = {"RANK_RUNS_FIRST": FAILS.format(steps=[6])}
    done = command.run("train", "config.yaml", "--max-steps", "20", cwd=folder, env=fails)
    assert done.returncode == 1
    assert done.stderr.count("ZeroDivisionError: by a test") == 2
    assert "restart 1 of 3, from step_00000004, in 1 s" in done.stderr
    assert re.search(
        r"longspan: the same error twice in a row, after step 6: ZeroDivisionError in <string>, line \d+\.",
        done.stderr,
    )
    assert len(curve(folder / "model-out")) == 6


def test_other_errors_are_counted_from_one_checkpoint_to_the_next(folder):
    fails = {"RANK_RUNS_FIRST": FAILS.format(steps=[2, 3, 6, 7, 99])}
    arguments = ["config.yaml", "--max-steps", "12", "--max-restarts", "2"]
    done = command.run("train", *arguments, cwd=folder, env=fails)
    assert done.returncode == 0, done.stderr
    texts = re.findall(r"restart \d of 2, from \w+( start)?, in \d s", done.stderr)
    assert len(texts) == 4
    # before the first checkpoint all begins anew, in the same metrics.jsonl
    assert "restart 2 of 2, from the start, in 2 s" in done.stderr
    assert "restart 1 of 2, from step_00000004, in 1 s" in done.stderr
    assert [row[0] for row in curve(folder / "model-out")] == list(range(1, 13))


def test_an_end_that_is_the_runs_own_is_no_reason_to_start_again(folder):
    done = command.run(
        "train", "config.yaml", "--learning-rate", "1e18", "--params-dtype", "float32", cwd=folder
    )
    assert done.returncode == 1
    assert "restart" not in done.stderr
    assert "the weights were not updated" in done.stderr


def test_a_restart_goes_on_along_the_line_of_its_own_launch(folder):
    """Checkpoints of later steps are there, from a run that was taken back to an earlier one."""
    steps = ["config.yaml", "--max-steps", "12", "--save-total-limit", "9"]
    assert command.run("train", *steps, cwd=folder).returncode == 0
    back = [*steps, "--resume", "model-out/checkpoints/step_00000004", "--learning-rate", "0.02"]
    # The second run begins anew, and moves the folder with the checkpoint aside.
    for more, fails_at in ([], 6), (["--no-load-optim"], 2):
        fails = {"RANK_RUNS_FIRST": FAILS.format(steps=[fails_at, 99])}
        done = command.run("train", *back, *more, cwd=folder, env=fails)
        assert done.returncode == 0, done.stderr
        assert "restart 1 of 3, from the start" in done.stderr
        assert [row[0] for row in curve(folder / "model-out")] == list(range(1, 13))
    rates = [row[3] for row in curve(folder / "model-out")]
    assert max(rates) > 0.015


def test_a_saved_run_goes_on_and_a_later_kill_costs_less(folder):
    process = command.start(
        "train", "config.yaml", "--save-steps", "1000", "--max-steps", "100000", cwd=folder
    )
    output = folder / "model-out"
    wait_for(lambda: len(records(output)) > 3, process)
    os.kill(process.pid, signal.SIGUSR1)
    wait_for(lambda: (output / "checkpoints" / "latest").exists(), process)
    saved = (output / "checkpoints" / "latest").read_text().strip()
    os.kill(children(process.pid)[1], signal.SIGKILL)
    wait_for(lambda: f"restart 1 of 3, from {saved}, in 1 s" in process.output, process)
    wait_for(lambda: f"resume     model-out/checkpoints/{saved}" in process.output, process)
    # the signal that stops a run stops it while it starts again, too
    os.kill(process.pid, signal.SIGTERM)
    done = process.wait()
    assert done.returncode == 1
    assert "SIGUSR1: step " in done.stderr
    assert not hidden(output)


def test_torchruns_restarts_go_on_from_the_last_checkpoint(folder):
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    arguments = ["-m", "longspan", "train", "config.yaml", "--launcher", "torchrun", "--"]
    arguments += ["--standalone", "--nproc-per-node", "2", "--max-restarts", "1", "--monitor-interval", "0.1"]
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(
            [sys.executable, *arguments], cwd=folder, env=environment, stdout=log, stderr=log
        )
    process.output = "see log"
    output = folder / "model-out"
    try:
        wait_for(lambda: (output / "checkpoints" / "latest").exists(), process)
        os.kill(ranks_of(process.pid)[1], signal.SIGKILL)
        assert process.wait(120) == 0, (folder / "log").read_text()[-3000:]
    finally:
        process.kill()
        process.wait()
    text = (folder / "log").read_text()
    assert re.search(r"resume     model-out/checkpoints/step_000000\d\d, after step", text)
    assert [row[0] for row in curve(output)] == list(range(1, 41))
    assert not list(output.glob("*.1"))


def machine(folder, number, port, *more):
    arguments = ["--num-machines", "2", "--machine-rank", number, "--main-process-ip", "127.0.0.1"]
    arguments += ["--main-process-port", port, "--dp-shard-size", "2", *more]
    return command.start("train", "config.yaml", *arguments, cwd=folder)


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


@pytest.mark.slow
def test_a_machine_that_dies_is_missed_and_may_come_back(folder):
    port, output = free_port(), folder / "model-out"
    first, second = (machine(folder, number, port) for number in (0, 1))
    wait_for(lambda: (output / "checkpoints" / "latest").exists(), first)
    ranks = children(second.pid)
    assert len(ranks) == len(children(first.pid)) == 2
    os.kill(second.pid, signal.SIGKILL)
    wait_until_gone(ranks)
    wait_for(lambda: "waiting for all 2 machines" in first.output, first)
    assert re.search(
        r"rank [01]: lost the connection to another rank, which ended, in step \d+", first.output
    )
    assert "failed with exit code 1; restart 1 of 3, from step_0000" in first.output

    again = machine(folder, 1, port)
    done = first.wait()
    assert done.returncode == 0, done.stderr
    assert again.wait().returncode == 0
    assert re.search(r"resume     model-out/checkpoints/step_000000\d\d, after step", done.stdout)
    assert [row[0] for row in curve(output)] == list(range(1, 41))
    assert not hidden(output)


def test_a_rank_that_is_lost_on_one_machine_is_started_again_on_both(folder):
    port = free_port()
    machines = [machine(folder, number, port, "--max-steps", "20") for number in (0, 1)]
    output = folder / "model-out"
    wait_for(lambda: (output / "checkpoints" / "latest").exists(), machines[0])
    os.kill(children(machines[1].pid)[0], signal.SIGKILL)
    for process in machines:
        done = process.wait()
        assert done.returncode == 0, done.stderr
    assert [row[0] for row in curve(output)] == list(range(1, 21))


def test_the_last_failure_of_one_machine_ends_the_others(folder):
    port = free_port()
    machines = [machine(folder, number, port, "--max-restarts", "0") for number in (0, 1)]
    wait_for(lambda: curve(folder / "model-out"), machines[0])
    os.kill(children(machines[1].pid)[0], signal.SIGKILL)
    ended = [process.wait() for process in machines]
    assert [done.returncode for done in ended] == [1, 1]
    assert "rank 2 was ended by SIGKILL (out of memory?); the other ranks were stopped." in ended[1].stderr


def test_a_launcher_heeds_signals_where_machine_0_does_not_answer(folder):
    port = free_port()
    first, second = (machine(folder, number, port) for number in (0, 1))
    wait_for(lambda: curve(folder / "model-out"), first)
    os.kill(first.pid, signal.SIGSTOP)
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(second.pid, number)
        time.sleep(1)
    done = second.wait(60)
    assert done.returncode == 1
    assert "stopped at once by a second signal, SIGINT" in done.stderr
    os.kill(first.pid, signal.SIGKILL)


def test_the_end_of_machine_0_ends_the_run(folder):
    """Its launcher has the store of the run: the others end with one message, and nothing is left."""
    port, output = free_port(), folder / "model-out"
    first, second = (machine(folder, number, port) for number in (0, 1))
    wait_for(lambda: curve(output), first)
    ranks = [*children(first.pid), *children(second.pid)]
    os.kill(first.pid, signal.SIGKILL)
    done = second.wait(90)
    assert done.returncode == 1
    assert "machine 0 has ended the run, or cannot be reached any more" in done.stderr
    assert "Traceback" not in done.stderr
    wait_until_gone(ranks)


@pytest.mark.slow
def test_machine_0_may_answer_again(folder):
    """Its ranks go on, but nobody could start them again: after 30 s the others end theirs and wait for it."""
    port, output = free_port(), folder / "model-out"
    first, second = (machine(folder, number, port, "--max-steps", "100000") for number in (0, 1))
    wait_for(lambda: (output / "checkpoints" / "latest").exists(), first)
    os.kill(first.pid, signal.SIGSTOP)
    wait_for(lambda: "waiting for all 2 machines" in second.output, second)
    assert "the launcher of machine 0 does not answer; restart 1 of 3, from step_" in second.output
    os.kill(first.pid, signal.SIGCONT)
    wait_for(lambda: "resume     model-out/checkpoints/step_" in first.output, first)
    done = last_step(output)
    wait_for(lambda: last_step(output) > done, first)
    ranks = [*children(first.pid), *children(second.pid)]
    for process in (first, second):
        os.kill(process.pid, signal.SIGKILL)
    wait_until_gone(ranks)


def test_a_meeting_has_an_end():
    """A store that does not answer blocks whoever asks it, for longer than the limit of the meeting."""
    with pytest.raises(TimeoutError):
        machines._while_nobody_asks(lambda: time.sleep(60), Heard(), 0.3)


def last_step(output):
    return curve(output)[-1][0]


def test_a_number_that_is_taken_is_refused_and_disturbs_nobody(folder):
    port = free_port()
    machines = [machine(folder, number, port) for number in (0, 1)]
    wait_for(lambda: curve(folder / "model-out"), machines[0])
    refused = machine(folder, 1, port).wait()
    assert refused.returncode == 2
    assert "--machine-rank 1: another launcher of this run has this number." in refused.stderr
    for process in machines:
        done = process.wait()
        assert done.returncode == 0
        assert "restart" not in done.stderr


class Launches:
    """The decisions about one attempt after the other, without processes."""

    def __init__(self, most):
        from torch.distributed import HashStore

        self.store, self.attempt, self.point = HashStore(), 0, None
        self.restarts = restarts.Restarts(most, lambda: self.point)

    def __call__(self, codes, failures=(), asked=(), elsewhere=""):
        notes = Notes(self.store, self.attempt)
        self.attempt += 1
        for rank, failure in dict(failures).items():
            notes.fail(rank, failure)
        return self.restarts.decide(Ending(codes, Heard(asked), elsewhere=elsewhere), notes)


ERROR = Failure("error", "ValueError in model.py, line 3", 7, "")
CHOSEN = Failure("chosen", "", 7, "")
LOST = Failure("lost", "RuntimeError in gloo.py, line 9", 7, "")


def test_what_is_started_again_and_what_is_not():
    assert not Launches(0)({1: -9}).again
    for codes, failures, again in (
        ({1: -9}, {}, True),
        ({1: 2}, {}, False),  # a mistake of the user
        ({0: 2, 1: -9}, {}, False),
        ({1: 1}, {1: CHOSEN}, False),
        ({0: -9, 1: 1}, {1: CHOSEN}, False),
        ({1: 1}, {}, True),
        ({1: 1}, {1: ERROR}, True),
        ({0: 1, 1: 1}, {0: LOST}, True),
        ({1: 134}, {}, True),
    ):
        assert Launches(3)(codes, failures).again == again, (codes, failures)
    assert not Launches(3)({1: -9}, asked=[signal.SIGTERM]).again
    # Restarts because of another machine count too: one that never stays would go on for ever.
    launches = Launches(1)
    assert launches({}, elsewhere="another machine starts its ranks again").again
    assert not launches({}, elsewhere="another machine starts its ranks again").again


def test_the_cause_is_named_and_not_its_consequences():
    """NCCL ends a rank that has waited in vain by SIGABRT."""
    late = Failure("late", "", 7, "")
    decision = Launches(3)({0: -6, 2: -6, 1: 1}, {0: late, 2: late, 1: ERROR})
    assert decision.text.startswith("rank 1 failed with exit code 1; restart 1 of 3")


def test_restarts_are_counted_since_the_last_checkpoint_with_growing_pauses():
    launches = Launches(8)
    pauses = [launches({0: -9}).pause for _ in range(8)]
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60]
    last = launches({0: -9})
    assert not last.again
    assert "after 8 restarts and no checkpoint yet (max_restarts)" in last.text
    launches.point = "step_00000010"
    assert launches({0: -9}).text.endswith("restart 1 of 8, from step_00000010, in 1 s")


def test_only_the_same_error_at_the_same_step_ends_a_run():
    launches = Launches(9)
    later = Failure("error", ERROR.error, 8, "")
    assert launches({1: 1, 0: 1}, {1: ERROR, 0: LOST}).again
    assert launches({1: 1, 0: 1}, {1: later, 0: LOST}).again
    assert launches({0: -9, 1: 1}, {1: later}).again  # what was killed from outside explains the rest
    assert launches({1: 1}, {1: later}).again
    ends = launches({1: 1, 0: 1}, {0: LOST, 1: later})
    assert not ends.again
    assert "the same error twice in a row, after step 8: ValueError in model.py, line 3" in ends.text
