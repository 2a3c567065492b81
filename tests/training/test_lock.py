"""One run a folder."""

import errno
import fcntl
import os
import socket
import subprocess
import sys
import threading

import pytest

from longspan.errors import UserError
from longspan.training import lock

#: holds a folder, hands the lock to a child, and waits for its input
HOLDER = """
import subprocess, sys
from pathlib import Path
from longspan.training.lock import hold
with hold(Path(sys.argv[1])) as lock:
    child = subprocess.Popen(["sleep", "600"], pass_fds=[lock])
    print(child.pid, flush=True)
    sys.stdin.readline()
"""


def test_a_second_run_is_refused_with_the_owner(tmp_path):
    with lock.hold(tmp_path / "out") as held:
        assert held is not None
        with pytest.raises(UserError) as refused, lock.hold(tmp_path / "out"):
            pass
        text = f"another run writes there (process {os.getpid()} on host {socket.gethostname()}, since "
        assert text in str(refused.value)
        with lock.hold(tmp_path / "other"):
            pass
    with lock.hold(tmp_path / "out") as again:
        assert again is not None


def test_a_lock_lasts_until_its_last_holder_is_killed(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    child = int(process.stdout.readline())
    process.kill()
    process.wait()
    with pytest.raises(UserError, match=f"process {process.pid} on host"), lock.hold(tmp_path, dying_s=0.2):
        pass
    # a start right after the kill waits for the processes that are still to end
    threading.Timer(0.5, os.kill, (child, 9)).start()
    with lock.hold(tmp_path, dying_s=60.0) as held:
        assert held is not None


def test_a_file_system_without_locks_is_told_of(tmp_path, monkeypatch, capsys):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with lock.hold(tmp_path) as held:
        assert held is None
    assert "its file system has no locks" in capsys.readouterr().err


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write there"), lock.hold(tmp_path / "file"):
        pass


def test_a_refused_run_leaves_no_folder(tmp_path):
    folder = tmp_path / "new" / "out"
    with pytest.raises(UserError, match="a mistake"), lock.hold(folder):
        raise UserError("a mistake")
    assert not list(tmp_path.iterdir())
    with lock.hold(folder):
        (folder / "config.yaml").write_text("")
    assert (folder / "config.yaml").is_file()
    (tmp_path / "empty").mkdir()
    with lock.hold(tmp_path / "empty"):
        pass
    assert (tmp_path / "empty").is_dir()


def test_a_lock_on_a_file_that_is_gone_is_taken_anew(tmp_path, monkeypatch):
    """A run that opens the file just before a refused run takes it away must hold the folder, not the old file."""
    take, times = fcntl.flock, []

    def after_the_other_has_gone(file, operation):
        if not times:
            (tmp_path / "out" / lock.LOCK).unlink()
        times.append(file)
        return take(file, operation)

    monkeypatch.setattr(fcntl, "flock", after_the_other_has_gone)
    with lock.hold(tmp_path / "out"):
        assert len(times) == 2
        with pytest.raises(UserError, match="another run writes there"), lock.hold(tmp_path / "out"):
            pass
