"""Where a rank waited in vain for another: derived from its calls, so that nothing has to record it."""

from __future__ import annotations

import re
import sys
import threading
import time
from collections.abc import Callable, Sequence
from types import CodeType, FrameType, TracebackType

STEP = ("training.trainer", "train_step")
#: function of longspan -> its task, for messages; of several in a stack the innermost one counts
PHASES = {
    ("runs.train", "prepare_together"): "preparing the data",
    ("mesh.mesh", "init_distributed"): "the start, in which the ranks find each other",
    ("mesh.mesh", "build"): "making the groups of ranks",
    ("mesh.mesh", "close_distributed"): "the end of the run",
    ("parallelize", "parallelize"): "making the model",
    ("weights", "load_pretrained"): "loading the base model",
    ("training.optimizer", "gradient_norm"): "the gradient norm",
    ("training.trainer", "resume"): "loading the checkpoint",
    ("training.trainer", "compute_gradients"): "the forward and backward passes",
    ("training.trainer", "apply_gradients"): "the update of the weights",
    STEP: "the end of the step",
    ("training.trainer", "evaluate"): "an evaluation",
    ("training.checkpoint", "save"): "saving a checkpoint",
    ("training.checkpoint", "finish"): "waiting for a checkpoint to be written",
    ("training.checkpoint", "load"): "loading the checkpoint",
    ("training.export", "export"): "the export",
}
#: texts in the errors of gloo, NCCL and torch's store after a time-out
TIMED_OUT = re.compile(r"timed out|timeout|time out", re.IGNORECASE)
#: texts in their errors when the other side has ended; NCCL has many other errors
LOST = re.compile(r"connection|remote process exit|recvValue|sendBytes|Broken pipe", re.IGNORECASE)

Call = tuple[str, str]
"""A function in a stack: its module and its name."""


def timed_out(error: BaseException) -> bool:
    """Whether an exchange with another rank ended by a time-out."""
    return isinstance(error, RuntimeError) and bool(TIMED_OUT.search(str(error)))


def lost(error: BaseException) -> bool:
    """Whether an exchange ended because another rank has ended."""
    # NCCL has many texts for it, and an exception of its own.
    nccl = any(kind.__name__ == "DistBackendError" for kind in type(error).__mro__)
    return isinstance(error, RuntimeError) and (nccl or bool(LOST.search(str(error))))


def calls_of(trace: TracebackType | None) -> list[Call]:
    """The calls that an exception passed through, outermost first."""
    calls = []
    while trace is not None:
        calls.append(_call(trace.tb_frame, trace.tb_frame.f_code))
        trace = trace.tb_next
    return calls


def calls_in(frame: FrameType | None) -> list[Call]:
    """The present calls of a thread, outermost first."""
    calls = []
    while frame is not None:
        calls.append(_call(frame, frame.f_code))
        frame = frame.f_back
    return calls[::-1]


def _call(frame: FrameType, code: CodeType) -> Call:
    return frame.f_globals.get("__name__", ""), code.co_name


def place(calls: Sequence[Call], step: int | None, unknown: str = "an exchange") -> str:
    """The step, the phase and the exchange that these calls belong to, as far as they show it.

    Args:
        step: number of finished optimizer steps; None before there is a trainer.
        unknown: text for the phase if the calls belong to none.
    """
    known = [
        ((module.removeprefix("longspan."), name), PHASES[module.removeprefix("longspan."), name])
        for module, name in calls
        if module.startswith("longspan.") and (module.removeprefix("longspan."), name) in PHASES
    ]
    phase = known[-1][1] if known else unknown
    keys = [key for key, _ in known]
    where = phase
    if step is not None and STEP in keys:
        # A step's own work comes after the step has been counted.
        where = f"step {step if keys[-1] == STEP else step + 1}, {phase}"
    elif step is not None:
        where = f"{phase}, after step {step}"
    exchange = _exchange(calls)
    return f"{where} ({exchange})" if exchange else where


def _exchange(calls: Sequence[Call]) -> str | None:
    """The exchange that these calls belong to: torch.distributed's name, or a name of what is sent."""
    names = [name for module, name in calls if module == "torch.distributed.distributed_c10d"]
    public = next((name for name in names if not name.startswith("_")), None)
    if public is None and ("longspan.context_parallel.move_keys", "wait") in calls:
        return "keys and values of other ranks"
    return public


class Watch:
    """Follows where this rank is, and prints it when it has been in one place for the time-out.

    NCCL needs the message, because it then ends the process without an exception. The launcher needs the place
    of a rank that does not answer.

    Args:
        seconds: ddp_timeout.
        rank: this rank, for the message.
        step: returns the number of finished optimizer steps.
        look: seconds between two checks.
        put_place: takes this rank's place when it changes.
        waited: called with the place when this rank has waited for the time-out. None does not look for that: gloo
            raises an exception, which has a message of its own.
    """

    def __init__(
        self,
        seconds: float,
        rank: int,
        step: Callable[[], int | None],
        look: float = 1.0,
        put_place: Callable[[str], None] = lambda place: None,
        waited: Callable[[str], None] | None = lambda place: None,
    ):
        self.seconds, self.rank, self.step, self.look = seconds, rank, step, look
        self.put_place, self.waited = put_place, waited
        self.ended = threading.Event()
        self.main = threading.main_thread().ident
        threading.Thread(target=self._watch, name="watch", daemon=True).start()

    def _watch(self) -> None:
        since, before, told, waits = time.monotonic(), None, False, False
        message = ""
        while not self.ended.wait(self.look):
            assert self.main is not None
            calls = calls_in(sys._current_frames().get(self.main))
            now = (place(calls, self.step(), "one place"), self.step())
            if now != before:
                since, before, told = time.monotonic(), now, False
                self.put_place(now[0])
                # Only an exchange waits for another rank; a long step, a compilation or a big save does not.
                waits = _exchange(calls) is not None
                if waits:
                    message = late(self.rank, now[0], self.seconds)
                else:
                    message = f"rank {self.rank} has been in {now[0]} for {self.seconds:g} s (ddp_timeout)"
            elif self.waited and not told and time.monotonic() - since >= self.seconds:
                told = True
                if waits:
                    self.waited(now[0])
                print(f"longspan: {message}", file=sys.stderr, flush=True)

    def close(self) -> None:
        self.ended.set()


def late(rank: int, where: str, seconds: float) -> str:
    """The message of a rank that waited in vain."""
    return (
        f"rank {rank} waited {seconds:g} s (ddp_timeout) for another rank in {where}. Look at the rank that is late: stopped, "
        "hung, or its machine slow or gone. Where one step takes that long, raise ddp_timeout."
    )
