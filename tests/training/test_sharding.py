"""The stream of documents cut at its end-of-document tokens, at every layout, against dense masks and positions in fp64."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import oracle
import pool
import tiny
from longspan.data.splits import open_datasets
from longspan.errors import UserError
from longspan.training.trainer import Trainer

CPU = torch.device("cpu")
EOD = 5  # one token of 97: several in some samples, none in others
STREAM = {
    "sample_packing": False,
    "sequence_len": 45,
    "eod_token_id": EOD,
    "max_steps": 2,
    "eval_max_samples": 2,
}
#: Megatron-LM's switches
SWITCHES = {
    "positions": {"reset_position_ids": True},
    "attention": {"reset_attention_mask": True},
    "both, and the loss": {"reset_position_ids": True, "reset_attention_mask": True, "eod_mask_loss": True},
}
LEARNED = {"position_embedding_type": "learned_absolute", "export_hf": False}


def steps(prefix, changes):
    """For each of the switches: the loss, the whole gradients and the weights of the first step, and an evaluation."""
    found = {}
    for name, switches in SWITCHES.items():
        run = tiny.tiny_run(prefix, dist.get_world_size(), **STREAM | switches | changes)
        trainer = Trainer(run, CPU)
        evaluation = trainer.evaluate()
        loss, count = trainer.compute_gradients(trainer.micro_batches(0))
        parameters = dict(trainer.model.named_parameters())
        found[name] = {
            "loss": (loss, count),
            "evaluation": (evaluation["loss"], evaluation["tokens"]),
            "gradients": {n: p.grad.full_tensor().clone() for n, p in parameters.items()},
            "weights": {n: p.detach().full_tensor().clone() for n, p in parameters.items()},
        }
    return found


def mask_and_positions(tokens, used, switches):
    """Megatron-LM's, token by token: what follows an end-of-document token begins anew."""
    seen = torch.ones(len(tokens), len(tokens)).tril().bool()
    positions = torch.arange(len(tokens))
    for i in range(used):
        if tokens[i] == EOD and switches.get("reset_attention_mask"):
            seen[i + 1 :, : i + 1] = False
        if tokens[i] == EOD and switches.get("reset_position_ids"):
            positions[i + 1 :] = torch.arange(len(tokens) - i - 1)
    return seen, positions


def dense(run, data, samples, weights, switches):
    """(sum of the losses, tokens that count) of samples of the plain stream, by explicit masks and positions."""
    total, count = 0.0, 0
    for sample in samples:
        row = data.row(sample)
        tokens, labels = torch.from_numpy(row.tokens), torch.from_numpy(row.labels).clone()
        seen, positions = mask_and_positions(tokens, data.boundaries(sample)[-1], switches)
        if switches.get("eod_mask_loss"):
            labels[tokens == EOD] = -100
        logits = oracle.plain_llama(weights, tokens, seen, positions, run.transformer_config())
        total = total + F.cross_entropy(logits[:, : tiny.VOCAB], labels, ignore_index=-100, reduction="sum")
        count += int((labels != -100).sum())
    return total, count


@pytest.fixture(scope="module")
def reference(prefix):
    """By dense masks and positions: for some changes, what ``steps`` gives."""
    done = {}

    def get(**changes):
        key = repr(changes)
        if key in done:
            return done[key]
        weights = pool.run(1, steps, prefix, changes)[0]["positions"]["weights"]
        run = tiny.tiny_run(prefix, 1, **{k: v for k, v in STREAM.items() if k != "eod_token_id"} | changes)
        train, valid, _ = open_datasets(run)
        done[key] = {}
        for name, switches in SWITCHES.items():
            leaves = {n: w.clone().requires_grad_() for n, w in weights.items()}
            loss, count = dense(run, train, train.global_batch(0, 4), leaves, switches)
            (loss / count).backward()
            with torch.no_grad():
                held, tokens = dense(run, valid, range(2), weights, switches)
            done[key][name] = {
                "loss": ((loss / count).item(), count),
                "evaluation": ((held / tokens).item(), tokens),
                "gradients": {n: w.grad for n, w in leaves.items()},
            }
        return done[key]

    return get


