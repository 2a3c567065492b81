"""Training at every layout against one process: a curve, evaluation, precision, checkpoints."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

import pool
import tiny
from longspan.data import IndexedDatasetWriter
from longspan.data.checks import check_data
from longspan.data.splits import open_datasets
from longspan.errors import UserError
from longspan.training import loop
from longspan.training.metrics import JsonLines, Metrics, set_aside
from longspan.training.progress import Lines, Progress
from longspan.training.trainer import Trainer
from marks import slow

CPU = torch.device("cpu")


def curve(prefix, steps, changes):
    """Losses and gradient norms of some steps, and the evaluation before and after.

    A step has two sequences, of which most layouts make two micro-batches.
    """
    run = tiny.tiny_run(prefix, dist.get_world_size(), **{"global_batch_size": 2} | changes)
    trainer = Trainer(run, CPU)
    before = trainer.evaluate()
    records = [trainer.train_step(trainer.micro_batches(step)) for step in range(steps)]
    after = trainer.evaluate()
    return {
        "losses": [r["loss"] for r in records],
        "norms": [r["grad_norm"] for r in records],
        "tokens": [r["tokens"] for r in records],
        "evals": [(e["loss"], e["tokens"]) for e in (before, after)],
    }


@pytest.fixture(scope="module")
def reference(prefix):
    done = {}

    def get(steps, **changes):
        key = steps, repr(sorted(changes.items()))
        if key not in done:
            done[key] = pool.run(1, curve, prefix, steps, changes)[0]
        return done[key]

    return get


def compare(got, expected, tolerance):
    for name in ("losses", "norms"):
        for step, (a, b) in enumerate(zip(got[name], expected[name])):
            assert abs(a - b) <= tolerance * abs(b), f"{name} at step {step + 1}: {a} instead of {b}"
    assert got["tokens"] == expected["tokens"]
    for (a, n), (b, m) in zip(got["evals"], expected["evals"]):
        assert n == m
        assert abs(a - b) <= tolerance * abs(b)


#: what one process needs too
PLAIN = (
    "sample_packing",
    "tie_word_embeddings",
    "sequence_len",
    "sliding_window",
    "global_batch_size",
    "val_set_size",
)

#: name -> (processes, steps, what differs)
CURVES = {
    "tp2 x cp2": (4, 30, {"tensor_parallel_size": 2, "context_parallel_size": 2}),
    "dp_shard2 x cp2": (
        4,
        6,
        {"dp_shard_size": 2, "context_parallel_size": 2, "micro_batch_size": 2, "global_batch_size": 4},
    ),
    "dp_replicate2 x tp2": (
        4,
        6,
        {"dp_replicate_size": 2, "tensor_parallel_size": 2, "global_batch_size": 4},
    ),
    "hybrid, 3 ranks": (
        3,
        6,
        {"context_parallel_size": 3, "hybrid_context_parallel": True, "max_seqlen_per_dp_cp_rank": 17},
    ),
    "cp3, all at once": (3, 6, {"context_parallel_size": 3, "cp_comm_type": "all_gather"}),
}


@pytest.mark.parametrize("name", slow(CURVES, "tp2 x cp2"))
def test_steps_follow_the_curve_of_one_process(name, prefix, reference):
    world, steps, changes = CURVES[name]
    got = pool.run(world, curve, prefix, steps, changes)
    assert all(rank == got[0] for rank in got), "the ranks disagree about what they computed"
    plain = {name: value for name, value in changes.items() if name in PLAIN}
    compare(got[0], reference(steps, **plain), 1e-9)
    assert steps < 30 or got[0]["losses"][-1] < 0.7 * got[0]["losses"][0]


SINGLE_STEPS = {
    "one stream of documents": (2, {"context_parallel_size": 2, "sample_packing": False}),
    "one stream, batches of two": (
        2,
        {
            "context_parallel_size": 2,
            "sample_packing": False,
            "micro_batch_size": 2,
            "global_batch_size": 4,
        },
    ),
    "hybrid, 2 x 2 ranks": (
        4,
        {
            "dp_shard_size": 2,
            "context_parallel_size": 2,
            "hybrid_context_parallel": True,
            "max_seqlen_per_dp_cp_rank": 13,
            "global_batch_size": 4,
        },
    ),
    "hybrid of one stream, with copies and tensor parallelism": (
        8,
        {
            "dp_replicate_size": 2,
            "context_parallel_size": 2,
            "tensor_parallel_size": 2,
            "hybrid_context_parallel": True,
            "max_seqlen_per_dp_cp_rank": 40,
            "global_batch_size": 4,
            "cp_comm_type": "all_gather",
            "sample_packing": False,
        },
    ),
    "a window, balanced": (3, {"context_parallel_size": 3, "sliding_window": [9, None]}),
    "heads inside, keys across": (
        4,
        {
            "context_parallel_size": 4,
            "cp_comm_type": "a2a+p2p",
            "hierarchical_context_parallel_sizes": [2, 2],
        },
    ),
    "contiguous": (2, {"context_parallel_size": 2, "cp_layout": "contiguous"}),
    "recompute": (2, {"context_parallel_size": 2, "gradient_checkpointing": True}),
    "tied": (2, {"tensor_parallel_size": 2, "tie_word_embeddings": True}),
    "hybrid shard": (4, {"dp_replicate_size": 2, "dp_shard_size": 2, "global_batch_size": 4}),
    "no resharding": (2, {"dp_shard_size": 2, "reshard_after_forward": False, "global_batch_size": 4}),
    "more ranks than some sequences have tokens": (
        8,
        {"context_parallel_size": 8, "sequence_len": 7, "val_set_size": 1},
    ),
}


@pytest.mark.parametrize("name", slow(SINGLE_STEPS, "more ranks than some sequences have tokens"))
def test_two_steps_equal_one_process(name, prefix, reference):
    world, changes = SINGLE_STEPS[name]
    plain = {name: value for name, value in changes.items() if name in PLAIN}
    compare(pool.run(world, curve, prefix, 2, changes)[0], reference(2, **plain), 1e-10)


def test_float32_follows_to_rounding(prefix, reference):
    changes = {"tensor_parallel_size": 2, "context_parallel_size": 2, "params_dtype": "float32"}
    compare(pool.run(4, curve, prefix, 6, changes)[0], reference(6, params_dtype="float32"), 1e-4)


def test_bf16_trains_with_float32_weights(prefix, reference):
    changes = {"context_parallel_size": 2, "params_dtype": "float32", "bf16": True}
    got = pool.run(2, curve, prefix, 12, changes)[0]
    expected = reference(12)
    assert expected["losses"][-1] < 0.85 * expected["losses"][0], "nothing is learned in so few steps"
    assert got["tokens"] == expected["tokens"]
    assert got["losses"][-1] == pytest.approx(expected["losses"][-1], rel=0.05)
    assert got["evals"][-1][0] == pytest.approx(expected["evals"][-1][0], rel=0.05)


def bf16_state(prefix):
    trainer = Trainer(
        tiny.tiny_run(prefix, 2, context_parallel_size=2, params_dtype="float32", bf16=True), CPU
    )
    trainer.train_step(trainer.micro_batches(0))
    kinds = {p.dtype for p in trainer.model.parameters()} | {p.grad.dtype for p in trainer.model.parameters()}
    kinds |= {s.dtype for state in trainer.optimizer.state.values() for s in state.values() if s.dim()}
    return kinds


def test_weights_gradients_and_optimizer_stay_float32_under_bf16(prefix):
    assert pool.run(2, bf16_state, prefix)[0] == {torch.float32}


def whole_run(prefix, folder):
    """Train to the end as the command does: metrics, evaluation and a checkpoint."""
    folder = Path(folder)
    changes = {"max_steps": 4, "eval_steps": 2, "save_steps": 2, "context_parallel_size": 2}
    changes |= {"global_batch_size": 2}
    trainer = Trainer(tiny.tiny_run(prefix, 2, **changes), CPU)
    first = dist.get_rank() == 0
    trainer.metrics = Metrics([JsonLines(folder / "metrics.jsonl")] if first else [])
    loop.train(trainer, folder, Lines(4) if first else Progress())
    trainer.metrics.close()
    return {n: p.detach().full_tensor() for n, p in trainer.model.named_parameters()}


def load_at_another_layout(prefix, folder):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    trainer = Trainer(tiny.tiny_run(prefix, 2, tensor_parallel_size=2, seed=7), CPU)
    state = {"model": get_model_state_dict(trainer.model)}
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(trainer.model, state["model"])
    return {n: p.detach().full_tensor() for n, p in trainer.model.named_parameters()}


def test_a_run_writes_its_records_and_a_checkpoint_that_loads_at_another_layout(prefix, tmp_path):
    weights = pool.run(2, whole_run, prefix, str(tmp_path))[0]
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(r["kind"], r["step"]) for r in records] == [
        ("train", 1),
        ("train", 2),
        ("eval", 2),
        ("train", 3),
        ("train", 4),
        ("eval", 4),
        ("summary", 4),
    ]
    assert set(records[0]) == {
        "kind", "step", "loss", "grad_norm", "learning_rate", "tokens", "step_time", "tokens_per_second",
        "peak_memory_gib",
    }  # fmt: skip
    assert set(records[2]) == {"kind", "step", "loss", "tokens"}
    folder = tmp_path / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == ["latest", "step_00000002", "step_00000004"]
    assert (folder / "latest").read_text() == "step_00000004\n"
    loaded = pool.run(2, load_at_another_layout, prefix, str(folder / "step_00000004"))[0]
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)


def test_metrics_of_an_earlier_run_are_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert set_aside(path) is None
    for text in ("first", "second"):
        path.write_text(text)
        set_aside(path)
    assert (tmp_path / "metrics.jsonl.1").read_text() == "first"
    assert (tmp_path / "metrics.jsonl.2").read_text() == "second"


def wrong_vocabulary(prefix):
    trainer = Trainer(tiny.tiny_run(prefix, 1, vocab_size=50), CPU)
    with pytest.raises(ValueError, match=r"holds token \d+, but vocab_size is 50"):
        trainer.train_step(trainer.micro_batches(0))


def test_data_of_another_tokenizer_is_refused(prefix):
    pool.run(1, wrong_vocabulary, prefix)


def test_a_held_out_sample_that_all_ranks_together_cannot_hold_is_refused(tmp_path):
    def write(name, lengths):
        with IndexedDatasetWriter(tmp_path / name, np.uint16) as writer:
            for n in lengths:
                writer.add_document(np.arange(n))
        hybrid = {
            "hybrid_context_parallel": True,
            "max_seqlen_per_dp_cp_rank": 20,
            "context_parallel_size": 2,
        }
        return tiny.tiny_run(str(tmp_path / name), 2, **hybrid)

    run = write("short", [5] * 10)
    _, valid, _ = open_datasets(run)
    check_data(run)
    lengths = [45 if i in valid.documents else 5 for i in range(10)]
    with pytest.raises(UserError, match="makes a sample of 45 tokens, but 2 ranks x .* 20 hold 40"):
        check_data(write("long", lengths))


def write_samples(folder, learned, length=10):
    """Samples of ``length`` tokens, of which those numbered in ``learned`` have an answer in their last four."""
    with (
        IndexedDatasetWriter(folder / "samples", np.uint16) as tokens,
        IndexedDatasetWriter(folder / "samples_mask", np.uint8) as masks,
    ):
        for i in range(8):
            tokens.add_document(np.arange(i, i + length))
            masks.add_document(np.array([0] * (length - 4) + [i in learned] * 4))
    return str(folder / "samples")


NOTHING_COUNTS = {
    "val_set_size": 0,
    "sample_packing": False,
    "global_batch_size": 2,
    "max_steps": 4,
    "weight_decay": 0.5,
}


def steps_without_targets(prefix, changes):
    """The records of an epoch, and in which steps a weight or the optimizer's state changed."""
    trainer = Trainer(tiny.tiny_run(prefix, dist.get_world_size(), **NOTHING_COUNTS, **changes), CPU)

    def state():
        moments = [s[k] for s in trainer.optimizer.state.values() for k in ("exp_avg", "exp_avg_sq", "step")]
        return [t.full_tensor().clone() if hasattr(t, "full_tensor") else t.clone() for t in
                (*map(torch.Tensor.detach, trainer.model.parameters()), *moments)]  # fmt: skip

    records, changed = [], []
    for step in range(4):
        before = state()
        records.append(trainer.train_step(trainer.micro_batches(step)))
        after = state()
        changed.append(len(before) != len(after) or not all(map(torch.equal, before, after)))
    assert trainer.step == 4
    return [{k: r[k] for k in ("loss", "grad_norm", "learning_rate", "tokens")} for r in records], changed


