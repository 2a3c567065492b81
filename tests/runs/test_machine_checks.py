"""Each check of the machines, and that it can fail: wrong exchanges and kernels, slow links and ranks are named."""

import dataclasses

import pytest
import torch
import torch.distributed as dist

import pool
from longspan.context_parallel.kernels.math import Math
from longspan.mesh.mesh import common_store
from longspan.runs.machine import collectives, kernels, small_verify, speed
from longspan.runs.machine.check import all_checks
from longspan.runs.machine.protocol import Check, Place, run_checks

CPU = torch.device("cpu")
HOSTS = ("node-a", "node-a", "node-b", "node-b")


def run(checks, seconds=30.0):
    """status and text of each finding, by name; names of links and ranks are in the text."""
    rank, hosts = dist.get_rank(), HOSTS[: dist.get_world_size()]
    findings, _ = run_checks(checks, Place(rank, hosts, CPU, dist.group.WORLD, seconds), common_store())
    return {finding.name: (finding.status, finding.text) for finding in findings}


def alone(check: Check, hosts=("node-a",)):
    """The findings of a check that exchanges nothing, in this process."""
    place = Place(0, hosts, CPU, None, 1.0)
    return {finding.name: finding for finding in check.judge([check.measure(place)], place)}


def on(world, seconds_by_rank=None):
    return Place(0, HOSTS[:world], CPU, None, 1.0)


# --- exchanges --------------------------------------------------------------------------------


def every_exchange():
    return run(collectives.checks_of_results("cpu"))


@pytest.mark.parametrize("world", [1, 3, 4])
def test_every_exchange_of_sound_ranks_is_right(world):
    findings = pool.run(world, every_exchange)[0]
    assert len(findings) == 11
    assert {status for status, _ in findings.values()} == {"ok"}


def wrong_on_rank_one(name, change):
    """All exchanges, of which one returns something else on rank 1."""
    collective = collectives.COLLECTIVES[name]

    def exchange(x, place):
        got = collective.exchange(x, place)
        return CHANGES[change](got) if place.rank == 1 else got

    changed = collectives.COLLECTIVES | {name: dataclasses.replace(collective, exchange=exchange)}
    return run(collectives.checks_of_results("cpu", changed))


def with_one_element_changed(got):
    return got.index_fill(0, torch.tensor([5]), 1e3)


CHANGES = {
    "one element": with_one_element_changed,
    "not a number": lambda got: got * float("nan"),
    "a row less": lambda got: got[1:],
    "bfloat16 alone": lambda got: got + 1 if got.dtype == torch.bfloat16 else got,
}


@pytest.mark.parametrize(
    ("name", "change", "text"),
    [
        ("all_reduce", "one element", "float32: 1 of 1001 elements differ, the first is 1000 instead of 4"),
        ("reduce_scatter_tensor", "not a number", "float32: 1001 of 1001 elements differ, the first is nan"),
        ("all_to_all_single (uneven)", "a row less", "float32: a result of shape [4, 5] instead of [5, 5]"),
        ("broadcast", "bfloat16 alone", "bfloat16: 1001 of 1001 elements differ"),
    ],
)
def test_a_wrong_exchange_is_named_with_its_rank_and_data_type(name, change, text):
    findings = pool.run(3, wrong_on_rank_one, name, change)[0]
    status, found = findings.pop(name)
    assert status == "wrong"
    assert found.startswith(f"rank 1 (node-a): {text}"), found
    assert {status for status, _ in findings.values()} == {"ok"}


def test_sums_are_exact_in_bfloat16_for_any_number_of_ranks():
    for world in (1, 2, 63, 64, 65, 300):
        expected = collectives.of_all(world).sum(0)
        assert expected.max() <= 256
        assert torch.equal(expected.bfloat16().long(), expected)
        # each rank's numbers count
        assert all(collectives.numbers(rank, world).any() for rank in range(world))


# --- speed ------------------------------------------------------------------------------------


