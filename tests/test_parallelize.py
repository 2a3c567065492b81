"""The norm of all weights, at every layout: each counted once."""

import pytest
import torch
import torch.distributed as dist

import pool
import tiny
from longspan.training.trainer import Trainer

CPU = torch.device("cpu")


def norms(prefix, changes):
    """What two steps record, and the norm of the whole tensors after them."""
    run = tiny.tiny_run(
        prefix, dist.get_world_size(), **{"log_params_norm": True, "global_batch_size": 2} | changes
    )
    trainer = Trainer(run, CPU)
    records = [trainer.train_step(trainer.micro_batches(step)) for step in range(2)]
    wholes = [p.detach().full_tensor() for p in trainer.model.parameters()]
    expected = torch.stack([whole.square().sum() for whole in wholes]).sum().sqrt().item()
    return [record.get("params_norm") for record in records], expected


@pytest.mark.parametrize(
    ("world", "changes"),
    [
        (1, {}),
        (4, {"tensor_parallel_size": 2, "dp_replicate_size": 2}),
        (3, {"context_parallel_size": 3, "gradient_checkpointing": True}),
    ],
)
def test_the_norm_of_the_weights_is_recorded_and_the_same_at_every_layout(world, changes, prefix):
    """Tied weights count once, as do those that tensor parallel ranks or copies hold alike."""
    tied = {"tie_word_embeddings": True}
    recorded, expected = pool.run(world, norms, prefix, tied | changes)[0]
    assert recorded[1] == pytest.approx(expected, rel=1e-12)
    alone, _ = pool.run(1, norms, prefix, tied)[0]
    assert recorded == pytest.approx(alone, rel=1e-10)
    assert recorded[0] != recorded[1]


def test_it_is_not_recorded_unless_asked_for(prefix):
    assert pool.run(1, norms, prefix, {"log_params_norm": False})[0][0] == [None, None]
