"""The planner's memory against closed formulas, also for a world of 1,024 ranks; `benchmarks/plan_memory.py` has real processes."""

import math

import pytest
import torch

from longspan.config.load import make_config
from longspan.config.parameters import parameter_shapes
from longspan.config.resolve import resolve
from longspan.errors import UserError
from longspan.planner.gpus import find_gpu
from longspan.planner.ledger import Ledger
from longspan.planner.trace import tracing
from longspan.runs.plan import memory_of_ranks, planned_run

MODEL = {
    "num_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "ffn_hidden_size": 128,
    "vocab_size": 256,
    "mock_data": True,
    "sequence_len": 128,
    "max_steps": 3,
    "learning_rate": 1e-3,
    "params_dtype": "float32",
    "bf16": False,
    "device": "cpu",
    "use_tensorboard": False,
    "val_set_size": 0,
    "attention_backend": "cpu-flash",
}


def run_of(world, **changes):
    reading = make_config(MODEL | changes)
    assert not reading.problems, reading.problems
    return planned_run(resolve(reading.config, world))


@pytest.mark.parametrize(
    ("world", "changes", "parts"),
    [
        (2, {}, 2),
        (4, {"context_parallel_size": 2}, 4),
        (1024, {"context_parallel_size": 4, "dp_shard_size": 2, "dp_replicate_size": 128}, 8),
    ],
)
def test_state_is_as_the_formulas_say(world, changes, parts):
    """Parameters, gradients and AdamW's two moments, cut into equal parts, all in float32."""
    run = run_of(world, **changes)
    (found,) = memory_of_ranks(run, [0])
    elements = sum(math.prod(shape) for shape in parameter_shapes(run.model, run.vocab_size).values())
    assert found.held["parameters"] == found.held["gradients"] == 4 * elements // parts
    steps = found.held["optimizer"] - 2 * 4 * elements // parts
    # AdamW counts the steps of each parameter in a number of four bytes.
    assert steps == 4 * len(parameter_shapes(run.model, run.vocab_size))
    assert sum(found.components.values()) == found.peak


@pytest.mark.parametrize(
    "changes", [{"pipeline_parallel_size": 2, "gradient_accumulation_steps": 4}, {"tensor_parallel_size": 2}]
)
def test_every_rank_of_a_world_can_be_planned(changes):
    found = memory_of_ranks(run_of(2, **changes), [0, 1])
    assert [memory.rank for memory in found] == [0, 1]
    assert all(memory.peak > sum(memory.held.values()) - memory.held["gradients"] for memory in found)


def test_experts_get_equally_many_tokens():
    keys = {"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 64}
    (found,) = memory_of_ranks(run_of(2, **keys), [0])
    assert found.components["experts"] > 0


def test_the_ledger_counts_storages_once_and_until_they_end():
    ledger = Ledger("cpu")
    with tracing(ledger):
        x = torch.empty(1000)
        y = x.view(10, 100)
        del x
        z = y + y
        del y
        w = z * 2
        del z, w
    assert [sign * block.size for block, sign in ledger.events] == [4000, 4000, -4000, 4000, -4000, -4000]
    assert sum(ledger.peaks(0)[None].values()) == 8000


def test_a_gradient_that_two_paths_add_up_takes_one_place():
    """Autograd writes the sum over the first gradient where nothing else holds it."""
    ledger = Ledger("cpu")
    with tracing(ledger):
        x = torch.empty(1000, requires_grad=True)
        (x.sin() + x.cos()).backward(torch.empty(1000))
    events = [(block.origin, sign) for block, sign in ledger.events]
    summed = max(at for at, event in enumerate(events) if event == ("aten.add.Tensor", 1))
    assert events[summed - 1][1] == -1


def test_what_cannot_be_planned_is_refused():
    with pytest.raises(UserError, match="h100"):
        find_gpu("h10")
    reading = make_config({k: v for k, v in MODEL.items() if k != "vocab_size"})
    with pytest.raises(UserError, match="vocab"):
        planned_run(resolve(reading.config, 1))
