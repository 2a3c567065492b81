"""``longspan.load``, ``train``, ``verify`` and ``evaluate``, in a process of their own as a script has one."""

import json

import pytest
import yaml

import command
import longspan
import tiny

# Each is a process of its own, because their ranks are forked here, which no process can be that has computed before.
SCRIPTS = [
    """
import json
import longspan

run = longspan.load("config.yaml", context_parallel_size=2, lr=1e-3)
assert isinstance(run, longspan.Run)
about = {
    "cp": run.sizes.cp,
    "rate": run.config.learning_rate,
    "batch": run.batch.tokens_a_step,
    "layers": [layer.number for layer in run.layers],
    "trained": longspan.train(run),
    "verified": longspan.verify(run),
}
print("RESULT", json.dumps(about))
""",
    """
import json
import signal
import threading
import longspan

# Python sets handlers of signals in the main thread only, and a program keeps its own.
handlers = [signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM)]
run, results = longspan.load("config.yaml", lr=1e-3, output_dir="alone"), []
thread = threading.Thread(target=lambda: results.append(longspan.train(run)))
thread.start()
thread.join()
longspan.train(longspan.load("config.yaml", lr=1e-3, output_dir="main", max_steps=1))
assert handlers == [signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM)]
print("RESULT", json.dumps({"alone": results[0]}))
""",
    """
import json
import longspan

alone = longspan.load("config.yaml", lr=1e-3, output_dir="alone")
print("RESULT", json.dumps({"evaluated": longspan.evaluate(alone, needles=0)}))
""",
]


@pytest.fixture
def folder(tmp_path):
    prefix = tiny.write_data(tmp_path)
    values = tiny.values(prefix, max_steps=3, export_hf=False, output_dir="out", global_batch_size=2)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    return tmp_path


def test_scripts_train_verify_and_evaluate(folder):
    found = {}
    for source in SCRIPTS:
        (folder / "script.py").write_text(source)
        done = command.script("script.py", cwd=folder).wait(60)
        assert done.returncode == 0, done.stderr
        (line,) = (line for line in done.stdout.splitlines() if line.startswith("RESULT "))
        found |= json.loads(line.removeprefix("RESULT "))
    assert (found["cp"], found["rate"], found["batch"], found["layers"]) == (2, 1e-3, 100, [1, 2])
    assert found["verified"]["passed"]
    assert found["verified"]["max_gradient_error"] < 1e-10
    assert found["trained"]["kind"] == "summary"
    assert found["trained"]["step"] == 3
    assert found["trained"]["loss"] == pytest.approx(found["alone"]["loss"], rel=1e-9)
    assert found["evaluated"]["step"] == 3
    assert found["evaluated"]["loss"] == pytest.approx(found["alone"]["eval_loss"], rel=1e-9)


def test_all_problems_come_at_once_as_an_error(folder, monkeypatch):
    monkeypatch.chdir(folder)
    with pytest.raises(longspan.UserError) as caught:
        longspan.load("config.yaml", context_parallel=2, hidden_size=33, cp_layout="zigzack")
    problems = "\n".join(caught.value.problems)
    for words in ("context_parallel: unknown key", "hidden_size", "zigzack"):
        assert words in problems
    with pytest.raises(longspan.UserError, match="does not exist"):
        longspan.load("nowhere.yaml")


def test_a_run_of_keys_alone(folder):
    values = yaml.safe_load((folder / "config.yaml").read_text())
    run = longspan.load(**values)
    assert (run.vocab_size, run.sizes.world_size, run.model.hidden_size) == (tiny.VOCAB, 1, 32)
