"""``longspan`` commands as a user meets them, without paying two seconds of imports for each.

    done = run("train", "config.yaml", cwd=folder)       returncode, stdout, stderr
    process = start("train", "config.yaml", cwd=folder)  pid, poll(), wait(); a process group of its own
    process = script("pretrain_gpt.py", "--lr", "1", cwd=folder)   a Python script in the same way

One server process imports what the commands need and forks once for each: working folder, environment, exit code and
output are those of a process of its own. The ranks that a launcher starts are forked too, from the launcher, which
saves the imports of each; with ``new_ranks`` they are started as users' are. So are all other processes. A forked
rank first runs the code in the variable RANK_RUNS_FIRST, with which a test makes it fail.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

#: torch._dynamo is here because DTensor imports it at its first use, which takes as long as all else
SERVED = "torch.distributed.checkpoint torch.distributed.fsdp torch._dynamo longspan.cli.main longspan.runs.session"


#: commands that a test has started; ``end_all`` ends what is left of them
started: list[Command] = []


def end_all() -> None:
    """Kills what a test has left behind, as one that failed does; the ranks end with their launcher."""
    while started:
        process = started.pop()
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)


class Command:
    """A started command; its output is in files until it is read."""

    def __init__(self, arguments, cwd, env, new_ranks=False, script=None):
        self.folder = tempfile.TemporaryDirectory()
        self.arguments = list(map(str, arguments))
        request = {
            "arguments": self.arguments,
            "cwd": str(cwd),
            "env": {**os.environ, "CUDA_VISIBLE_DEVICES": "", **(env or {})},
            "folder": self.folder.name,
            "new_ranks": new_ranks,
            "script": None if script is None else str(script),
        }
        self.pid = _Server.get().fork(request)
        started.append(self)

    def _file(self, name: str) -> str:
        path = Path(self.folder.name, name)
        return path.read_text() if path.exists() else ""

    def poll(self) -> int | None:
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return int(self._file("code") or -signal.SIGKILL)  # one that was killed has left no code
        return None

    def wait(self, timeout: float = 240.0) -> subprocess.CompletedProcess:
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                os.killpg(self.pid, signal.SIGKILL)
                raise TimeoutError(f"{self.arguments} ran over {timeout:.0f} s:\n{self.output}")
            time.sleep(0.01)
        return subprocess.CompletedProcess(
            self.arguments, self.poll(), self._file("stdout"), self._file("stderr")
        )

    @property
    def output(self) -> str:
        return self._file("stdout") + self._file("stderr")


def start(*arguments, cwd, env=None, new_ranks=False) -> Command:
    """Starts ``longspan ARGUMENTS``."""
    return Command(arguments, cwd, env, new_ranks)


def run(*arguments, cwd, env=None, timeout: float = 240.0, new_ranks=False) -> subprocess.CompletedProcess:
    """Runs ``longspan ARGUMENTS`` to its end."""
    return start(*arguments, cwd=cwd, env=env, new_ranks=new_ranks).wait(timeout)


def script(path, *arguments, cwd, env=None) -> Command:
    """Starts a Python script, as ``python PATH ARGUMENTS`` does; it starts no processes once it has computed."""
    return Command(arguments, cwd, env, script=path)


class _Server:
    """The process that forks."""

    one: _Server | None = None

    @classmethod
    def get(cls) -> _Server:
        if cls.one is None or cls.one.process.poll() is not None:
            cls.one = cls()
        return cls.one

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        atexit.register(self.process.kill)

    def fork(self, request: dict) -> int:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())


def _serve() -> None:
    import importlib

    for module in SERVED.split():
        importlib.import_module(module)
    gc.freeze()  # no collection in a forked process looks at, and so copies, what is imported
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for a child: the kernel takes it away
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            _become(json.loads(line))
        print(pid, flush=True)


def _become(request: dict) -> None:
    """The forked child: a ``longspan`` process."""
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    for number, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(os.path.join(request["folder"], name), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        setattr(sys, name, open(number, "w", buffering=1, closefd=False))  # noqa: SIM115
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)

    def main() -> int:
        from longspan.cli import main
        from longspan.runs import ranks

        if request["new_ranks"]:
            return main.main(request["arguments"])
        with mock.patch.object(ranks, "start_rank", ForkedRank):
            if request["script"] is None:
                return main.main(request["arguments"])
            sys.argv = [request["script"], *request["arguments"]]
            runpy.run_path(request["script"], run_name="__main__")
            return 0

    code = _exit_code(main)
    Path(request["folder"], "code").write_text(str(code))
    os._exit(code)


def _exit_code(main) -> int:
    """The exit code of a process that runs ``main``."""
    code = 1
    try:
        code = main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
    return code


class ForkedRank:
    """A rank that a launcher forks instead of starting ``python -m longspan``; the part of Popen that it uses."""

    def __init__(self, command, environment, kept):
        self.args, self.returncode = command, None
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self._become(command[command.index("longspan") + 1 :], environment)

    @staticmethod
    def _become(arguments, environment) -> None:
        # descriptors stay open, not only the kept ones: objects that are copied with the process would close them again
        os.setsid()
        for number in signal.valid_signals():  # as a new program has them: what is not ignored is the default
            if callable(signal.getsignal(number)):
                signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.environ.clear()
        os.environ.update(environment)

        def main() -> int:
            from longspan.cli.main import main

            exec(os.environ.get("RANK_RUNS_FIRST", ""), {})
            return main(arguments)

        os._exit(_exit_code(main))

    def poll(self):
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout):
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(self.args, timeout)
            time.sleep(0.01)
        return self.returncode


if __name__ == "__main__":
    _serve()
