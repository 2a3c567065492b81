"""Fine-tuning at TP 2 x CP 2: the loss of every token of every sample against transformers, one sample at a time."""

import importlib.util
import json

import numpy as np
import pytest
import torch
import torch.distributed as dist

import pool
from chats import chat, write_lines, write_tokenizer
from longspan.config.load import make_config
from longspan.config.model import IGNORE_INDEX
from longspan.config.resolve import resolve
from longspan.data import IndexedDataset, open_masks
from longspan.data.checks import check_data
from longspan.data.splits import open_datasets
from longspan.errors import UserError
from longspan.runs.prepare import prepare_data
from longspan.training.trainer import Trainer

CPU = torch.device("cpu")
LENGTH = 192

needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """An Alpaca file, a file of chats, one of documents, and a random Llama with its tokenizer."""
    folder = tmp_path_factory.mktemp("finetune")
    words = [
        "the",
        "capital",
        "of",
        "France",
        "is",
        "Paris",
        "and",
        "two",
        "plus",
        "two",
        "is",
        "four",
        "hello",
        "naïve",
        "😀",
        "answer",
    ]
    rng = np.random.default_rng(0)

    def text(most):
        return " ".join(rng.choice(words, int(rng.integers(0, most))))

    write_lines(
        folder / "alpaca.jsonl",
        [{"instruction": text(9), "input": text(4) if i % 2 else "", "output": text(9)} for i in range(24)],
    )
    talks = [chat(*(text(8) for _ in range(2 * int(rng.integers(1, 4))))) for _ in range(24)]
    talks[5] = chat("only a question")  # nothing to learn
    names = {"user": "human", "assistant": "gpt"}
    shared = [[{"from": names[m["role"]], "value": m["content"]} for m in talk] for talk in talks]
    write_lines(folder / "chats.jsonl", [{"conversations": talk} for talk in shared])
    write_lines(folder / "texts.jsonl", [{"text": text(90)} for _ in range(6)])
    write_tokenizer(folder / "model")
    if importlib.util.find_spec("transformers"):
        import transformers

        torch.manual_seed(3)
        config = transformers.LlamaConfig(
            vocab_size=420,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.2,
            tie_word_embeddings=False,
        )
        transformers.LlamaForCausalLM(config).save_pretrained(folder / "model")
    return folder


def run_of(folder, world, **changes):
    """A prepared run of the three files."""
    values = {
        "base_model": str(folder / "model"),
        "datasets": [
            {"path": str(folder / "alpaca.jsonl"), "type": "alpaca"},
            {"path": str(folder / "chats.jsonl"), "type": "chat_template", "chat_template": "chatml"},
        ],
        "dataset_prepared_path": str(folder / "cache"),
        "sequence_len": LENGTH,
        "micro_batch_size": 1,
        "global_batch_size": 4,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "bf16": False,
        "device": "cpu",
        "use_tensorboard": False,
    } | changes
    read = make_config(values)
    assert not read.problems, read.problems
    run = resolve(read.config, world)
    return prepare_data(run, show=False)


def token_losses(folder, changes):
    """This rank's (position in the row's pack, token, label, loss) of the first steps, by data parallel rank."""
    trainer = Trainer(run_of(folder, dist.get_world_size(), **changes), CPU)
    trainer.model.eval()
    found = []
    with torch.no_grad():
        for step in range(trainer.steps):
            for number, batch in enumerate(trainer.micro_batches(step)):
                losses = trainer.losses(batch)
                places = batch.layout.positions(dist.get_rank(trainer.groups.cp))
                found.append((step, number, places, batch.tokens, batch.labels, losses))
    return dist.get_rank(trainer.groups.dp), found


def by_place(results):
    """(dp rank, step, micro-batch, row) -> tokens, labels and losses of the row in order of position."""
    rows = {}
    for dp, found in results:
        for step, number, places, *values in found:
            for b in range(values[0].shape[0]):
                row = rows.setdefault((dp, step, number, b), {})
                row.update(zip(places.tolist(), zip(*(v[b].tolist() for v in values))))
    return {key: [row[place] for place in sorted(row)] for key, row in rows.items()}


