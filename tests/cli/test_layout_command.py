"""``longspan layout``: its figures are those of SequenceLayout and Schedule; it says no before it does anything."""

import itertools
import json
import subprocess
import sys

import pytest
import yaml

import tiny
from longspan.cli import layout as command
from longspan.cli.main import main
from longspan.context_parallel import Schedule, SequenceLayout
from longspan.context_parallel.costs import AlikeLayers, Costs

DOCUMENTS = [188, 8, 81, 409, 72, 1, 311, 75, 409, 23, 279]


@pytest.fixture
def config(tmp_path, monkeypatch):
    """Writes a config that has no data, and stands in its folder."""
    monkeypatch.chdir(tmp_path)

    def write(**changes):
        values = tiny.values("nowhere", **changes)
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
        return "config.yaml"

    return write


def ask(capsys, *arguments):
    """The JSON object that a call prints."""
    code = main(["layout", *map(str, arguments), "--json"])
    out, err = capsys.readouterr()
    assert code == 0, err
    return json.loads(out)


def given(lengths):
    return ",".join(map(str, lengths))


def cumulative(lengths):
    return [0, *itertools.accumulate(lengths)]


# --- the figures ------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 3, 8])
@pytest.mark.parametrize("lengths", [DOCUMENTS, [1], [999], [5, 1, 1, 700]])
@pytest.mark.parametrize("window", [None, 1, 100])
@pytest.mark.parametrize(("name", "comm_type"), [("auto", "p2p"), ("zigzag", "all_gather")])
def test_figures_are_those_of_the_layout_and_its_schedule(
    config, capsys, ranks, lengths, window, name, comm_type
):
    changes = dict(context_parallel_size=ranks, cp_layout=name, cp_comm_type=comm_type, sliding_window=window)
    result = ask(capsys, config(**changes), "--lengths", given(lengths))
    cu, total = cumulative(lengths), sum(lengths)
    layout = SequenceLayout.make(name, total, ranks, cu_seqlens=cu, windows=[window] * 2)
    assert (result["layout"], result["documents"], result["ranks"]) == (layout.name, lengths, ranks)
    assert (result["tokens"], result["padding"]) == (total, layout.padded_total - total)
    areas = [layout.area(r, window) for r in range(ranks)]
    assert result["imbalance"] == pytest.approx(max(areas) * ranks / sum(areas), abs=1e-4)
    assert result["ring_rows"] == (ranks - 1) * total
    received = 0
    for r, line in enumerate(result["per_rank"]):
        schedule = Schedule.of(layout, r, window=window, all_at_once=comm_type == "all_gather")
        assert [tuple(span) for span in line["spans"]] == layout.spans(r)
        assert (line["rank"], line["pairs"]) == (r, areas[r])
        assert (line["received_rows"], line["sent_rows"]) == (schedule.received_rows, schedule.sent_rows)
        assert line["received_rows"] == layout.received_rows(r, window)
        assert line["steps"] == len(schedule.steps)
        assert line["hears_from"] == sorted(m.peer for step in schedule.steps for m in step.receives)
        received += line["received_rows"]
    assert result["received_rows"] == received
    assert sum(line["padding"] for line in result["per_rank"]) == result["padding"]
    if ranks > 1:
        assert result["of_ring"] == pytest.approx(received / result["ring_rows"], abs=1e-4)


def test_the_other_layouts_are_shown_with_the_same_figures(config, capsys):
    result = ask(capsys, config(context_parallel_size=4), "--lengths", given(DOCUMENTS))
    shown = {line["layout"]: line for line in result["layouts"]}
    assert list(shown) == ["contiguous", "zigzag", "per_document_zigzag", "balanced"]
    cu = cumulative(DOCUMENTS)
    for name, line in shown.items():
        layout = SequenceLayout.make(name, cu[-1], 4, cu_seqlens=cu)
        received = [layout.received_rows(r) for r in range(4)]
        assert (line["received_rows"], line["most_received_rows"]) == (sum(received), max(received))
        assert line["padding"] == layout.padded_total - layout.total
    assert shown["balanced"]["of_ring"] == result["of_ring"]


