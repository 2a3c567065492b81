"""A launcher and its ranks: signals, failures, ends. The ranks are small scripts without torch."""

import os
import signal
import socket
import subprocess
import sys
import types
from pathlib import Path

import pytest

from longspan.cli import main
from longspan.errors import UserError
from longspan.runs import ranks

#: runs one script a rank
LAUNCHER = """
import os, signal, sys
from longspan.runs import ranks
ranks.GRACE_S = 0.5
for name in {ignored}:
    signal.signal(name, signal.SIG_IGN)
sources = {sources}
environments = {{rank: dict(os.environ, SOURCE=source) for rank, source in enumerate(sources)}}
command = [sys.executable, "-c", "import os; exec(os.environ['SOURCE'])"]
with ranks.listening() as asked:
    sys.exit(ranks.report(ranks.run_together(command, environments, [], asked)))
"""
#: says who it is, and ends with code 1 a while after a signal, as a step takes its time
RANK = r"""
import os, signal, time
got = []
for name in ("SIGTERM", "SIGINT", "SIGHUP"):
    if signal.getsignal(getattr(signal, name)) is not signal.SIG_IGN:
        signal.signal(getattr(signal, name), lambda n, _: got.append(n))
os.write(1, b"rank %d\n" % os.getpid())
while not got or {deaf}:
    time.sleep(0.01)
os.write(1, b"saved after %s\n" % signal.Signals(got[0]).name.encode())
os._exit(1)
"""
#: writes a file some time after a signal
LEAVES_A_FILE = r"""
import os, signal, time
got = []
signal.signal(signal.SIGHUP, lambda n, _: got.append(n))
os.write(1, b"rank %d\n" % os.getpid())
while not got:
    time.sleep(0.01)
time.sleep(0.5)
open({path!r}, "w").write("saved")
os._exit(1)
"""


#: launchers that tests have started
STARTED: list[subprocess.Popen] = []


