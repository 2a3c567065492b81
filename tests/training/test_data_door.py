"""Training from Megatron's data door: the same losses at every layout, a test at the end, what is refused."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import pool
import tiny
from longspan.config.load import make_config
from longspan.config.resolve import resolve
from longspan.config.run import Run
from longspan.data.blend import BlendedDataset
from longspan.data.checks import check_data, missing_sources
from longspan.errors import UserError
from longspan.runs.prepare import prepare_data
from longspan.training import loop
from longspan.training.description import describe_run
from longspan.training.metrics import JsonLines, Metrics
from longspan.training.progress import Progress
from longspan.training.trainer import Trainer

CPU = torch.device("cpu")


def door_checked(world, **changes):
    values = tiny.values("unused", **changes)
    del values["datasets"], values["val_set_size"]
    reading = make_config(values)
    assert not reading.problems, reading.problems
    return resolve(reading.config, world)


def door_run(world, **changes):
    return Run.of(door_checked(world, **changes).config)


@pytest.fixture(scope="module")
def blend(tmp_path_factory):
    """0.3 of one file, 0.7 of another."""
    paths = []
    for seed, weight in ((1, "0.3"), (2, "0.7")):
        folder = tmp_path_factory.mktemp(f"blend{seed}")
        paths += [weight, tiny.write_data(folder, documents=80, seed=seed)]
    return paths


def curve(steps, changes):
    trainer = Trainer(door_run(dist.get_world_size(), **changes), CPU)
    losses = [trainer.train_step(trainer.micro_batches(step))["loss"] for step in range(steps)]
    ends = [trainer.evaluate(data)["loss"] for data in (trainer.valid_data, trainer.test_data)]
    return losses + ends


def test_a_blend_trains_the_same_at_every_layout(blend):
    changes = {"data_path": blend, "split": "80,10,10", "global_batch_size": 2, "eval_max_samples": 3}
    expected = pool.run(1, curve, 3, changes)[0]
    for world, more in (
        (2, {"tensor_parallel_size": 2, "sample_packing": True}),
        (2, {"context_parallel_size": 2}),
        (2, {"dp_shard_size": 2}),
        (2, {"hybrid_context_parallel": True, "max_seqlen_per_dp_cp_rank": 64}),
    ):
        for losses in pool.run(world, curve, 3, changes | more):
            assert losses == pytest.approx(expected, rel=1e-10), more


def whole_run(folder, changes):
    trainer = Trainer(door_run(dist.get_world_size(), **changes), CPU)
    if dist.get_rank() == 0:
        trainer.metrics = Metrics([JsonLines(Path(folder) / "metrics.jsonl")])
    loop.train(trainer, Path(folder), Progress())
    trainer.metrics.close()


def test_the_test_comes_at_the_end_and_once(tmp_path):
    changes = {"mock_data": True, "split": "90,5,5", "max_steps": 4, "eval_steps": 2, "eval_max_samples": 4}
    pool.run(1, whole_run, tmp_path, changes)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    kinds = [(r["kind"], r.get("split"), r["step"]) for r in records if r["kind"] != "train"]
    assert kinds == [("eval", None, 2), ("eval", None, 4), ("eval", "test", 4), ("summary", None, 4)]
    assert set(records[-2]) == {"kind", "step", "loss", "tokens", "split"}
    assert records[-1]["eval_loss"] == records[-3]["loss"]


def test_a_model_learns_from_mock_data():
    changes = {"mock_data": True, "split": "90,5,5", "sequence_len": 128, "eval_max_samples": 4}
    losses = pool.run(1, curve, 20, changes)[0]
    assert losses[19] < losses[0] - 1


def test_check_data_names_the_file_and_the_vocabulary(blend):
    run = door_run(1, data_path=blend)
    assert isinstance(check_data(run), BlendedDataset)
    with pytest.raises(UserError, match=f"{blend[1]} holds token 96, but vocab_size is 50"):
        check_data(door_run(1, data_path=blend, vocab_size=50))
    mock = door_run(1, mock_data=True)
    assert check_data(mock).num_tokens > 0


def test_a_resume_keeps_weights_and_split(blend):
    run = door_run(1, data_path=blend, split="80,10,10")
    settings = describe_run(run, check_data(run))["settings"]
    assert (settings["weights"], settings["split"]) == ([3, 7], "80,10,10")
    plain = tiny.tiny_run(blend[1], 1)
    settings = describe_run(plain, check_data(plain))["settings"]
    assert (settings["weights"], settings["split"]) == (None, None)  # as an older checkpoint has them


def test_missing_files_are_found_first(blend, tmp_path):
    text = tmp_path / "x.jsonl"
    text.write_text("{}")
    run = door_run(1, data_path=["1", blend[1] + "_text", "1", str(text)])
    problems = missing_sources(run.config)
    assert "tiny_text.idx: no such file" in problems[0]
    assert "Did you mean" in problems[0]
    assert problems[1] == (
        f"data_path: {text} is no .bin/.idx pair. Make one: longspan prepare --input {text} --output-prefix PREFIX, or train "
        "on it by datasets."
    )


def test_vocabularies_at_this_door(blend, tmp_path):
    def vocab(**changes):
        done = prepare_data(door_checked(1, **changes), show=False)
        again = prepare_data(done, show=False)  # a launched process prepares what is prepared
        assert again == done
        return done.config

    assert vocab(mock_data=True, vocab_size=None).vocab_size == 32768
    assert vocab(data_path=blend, vocab_size=97).vocab_size == 97
    null = vocab(data_path=blend, vocab_size=97, tokenizer_type="NullTokenizer")
    assert (null.vocab_size, null.tokenizer_type) == (98, None)
    with pytest.raises(UserError, match="vocab_size: missing"):
        vocab(data_path=blend, vocab_size=None)
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0, "b": 1, "ab": 2, "<|endoftext|>": 3}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    files = {"vocab_file": str(tmp_path / "vocab.json"), "merge_file": str(tmp_path / "merges.txt")}
    gpt2 = vocab(data_path=blend, vocab_size=None, dataset_prepared_path=str(tmp_path), **files)
    assert gpt2.vocab_size == 4
    assert gpt2.vocab_file is None
    assert (Path(gpt2.tokenizer_config) / "tokenizer.json").is_file()
