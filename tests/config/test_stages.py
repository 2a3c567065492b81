"""Which layers a stage has, and which rank holds it: written out, by numbers, by cost."""

import pytest

import tiny
from longspan.config.stages import LayoutError, parse_layout, rank_of_stage, split_by_cost
from longspan.errors import UserError


@pytest.mark.parametrize(
    ("text", "layers", "pp", "expected"),
    [
        ("Ett|tL", 3, 2, [2, 1]),
        ("E|t|t|L", 2, 2, [0, 1, 1, 0]),
        ("Et*2||(t,)*2L", 4, 3, [2, 0, 2]),
        ("Et*3|(tt|)*29,t|L", 62, 16, [3, *[2] * 29, 1, 0]),
        ("Et*2|(t*2|)*34,t*3|(t*2|)*3,tL", 80, 8, [*[2] * 35, 3, *[2] * 3, 1]),
        ("E((t|)*2t|)*2L", 6, 7, [1, 1, 1, 1, 1, 1, 0]),
    ],
)
def test_layouts(text, layers, pp, expected):
    assert parse_layout(text, layers, pp) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Et*3|(tt|)*29,m|L", "m stands for multi-token prediction"),
        ("Ettt|tL", r"4 layers \(t\), and num_layers is 3"),
        ("tt|tL", "one E .embedding., and it comes first"),
        ("Et|EtL", "one E"),
        ("Ett|t", "one L .output and loss., and it comes last"),
        ("EttLt|", "it comes last"),
        ("Et|t|tL", "3 stages, which do not divide by pipeline_parallel_size 2"),
        ("Et|xtL", "'x' is none of E"),
        ("E(t|*2", r"a \( without its \)"),
        ("Et)|tL", r"a \) without its \("),
        ("Et*|tL", r"a \* without a number"),
    ],
)
def test_what_is_no_layout(text, message):
    with pytest.raises(LayoutError, match=message):
        parse_layout(text, 3, 2)


def test_each_layer_is_in_one_stage_and_the_dearest_stage_is_as_cheap_as_possible():
    assert split_by_cost([1] * 8, 4) == [2, 2, 2, 2]
    assert max(split_by_cost([1] * 43, 8)) == 6
    assert split_by_cost([1] * 8, 2, after=2) == [5, 3]
    assert split_by_cost([3, 1, 1, 1], 2) == [1, 3]
    for layers in range(12):
        for stages in range(1, 7):
            assert sum(split_by_cost([1] * layers, stages)) == layers


def test_a_loop_and_a_v():
    assert [rank_of_stage(i, 3, "interleaved") for i in range(6)] == [0, 1, 2, 0, 1, 2]
    assert [rank_of_stage(i, 3, "zbv") for i in range(6)] == [0, 1, 2, 2, 1, 0]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"num_layers": 5, "decoder_first_pipeline_num_layers": 1}, [1, 4]),
        ({"num_layers": 5, "decoder_last_pipeline_num_layers": 1}, [4, 1]),
        ({"num_layers": 7, "account_for_loss_in_pipeline_split": True}, [4, 3]),
        ({"num_layers": 6, "pipeline_layout": "Et|ttt|t|tL"}, [1, 3, 1, 1]),
        ({"num_layers": 2, "pipeline_schedule": "zbv"}, None),
    ],
)
def test_the_stages_of_a_run(changes, expected):
    run = tiny.checked("data", 2, pipeline_parallel_size=2, **changes)
    sizes = [len(stage.layers) for stage in run.stages]
    assert expected is None or sizes == expected
    held = [stage.index for rank in range(2) for stage in run.stages_of_rank(rank)]
    assert sorted(held) == list(range(len(run.stages)))
    assert [n for stage in run.stages for n in stage.layers] == list(range(1, run.model.num_layers + 1))


@pytest.mark.parametrize(
    ("changes", "world", "message"),
    [
        (
            {"pipeline_parallel_size": 2, "global_batch_size": 1, "pipeline_schedule": "1f1b"},
            2,
            "it needs one for each stage. Set gradient_acc",
        ),
        (
            {"pipeline_layout": "EttL"},
            1,
            "pipeline_layout EttL has no effect with pipeline_parallel_size 1",
        ),
        (
            {
                "pipeline_parallel_size": 2,
                "pipeline_schedule": "gpipe",
                "virtual_pipeline_parallel_size": 2,
            },
            2,
            "it has one stage a rank. Use interleaved",
        ),
        (
            {
                "pipeline_parallel_size": 2,
                "pipeline_schedule": "interleaved",
                "virtual_pipeline_parallel_size": 1,
            },
            2,
            "needs several stages a rank",
        ),
        (
            {"pipeline_parallel_size": 2, "pipeline_schedule": "zbv", "virtual_pipeline_parallel_size": 3},
            2,
            "zbv has 2 stages a rank",
        ),
        (
            {"pipeline_parallel_size": 2, "hybrid_context_parallel": True, "max_seqlen_per_dp_cp_rank": 50},
            2,
            "the micro-batches of a pipeline have one length",
        ),
        (
            {"pipeline_parallel_size": 2, "pipeline_layout": "Ett|tL"},
            2,
            r"it has 3 layers \(t\), and num_layers is 2",
        ),
        (
            {"pipeline_parallel_size": 2, "pipeline_layout": "Et|tL", "decoder_first_pipeline_num_layers": 1},
            2,
            "both divide the layers among the stages",
        ),
        (
            {"pipeline_parallel_size": 2, "decoder_first_pipeline_num_layers": 3},
            2,
            "the stages between them take the rest",
        ),
        (
            {
                "pipeline_parallel_size": 3,
                "virtual_pipeline_parallel_size": 2,
                "num_layers": 6,
                "global_batch_size": 7,
            },
            3,
            "it takes them in rounds of 3. Set gradient_accumulation_steps: 6",
        ),
    ],
)
def test_broken_rules_of_pipelines(changes, world, message):
    with pytest.raises(UserError, match=message):
        tiny.checked("data", world, **changes)