class Launcher:
    def __init__(self, *sources, ignored=()):
        source = LAUNCHER.format(sources=list(sources), ignored=[int(n) for n in ignored])
        self.process = subprocess.Popen(
            [sys.executable, "-c", source],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        STARTED.append(self.process)

    def lines(self, count):
        return [self.process.stdout.readline().split() for _ in range(count)]

    def end(self):
        out, err = self.process.communicate(timeout=60)
        return self.process.returncode, out, err


@pytest.fixture(autouse=True)
def _ends_what_is_left():
    yield
    while STARTED:
        process = STARTED.pop()
        if process.poll() is None:  # two signals end the ranks too
            process.send_signal(signal.SIGTERM)
            process.send_signal(signal.SIGINT)
            process.wait(30)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_is_handed_on_and_waited_for(number):
    launcher = Launcher(RANK.format(deaf=False), RANK.format(deaf=False))
    launcher.lines(2)
    launcher.process.send_signal(number)
    code, out, err = launcher.end()
    assert code == 1
    assert out == 2 * f"saved after {number.name}\n"
    assert err == (
        f"longspan: {number.name}: waiting for the ranks; a second signal stops them at once\n"
        f"longspan: stopped by signal {number.name}\n"
    )


def test_a_second_signal_kills_ranks_that_do_not_end():
    launcher = Launcher(RANK.format(deaf=True), RANK.format(deaf=True))
    pids = [int(pid) for _, pid in launcher.lines(2)]
    launcher.process.send_signal(signal.SIGTERM)
    launcher.process.stderr.readline()
    launcher.process.send_signal(signal.SIGINT)
    code, _, err = launcher.end()
    assert code == 1
    assert "stopped at once by a second signal, SIGINT" in err
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_launcher_whose_reader_has_gone_waits_for_its_ranks(tmp_path):
    """``2>&1 | tee log``: Ctrl-C ends tee too, and the launcher's own line once ended it and killed the ranks."""
    launcher = Launcher(LEAVES_A_FILE.format(path=str(tmp_path / "file")))
    launcher.lines(1)
    launcher.process.stdout.close()
    launcher.process.stderr.close()
    # the same signal again at once is not a second one
    launcher.process.send_signal(signal.SIGHUP)
    os.kill(launcher.process.pid, signal.SIGHUP)
    assert launcher.process.wait(60) == 1
    assert (tmp_path / "file").read_text() == "saved"


def test_a_hangup_that_is_ignored_at_the_start_is_not_handed_on():
    launcher = Launcher(RANK.format(deaf=False), ignored=[signal.SIGHUP])
    ((_, pid),) = launcher.lines(1)
    launcher.process.send_signal(signal.SIGHUP)
    os.kill(int(pid), signal.SIGHUP)
    launcher.process.send_signal(signal.SIGTERM)
    code, out, _ = launcher.end()
    assert (code, out) == (1, "saved after SIGTERM\n")


def test_a_mistake_ends_the_others_at_once_with_its_code():
    launcher = Launcher("import os; os._exit(2)", RANK.format(deaf=True))
    assert launcher.end()[0] == 2


def test_what_failed_is_named_and_not_what_the_launcher_ended():
    launcher = Launcher(
        RANK.format(deaf=True), "import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "import time"
    )
    code, _, err = launcher.end()
    assert code == 1
    assert err == "longspan: rank 1 was ended by SIGKILL (out of memory?); the other ranks were stopped.\n"
    launcher = Launcher(RANK.format(deaf=True), "import os; os._exit(1)")
    code, _, err = launcher.end()
    assert code == 1
    assert err == "longspan: rank 1 failed with exit code 1; its own message is above.\n"


def test_success_is_the_success_of_all():
    assert Launcher("", "").end() == (0, "", "")


def listening(port):
    """The local addresses that listen on a port, as the kernel writes them."""
    found = set()
    for name in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(name).read_text().splitlines()[1:]:
            address, state = line.split()[1], line.split()[3]
            if state == "0A" and int(address.rpartition(":")[2], 16) == port:
                found.add(address.rpartition(":")[0])
    return found


LOOPBACK = "0100007F"


@pytest.mark.parametrize(
    ("ip", "machines", "expected"),
    [
        ("127.0.0.1", 1, {LOOPBACK}),
        ("10.255.255.1", 1, {LOOPBACK}),  # of one machine the address means nothing
        ("127.0.0.1", 2, {LOOPBACK}),
        ("localhost", 2, {"00000000"}),  # a name for the loopback interface here is another address elsewhere
        ("10.255.255.1", 2, {"00000000"}),  # an address that only others see
    ],
)
def test_the_ranks_store_listens_where_it_has_to(ip, machines, expected):
    store, port = ranks.serve_store(ip, 0, machines)
    assert listening(port) == expected
    del store


def test_a_machine_0_that_is_not_there_is_no_mistake_of_the_input(monkeypatch, capsys):
    """Exit code 2 would keep a cluster from trying again."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    command = types.SimpleNamespace(run=lambda _: ranks.meeting_store("127.0.0.1", port, 2, 1, 0.5))
    monkeypatch.setitem(sys.modules, "meets", command)
    monkeypatch.setitem(main.COMMANDS, "meet", ("meets", ""))
    assert main.main(["meet"]) == 1
    assert f"machine 1 found nobody at 127.0.0.1:{port} within 0.5 s" in capsys.readouterr().err


def test_a_port_that_is_taken_is_refused():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"--main-process-port {port}: cannot listen there"):
            ranks.serve_store("127.0.0.1", port, 1)


@pytest.mark.parametrize(
    ("failures", "expected"),
    [
        ({0: 1, 1: -9}, "rank 1 was ended by SIGKILL (out of memory?)"),
        # NCCL aborts the ranks that wait for a lost one.
        ({0: -6, 1: 1, 2: -6}, "rank 1 failed with exit code 1"),
        ({0: -6, 1: -11}, "rank 1 was ended by SIGSEGV"),
        ({3: 1, 2: 2}, "rank 3 failed with exit code 1"),
        ({0: -6}, "rank 0 was ended by SIGABRT"),
    ],
)
def test_the_failure_that_explains_the_others(failures, expected):
    assert ranks.Ending(failures).describe() == expected
