"""The machines of a run: their launchers meet before every attempt, and notice when another one needs a new one.

Several machines meet through torch elastic's rendezvous (``c10d``), in the store of machine 0: it keeps a list of
the launchers that are there, strikes one off that has been silent for 15 seconds, and takes one back that was
started again. Machine 0 has the store, so a run ends with its launcher.
"""

from __future__ import annotations

import contextlib
import datetime
import sys
import threading
import time
import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from longspan.errors import NotReached, UserError
from longspan.runs.environment import RUN_ID
from longspan.runs.notes import within
from longspan.training.stopping import Heard

if TYPE_CHECKING:
    from torch.distributed import Store

LOOK_S = 1.0
#: seconds in which a launcher answers one that wants its number
ANSWER_S = 5.0
#: seconds of silence after which machine 0 is said to be gone
SILENT_S = 30.0


class Machines(Protocol):
    """What the launcher of one machine needs to know of the others."""

    def meet(self, asked: Heard) -> int | None:
        """Waits until all machines are there. Returns the number of this attempt, from 0, the same on all.

        Returns None if a signal has asked to stop meanwhile, or if another launcher has ended the run.

        Raises:
            NotReached: a machine does not come, or machine 0 has ended.
        """

    def elsewhere(self) -> str:
        """Why the ranks of another machine have ended, "" while they run."""

    def close(self) -> None:
        """Ends the run for all machines."""


class OneMachine:
    """A machine alone."""

    def __init__(self) -> None:
        self.attempts = 0

    def meet(self, asked: Heard) -> int | None:
        self.attempts += 1
        return self.attempts - 1

    def elsewhere(self) -> str:
        return ""

    def close(self) -> None:
        pass


class SeveralMachines:
    """The launcher of one machine among several.

    Args:
        store: the store of machine 0.
        number, machines: this machine, from 0, and their number.
        wait_s: seconds to wait for the others.

    Raises:
        UserError: a launcher that runs has the same number.
    """

    def __init__(self, store: Store, number: int, machines: int, wait_s: float):
        from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
        from torch.distributed.elastic.rendezvous.dynamic_rendezvous import (
            DynamicRendezvousHandler,
            RendezvousTimeout,
        )

        self.store, self.number, self.machines, self.wait_s = store, number, machines, wait_s
        self.handler = DynamicRendezvousHandler.from_backend(
            RUN_ID,
            store,
            C10dRendezvousBackend(store, RUN_ID),
            machines,
            machines,
            local_addr=f"machine-{number}",
            timeout=RendezvousTimeout(join=datetime.timedelta(seconds=wait_s)),
        )
        self.name = uuid.uuid4().hex
        self.why, self.meetings = "", 0
        # True while the ranks run, when the others' launchers are watched.
        self.watching = False
        self._take_number()
        self.answered = time.monotonic()
        threading.Thread(target=self._follow, name="machines", daemon=True).start()

    def meet(self, asked: Heard) -> int | None:
        from torch.distributed import DistNetworkError, DistStoreError
        from torch.distributed.elastic.rendezvous import (
            RendezvousClosedError,
            RendezvousError,
            RendezvousTimeoutError,
        )

        self.watching, self.why = False, ""
        self.meetings += 1
        if self.meetings > 1:
            text = f"waiting for all {self.machines} machines, at most {self.wait_s:g} s"
            print(f"longspan: {text}", file=sys.stderr, flush=True)
        try:
            attempt = _while_nobody_asks(self._join, asked, self.wait_s + SILENT_S)
        except RendezvousClosedError:
            self.why = "the launcher of another machine has ended the run"
            return None
        except (RendezvousTimeoutError, DistStoreError):
            raise NotReached(
                f"machine {self.number} did not find all {self.machines} machines within {self.wait_s:g} s. Start the same command on "
                "every machine, each with its own --machine-rank."
            ) from None
        except TimeoutError:
            text = f"machine 0 has not answered for {self.wait_s:g} s. Look at its launcher, and start the run again."
            raise NotReached(text) from None
        except (RendezvousError, DistNetworkError) as error:
            why = str(error).partition("\n")[0]
            raise NotReached(f"machine 0 has ended the run, or cannot be reached any more ({why}).") from None
        self.watching = True
        return attempt

    def _join(self) -> int:
        """The number of the attempt, once all machines are there."""
        info = self.handler.next_rendezvous()
        if self.number == 0:
            info.store.set("attempt", str(self.store.add("longspan/attempts", 1) - 1))
        return int(info.store.get("attempt"))

    def _take_number(self) -> None:
        """Takes this machine's number, unless its holder answers that it is still there."""
        key = f"longspan/launcher/{self.number}"
        if self.store.compare_set(key, "", self.name).decode() == self.name:
            return
        self.store.set(f"{key}/question", self.name)
        until = time.monotonic() + ANSWER_S
        while time.monotonic() < until:
            if self.store.check([f"{key}/answer"]) and self.store.get(f"{key}/answer").decode() == self.name:
                raise UserError(
                    f"--machine-rank {self.number}: another launcher of this run has this number. Give each machine its own."
                )
            time.sleep(0.1)
        self.store.set(key, self.name)

    def _follow(self) -> None:
        """Answers launchers that want this machine's number, and watches the others; until this process ends.

        A store that does not answer blocks whoever asks it, so nobody but this thread does.
        """
        while True:
            try:
                self._answer()
                if self.watching and not self.why:
                    if self.handler.is_closed():
                        self.why = "the launcher of another machine has ended the run"
                    elif self.handler.num_nodes_waiting():
                        self.why = "another machine starts its ranks again"
            except Exception:
                # The store's end is noticed by its silence.
                time.sleep(LOOK_S)
                continue
            self.answered = time.monotonic()
            time.sleep(LOOK_S)

    def _answer(self) -> None:
        """Answers a launcher that asks whether this machine's number is taken."""
        key = f"longspan/launcher/{self.number}"
        if self.store.check([f"{key}/question"]):
            question = self.store.get(f"{key}/question").decode()
            if question != self.name:
                self.store.set(f"{key}/answer", question)

    def elsewhere(self) -> str:
        if not self.why and time.monotonic() - self.answered > SILENT_S:
            self.why = "the launcher of machine 0 does not answer"
        return self.why

    def close(self) -> None:
        # Machine 0 may have ended, and the store with it.
        with contextlib.suppress(TimeoutError):
            within(ANSWER_S, self.handler.set_closed)


def _while_nobody_asks(call: Callable[[], int], asked: Heard, limit_s: float) -> int | None:
    """The result of a call that waits for others, or None once a signal has asked to stop.

    The call runs in a thread, because Python would handle the signal only after it.

    Raises:
        TimeoutError: it has not ended after ``limit_s`` seconds. The store's own calls have no limit where its
            process is stopped.
    """
    until = time.monotonic() + limit_s
    results: list[int] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            results.append(call())
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="rendezvous", daemon=True)
    thread.start()
    while thread.is_alive() and not asked:
        thread.join(0.1)
        if time.monotonic() > until:
            raise TimeoutError
    if errors:
        raise errors[0]
    return results[0] if results else None
