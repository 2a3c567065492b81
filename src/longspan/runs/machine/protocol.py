"""Checks that all ranks run together, of which the first rank judges the answers.

    every rank    measure (exchange, compute)    -> answer            -> store
    first rank    the answers of all ranks       -> findings, verdict -> store
    every rank    verdict                        -> next check, or the end

Answers and verdicts travel through the store in which the ranks found each other, never through the groups
that are checked. So a broken or hanging exchange cannot keep the first rank from naming it: a rank that has
not answered in time is named with its host, and the checks end.
"""

from __future__ import annotations

import datetime
import json
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import torch.distributed as dist

from longspan.training.waiting import timed_out

Status = Literal["ok", "slow", "wrong", "broken", "absent", "skipped"]
#: the results with which the check of the machines fails
FAILED: tuple[Status, ...] = ("wrong", "broken")
#: ranks that a message names; of more ranks it has the number
NAMED = 4
NO_ANSWER = "gave no answer"


@dataclass(frozen=True)
class Finding:
    """What one check has found.

    Attributes:
        name: the exchange, kernel, link or rank.
        status: ``ok``; ``slow``, a warning; ``wrong``, a result differs from the known one; ``broken``, it
            raised an error or gave no answer; ``absent``, it is not installed; ``skipped``, it was not run.
        text: figures, or what was found.
        remedy: what to look at; empty if there is nothing to do.
        figures: the numbers behind the text, for JSON.
    """

    name: str
    status: Status
    text: str
    remedy: str = ""
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Place:
    """A rank of the check.

    Attributes:
        hosts: the host name of each rank.
        group: all ranks.
        seconds: how long an exchange in the group waits for an answer.
    """

    rank: int
    hosts: tuple[str, ...]
    device: torch.device
    group: dist.ProcessGroup
    seconds: float

    @property
    def world(self) -> int:
        return len(self.hosts)

    def named(self, ranks: Iterable[int]) -> str:
        """For example ``rank 1 (node-a), rank 2 (node-a)``."""
        ranks = list(ranks)
        names = [f"rank {rank} ({self.hosts[rank]})" for rank in ranks[:NAMED]]
        more = [f"{len(ranks) - NAMED} more"] if len(ranks) > NAMED else []
        return ", ".join([*names, *more])


@dataclass(frozen=True)
class Check:
    """One check, as a pair of functions.

    Attributes:
        measure: runs on every rank and returns what JSON can hold. If it raises, it is broken on that rank.
        judge: runs on the first rank, with the results by rank and its Place; returns the findings.
        remedy: what to look at if a rank raises an error or gives no answer.
        seconds: how long a rank may take; None is twice the time-out of an exchange.
        exchanges: the ranks exchange data, so that one rank's failure can be the cause of another's.
        needs_sound: it is not run after a failed exchange.
    """

    name: str
    measure: Callable[[Place], Any]
    judge: Callable[[list[Any], Place], list[Finding]]
    remedy: str
    seconds: float | None = None
    exchanges: bool = True
    needs_sound: bool = False


@dataclass(frozen=True)
class Verdict:
    """What the first rank publishes after a check.

    Attributes:
        findings: of this check, and of those that are skipped after it.
        following: the number of the next check; the number of all checks at the end.
        new_group: the ranks make a new group first, because an exchange has failed in the old one.
        hung: a rank has given no answer, so the checks end.
    """

    findings: list[Finding]
    following: int
    new_group: bool = False
    hung: bool = False

    def to_json(self) -> str:
        return json.dumps({**vars(self), "findings": [vars(finding) for finding in self.findings]})

    @classmethod
    def from_json(cls, text: str | bytes) -> Verdict:
        values = json.loads(text)
        return cls(**values | {"findings": [Finding(**finding) for finding in values["findings"]]})


@dataclass(frozen=True)
class Limits:
    """How long checks may take, in seconds.

    Attributes:
        whole: no check begins that could end later than this, from the first check on.
        margin: how long the first rank waits for answers beyond a check's own time.
    """

    whole: float = 240.0
    margin: float = 5.0


class RankLost(RuntimeError):
    """Another rank, without which this one cannot go on, gives no answer."""