def test_layers_that_differ_are_summed(config, capsys):
    """Layers 1 and 3 have the window, 2 does not."""
    path = config(context_parallel_size=3, num_layers=3, sliding_window=[50, None])
    result = ask(capsys, path, "--lengths", given(DOCUMENTS))
    layout = SequenceLayout.balanced(cumulative(DOCUMENTS), 3, [50, None, 50])
    for r, line in enumerate(result["per_rank"]):
        assert line["pairs"] == 2 * layout.area(r, 50) + layout.area(r)
        assert line["received_rows"] == 2 * layout.received_rows(r, 50) + layout.received_rows(r)
    assert result["layers"] == [
        {"comm_type": "p2p", "window": 50, "together": 1, "count": 2},
        {"comm_type": "p2p", "window": None, "together": 1, "count": 1},
    ]
    assert any("summed over the layers: 2 x p2p window 50, 1 x p2p" in note for note in result["notes"])


def test_a_window_that_no_document_is_longer_than_changes_nothing(config, capsys):
    path = config(context_parallel_size=3, sliding_window=[409, None])
    result = ask(capsys, path, "--lengths", given(DOCUMENTS))
    assert result["layers"] == [{"comm_type": "p2p", "window": None, "together": 1, "count": 1}]
    assert any("changes nothing" in note for note in result["notes"])


