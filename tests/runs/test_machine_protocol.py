"""Checks of several ranks: answers, verdicts, and ranks that fail, wait in vain or give no answer."""

import datetime

import torch
import torch.distributed as dist

import pool
from longspan.mesh.mesh import common_store
from longspan.runs.machine.protocol import Board, Check, Finding, Judge, Limits, Place, RankLost, run_checks

SECONDS = 5.0
SHORT = Limits(margin=0.5)


def place(**changes):
    hosts = tuple(f"node-{rank // 2}" for rank in range(dist.get_world_size()))
    values = {"rank": dist.get_rank(), "hosts": hosts, "device": torch.device("cpu")}
    return Place(**values | {"group": dist.new_group(), "seconds": SECONDS} | changes)


def check(name, measure, judge=None, **options):
    def numbers(values, place):
        return [Finding(name, "ok", f"{values}")]

    return Check(name, measure, judge or numbers, "Look here.", **options)


def run(checks, limits=SHORT, **changes):
    """(findings as (status, name, text), whether a rank hung, names of begun checks) on this rank."""
    began = []
    findings, hung = run_checks(checks, place(**changes), common_store(), limits, began=began.append)
    return [(finding.status, finding.name, finding.text) for finding in findings], hung, began


def of_rank(place):
    return place.rank


def raises_on_one(place):
    if place.rank == 1:
        raise ValueError("no such port\nand more")
    return place.rank


def sums(place):
    x = torch.ones(1)
    dist.all_reduce(x, group=place.group)
    return x.item()


def without_rank_two(place):
    """A collective that rank 2 does not take part in."""
    return sums(place) if place.rank != 2 else None


def judge_that_fails(values, place):
    raise ZeroDivisionError("nothing to divide")


def failures():
    checks = [
        check("fine", of_rank),
        check("raises", raises_on_one, exchanges=False),
        check("still sound", sums, needs_sound=True),
        check("judged badly", of_rank, judge_that_fails),
        check("incomplete", without_rank_two),
        check("a new group", sums),
        check("unsound", of_rank, needs_sound=True),
        check("last", of_rank),
    ]
    return run(checks, group=dist.new_group(timeout=datetime.timedelta(seconds=2)))


def test_a_failure_is_named_by_rank_and_the_checks_go_on_in_a_new_group():
    results = pool.run(3, failures)
    findings, hung, began = results[0]
    assert [(status, name) for status, name, _ in findings] == [
        ("ok", "fine"),
        ("broken", "raises"),
        ("ok", "still sound"),
        ("broken", "judged badly"),
        ("broken", "incomplete"),
        ("ok", "a new group"),
        ("skipped", "unsound"),
        ("ok", "last"),
    ]
    texts = {name: text for _, name, text in findings}
    assert texts["fine"] == "[0, 1, 2]"
    assert texts["raises"] == "rank 1 (node-0): ValueError: no such port"
    assert texts["judged badly"] == "its results cannot be judged: ZeroDivisionError: nothing to divide"
    assert "waited 5 s for another rank in vain" in texts["incomplete"]
    assert "rank 2" not in texts["incomplete"]
    assert texts["a new group"] == "[3.0, 3.0, 3.0]"
    assert texts["unsound"] == "not run: an exchange has failed"
    assert not hung
    assert "unsound" not in began
    # every rank has the same findings, and only the first one hears of beginnings
    assert [result[:2] for result in results] == [results[0][:2]] * 3
    assert [bool(result[2]) for result in results] == [True, False, False]


def stuck_on_one(place):
    """One rank answers only when the first rank has waited in vain."""
    if place.rank == 1:
        assert Board(common_store(), place.rank, place.world).hung(60)
    return place.rank


def one_that_hangs():
    return run([check("fine", of_rank), check("stuck", stuck_on_one, seconds=2), check("never", of_rank)])


def test_a_rank_without_an_answer_is_named_and_the_checks_end():
    for findings, hung, _ in pool.run(3, one_that_hangs):
        assert hung
        assert findings == [
            ("ok", "fine", "[0, 1, 2]"),
            ("broken", "stuck", "rank 1 (node-0): gave no answer"),
            ("skipped", "never", "not run: the checks ended before it"),
        ]


def one_that_comes_late():
    """A rank that stops before a check in which the others wait for it, as NCCL does: without an error."""
    checks = [check("fine", of_rank), check("late", waits_for_the_end, seconds=2)]
    if dist.get_rank() != 1:
        return run(checks)
    here, board = place(), Board(common_store(), 1, 3)
    board.begin(0)
    board.answer(0, {"value": 1})
    assert board.hung(60)
    return here.rank


def waits_for_the_end(place):
    return Board(common_store(), place.rank, place.world).hung(60)


def test_a_rank_that_has_not_begun_is_named_before_those_that_wait_for_it():
    (findings, hung, _), *_ = pool.run(3, one_that_comes_late)
    assert hung
    text = "rank 1 (node-0): did not begin; rank 0 (node-0), rank 2 (node-1): gave no answer"
    assert findings == [("ok", "fine", "[0, 1, 2]"), ("broken", "late", text)]


def first_rank_that_hangs():
    """The first rank takes part in nothing."""
    if dist.get_rank() == 0:
        place()
        return None
    try:
        run([check("fine", of_rank, seconds=0.1)])
    except RankLost as error:
        return str(error)


def test_a_first_rank_that_gives_no_verdict_is_named_by_the_others():
    _, message = pool.run(2, first_rank_that_hangs)
    assert message.startswith("rank 1 (node-0): rank 0 (node-0) gave no verdict on fine within 2 s. Look at")


def too_late():
    return run([check("first", of_rank), check("second", of_rank)], Limits(whole=1.0))


def test_no_check_begins_that_could_end_too_late():
    (findings, hung, _), _ = pool.run(2, too_late)
    assert not hung
    assert findings[0] == ("ok", "first", "[0, 1]")
    assert findings[1][:2] == ("skipped", "second")
    assert findings[1][2].endswith("and it could end after 1 s")


def test_on_a_gpu_no_exchange_follows_a_failed_one():
    """Its streams may wait forever for what has failed."""
    on_gpu = Place(0, ("a",), torch.device("cuda"), None, SECONDS)
    judge = Judge([], on_gpu, None, Limits(), print, print)
    judge.sound = False
    assert "cannot be trusted" in judge.reason_to_skip(check("exchange", of_rank))
    assert judge.reason_to_skip(check("kernel", of_rank, exchanges=False)) is None


def test_many_ranks_are_counted_instead_of_named():
    many = Place(0, ("a",) * 9, torch.device("cpu"), None, SECONDS)
    assert many.named([2, 3]) == "rank 2 (a), rank 3 (a)"
    assert many.named(range(9)) == "rank 0 (a), rank 1 (a), rank 2 (a), rank 3 (a), 5 more"
