"""Timers of a script: what they add up, and what is printed of all ranks."""

import contextlib
import io
import re
import time

import pytest
import torch.distributed as dist

import pool
from longspan.timers import Timers


def spend(timer, seconds):
    timer.start()
    time.sleep(seconds)
    timer.stop()


def test_a_timer_adds_up_what_lies_between_start_and_stop():
    timer = Timers()("forward")
    spend(timer, 0.02)
    time.sleep(0.05)  # not between
    spend(timer, 0.02)
    first = timer.elapsed(reset=False)
    assert first >= 0.04
    assert timer.elapsed() == first
    assert timer.elapsed() == 0.0
    spend(timer, 0.01)
    timer.reset()
    assert timer.elapsed() == 0.0


def test_a_running_timer_is_read_and_goes_on():
    timer = Timers()("forward")
    timer.start()
    time.sleep(0.01)
    assert timer.elapsed() >= 0.01
    time.sleep(0.01)
    timer.stop()
    assert timer.elapsed() >= 0.01


def test_mistakes_are_refused():
    timers = Timers()
    timer = timers("forward", log_level=1)
    assert timers("forward") is timer
    with pytest.raises(ValueError, match="'forward' has log_level 1, and here 2"):
        timers("forward", log_level=2)
    with pytest.raises(RuntimeError, match="'forward' does not run"):
        timer.stop()
    timer.start()
    with pytest.raises(RuntimeError, match="'forward' runs already"):
        timer.start()
    with pytest.raises(ValueError, match="log_level 3: one of 0, 1, 2"):
        timers("backward", log_level=3)
    with pytest.raises(ValueError, match="timing_log_option 'mean': one of max, minmax, all"):
        Timers(0, "mean")
    with pytest.raises(ValueError, match="normalizer 0"):
        timers.log(normalizer=0)


def test_timers_above_the_level_measure_and_are_not_printed(capsys):
    timers = Timers(log_level=1)
    spend(timers("step", log_level=0), 0.001)
    spend(timers("gradients", log_level=1), 0.001)
    spend(timers("forward"), 0.001)
    timers.log()
    printed = capsys.readouterr().out
    assert "step" in printed
    assert "gradients" in printed
    assert "forward" not in printed
    assert timers("forward").elapsed() >= 0.001
    assert timers("step").elapsed() == 0.0, "it was printed, and so begins anew"


def logs_of_a_rank(option):
    """What a rank prints; rank r runs "forward" for (r + 1) x 20 ms, and rank 0 alone runs "embedding"."""
    timers = Timers(2, option)
    if dist.get_rank() == 0:
        spend(timers("embedding"), 0.01)
    spend(timers("forward"), 0.02 * (dist.get_rank() + 1))
    timers("never")
    printed = []
    for keywords in ({"reset": False}, {"names": ["forward"], "rank": 0, "normalizer": 2}):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            timers.log(**keywords)
        printed.append(out.getvalue())
    return printed, timers("forward").elapsed(), timers("embedding").elapsed()


def number_lists(text):
    return [[float(n) for n in re.findall(r"\d+\.\d\d", line)] for line in text.splitlines()[1:]]


def test_the_last_rank_prints_the_smallest_and_the_largest_time():
    (first, _, embedding), (last, left, _) = pool.run(2, logs_of_a_rank, "minmax")
    assert first[0] == last[1] == ""
    lines = last[0].splitlines()
    assert lines[0] == "(min, max) time across ranks (ms):"
    assert re.fullmatch(r"    embedding \.{38}: \((\d+\.\d\d), \1\)", lines[1]), "on one rank only"
    assert re.fullmatch(r"    forward \.{40}: \(\d+\.\d\d, \d+\.\d\d\)", lines[2])
    assert len(lines) == 3
    least, most = number_lists(last[0])[1]
    assert least >= 20
    assert most >= 40
    assert least < most
    # named, divided, and printed by rank 0
    ((half, half_most),) = number_lists(first[1])
    assert abs(half - least / 2) < 0.011
    assert abs(half_most - most / 2) < 0.011
    assert left == 0.0
    assert embedding >= 0.01, "what is not named keeps its time"


@pytest.mark.parametrize("option", ["max", "all"])
def test_other_options(option):
    last = pool.run(2, logs_of_a_rank, option)[1][0][0]
    if option == "max":
        assert last.startswith("max time across ranks (ms):\n    embedding ....")
        assert [len(numbers) for numbers in number_lists(last)] == [1, 1]
        assert number_lists(last)[1][0] >= 40
    else:
        assert last.startswith("times across ranks (ms):\n  embedding:\n     rank  0: 1")
        assert re.search(r"  forward:\n     rank  0: \d+\.\d\d\n     rank  1: \d+\.\d\d\n$", last)
