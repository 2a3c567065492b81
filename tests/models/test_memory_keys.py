"""Every key that saves memory gives the loss and gradients of a run without it, at every layout. fp64."""

import json

import pytest
import torch
import torch.distributed as dist
from test_gpt import LENGTH, VOCAB, compare, loss_and_gradients, transformer_config
from torch.distributed.tensor import DTensor

import pool
import tiny
from longspan.config.load import make_config
from longspan.config.resolve import resolve
from longspan.config.sizes import MeshSizes
from longspan.errors import UserError
from longspan.mesh.mesh import ParallelMesh
from longspan.models import GPTModel
from longspan.models.hf_weights import SafetensorsFolder
from longspan.models.memory.offload import Offload
from longspan.parallelize import parallelize
from longspan.training.export import export
from longspan.training.trainer import Trainer

CPU = torch.device("cpu")


def gradients(sizes, kind, options, variants):
    """For each variant: loss, gradient norm, whole gradients, and bytes moved.

    Args:
        options: of the model.
        variants: (keys of ``parallelize``, whether to offload for real, which a run on the CPU leaves out).
    """
    mesh = ParallelMesh.build(sizes)
    config = transformer_config(sizes, **options)
    found = []
    for keys, move in variants:
        with torch.device("meta"):
            model = GPTModel(config, VOCAB, LENGTH, pg_collection=mesh.groups)
        parallelize(model, mesh, seed=3, device=CPU, **keys)
        offload = Offload(CPU, minimum=1) if move else None
        for layer in model.decoder.layers.values():
            assert layer.offload is None
            layer.offload = offload
        found.append((*loss_and_gradients(model, mesh, kind), offload.moved if offload else 0))
    return found


PLAIN = ({}, False)


LAYOUTS = {
    "1": MeshSizes(),
    "tp2": MeshSizes(tp=2),
    "cp2": MeshSizes(cp=2),
    "tp2 x cp2": MeshSizes(tp=2, cp=2),
    "cp2 x dp_shard2": MeshSizes(cp=2, dp_shard=2),
    "dp_replicate2 x tp2": MeshSizes(dp_replicate=2, tp=2),
}
MLPS = {
    "gated": {},
    "gated, biases": {"add_bias_linear": True},
    "not gated, biases": {"gated_linear_unit": False, "add_bias_linear": True, "activation_func": "gelu"},
    "not gated": {"gated_linear_unit": False, "activation_func": "gelu"},
}


@pytest.mark.parametrize("mlp", MLPS)
@pytest.mark.parametrize("name", ["1", "tp2", "cp2", "tp2 x cp2"])
def test_tiled_mlp(name, mlp):
    sizes = LAYOUTS[name]
    options = MLPS[mlp] | {"sequence_parallel": sizes.tp > 1}
    tiles = [{"mlp_tiles": n} for n in ((None, 4) if mlp == "gated" else (4,))]
    variants = [PLAIN, *((keys, False) for keys in tiles)]
    expected, *found = pool.run(sizes.world_size, gradients, sizes, "packed", options, variants)[0]
    for got in found:
        compare(got[:3], expected[:3])


@pytest.mark.parametrize("name", ["tp2", "cp2 x dp_shard2", "dp_replicate2 x tp2"])
def test_tiled_mlp_without_sequence_parallelism_and_with_sharded_weights(name):
    sizes = LAYOUTS[name]
    variants = [PLAIN, *(({"mlp_tiles": n}, False) for n in (2, 1000))]  # 1000: more tiles than tokens
    expected, *found = pool.run(sizes.world_size, gradients, sizes, "unpacked", {}, variants)[0]
    for got in found:
        compare(got[:3], expected[:3])


#: keys of parallelize, whether to move for real, and whether the operations are the same ones
KEYS = {
    "full": ({"recompute": "full"}, False, True),
    "selective": ({"recompute": "selective"}, False, True),
    "offload, on the CPU": ({"recompute": "offload"}, False, True),
    "offload": ({"recompute": "offload"}, True, True),
    "activation_offloading, on the CPU": ({"activation_offloading": True}, False, True),
    "activation_offloading": ({}, True, True),
    "activation_offloading, selective": ({"recompute": "selective"}, True, True),
    "offload_params": ({"offload_params": True}, False, True),
    "offload_params, weights kept": ({"offload_params": True, "reshard_after_forward": False}, False, True),
    "weights kept": ({"reshard_after_forward": False}, False, True),
    "all": ({"recompute": "offload", "offload_params": True, "mlp_tiles": 3}, True, False),
    "all, selective": ({"recompute": "selective", "offload_params": True, "mlp_tiles": 3}, True, False),
}


@pytest.fixture(scope="module")
def of_every_key():
    """(layout, kind) -> key -> what the layout computes with it, and without any key (None)."""
    done = {}

    def get(name, kind):
        if (name, kind) not in done:
            sizes = LAYOUTS[name]
            keys = [key for key, *case in CASES if case == [name, kind]]
            variants = [PLAIN, *(KEYS[key][:2] for key in keys)]
            options = {"sequence_parallel": sizes.tp > 1}
            found = pool.run(sizes.world_size, gradients, sizes, kind, options, variants)[0]
            done[name, kind] = dict(zip([None, *keys], found))
        return done[name, kind]

    return get


#: each key at both layouts, at one of them with packed documents and at the other without
CASES = [
    (key, name, ("packed", "unpacked")[(i + j) % 2])
    for j, name in enumerate(("tp2 x cp2", "cp2 x dp_shard2"))
    for i, key in enumerate(KEYS)
]