def all_speeds():
    checks = [*speed.checks_of_bandwidth("cpu"), speed.check_of_links("cpu"), speed.check_of_compute()]
    return run(checks)


def test_exchanges_links_and_products_are_measured():
    findings = pool.run(3, all_speeds)[0]
    assert {name for name in findings if name.startswith("speed of")} == {
        f"speed of {name}" for name, one in collectives.COLLECTIVES.items() if one.travels is not None
    }
    assert findings["links"][1].startswith("median on a machine ")
    assert ", between machines " in findings["links"][1]
    assert findings["products"][0] == "ok"


def slow_on_rank_two(function, place):
    """A clock on which everything takes four times as long on rank 2."""
    function()
    return 0.4 if place.rank == 2 else 0.1


def a_slow_rank():
    return run([speed.check_of_links("cpu", slow_on_rank_two), speed.check_of_compute(slow_on_rank_two)])


def test_a_slow_rank_and_a_slow_link_are_named_with_their_hosts():
    findings = pool.run(4, a_slow_rank)[0]
    assert findings["rank"] == ("slow", "rank 2 (node-b): 4.0 times as long as the median rank")
    status, text = findings["link"]
    assert status == "slow"
    assert text.startswith("rank 1 (node-a) -> rank 2 (node-b): ")
    assert text.endswith(", 0.25 of the median of the other links between machines")


def test_links_are_compared_with_links_of_their_kind():
    """Between machines they may all be slower."""
    place = on(4)
    assert [finding.name for finding in speed.judge_links([1.0, 0.01, 1.1, 0.012], place)] == ["links"]
    names = [finding.text for finding in speed.judge_links([1.0, 0.01, 1.1, 0.03], place)]
    assert len(names) == 2
    assert names[1].startswith("rank 2 (node-b) -> rank 3 (node-b)")
    # one link of its kind is compared with nothing
    assert len(speed.judge_links([9.0, 0.1, 0.1], Place(0, ("a", "a", "a"), CPU, None, 1.0))) == 2


def test_one_rank_alone_has_no_exchange_to_measure():
    names = [check.name for check in all_checks(1, "cuda")]
    assert not [name for name in names if "speed" in name or "links" in name]
    assert "attention flash-attn-3" in names
    assert names[-1] == "verify"
    assert set(names) < {check.name for check in all_checks(2, "cuda")} | {"verify cp 1: 2 steps"}


@pytest.mark.parametrize("world", range(2, 9))
def test_in_each_turn_a_rank_has_one_link(world):
    turns = speed.turns(world)
    assert sorted(rank for receivers in turns for rank in receivers) == list(range(world))
    for receivers in turns:
        ends = [end for rank in receivers for end in (rank, (rank - 1) % world)]
        assert len(ends) == len(set(ends))


def test_a_wrong_product_is_named():
    measured = [{"seconds": 1.0, "error": 0.0}, {"seconds": 1.0, "error": float("nan")}]
    (finding,) = speed.judge_compute(measured, on(2))
    assert finding.status == "wrong"
    assert finding.text.startswith("rank 1 (node-a): ")


# --- kernels ----------------------------------------------------------------------------------


class BlindToTheDiagonal(Math):
    """A kernel that ignores ``causal``."""

    def forward(self, q, k, v, causal, scale):
        return super().forward(q, k, v, False, scale)


class WrongGradient(Math):
    """A kernel with half of the gradient of v."""

    def backward(self, *arguments):
        dq, dk, dv = super().backward(*arguments)
        return dq, dk, dv / 2


class Crashes(Math):
    def forward(self, *arguments):
        raise RuntimeError("CUDA error: no kernel image is available")


def wrong_kernels():
    tried = {"math": Math(), "blind": BlindToTheDiagonal(), "half": WrongGradient(), "crashes": Crashes()}
    return run(kernels.checks_of_attention("cpu", tried))