def test_a_step_in_which_nothing_counts_changes_nothing_at_any_layout(tmp_path):
    """It was once recorded as loss 0, and weight decay ate the model."""
    prefix = write_samples(tmp_path, learned={2})
    expected, changed = pool.run(1, steps_without_targets, prefix, {})[0]
    nothing = [r["loss"] is None for r in expected]
    assert sum(nothing) == 3
    assert changed == [not empty for empty in nothing]
    assert [r["grad_norm"] is None for r in expected] == nothing
    assert expected[-1]["tokens"] == 4
    # the schedule goes on; the default warm-up is one step, cosine falls over the other three
    assert [r["learning_rate"] for r in expected] == pytest.approx([0, 0.01, 0.0075, 0.0025])
    layouts = [
        (2, {"context_parallel_size": 2}),
        (2, {"dp_shard_size": 2}),
        (2, {"context_parallel_size": 2, "hybrid_context_parallel": True, "max_seqlen_per_dp_cp_rank": 50}),
    ]
    for world, changes in layouts:
        for records, moved in pool.run(world, steps_without_targets, prefix, changes):
            assert moved == changed, changes
            for got, want in zip(records, expected):
                for key, value in want.items():
                    same = got[key] is None if value is None else got[key] == pytest.approx(value, rel=1e-10)
                    assert same, (changes, key)


