"""What a run reports by itself: losses far above the others, and slow ranks."""

import json
from pathlib import Path

import torch
import torch.distributed as dist

import pool
import tiny
from longspan.training.metrics import JsonLines, Metrics
from longspan.training.spikes import WINDOW, LossSpikes
from longspan.training.stragglers import Stragglers, probe
from longspan.training.trainer import Trainer

CPU = torch.device("cpu")


def test_a_spike_is_far_above_the_losses_before_it():
    spikes = LossSpikes(6.0)
    losses = [3.0 + 0.01 * (-1) ** n for n in range(WINDOW[1])]
    assert [spikes.add(loss) for loss in losses] == [None] * WINDOW[1]
    assert spikes.add(3.1) is None  # 10 standard deviations, but 3 % only
    assert spikes.add(2.0) is None  # low is no spike
    assert abs(spikes.add(9.0) - 2.97) < 0.02
    assert LossSpikes(0.0).add(99.0) is None


def test_few_losses_are_no_measure():
    spikes = LossSpikes(6.0)
    assert [spikes.add(loss) for loss in (3.0, 3.0, 50.0)] == [None] * 3


def with_a_spike(prefix, folder):
    changes = {"max_steps": WINDOW[1] + 4, "learning_rate": 1e-6, "global_batch_size": 2, "num_layers": 1}
    run = tiny.tiny_run(prefix, dist.get_world_size(), loss_spike_sigma=4.0, straggler_interval=8, **changes)
    trainer = Trainer(run, CPU)
    if dist.get_rank() == 0:
        trainer.metrics = Metrics([JsonLines(Path(folder) / "metrics.jsonl")])
    texts = []
    for step in range(WINDOW[1] + 2):
        if step == WINDOW[1] + 1:
            with torch.no_grad():  # a weight that was damaged
                for parameter in trainer.model.parameters():
                    parameter.mul_(10)
        texts += trainer.remarks(trainer.train_step(trainer.micro_batches(step)))
    again = Trainer(run, CPU)
    assert again.spikes.losses != trainer.spikes.losses
    again.spikes.restart(json.loads(json.dumps(trainer.description()))["last_losses"])
    assert again.spikes.losses == trainer.spikes.losses
    return texts


def test_a_spike_is_recorded_with_its_documents(prefix, tmp_path):
    texts = pool.run(2, with_a_spike, prefix, str(tmp_path))
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    (spike,) = (record for record in records if record["kind"] == "loss_spike")
    assert spike["step"] == WINDOW[1] + 2
    assert spike["loss"] > 1.5 * spike["mean"]
    assert spike["documents"][0].startswith(f"{prefix}:")
    assert [text for text in texts[0] if "the loss of step" in text] == [
        f"the loss of step {spike['step']} is {spike['loss']:.4g}, far above the {spike['mean']:.4g} of the steps before. "
        f"The step's documents: {', '.join(spike['documents'][:3])}"
        + (f" and {len(spike['documents']) - 3} more." if len(spike["documents"]) > 3 else ".")
    ]
    ranks = [record for record in records if record["kind"] == "ranks"]
    assert [record["step"] for record in ranks] == [8, 16, 24, 32]
    assert set(ranks[0]["work_ms"]) == {"min", "median", "max", "slowest_ranks"}


def slow(factor, waits):
    """Three comparisons, in which rank 1 takes ``factor`` times as long in the first and the last two."""
    rank, found = dist.get_rank(), []
    watch = Stragglers(10, lambda: 0.01 * (factor if rank == 1 else 1))
    for step in (10, 20):
        watch.since -= 1.0
        watch.waited = waits if rank == 2 else 0.001
        found.append(watch.look(step)[1])
    watch.measure = lambda: 0.01
    found.append(watch.look(30)[1])
    assert watch.look(35) is None
    return found


def test_a_rank_that_is_slow_twice_is_named():
    (first, second, third), *others = pool.run(3, slow, 2.0, 0.0)
    assert all(other == [first, second, third] for other in others)
    assert first == third == []  # once may be chance
    (line,) = second
    assert line.startswith("rank 1 (")
    assert "computes slower than the others: 20 ms against 10 ms (median) for the same work" in line
    assert pool.run(3, slow, 1.3, 0.0)[0] == [[], [], []]


def test_a_rank_that_waits_for_its_data_is_named():
    _, (line,), _ = pool.run(3, slow, 1.0, 0.5)[0]
    assert "waits longer for its data than the others: 500 ms against 1 ms (median)" in line


def test_the_work_takes_time():
    assert 0 < probe(CPU) < 60