LAYOUTS = {
    "one process": (1, {}),
    "cp2 zigzag, batches of two": (
        2,
        {"context_parallel_size": 2, "cp_layout": "zigzag", "micro_batch_size": 2},
    ),
    "cp3 contiguous": (3, {"context_parallel_size": 3, "cp_layout": "contiguous"}),
    "cp2 balanced, heads": (
        2,
        {
            "context_parallel_size": 2,
            "cp_layout": "balanced",
            "cp_comm_type": "a2a",
            "micro_batch_size": 2,
        },
    ),
    "tp2 x cp2": (4, {"tensor_parallel_size": 2, "context_parallel_size": 2, "micro_batch_size": 2}),
    "hybrid": (
        2,
        {"context_parallel_size": 2, "hybrid_context_parallel": True, "max_seqlen_per_dp_cp_rank": 30},
    ),
    "learned positions, tp2": (2, {"tensor_parallel_size": 2, "micro_batch_size": 2} | LEARNED),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_positions_and_attention_begin_anew_each_by_itself(name, prefix, reference):
    world, changes = LAYOUTS[name]
    got = pool.run(world, steps, prefix, changes)[0]
    expected = reference(**(LEARNED if "learned" in name else {}))
    for switch, want in expected.items():
        for part in ("loss", "evaluation"):
            assert got[switch][part][1] == want[part][1]
            assert got[switch][part][0] == pytest.approx(want[part][0], rel=1e-10)
        for parameter, whole in want["gradients"].items():
            scale = whole.abs().max()
            torch.testing.assert_close(
                got[switch]["gradients"][parameter] / scale, whole / scale, rtol=0, atol=1e-10
            )


def test_the_switches_differ_from_each_other_and_from_none(prefix, reference):
    losses = [part["loss"][0] for part in reference(**LEARNED).values()]
    losses.append(pool.run(1, plain_loss, prefix)[0])
    assert all(abs(a - b) > 1e-6 for i, a in enumerate(losses) for b in losses[:i]), losses


def plain_loss(prefix):
    run = tiny.tiny_run(prefix, 1, **STREAM | LEARNED | {"eod_token_id": None})
    trainer = Trainer(run, CPU)
    return trainer.compute_gradients(trainer.micro_batches(0))[0]


def test_the_samples_of_the_stream_stay_as_they_are(prefix):
    """Same tokens in the same order, same labels, across an end of document too; other boundaries and positions."""
    plain = open_datasets(tiny.tiny_run(prefix, 1, **STREAM | {"eod_token_id": None}))[0]
    for name, switches in SWITCHES.items():
        data = open_datasets(tiny.tiny_run(prefix, 1, **STREAM | switches))[0]
        assert data.global_batch(3, 4) == plain.global_batch(3, 4)
        assert len(data) == len(plain)
        for sample in range(len(plain)):
            row, old = data.row(sample), plain.row(sample)
            used = plain.boundaries(sample)[-1]
            assert row.tokens.tolist() == old.tokens.tolist()
            changed = row.labels != old.labels
            if name != "both, and the loss":
                assert not changed.any()
            assert set(row.tokens[changed].tolist()) <= {EOD}
            seen, positions = mask_and_positions(torch.from_numpy(row.tokens), used, switches)
            assert row.positions[:used].tolist() == positions[:used].tolist()
            firsts = [i for i in range(used) if i == 0 or not seen[i, i - 1]]
            assert data.boundaries(sample) == [*firsts, used]


def test_packed_documents_and_samples_need_no_switch(prefix):
    train = open_datasets(tiny.tiny_run(prefix, 1))[0]
    assert train.sample_packing
    with pytest.raises(UserError, match=r"reset_position_ids: true is for the stream of documents"):
        tiny.tiny_run(prefix, 1, reset_position_ids=True)