@pytest.mark.parametrize(("key", "name", "kind"), CASES)
def test_every_key_gives_the_numbers_without_it(key, name, kind, of_every_key):
    _, move, same = KEYS[key]
    found = of_every_key(name, kind)
    got, expected = found[key], found[None]
    assert bool(got[3]) == move
    if same:
        assert got[:2] == expected[:2]
        assert all(torch.equal(got[2][name], whole) for name, whole in expected[2].items())
    compare(got[:3], expected[:3])


def test_offloaded_parameters_with_copies_of_the_weights():
    sizes = LAYOUTS["dp_replicate2 x tp2"]
    variants = [PLAIN, ({"offload_params": True}, False)]
    expected, got = pool.run(4, gradients, sizes, "packed", {}, variants)[0]
    assert got[:2] == expected[:2]
    assert all(torch.equal(got[2][name], whole) for name, whole in expected[2].items())


# --- offload_params through a whole run -------------------------------------------------------------------


def a_run(prefix, folder, changes):
    """Three steps with clipping and accumulation, a checkpoint after two, an evaluation and an export."""
    run = tiny.tiny_run(
        prefix, dist.get_world_size(), max_grad_norm=0.1, max_steps=3, val_set_size=1, **changes
    )
    trainer = Trainer(run, CPU)
    records = []
    from longspan.training.checkpoint import Checkpointer

    saves = Checkpointer(folder / "checkpoints")
    for step in range(3):
        records.append(trainer.train_step(trainer.micro_batches(step)))
        if step == 1:
            saves.save(step + 1, trainer.model, trainer.optimizer, trainer.description())
    saves.finish()
    export(trainer, folder / "hf")
    places = {p.to_local().device.type for p in trainer.model.parameters()} | {
        (t.to_local() if isinstance(t, DTensor) else t).device.type
        for state in trainer.optimizer.state.values()
        for t in state.values()
    }
    assert places == {"cpu"}
    return [(r["loss"], r["grad_norm"]) for r in records], trainer.evaluate()["loss"]


def a_resumed_step(prefix, folder, changes):
    run = tiny.tiny_run(
        prefix, dist.get_world_size(), max_grad_norm=0.1, max_steps=3, val_set_size=1, **changes
    )
    trainer = Trainer(run, CPU)
    trainer.resume(folder / "checkpoints" / "step_00000002")
    record = trainer.train_step(trainer.micro_batches(2))
    return record["loss"], record["grad_norm"]


def a_pretrained_loss(prefix, folder, changes):
    run = tiny.tiny_run(prefix, dist.get_world_size(), base_model=str(folder / "hf"), **changes)
    return Trainer(run, CPU).evaluate()["loss"]


def test_offloaded_parameters_clip_save_resume_export_and_load(prefix, tmp_path):
    cut = {"tensor_parallel_size": 2, "dp_shard_size": 2}
    done = {}
    for name, keys in {"plain": {}, "offloaded": {"offload_params": True}}.items():
        records, evaluation = pool.run(4, a_run, prefix, tmp_path / name, cut | keys)[0]
        done[name] = records, evaluation
        assert pool.run(4, a_resumed_step, prefix, tmp_path / name, cut | keys)[0] == records[2]
    assert done["plain"] == done["offloaded"]
    files = [SafetensorsFolder(tmp_path / name / "hf") for name in done]
    assert files[0].files.keys() == files[1].files.keys()
    for name in files[0].files:
        assert torch.equal(files[0].slice(name)[:], files[1].slice(name)[:])
    # a checkpoint of the one is resumed by the other, at another layout
    keys = {"offload_params": True, "context_parallel_size": 2}
    loss, norm = pool.run(2, a_resumed_step, prefix, tmp_path / "plain", keys)[0]
    assert abs(loss / done["plain"][0][2][0] - 1) < 1e-10
    assert abs(norm / done["plain"][0][2][1] - 1) < 1e-10
    config = json.loads((tmp_path / "plain" / "hf" / "config.json").read_text())
    assert config["vocab_size"] == tiny.VOCAB
    losses = [
        pool.run(2, a_pretrained_loss, prefix, tmp_path / "plain", changes)[0]
        for changes in ({"dp_shard_size": 2}, {"dp_shard_size": 2, "offload_params": True})
    ]
    assert losses[0] == losses[1]


# --- the keys ---------------------------------------------------------------------------------------------


def test_the_keys_reach_the_layers(prefix):
    found = pool.run(1, what_layers_hold, prefix, {"tiled_mlp": True, "gradient_checkpointing": "offload"})
    assert found == [("full", None)]
    found = pool.run(1, what_layers_hold, prefix, {"tiled_mlp": True, "tiled_mlp_num_shards": 7})
    assert found == [("none", 7)]
    assert pool.run(1, what_layers_hold, prefix, {}) == [("none", 1)]


def what_layers_hold(prefix, changes):
    trainer = Trainer(tiny.tiny_run(prefix, 1, **changes), CPU)
    (held,) = {(layer.recompute, layer.tiles) for layer in trainer.model.decoder.layers.values()}
    return held


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tiled_mlp_num_shards": 4}, "tiled_mlp_num_shards 4 has no effect without tiled_mlp: true"),
        (
            {"gradient_checkpointing": "offload", "activation_offloading": True},
            "activation_offloading: true adds nothing",
        ),
        ({"tf32": True}, "tf32: true with params_dtype: float64 has no effect"),
    ],
)
def test_keys_that_say_nothing_together_are_refused_all_at_once(changes, said):
    both = changes | {"reinit_weights": True}
    with pytest.raises(UserError) as caught:
        resolve(make_config(tiny.values("x", **both)).config, 1)
    assert any(said in problem for problem in caught.value.problems)
    assert len(caught.value.problems) == 2