class Board:
    """Answers and verdicts in the store. Each thread needs a Board of its own.

    Args:
        store: is cloned, because a connection to the store serves one waiting thread at a time.
    """

    def __init__(self, store: dist.Store, rank: int, world: int):
        # Torch's stubs do not have this method.
        own = store.clone()  # type: ignore[attr-defined]
        self.store = dist.PrefixStore("longspan/check", own)
        self.rank, self.world = rank, world

    def begin(self, number: int) -> None:
        self.store.set(f"{number}/begun/{self.rank}", "")

    def answer(self, number: int, answer: dict) -> None:
        self.store.set(f"{number}/{self.rank}", json.dumps(answer))

    def answers(self, number: int, seconds: float) -> list[dict]:
        """The answers of all ranks to a check.

        A rank that has not answered in ``seconds`` has ``missing`` instead, a text. One that has not even begun
        the check is the reason why others wait in it.
        """
        self._wait([f"{number}/{rank}" for rank in range(self.world)], seconds)
        answers = []
        for rank in range(self.world):
            if self.store.check([f"{number}/{rank}"]):
                answers.append(json.loads(self.store.get(f"{number}/{rank}")))
            else:
                begun = self.store.check([f"{number}/begun/{rank}"])
                answers.append({"missing": NO_ANSWER if begun else "did not begin"})
        return answers

    def publish(self, number: int, verdict: Verdict) -> None:
        self.store.set(f"{number}", verdict.to_json())
        if verdict.hung:
            self.store.set("hung", "")

    def verdict(self, number: int, seconds: float) -> Verdict | None:
        """The verdict on a check; None if the first rank has not published it in ``seconds``."""
        name = f"{number}"
        return Verdict.from_json(self.store.get(name)) if self._wait([name], seconds) else None

    def shared(self, name: str, value: str, seconds: float = 60.0) -> list[str]:
        """Every rank gives a text, and gets those of all ranks.

        Raises:
            RankLost: a rank has given none in ``seconds``.
        """
        names = [f"{name}/{rank}" for rank in range(self.world)]
        self.store.set(names[self.rank], value)
        if not self._wait(names, seconds):
            late = [str(rank) for rank, other in enumerate(names) if not self.store.check([other])]
            raise RankLost(f"rank {self.rank}: rank {', '.join(late)} gave no answer within {seconds:.0f} s.")
        return [self.store.get(other).decode() for other in names]

    def end(self, seconds: float = 10.0) -> None:
        """Ends the use of the store. The first rank, whose launcher may hold the store, waits for the others."""
        names = [f"end/{rank}" for rank in range(self.world)]
        self.store.set(names[self.rank], "")
        if self.rank == 0:
            self._wait(names, seconds)

    def hung(self, seconds: float) -> bool:
        """Waits until the checks end because a rank gave no answer; False if they have not in ``seconds``."""
        return self._wait(["hung"], seconds)

    def _wait(self, names: list[str], seconds: float) -> bool:
        try:
            self.store.wait(names, datetime.timedelta(seconds=max(seconds, 0.001)))
        except RuntimeError as error:
            # The kinds of stores raise different errors for a time-out.
            if isinstance(error, dist.DistNetworkError) or not timed_out(error):
                raise
            return False
        return True


def run_checks(
    checks: Sequence[Check],
    place: Place,
    store: dist.Store,
    limits: Limits = Limits(),
    began: Callable[[str], None] = lambda name: None,
    found: Callable[[Finding], None] = lambda finding: None,
) -> tuple[list[Finding], bool]:
    """Runs all checks on this rank; collective.

    Args:
        checks: the same on every rank.
        store: the ranks' common store.
        began: called on the first rank with the name of each check.
        found: called on the first rank with each finding.

    Returns:
        All findings, the same on every rank; and whether the checks ended because a rank gave no answer.

    Raises:
        RankLost: the first rank publishes no verdict.
    """
    findings: list[Finding] = []
    judge = Judge(checks, place, Board(store, 0, place.world), limits, began, found)
    # Another thread judges, because this one may hang in an exchange.
    thread = threading.Thread(target=judge.run, name="judge", daemon=True)
    if place.rank == 0:
        thread.start()
    board, number, new_group, hung = Board(store, place.rank, place.world), 0, False, False
    while number < len(checks):
        check = checks[number]
        board.begin(number)
        answer, place = attempt(check, place, new_group)
        board.answer(number, answer)
        patience = seconds_of(check, place) + 4 * limits.margin
        verdict = board.verdict(number, patience)
        if verdict is None:
            raise RankLost(
                f"{place.named([place.rank])}: {place.named([0])} gave no verdict on {check.name} within {patience:.0f} s. "
                "Look at its machine, and at the connection to it."
            )
        findings += verdict.findings
        number, new_group, hung = verdict.following, verdict.new_group, verdict.hung
    if place.rank == 0:
        thread.join()
    return findings, hung


