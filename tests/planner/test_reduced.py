"""Few layers and few micro-batches stand for many: against traces of whole steps."""

import pytest

from longspan.config.load import make_config
from longspan.config.resolve import resolve
from longspan.config.run import Run
from longspan.planner.corners import at, memory_at, work_at
from longspan.planner.documents import even_samples
from longspan.planner.memory import rank_memory, trace_rank
from longspan.planner.reduced import Pattern, rank_of, reduced
from longspan.runs.plan import _in_process
from longspan.training.trainer import Trainer

MODEL = {
    "num_layers": 6,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "ffn_hidden_size": 160,
    "vocab_size": 512,
    "mock_data": True,
    "max_steps": 3,
    "learning_rate": 1e-3,
    "params_dtype": "float32",
    "device": "cpu",
    "val_set_size": 0,
    "sequence_len": 128,
    "micro_batch_size": 1,
    "export_hf": False,
    "attention_backend": "cpu-flash",
}


def run_of(world, **changes):
    reading = make_config({**MODEL, **changes})
    assert not reading.problems, reading.problems
    return Run.of(resolve(reading.config, world).config)


@pytest.mark.parametrize(
    ("kinds", "pattern"),
    [
        ("a" * 6, Pattern(0, 1, 0)),
        ("a" * 5, None),  # the larger corner would have all of them
        ("ddd" + "m" * 20, Pattern(3, 1, 0)),
        ("llla" * 6, Pattern(0, 4, 0)),
        ("llla" * 6 + "ll", Pattern(0, 4, 2)),
        ("abcdefghijklmnop", None),
    ],
)
def test_a_pattern_is_the_shortest_of_a_stage(kinds, pattern):
    found = Pattern.of(kinds)
    assert found == pattern
    if found is not None:
        taken = [found.taken(range(len(kinds)), more) for more in (0, 1)]
        assert [len(one) for one in taken] == [found.layers(0), found.layers(1)]
        larger = "".join(kinds[i] for i in taken[1])
        smaller = "".join(kinds[i] for i in taken[0])
        assert kinds.startswith(larger[: len(larger) - found.after])
        assert smaller[: found.from_bottom] == larger[: found.from_bottom] == kinds[: found.from_bottom]
        top = len(smaller) - found.from_bottom
        assert smaller[-top:] == larger[-top:] == kinds[-top:]
        assert found.layers(0) + found.repeats(len(kinds)) * found.period == len(kinds)


def test_a_value_is_on_the_plane_through_the_corners():
    def f(x, y):
        return 3 + 5 * x - 2 * y + 7 * x * y

    corners = [[f(0, 0), f(0, 1)], [f(1, 0), f(1, 1)]]
    assert at(corners, 4, -3) == f(4, -3)
    assert at([[8]], 4, 4) == 8


def compare(run):
    """(stage, peak of the corners, peak of the whole step, whether the held bytes and the work are equal) of each stage."""
    found = []
    for family in reduced(run):
        traced = [
            [trace(corner.run, corner.rank, corner.from_bottom) for corner in row] for row in family.corners
        ]
        for stage, repeats, in_flight, micro_batches in family.stages:
            memory = memory_at(0, traced, repeats, in_flight, micro_batches)
            work = work_at(traced, repeats, micro_batches)
            whole = trace(run, rank_of(run, stage), None)
            expected = rank_memory(0, whole.parts.values(), whole.held)
            same = memory.held == expected.held and work.flops == whole.work.flops
            same = same and work.moved == pytest.approx(whole.work.moved)
            found.append((stage, memory.peak, expected.peak, same and work.sent == whole.work.sent))
    return found


def trace(run, rank, from_bottom):
    def make(run, device, mesh):
        return Trainer(run, device, mesh=mesh, filled=False, train_data=even_samples(run))

    return trace_rank(run, rank, make, 1, from_bottom)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "changes", "error"),
    [
        (2, {"context_parallel_size": 2, "gradient_checkpointing": "selective", "sample_packing": True}, 0),
        (
            2,
            {
                "num_moe_experts": 4,
                "moe_router_topk": 2,
                "moe_ffn_hidden_size": 64,
                "moe_layer_freq": "[0]*1+[1]*6",
                "num_layers": 7,
            },
            0,
        ),
        # The layouts of micro-batches that wait are not counted.
        (5, {"pipeline_parallel_size": 5, "gradient_accumulation_steps": 6, "num_layers": 5}, 0.005),
    ],
)
def test_corners_give_the_memory_and_the_work_of_the_whole_step(world, changes, error):
    for stage, found, expected, same in _in_process(compare, run_of(world, **changes)):
        assert abs(found / expected - 1) <= error, (stage, found, expected)
        assert same, stage


def test_ranks_of_a_pipeline_are_planned_by_few_runs():
    """Sixteen stages are three: the first, the last, and one between them."""
    run = run_of(
        16,
        num_layers=96,
        pipeline_parallel_size=16,
        gradient_accumulation_steps=32,
        account_for_loss_in_pipeline_split=False,
    )
    families = reduced(run)
    assert sorted(stage for family in families for stage, *_ in family.stages) == list(range(16))
    middle = max(families, key=lambda family: len(family.stages))
    in_flight = {stage: flight for stage, _, flight, _ in middle.stages}
    assert in_flight[1] - in_flight[2] == 1, (
        "each stage has one micro-batch fewer in flight than the one before"
    )
    assert all(corner.run.sizes.pp <= 4 for family in families for row in family.corners for corner in row)