def test_hierarchical_moves_heads_inside_and_keys_across(config, capsys):
    path = config(context_parallel_size=8, cp_comm_type="a2a+p2p", hierarchical_context_parallel_sizes=[2, 4])
    result = ask(capsys, path, "--lengths", given(DOCUMENTS))
    cu = cumulative(DOCUMENTS)
    layout = SequenceLayout.make("auto", cu[-1], 8, cu_seqlens=cu, together=2)
    merged = layout.merged([(0, 1), (2, 3), (4, 5), (6, 7)])
    rows = layout.local_length
    assert result["head_rows"] == rows / 2
    for r, line in enumerate(result["per_rank"]):
        schedule = Schedule.of(merged, r // 2)
        assert line["pairs"] == merged.area(r // 2) / 2
        assert (line["received_rows"], line["sent_rows"]) == (schedule.received_rows, schedule.sent_rows)
        assert line["steps"] == len(schedule.steps)
        across = {2 * m.peer + r % 2 for step in schedule.steps for m in step.receives}
        assert set(line["hears_from"]) == across | {r ^ 1}
        # 4 query and 2 key/value heads: a key row is of 1 of 2 heads; the other rank of the group sends all
        # its rows of 2 heads of q and of out, 1 of k and of v, which is 6 / 4 of a key/value row
        by_size = schedule.received_rows / 2 + rows * 6 / 4
        assert line["of_ring"] == pytest.approx(by_size * 8 / result["ring_rows"], abs=1e-4)


def test_all_to_all_computes_alike_and_sends_all_but_its_share(config, capsys):
    result = ask(
        capsys, config(context_parallel_size=2, cp_comm_type="a2a"), "--lengths", "8", "--num-processes", 2
    )
    assert (result["imbalance"], result["received_rows"], result["head_rows"]) == (1.0, 0, 2)
    # 4 rows x (2 + 2 of q and out, 1 + 1 of k and v) against 4 rows x (2 + 2 of k and v)
    assert result["of_ring"] == 1.5
    assert [line["pairs"] for line in result["per_rank"]] == [18, 18]
    assert any("at every layout alike" in note for note in result["notes"])


def test_rows_are_padded_to_the_tensor_parallel_size(config, capsys):
    path = config(context_parallel_size=3, tensor_parallel_size=2, cp_layout="contiguous")
    assert ask(capsys, path, "--lengths", "13")["rows"] == 6
    assert ask(capsys, path, "--lengths", "13", "--no-sequence-parallel")["rows"] == 5


def test_steps_are_counted_as_the_schedule_counts_them():
    """Short and long exchanges, merged ones, and ranks that stop earlier than others."""
    for ranks, lengths in ((5, [9000, 3]), (12, [100] * 40 + [7000]), (16, [64000])):
        for name in ("contiguous", "zigzag", "balanced"):
            layout = SequenceLayout.make(name, sum(lengths), ranks, cu_seqlens=cumulative(lengths))
            for comm_type, window in (("p2p", None), ("p2p", 300), ("all_gather", 300)):
                steps = Costs.of(layout, [AlikeLayers(comm_type, window)]).steps
                at_once = comm_type == "all_gather"
                expected = [
                    Schedule.of(layout, r, window=window, all_at_once=at_once).steps for r in range(ranks)
                ]
                assert steps.tolist() == list(map(len, expected))


def test_hybrid_steps_get_layouts_of_their_own(config, capsys):
    path = config(context_parallel_size=2, hybrid_context_parallel=True, max_seqlen_per_dp_cp_rank=64)
    assert any("hybrid_context_parallel" in note for note in ask(capsys, path, "--lengths", "50,20")["notes"])


# --- what is shown -----------------------------------------------------------------------------


def test_the_table_says_what_was_chosen_and_why(config, capsys):
    assert main(["layout", config(context_parallel_size=3), "--lengths", given(DOCUMENTS)]) == 0
    out = capsys.readouterr().out
    assert "balanced layout: 1,856 tokens" in out
    assert "11 documents of 1 to 409 tokens, 3 ranks, p2p" in out
    assert "cp_layout auto: runs of equal length would be uneven" in out
    assert "note: the pack has 1,856 tokens; the config trains on 50 (sequence_len)" in out
    assert "balanced *" in out
    assert "of a plain ring's 3,712 key/value rows" in out


def test_one_rank_receives_nothing(config, capsys):
    assert main(["layout", config(), "--lengths", "7,9"]) == 0
    out = capsys.readouterr().out
    assert "one rank holds everything" in out
    assert "nobody" in out


def test_a_better_layout_is_named(config, capsys):
    path = config(context_parallel_size=8, cp_layout="zigzag")
    (note,) = ask(capsys, path, "--lengths", "600,600,600,600,600,600,600,600", "--sequence-len", 4800)[
        "notes"
    ]
    assert note.startswith("contiguous would be better for this pack (busiest / mean 1.00, 0% of a ring)")


def test_every_key_of_the_json_is_in_the_usage(config, capsys):
    result = ask(capsys, config(context_parallel_size=2), "--lengths", "30,20")
    for name in (*result, *result["per_rank"][0], *result["layouts"][0], *result["layers"][0]):
        assert name in command.USAGE, name
    assert main(["layout", "--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: longspan layout")


def test_help_needs_neither_torch_nor_matplotlib():
    code = "import sys, longspan.cli.layout; assert not {'torch', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- without --lengths -----------------------------------------------------------------------------


def test_the_documents_of_a_step_are_those_training_takes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    values = tiny.values(tiny.write_data(tmp_path), context_parallel_size=2, micro_batch_size=2)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    from longspan.data.splits import open_datasets

    data, *_ = open_datasets(tiny.tiny_run(values["datasets"][0]["path"], 2, micro_batch_size=2))
    for step, arguments in ((0, []), (3, ["--step", 3])):
        result = ask(capsys, "config.yaml", *arguments)
        batch = data.micro_batches(step, global_batch_size=4, micro_batch_size=2, dp_rank=0, dp_size=1)[0]
        assert result["documents"] == batch.cu_seqlens.diff().tolist()
        assert result["tokens"] == 100
        assert not any("the config trains on" in note for note in result["notes"])
    assert main(["layout", "config.yaml", "--step", "30"]) == 2
    assert "--step 30: the config trains 30 steps, so it is from 0 to 29." in capsys.readouterr().err


def test_without_packing_a_sequence_is_one_document_and_needs_no_data(config, capsys):
    path = config(context_parallel_size=2, sample_packing=False)
    assert ask(capsys, path)["documents"] == [50]
    assert ask(capsys, path)["layout"] == "zigzag"
    (note, _) = reversed(ask(capsys, path, "--lengths", "20,20")["notes"])
    assert "one stream" in note


# --- mistakes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lengths", "12,abc"], "--lengths: document 2 has 'abc' tokens: a whole number from 1 on."),
        (["--lengths", "12,-3"], "document 2 has '-3' tokens"),
        (["--lengths", "0,12"], "document 1 has '0' tokens"),
        (["--lengths", "1.5"], "document 1 has '1.5' tokens"),
        (["--lengths", "9" * 5000], "a whole number from 1 on"),
        (["--lengths="], "document 1 has '' tokens"),
        (["--lengths", "12,"], "document 2 has '' tokens"),
        (["--lengths"], "--lengths needs a value."),
        (["--lengths", "999999999"], "at most 268,435,456"),
        (["--lenghts", "12"], "--lenghts: unknown option. Did you mean --lengths?"),
        (["--lengths", "12", "--step", "1"], "Keep one."),
        (["--lengths", "12", "--step", "-1"], "--step '-1': a whole number from 0 on."),
        (["--lengths", "12", "--window", "0"], "sliding_window 0: tokens a query sees"),
        (["--lengths", "12", "--png", "a.jpg"], "--png a.jpg: the picture is a PNG."),
        (["--lengths", "12", "--png", "no/a.png"], "--png no/a.png: there is no folder no."),
        (["--lengths", "12", "--cp-layout", "zigzga"], "Did you mean zigzag?"),
        (["--lengths", "12", "--tensor-parallel-size", "3"], "num_attention_heads 4 is not divisible"),
        (["--lengths", "12", "--num-processes", "3"], "The product must be the number of processes"),
        (["--sample-packing", "false", "--step", "1"], "Leave --step out."),
        ([], "Or give --lengths, which needs no data."),
    ],
)
def test_each_mistake_is_told_and_nothing_is_written(config, capsys, tmp_path, arguments, message):
    path = config(context_parallel_size=2)
    before = sorted(tmp_path.iterdir())
    assert main(["layout", path, *arguments]) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert out == ""
    assert all(line.startswith("longspan: error: ") for line in err.splitlines())
    assert sorted(tmp_path.iterdir()) == before


def test_mistakes_are_told_together(config, capsys):
    assert main(["layout", config(), "--lengths", "x", "--step", "x", "--stpe", "1"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 4  # --step and --lengths do not go together, either


def test_a_picture_without_matplotlib_says_what_to_install(config, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["layout", config(), "--lengths", "12", "--png", "a.png"]) == 2
    assert "pip install 'longspan[plot]'" in capsys.readouterr().err


# --- the picture ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        dict(context_parallel_size=3, sliding_window=[100, None]),
        dict(context_parallel_size=4, cp_comm_type="a2a+p2p", hierarchical_context_parallel_sizes=[2, 2]),
        dict(context_parallel_size=20, cp_layout="per_document_zigzag"),
        dict(),
    ],
)
def test_the_picture_is_a_png_and_whole(config, capsys, tmp_path, changes):
    pytest.importorskip("matplotlib")
    (tmp_path / "a.png").write_text("an older one")
    result = ask(capsys, config(**changes), "--lengths", given(DOCUMENTS), "--png", "a.png")
    assert result["png"] == "a.png"
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "config.yaml"]