def attempt(check: Check, place: Place, new_group: bool) -> tuple[dict, Place]:
    """Runs a check on this rank. Returns its value or its error, and the Place with its group."""
    try:
        if new_group:
            wait = datetime.timedelta(seconds=place.seconds)
            place = replace(place, group=dist.new_group(timeout=wait))
        return {"value": check.measure(place)}, place
    except Exception as error:
        if timed_out(error):
            return {"error": f"waited {place.seconds:g} s for another rank in vain", "waited": True}, place
        line = str(error).partition("\n")[0][:300]
        return {"error": f"{type(error).__name__}: {line}", "waited": False}, place


def seconds_of(check: Check, place: Place) -> float:
    """How long a rank may take for a check, in seconds."""
    return 2 * place.seconds if check.seconds is None else check.seconds


class Judge:
    """The first rank's thread: it collects answers, judges them and publishes verdicts.

    Args:
        board: of this thread.
        began, found: see :func:`run_checks`.
    """

    def __init__(
        self,
        checks: Sequence[Check],
        place: Place,
        board: Board,
        limits: Limits,
        began: Callable[[str], None],
        found: Callable[[Finding], None],
    ):
        self.checks, self.place, self.board, self.limits = checks, place, board, limits
        self.began, self.found = began, found
        self.sound, self.start = True, time.monotonic()

    def run(self) -> None:
        number = 0
        while number < len(self.checks):
            check = self.checks[number]
            self.began(check.name)
            answers = self.board.answers(number, seconds_of(check, self.place) + self.limits.margin)
            findings = self.judge(check, answers)
            hung = any("missing" in answer for answer in answers)
            failed = check.exchanges and not all("value" in answer for answer in answers)
            self.sound = self.sound and not failed
            following = len(self.checks)
            for later in range(number + 1, len(self.checks)):
                reason = "the checks ended before it" if hung else self.reason_to_skip(self.checks[later])
                if reason is None:
                    following = later
                    break
                findings.append(Finding(self.checks[later].name, "skipped", f"not run: {reason}"))
            for finding in findings:
                self.found(finding)
            new_group = failed and self.place.device.type == "cpu"
            self.board.publish(number, Verdict(findings, following, new_group, hung))
            number = following

    def judge(self, check: Check, answers: list[dict]) -> list[Finding]:
        """The findings of one check: of its errors and missing answers, or else of its results."""
        if all("value" in answer for answer in answers):
            try:
                return check.judge([answer["value"] for answer in answers], self.place)
            except Exception as error:
                text = f"its results cannot be judged: {type(error).__name__}: {error}"
                return [Finding(check.name, "broken", text, check.remedy)]
        ranks: dict[str, list[int]] = defaultdict(list)
        for rank, answer in enumerate(answers):
            if "value" not in answer:
                ranks[answer.get("missing") or answer["error"]].append(rank)
        # A rank that has waited has waited for one with another failure, which is named first.
        waited = {NO_ANSWER, *(answer["error"] for answer in answers if answer.get("waited"))}
        texts = sorted(ranks, key=lambda text: text in waited)
        text = "; ".join(f"{self.place.named(ranks[text])}: {text}" for text in texts)
        return [Finding(check.name, "broken", text, check.remedy)]

    def reason_to_skip(self, check: Check) -> str | None:
        """Why a check is not run; None if it is."""
        if not self.sound and check.needs_sound:
            return "an exchange has failed"
        if not self.sound and check.exchanges and self.place.device.type != "cpu":
            return "an exchange has failed, after which this device's exchanges cannot be trusted"
        elapsed = time.monotonic() - self.start
        if elapsed + seconds_of(check, self.place) > self.limits.whole:
            return f"{elapsed:.0f} s have passed, and it could end after {self.limits.whole:.0f} s"
        return None
