"""Calls within limits: what a function returns and raises comes back, what runs for ever does not."""

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from chats import chat
from longspan.data import limited as module
from longspan.data.chat import ChatTemplate
from longspan.data.limited import LimitError, limited
from longspan.data.templates import TEMPLATES
from longspan.data.turns import Turns
from longspan.errors import UserError

CHATML = TEMPLATES["chatml"]


def add(a, b):
    return a + b


def fail(error):
    raise error


def loop():
    while True:
        pass


def one_long_operation():
    return len(str(7 ** (10**9)))


def much_memory():
    return len(bytearray(1 << 40))


class Strange(Exception):
    def __init__(self, one, two):
        super().__init__(one)


def test_results_and_exceptions_come_back():
    assert limited(add, "a", "b\ud800") == "ab\ud800"
    process = limited(os.getpid)
    assert process != os.getpid()
    with pytest.raises(KeyError, match="x"):
        limited(fail, KeyError("x"))
    with pytest.raises(RecursionError):
        limited(fail, RecursionError())
    with pytest.raises(RuntimeError, match="Strange"):  # its pickle cannot be read
        limited(make_strange)
    assert limited(os.getpid) == process


def make_strange():
    raise Strange(1, 2)


@pytest.mark.parametrize("function", [loop, one_long_operation])
@pytest.mark.parametrize("thread", [False, True])
def test_what_runs_for_ever_is_ended(function, thread):
    with ThreadPoolExecutor(1) as pool:
        with pytest.raises(LimitError, match=r"more than 0.3 seconds of computing, .* look for a loop"):
            if thread:
                pool.submit(limited, function, seconds=0.3).result()
            limited(function, seconds=0.3)
        assert pool.submit(limited, add, 1, 2).result() == 3


def test_too_much_memory_is_refused():
    with pytest.raises(LimitError, match=r"^it took more than 2 GiB of memory$"):
        limited(much_memory)
    with pytest.raises(LimitError, match=r"^the process that ran it ended with code 3$"):
        limited(os._exit, 3)
    assert limited(add, 1, 2) == 3


def test_an_interrupt_leaves_no_process_behind():
    limited(add, 1, 2)
    process = module._state.process
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        limited(loop, seconds=60.0)
    assert process.returncode is not None  # it was waited for


def test_threads_take_turns():
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda i: limited(add, i, i), range(100))) == [2 * i for i in range(100)]


def test_a_process_that_ended_is_started_again():
    first = limited(os.getpid)
    process = module._state.process
    process.stdin.close()
    process.wait()
    assert limited(os.getpid) != first


def test_a_fork_has_a_process_of_its_own():
    own = limited(os.getpid)
    read, write = os.pipe()
    if not (child := os.fork()):
        os.write(write, str(limited(os.getpid)).encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert int(os.read(read, 100)) != own
    assert limited(os.getpid) == own


def test_nothing_outlives_its_caller():
    code = "import os; from longspan.data.limited import limited; print(limited(os.getpid), flush=True); os.kill(os.getpid(), 9)"
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    found = int(subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True).stdout)
    for _ in range(1000):
        try:
            os.kill(found, 0)
        except ProcessLookupError:
            return
        with open(f"/proc/{found}/stat") as file:  # a zombie that nobody waits for has ended too
            if file.read().rpartition(")")[2].split()[0] == "Z":
                return
        time.sleep(0.01)
    pytest.fail(f"process {found} is still there")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}" + CHATML,
            "more than 0.3 seconds",
        ),
        ("{{ (messages | length) ** (10 ** 10) }}{{ 3 ** (10 ** 10) }}", "more than 0.3 seconds"),
        ("{{ messages[0].content * 10 ** 11 }}", "more than 2 GiB"),
        ("{% set x = ['a'] %}" + "{% set x = [x, x] %}" * 40 + "{{ x }}", "more than 0.3 seconds"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{" + "(" * 5000 + "1" + ")" * 5000 + "}}", "cannot be compiled"),
        ("{% for i in messages %}" * 40 + "{% endfor %}" * 40, "cannot be compiled"),
        ("a" * 300_000, "300,000 characters; a template has 200,000 at most"),
    ],
)
def test_an_endless_template_is_refused(template, message):
    with pytest.raises(UserError, match=f"chat template some.*{message}"):
        found = ChatTemplate("some", template, {}, seconds=0.3)
        found.check()
        Turns(found).find(chat("a", "b"), [False, True])


def test_a_template_of_a_stranger_gives_what_a_bundled_one_gives():
    messages = chat("a", "b", "c", "d")
    own = Turns(ChatTemplate("own", CHATML, {})).find(messages, [False, True] * 2)
    other = ChatTemplate("other", CHATML + "{# of a stranger #}", {})
    other.check()
    assert Turns(other).find(messages, [False, True] * 2) == own