@pytest.mark.parametrize("window", [None, 1, 40, 409])
def test_the_bands_of_all_ranks_cover_the_causal_area_once(window):
    pytest.importorskip("matplotlib")
    from longspan.cli.layout_picture import band

    layout = SequenceLayout.balanced(cumulative(DOCUMENTS), 3, window)
    drawn = 0.0
    for s in (s for r in range(3) for s in layout.segments(r)):
        corners = band(s, layout.cu_seqlens[s.document], window)
        turned = zip(corners, corners[1:] + corners[:1])
        drawn += abs(sum(x1 * y2 - x2 * y1 for (x1, y1), (x2, y2) in turned)) / 2
    reach = [min(n, window or n) for n in DOCUMENTS]
    assert drawn == pytest.approx(sum(n * w - w * w / 2 for n, w in zip(DOCUMENTS, reach)))


def test_more_strips_than_the_picture_has_points_are_sampled():
    pytest.importorskip("matplotlib")
    from longspan.cli.layout_picture import STRIPS, strips

    lengths = [7, 3] * 1000
    layout = SequenceLayout.contiguous(10_000, 5, cu_seqlens=cumulative(lengths))
    sampled = strips(layout)
    assert len(sampled) == STRIPS
    for i, (rank, s) in enumerate(sampled):
        assert i * 10 <= s.start < s.stop <= i * 10 + 10
        assert rank == s.start // 2000
        assert layout.cu_seqlens[s.document] <= s.start < s.stop <= layout.cu_seqlens[s.document + 1]


def test_commands_that_do_not_train_need_no_learning_rate(config, capsys):
    path = config(learning_rate=None, sample_packing=False, val_set_size=0, min_lr=1e-5)
    assert ask(capsys, path, "--context-parallel-size", 2)["ranks"] == 2
    assert main(["validate", path]) == 2
    assert "learning_rate: missing" in capsys.readouterr().err
    assert main(["config", path, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["learning_rate"] is None
    path = config(learning_rate=None, sample_packing=False, val_set_size=0, lr_warmup_init=1e-6)
    assert ask(capsys, path, "--context-parallel-size", 2)["ranks"] == 2
