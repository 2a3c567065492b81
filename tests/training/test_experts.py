"""Training with experts at every mix of ranks against one process: losses, every gradient, counts, bias. fp64."""

import json

import pytest
import torch
import torch.distributed as dist

import pool
import tiny
from longspan.training.trainer import Trainer

CPU = torch.device("cpu")
#: every balancing loss at once
ALL = {
    "num_moe_experts": 6,
    "moe_ffn_hidden_size": 24,
    "moe_router_topk": 2,
    "moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss", "global_aux_loss"],
    "moe_aux_loss_coeff": [0.2, 0.1, 0.05],
    "moe_z_loss_coeff": 0.02,
}
BIAS = ALL | {
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_bias_update_rate": 0.01,
}


def steps(prefix, count, changes):
    """Records of some steps, every whole gradient of the second one, and the bias of the experts."""
    trainer = Trainer(tiny.tiny_run(prefix, dist.get_world_size(), **changes), CPU)
    records, gradients = [], {}
    for step in range(count):
        trainer.compute_gradients(trainer.micro_batches(step))
        if step == min(1, count - 1):
            gradients = {name: p.grad.full_tensor().clone() for name, p in trainer.model.named_parameters()}
        trainer.step = step
        records.append(trainer.train_step(trainer.micro_batches(step)))
    state = {
        name: buffer.to_local().clone() if hasattr(buffer, "to_local") else buffer.clone()
        for name, buffer in trainer.model.named_buffers()
        if name.endswith(("expert_bias", "last_counts"))
    }
    keys = ("loss", "grad_norm", "moe_aux_loss", "moe_z_loss", "moe_dropped_tokens", "moe_load", "tokens")
    return {
        "records": [{k: r.get(k) for k in keys} for r in records],
        "evaluation": trainer.evaluate()["loss"],
        "gradients": gradients if dist.get_rank() == 0 else {},
        "state": state,
    }


@pytest.fixture(scope="module")
def prefix(tmp_path_factory):
    return tiny.write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def reference(prefix):
    done = {}

    def get(count, changes):
        key = count, json.dumps(changes, sort_keys=True)
        if key not in done:
            done[key] = pool.run(1, steps, prefix, count, changes)[0]
        return done[key]

    return get


def close(got, expected, tolerance):
    assert got == expected or abs(got - expected) <= tolerance * abs(expected), (got, expected)


def compare(got, expected, tolerance=1e-10):
    for a, b in zip(got["records"], expected["records"]):
        for key in ("loss", "grad_norm", "moe_aux_loss", "moe_z_loss"):
            close(a[key], b[key], tolerance)
        assert [a[k] for k in ("moe_dropped_tokens", "moe_load", "tokens")] == [
            b[k] for k in ("moe_dropped_tokens", "moe_load", "tokens")
        ]
    close(got["evaluation"], expected["evaluation"], tolerance)
    for name, whole in expected["gradients"].items():
        largest = whole.abs().max()
        torch.testing.assert_close(
            got["gradients"][name],
            whole,
            rtol=0,
            atol=tolerance * max(largest.item(), 1e-3),
            msg=lambda m, n=name: f"{n}: {m}",
        )
    for name, value in expected["state"].items():
        assert torch.equal(got["state"][name], value), name


#: name -> (processes, what differs)
MIXES = {
    "ep2": (2, {"expert_parallel_size": 2}),
    "ep2, all to all ranks": (2, {"expert_parallel_size": 2, "moe_token_dispatcher_type": "allgather"}),
    "ep2 x tp2": (4, {"expert_parallel_size": 2, "tensor_parallel_size": 2}),
    "ep2 x tp2, experts whole": (
        4,
        {"expert_parallel_size": 2, "tensor_parallel_size": 2, "expert_tensor_parallel_size": 1},
    ),
    "tp2 without sequence parallelism": (2, {"tensor_parallel_size": 2, "sequence_parallel": False}),
    "ep2 folded into cp2": (2, {"expert_parallel_size": 2, "context_parallel_size": 2}),
    "ep2 x etp2 over cp2": (
        4,
        {"expert_parallel_size": 2, "expert_tensor_parallel_size": 2, "context_parallel_size": 2},
    ),
    "dp_shard2 x cp2, ep2": (4, {"expert_parallel_size": 2, "context_parallel_size": 2}),
    "cp3 x ep3": (3, {"expert_parallel_size": 3, "context_parallel_size": 3}),
    "HSDP x ep2": (4, {"expert_parallel_size": 2, "dp_replicate_size": 2}),
    "one expert a rank, more ranks than that": (4, {"num_moe_experts": 2, "expert_parallel_size": 2}),
    "dp4": (4, {}),
}


@pytest.mark.parametrize("name", MIXES)
def test_steps_equal_one_process(name, prefix, reference):
    world, changes = MIXES[name]
    run = ALL | changes
    alone = {
        k: v
        for k, v in run.items()
        if k
        not in (
            "expert_parallel_size",
            "tensor_parallel_size",
            "context_parallel_size",
            "expert_tensor_parallel_size",
            "dp_replicate_size",
            "sequence_parallel",
            "moe_token_dispatcher_type",
        )
    }
    got = pool.run(world, steps, prefix, 3, run)
    assert all(rank["records"] == got[0]["records"] for rank in got), (
        "the ranks disagree about what they computed"
    )
    compare(got[0], reference(3, alone))