def samples_of(run):
    """tokens -> mask of each sample of a prepared run (a document has no mask)."""
    found = {}
    for source in [*run.config.datasets, *run.config.test_datasets]:
        tokens, masks = IndexedDataset(source.prepared), open_masks(source.prepared)
        for number in range(len(tokens)):
            ids = tokens.read(number)
            mask = np.ones(len(ids), np.uint8) if masks is None else masks.read(number)
            found[tuple(ids.tolist())] = mask
    return found


def reference(folder, samples):
    """tokens -> the loss of each next token by transformers, in float32."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
    losses = {}
    with torch.no_grad():
        for ids in samples:
            logits = model(torch.tensor([ids])).logits[0, :-1]
            losses[ids] = torch.nn.functional.cross_entropy(
                logits, torch.tensor(ids[1:]), reduction="none"
            ).tolist()
    return losses


LAYOUTS = {
    "packed, tp2 x cp2": (4, {"tensor_parallel_size": 2, "context_parallel_size": 2}),
    "packed, two a micro-batch": (
        4,
        {"tensor_parallel_size": 2, "context_parallel_size": 2, "micro_batch_size": 2},
    ),
    "one sample a row, two a micro-batch": (
        4,
        {
            "tensor_parallel_size": 2,
            "context_parallel_size": 2,
            "micro_batch_size": 2,
            "sample_packing": False,
            "max_steps": 12,
        },
    ),
    "packed, all to all over dp2": (
        4,
        {"dp_shard_size": 2, "context_parallel_size": 2, "cp_comm_type": "a2a"},
    ),
}


@needs_transformers
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_tokens_loss_is_that_of_transformers_on_the_sample_alone(data, name):
    world, changes = LAYOUTS[name]
    run = run_of(data, world, **changes)
    samples = samples_of(run)
    expected = reference(data, samples)
    begins = {}
    for ids in samples:
        begins.setdefault(ids[:1], []).append(ids)
    seen = 0
    for row in by_place(pool.run(world, token_losses, data, changes)).values():
        # the whole rows of one or more sequences of LENGTH, padding included
        tokens = tuple(token for token, *_ in row)
        at = 0
        while at < len(tokens):
            fits = [ids for ids in begins.get(tokens[at : at + 1], []) if tokens[at : at + len(ids)] == ids]
            if not fits:  # padding: token 0, never a label
                assert row[at][:2] == (0, IGNORE_INDEX)
                assert row[at][2] == 0
                at += 1
                continue
            ids = max(fits, key=len)
            for i, (_, label, loss) in enumerate(row[at : at + len(ids)]):
                if i + 1 < len(ids) and samples[ids][i + 1]:
                    assert label == ids[i + 1]
                    assert abs(loss - expected[ids][i]) <= 1e-5 * max(1.0, expected[ids][i])
                    seen += 1
                else:
                    assert label == IGNORE_INDEX
                    assert loss == 0
            at += len(ids)
    assert seen > 100


def curve(folder, steps, changes):
    trainer = Trainer(run_of(folder, dist.get_world_size(), **changes), CPU)
    records = [trainer.train_step(trainer.micro_batches(step)) for step in range(steps)]
    evals = [trainer.evaluate()] if trainer.valid_data is not None else []
    return [(r["loss"], r["grad_norm"], r["tokens"]) for r in records] + [
        (e["loss"], 0, e["tokens"]) for e in evals
    ]


def mix(folder, **changes):
    """Three kinds of data, in float64, from random weights, evaluated on other files."""
    return {
        "reinit_weights": True,
        "init_method_std": 0.1,
        "params_dtype": "float64",
        "datasets": [
            {"path": str(folder / "alpaca.jsonl"), "type": "alpaca", "split": "train[:16]"},
            {"path": str(folder / "chats.jsonl"), "type": "sharegpt", "chat_template": "llama3"},
            {"path": str(folder / "texts.jsonl")},
        ],
        "test_datasets": [{"path": str(folder / "alpaca.jsonl"), "type": "alpaca", "split": "train[16:]"}],
        "sequence_len": 100,
        "excess_length_strategy": "truncate",
    } | changes


CURVES = {
    "tp2 x cp2": (4, {"tensor_parallel_size": 2, "context_parallel_size": 2, "micro_batch_size": 2}),
    "dp2 x cp2": (4, {"dp_shard_size": 2, "context_parallel_size": 2}),
    "hybrid": (
        2,
        {"context_parallel_size": 2, "hybrid_context_parallel": True, "max_seqlen_per_dp_cp_rank": 60},
    ),
}


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("name", CURVES)
def test_a_mix_follows_the_curve_of_one_process(data, name, packing):
    if not (data / "model" / "config.json").is_file():
        pytest.skip("transformers is not installed")
    world, changes = CURVES[name]
    expected = pool.run(1, curve, data, 3, mix(data, sample_packing=packing))[0]
    got = pool.run(world, curve, data, 3, mix(data, sample_packing=packing, **changes))
    assert all(rank == got[0] for rank in got)
    for (loss, norm, tokens), (loss2, norm2, tokens2) in zip(got[0], expected):
        assert tokens == tokens2
        assert abs(loss - loss2) <= 1e-10 * loss2
        assert abs(norm - norm2) <= 1e-10 * norm2


def nothing_to_learn(folder, changes):
    trainer = Trainer(run_of(folder, dist.get_world_size(), **changes), CPU)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    record = trainer.train_step(trainer.micro_batches(0))
    same = all(torch.equal(p.to_local(), q.to_local()) for p, q in zip(trainer.model.parameters(), before))
    return record["loss"], record["grad_norm"], record["tokens"], same


@needs_transformers
def test_a_step_without_a_token_to_learn_changes_nothing(data, tmp_path):
    # chats that are questions alone
    path = write_lines(tmp_path / "a.jsonl", [{"messages": chat("a " * i)} for i in range(1, 9)])
    changes = {
        "datasets": [{"path": str(path), "type": "chat_template", "chat_template": "chatml"}],
        "context_parallel_size": 2,
        "sample_packing": False,
        "weight_decay": 0.5,
    }
    run_of(data, 1, **changes | {"context_parallel_size": 1})  # one process prepares; the ranks find it made
    assert pool.run(2, nothing_to_learn, data, changes)[0] == (None, None, 0, True)
    with pytest.raises(UserError, match="no token counts in the loss"):
        check_data(run_of(data, 1, **changes | {"context_parallel_size": 1}))


@needs_transformers
def test_preparing_again_finds_everything_and_special_tokens_are_used(data, tmp_path):
    changes = {
        "dataset_prepared_path": str(tmp_path),
        "special_tokens": {"eos_token": "<|im_end|>", "bos_token": "<unk>"},
        "chat_template": "mistral",
        "datasets": [
            {"path": str(data / "alpaca.jsonl"), "type": "alpaca"},
            {"path": str(data / "chats.jsonl"), "type": "chat_template"},
            {"path": str(data / "texts.jsonl")},
        ],
    }
    run = run_of(data, 1, **changes)
    assert str(tmp_path) in run.config.tokenizer_config
    for source in run.config.datasets:
        first = IndexedDataset(source.prepared).read(0)
        assert first[0] == 0
        assert first[-1] == 4
    kept = (tmp_path / "x").parent.rglob("*")
    stamps = {p: p.stat().st_mtime_ns for p in kept if p.is_file()}
    again = prepare_data(run.with_keys(datasets=[
        d.model_copy(update={"prepared": None}) for d in run.config.datasets]), show=False)  # fmt: skip
    assert again.config == run.config
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()} == stamps
    settings = json.loads((tmp_path / run.config.tokenizer_config / "tokenizer_config.json").read_text())
    assert settings["eos_token"] == "<|im_end|>"
    with pytest.raises(UserError, match="'<none>': not in the vocabulary"):
        run_of(data, 1, special_tokens={"eos_token": "<none>"})


@needs_transformers
def test_tokens_with_a_type_need_their_masks(data, tmp_path):
    run = run_of(data, 1)
    prefix = run.config.datasets[0].prepared
    found = run_of(
        data, 1, datasets=[{"path": prefix}], vocab_size=420
    )  # with masks beside them they are samples
    assert open_datasets(found)[0].has_samples
    for end in (".bin", ".idx"):
        (tmp_path / f"bare{end}").write_bytes((data / "cache" / f"{prefix}{end}").read_bytes())
    with pytest.raises(UserError, match="holds tokens, and no masks"):
        run_of(data, 1, datasets=[{"path": str(tmp_path / "bare"), "type": "alpaca"}])
