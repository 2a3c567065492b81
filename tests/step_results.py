"""What tests of training compare with one process: the records, gradients and state of some steps."""

import json
from pathlib import Path

import torch
import torch.distributed as dist

import pool
import tiny
from longspan.mesh.whole import whole_tensors
from longspan.tensor_parallel.layers import local
from longspan.training.checkpoint import Checkpointer
from longspan.training.export import export
from longspan.training.trainer import Trainer

CPU = torch.device("cpu")
#: every balancing loss at once
ALL = {
    "export_hf": False,
    "eval_max_samples": 3,
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


def keep_gradients(trainer):
    """The whole gradients of the next step, before they are clipped, by parameter; filled on every rank."""
    found, apply = {}, trainer.apply_gradients

    def keep(rate):
        named = {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
        found.update((name, whole.clone()) for name, whole in whole_tensors(named, trainer.groups.pp))
        trainer.apply_gradients = apply
        return apply(rate)

    trainer.apply_gradients = keep
    return found


def steps(prefix, count, changes, favoured=(), evaluates_first=False):
    """Records of some steps, every whole gradient of the second one, and the bias of the experts.

    Args:
        favoured: experts that get a large bias, so that all tokens choose them.
        evaluates_first: evaluate before the first step too.
    """
    trainer = Trainer(tiny.tiny_run(prefix, dist.get_world_size(), **changes), CPU)
    for layer in trainer.experts.layers if favoured else ():
        local(layer.router.expert_bias)[list(favoured)] = 10.0
    records, gradients = [], {}
    evaluations = [trainer.evaluate()["loss"]] if evaluates_first else []
    for step in range(count):
        if step == min(1, count - 1):
            gradients = keep_gradients(trainer)
        records.append(trainer.train_step(trainer.micro_batches(step)))
    state = {
        name: buffer.to_local().clone() if hasattr(buffer, "to_local") else buffer.clone()
        for name, buffer in trainer.model.named_buffers()
        if name.endswith(("expert_bias", "last_counts"))
    }
    keys = ("loss", "grad_norm", "moe_aux_loss", "moe_z_loss", "moe_dropped_tokens", "moe_load", "tokens")
    return {
        "parameters": trainer.parameter_counts,
        "records": [{k: r.get(k) for k in keys} for r in records],
        "evaluations": [*evaluations, trainer.evaluate()["loss"]],
        "gradients": gradients if dist.get_rank() == 0 else {},
        "state": state,
    }


class References:
    """What one process computes, once for each case."""

    def __init__(self, prefix):
        self.prefix, self.done = prefix, {}

    def __call__(self, count, changes, evaluates_first=False):
        key = count, json.dumps([changes, evaluates_first], sort_keys=True)
        if key not in self.done:
            self.done[key] = pool.run(1, steps, self.prefix, count, changes, (), evaluates_first)[0]
        return self.done[key]


def close(got, expected, tolerance):
    same = got == expected or (tolerance and abs(got - expected) <= tolerance * abs(expected))
    assert same, (got, expected)


def compare(got, expected, tolerance=1e-10):
    for a, b in zip(got["records"], expected["records"]):
        assert a.keys() == b.keys()
        for key, value in b.items():
            rounded = key in ("loss", "grad_norm", "moe_aux_loss", "moe_z_loss")
            close(a[key], value, tolerance if rounded else 0)
    for a, b in zip(got["evaluations"], expected["evaluations"], strict=True):
        close(a, b, tolerance)
    assert got["parameters"] == expected["parameters"]
    assert got["gradients"].keys() == expected["gradients"].keys()
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


def together(ranks):
    """What rank 0 has found, with the state of all ranks: each stage of a pipeline has its own layers."""
    assert all(rank["records"] == ranks[0]["records"] for rank in ranks)
    state = {name: value for rank in ranks for name, value in rank["state"].items()}
    return ranks[0] | {"state": state}


def alike(prefix, expected, count, cases, tolerance=1e-10, evaluates_first=False):
    """Each case (processes, changes) computes what one process does."""
    for world, changes in cases:
        got = pool.run(world, steps, prefix, count, changes, (), evaluates_first)
        compare(together(got), expected, tolerance)


def saved(prefix, folder, changes):
    """Two steps and a checkpoint, the export if there is one, and the losses of two more steps."""
    trainer = Trainer(tiny.tiny_run(prefix, dist.get_world_size(), **changes), CPU)
    for step in range(2):
        trainer.train_step(trainer.micro_batches(step))
    saver = Checkpointer(Path(folder), background=False)
    path = saver.save(2, trainer.model, trainer.optimizer, trainer.description())
    if trainer.run.config.export_hf:
        export(trainer, Path(folder) / "hf")
    return str(path), [trainer.train_step(trainer.micro_batches(step))["loss"] for step in range(2, 4)]


def continued(prefix, path, changes):
    """The losses of the two steps after a checkpoint."""
    trainer = Trainer(tiny.tiny_run(prefix, dist.get_world_size(), **changes), CPU)
    trainer.resume(Path(path))
    return [trainer.train_step(trainer.micro_batches(step))["loss"] for step in range(2, 4)]