class Shown(Lines):
    """Keeps the lines."""

    def __init__(self, steps):
        super().__init__(steps)
        self.lines = []

    def emit(self, text):
        self.lines.append(text)


def many_steps_without_targets(prefix, folder):
    changes = NOTHING_COUNTS | {
        "global_batch_size": 1,
        "max_steps": 8,
        "logging_steps": 1,
        "save_last": False,
    }
    trainer = Trainer(tiny.tiny_run(prefix, 1, **changes), CPU)
    shown = Shown(8)
    summary = loop.train(trainer, Path(folder), shown)
    return shown.lines, summary["loss"]


def test_several_steps_without_targets_in_a_row_are_warned_of(tmp_path):
    lines, loss = pool.run(
        1, many_steps_without_targets, write_samples(tmp_path, learned={2}), str(tmp_path)
    )[0]
    assert sum("| loss none | grad_norm none |" in line for line in lines) == 7
    assert sum("warning: no token has counted in the loss for 4 steps" in line for line in lines) == 1
    assert loss > 1, "the summary has the loss of the last step that had one"


def test_samples_whose_answers_are_truncated_are_refused(tmp_path):
    """They once trained at loss 0 to the end, with an export."""

    def run(**changes):
        return tiny.tiny_run(write_samples(tmp_path, learned=range(8)), 1, val_set_size=0, **changes)

    text = "training data: no token counts in the loss: 8 of 8 samples are longer than sequence_len 6, and what is left"
    with pytest.raises(UserError, match=text):
        check_data(run(sequence_len=6, excess_length_strategy="truncate"))
    check_data(run(sequence_len=7, excess_length_strategy="truncate"))
    held_out = {"val_set_size": 2, "sequence_len": 6, "excess_length_strategy": "truncate"}
    with pytest.raises(UserError, match="training data: no token counts"):
        check_data(tiny.tiny_run(write_samples(tmp_path, learned=range(8)), 1, **held_out))
    with pytest.raises(UserError, match="no sample has an answer to learn. Look at the data, roles_to_train"):
        check_data(tiny.tiny_run(write_samples(tmp_path, learned=()), 1, val_set_size=0))


def test_evaluation_data_without_a_target_is_refused(tmp_path):
    run = tiny.tiny_run(write_samples(tmp_path, learned=range(8)), 1, val_set_size=1)
    _, valid, _ = open_datasets(run)
    (held_out,) = valid.documents
    with pytest.raises(UserError, match="evaluation data: no token counts in the loss"):
        check_data(
            tiny.tiny_run(write_samples(tmp_path, learned=set(range(8)) - {int(held_out)}), 1, val_set_size=1)
        )