def test_a_wrong_kernel_and_a_broken_one_are_named():
    findings = pool.run(1, wrong_kernels)[0]
    assert findings["attention math"][0] == "ok"
    assert findings["attention blind"][0] == "wrong"
    assert findings["attention half"][0] == "wrong"
    assert "rank 0 (node-a): " in findings["attention half"][1]
    assert "times the allowed error" in findings["attention half"][1]
    assert findings["attention crashes"] == (
        "broken",
        "rank 0 (node-a): RuntimeError: CUDA error: no kernel image is available",
    )


def test_kernels_of_this_device_are_right():
    names = []
    for check in kernels.checks_of_attention("cpu"):
        (finding,) = alone(check).values()
        names.append(finding.name)
        assert finding.status in ("ok", "absent"), finding
    assert names == ["attention cpu-blocks", "attention cpu-flash", "attention math"]
    assert kernels.backends("cuda") == ["flash-attn-3", "flash-attn-2", "cuda-flash", "cudnn", "math"]


def test_a_kernel_that_is_installed_nowhere_is_absent_and_one_on_some_ranks_is_broken():
    missing, good = "is not installed (pip install flash-attn).", {"causal, bfloat16": 0.5}
    (finding,) = kernels.judge_errors("attention x", "", [missing, missing], on(2))
    assert (finding.status, finding.text) == ("absent", f"not checked: it {missing}")
    (finding,) = kernels.judge_errors("attention x", "", [good, missing], on(2))
    assert finding.status == "broken"
    assert finding.text.startswith("rank 1 (node-a): it is not installed")
    (finding,) = kernels.judge_errors("attention x", "", [good, {"causal, bfloat16": float("inf")}], on(2))
    assert (finding.status, finding.text.partition(": ")[0]) == ("wrong", "rank 1 (node-a)")


def test_grouped_experts_are_right_and_wrong_ones_are_named():
    (finding,) = alone(kernels.check_of_experts()).values()
    assert finding.status == "ok", finding

    def without_the_last_row(x, scores, choices, weights):
        out = kernels.own_experts(x, scores, choices, weights)
        return torch.cat((out[:-1], torch.zeros_like(out[-1:])))

    (finding,) = alone(kernels.check_of_experts(without_the_last_row)).values()
    assert finding.status == "wrong"


# --- training ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("world", "names"),
    [
        (1, {"verify cp 1": "tp 1 x cp 1 x dp_shard 1"}),
        (2, {"verify cp 2": "tp 1 x cp 2 x dp_shard 1", "verify tp 2, cp 1": "tp 2 x cp 1 x dp_shard 1"}),
        (3, {"verify cp 3": "tp 1 x cp 3 x dp_shard 1"}),
        (14, {"verify cp 7": "tp 1 x cp 7 x dp_shard 2", "verify tp 2, cp 7": "tp 2 x cp 7 x dp_shard 1"}),
        (16, {"verify cp 8": "tp 1 x cp 8 x dp_shard 2", "verify tp 2, cp 8": "tp 2 x cp 8 x dp_shard 1"}),
        (64, {"verify cp 8": "tp 1 x cp 8 x dp_shard 8", "verify tp 2, cp 8": "tp 2 x cp 8 x dp_shard 4"}),
    ],
)
def test_layouts_of_the_small_verify_use_all_ranks_and_have_one_batch(world, names):
    for device in ("cpu", "cuda"):
        runs = small_verify.layouts(world, device)
        assert {name: run.sizes.equation().partition(" x dp_rep")[0] for name, run in runs.items()} == names
        assert len({run.batch.global_size for run in runs.values()}) == 1
        assert {run.device for run in runs.values()} == {device}


def test_a_layout_that_differs_from_one_process_is_wrong():
    result = {"loss_error": 1e-3, "grad_norm_error": 0.0, "max_gradient_error": 2e-3, "passed": False}
    finding = small_verify.judge_result(
        "verify cp 2", result | {"tolerance": 1e-10, "worst_parameter": "output_layer.weight"}
    )
    assert finding.status == "wrong"
    assert "loss 1.0e-03" in finding.text
    assert "output_layer.weight" in finding.text
