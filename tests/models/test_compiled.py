"""torch_compile gives the numbers of a run without it, makes a part once for all layers, and refuses what it cannot serve.

Most runs here take the compiler's tracing and its own backward passes without its code generation (``aot_eager``):
generated code takes seconds a part, and one test has it.
"""

import shutil

import pytest
import torch
from test_gpt import LENGTH, VOCAB, batch, transformer_config
from test_memory_keys import PLAIN, gradients

import pool
import tiny
from longspan import compiled
from longspan.config.load import make_config
from longspan.config.lora import TARGETS, Lora
from longspan.config.resolve import resolve
from longspan.config.sizes import MeshSizes
from longspan.context_parallel import SequenceLayout
from longspan.errors import UserError
from longspan.mesh.mesh import ParallelMesh
from longspan.models import GPTModel
from longspan.models.peft import attach
from longspan.parallelize import parallelize
from longspan.runs.check import checked, has_compiler
from longspan.runs.start import Launch
from longspan.tensor_parallel.lora import Adapter
from longspan.tensor_parallel.random import Normal
from longspan.training.trainer import Trainer

CPU = torch.device("cpu")
#: norm; add and norm; heads; MLP; and the loss's two
PARTS = 6


def freshly_compiled(function, *args):
    """``function(*args)`` with a fresh compiler; also the number of graphs it made, and where it gave up."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    compiled.compiled.cache_clear()
    try:
        return function(*args), counters["stats"]["unique_graphs"], dict(counters["graph_break"])
    finally:
        compiled.compiled.cache_clear()


def compiled_gradients(sizes, options, keys, move=False):
    """What a model computes without ``keys`` and with them."""
    return freshly_compiled(gradients, sizes, "packed", options, [PLAIN, (keys, move)])


def compare(got, expected, tolerance=1e-10):
    loss, norm, grads, _ = got
    assert loss == pytest.approx(expected[0], rel=tolerance)
    assert norm == pytest.approx(expected[1], rel=tolerance)
    for name, grad in expected[2].items():
        error = (grads[name] - grad).abs().max() / grad.abs().max()
        assert error <= tolerance, f"{name}: {error}"


ALONE, TP2 = MeshSizes(), MeshSizes(tp=2)
# A part is compiled between two exchanges, so that each axis is enough by itself.
CASES = {
    "sequence parallel, norms of heads": (TP2, {"sequence_parallel": True, "qk_layernorm": True}, {}, False),
    "copies and shards, full recomputation": (
        MeshSizes(dp_shard=2, dp_replicate=2),
        {},
        {"recompute": "full"},
        False,
    ),
    "selective, tiles": (MeshSizes(cp=2), {}, {"recompute": "selective", "mlp_tiles": 3}, False),
    "sinks, a clamped gate": (
        MeshSizes(cp=2),
        {
            "softmax_type": "learnable",
            "activation_func": "quick_gelu",
            "activation_func_clamp_value": 0.3,
            "glu_linear_offset": 1.0,
        },
        {},
        False,
    ),
    "moved activations": (ALONE, {}, {}, True),
    "LayerNorm, biases, not gated, tied": (
        TP2,
        {
            "normalization": "LayerNorm",
            "add_bias_linear": True,
            "gated_linear_unit": False,
            "activation_func": "gelu",
            "share_embeddings_and_output_weights": True,
        },
        {},
        False,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_compiled_parts_give_the_gradients_of_plain_ones(name):
    sizes, options, keys, move = CASES[name]
    keys = keys | {"torch_compile": "aot_eager"}
    for (expected, got), graphs, breaks in pool.run(
        sizes.world_size, compiled_gradients, sizes, options, keys, move
    ):
        assert not breaks
        compare(got, expected)
        if keys.get("recompute") == "full" or name == "moved activations":
            assert graphs == PARTS, "a part is made once for both layers, and for recomputation"


def three_layers_twice(prefix):
    """Losses of two steps and of an evaluation, and the graphs made by the first step and by the second."""
    from torch._dynamo.utils import counters

    run = tiny.tiny_run(prefix, 1, num_layers=3, torch_compile=True, deterministic_mode=False)
    trainer = Trainer(run, CPU)
    parts = [module for module in trainer.model.modules() if isinstance(module, compiled.Compilable)]
    assert {part.compiled for part in parts} == {"inductor"}
    compiled.compile_parts(trainer.model, "aot_eager")
    made, losses = [], []
    for batches, _ in zip(trainer.steps_ahead(), range(2)):
        losses.append(trainer.train_step(batches)["loss"])
        made.append(counters["stats"]["unique_graphs"])
    losses.append(trainer.evaluate()["loss"])
    return losses, made


def plain_losses(prefix, **changes):
    trainer = Trainer(tiny.tiny_run(prefix, 1, num_layers=3, **changes), CPU)
    losses = [trainer.train_step(b)["loss"] for b, _ in zip(trainer.steps_ahead(), range(2))]
    return [*losses, trainer.evaluate()["loss"]]


def compiled_curve(prefix):
    return freshly_compiled(three_layers_twice, prefix)


def with_adapters():
    """Whole gradients of one model with adapters beside all its layers, plain and then compiled."""
    sizes = MeshSizes(tp=2)
    mesh = ParallelMesh.build(sizes)
    config = transformer_config(sizes)
    with torch.device("meta"):
        model = GPTModel(config, VOCAB, LENGTH, pg_collection=mesh.groups)
        attach(model, Lora(rank=2, alpha=4, targets=TARGETS))
    for module in model.modules():
        if isinstance(module, Adapter):  # B starts at zero, and A has no gradient then
            module.initial["B"] = Normal(0.02)
    parallelize(model, mesh, seed=3, device=CPU)
    tokens, labels, cu = batch("packed")
    layout = SequenceLayout.contiguous(LENGTH, 1, cu_seqlens=cu)
    found = []
    for on in (False, "aot_eager"):
        compiled.compile_parts(model, on)
        model.zero_grad()
        model(tokens, labels=labels, layout=layout).sum().backward()
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        found.append({name: p.grad.full_tensor() for name, p in trained.items()})
    return found


def compiled_adapters():
    return freshly_compiled(with_adapters)


def test_later_steps_and_more_layers_compile_nothing(prefix):
    (losses, made), _, breaks = pool.run(1, compiled_curve, prefix)[0]
    assert not breaks
    assert made == [PARTS, PARTS]
    assert losses == pytest.approx(pool.run(1, plain_losses, prefix)[0], rel=1e-10)


def test_adapters_are_compiled_too():
    (expected, got), _, breaks = pool.run(2, compiled_adapters)[0]
    assert not breaks
    assert len(got) == 2 * 2 * len(TARGETS)  # A and B of each layer's
    for name, grad in expected.items():
        assert (got[name] - grad).abs().max() <= 1e-10 * grad.abs().max(), name


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++") and not shutil.which("clang++"), reason="needs a C++ compiler")
def test_generated_code_gives_the_gradients_of_plain_parts():
    found, graphs, breaks = pool.run(1, compiled_gradients, ALONE, {}, {"torch_compile": True})[0]
    assert (graphs, breaks) == (PARTS, {})
    expected, got = found
    compare(got, expected)


# --- what is refused ----------------------------------------------------------------------------


def test_deterministic_mode_is_refused_and_its_neighbours_are_not(prefix):
    tiny.tiny_run(prefix, 1, torch_compile=True)
    tiny.tiny_run(prefix, 1, deterministic_mode=True)
    with pytest.raises(UserError, match=r"deterministic_mode.*another order"):
        tiny.tiny_run(prefix, 1, torch_compile=True, deterministic_mode=True)


def test_other_backends_are_refused(prefix):
    assert not make_config(tiny.values(prefix, torch_compile=True, torch_compile_backend="inductor")).problems
    (problem,) = make_config(
        tiny.values(prefix, torch_compile=True, torch_compile_backend="cudagraphs")
    ).problems
    assert "Inductor" in problem


def test_a_machine_without_a_compiler_is_refused(monkeypatch):
    compiled.check_compiler(CPU) if shutil.which("g++") else None
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(UserError, match=r"C\+\+ compiler.*leave torch_compile out"):
        compiled.check_compiler(CPU)


@pytest.mark.parametrize("asked", ["auto", True])
def test_auto_without_a_compiler_runs_without_and_true_is_refused(prefix, monkeypatch, asked):
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.delenv("CC", raising=False)
    reading = make_config(tiny.values(prefix, torch_compile=asked))
    assert has_compiler(reading, "cuda") is False
    problem = "torch_compile: true needs a C compiler on cuda"
    if asked is True:
        assert any(problem in text for text in reading.problems)
        return
    assert not reading.problems
    (note,) = reading.notes
    assert note.startswith(f"torch_compile: auto compiles nothing on this machine: {problem}")
    assert resolve(reading.config, 1, device="cuda").config.torch_compile is True
    assert resolve(reading.config, 1, device="cuda", compiler=False).config.torch_compile is False


def test_a_machine_without_a_compiler_refuses_a_run_that_compiles(prefix, monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(UserError, match=r"needs a C\+\+ compiler on cpu"):
        checked(make_config(tiny.values(prefix, torch_compile=True)), Launch())
