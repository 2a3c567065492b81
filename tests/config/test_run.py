"""Checked and Run: complete, frozen, and the same from the written config."""

import dataclasses

import pydantic
import pytest

import tiny
from longspan.config.load import load_config, make_config, to_yaml
from longspan.config.resolve import resolve
from longspan.config.run import BatchSizes, Checked, LayerKind, Memory, Precision, Run

CUT = {
    "tensor_parallel_size": 2,
    "context_parallel_size": 4,
    "cp_comm_type": ["a2a+p2p", "allgather"],
    "hierarchical_context_parallel_sizes": [2, 2],
    "sliding_window": [None, 8],
    "gradient_checkpointing": True,
    "tiled_mlp": True,
    "tf32": "auto",
    "torch_compile": "auto",
    "bf16": "auto",
    "params_dtype": "float32",
}


def test_a_checked_config_is_complete():
    run = tiny.checked("data", 16, **CUT)
    assert run.device == "cpu"
    assert (run.sizes.tp, run.sizes.cp, run.sizes.dp_shard, run.sizes.world_size) == (2, 4, 2, 16)
    assert run.sequence_parallel
    assert run.row_multiple == 2
    assert run.batch == BatchSizes(1, 2, 4, 50)
    assert run.batch.equation(2) == "micro 1 x accumulation 2 x dp 2 = 4 sequences = 200 tokens a step"
    assert run.precision == Precision("float32", "float32", tf32=False)
    assert run.memory == Memory("full", None, True, False, False, torch_compile=False)
    assert run.layers == (
        LayerKind(1, comm_type="a2a+p2p"),
        LayerKind(2, window=8, comm_type="all_gather"),
    )
    assert [run.head_group(layer) for layer in run.layers] == [2, 1]
    assert (run.lora, run.pretrained) == (None, None)
    assert "auto" not in (run.config.device, run.config.bf16, run.config.tf32, run.config.torch_compile)
    assert run.model.kv_channels == 8


def test_where_it_runs_decides_what_auto_is():
    config = make_config(tiny.values("data", **CUT | {"device": "auto"})).config
    run = resolve(config, 16, device="cuda")
    assert run.precision == Precision("float32", "bfloat16", tf32=False)
    assert run.precision.mixed
    assert run.memory.torch_compile
    assert not resolve(config, 16, device="cuda", compiler=False).memory.torch_compile


@pytest.mark.parametrize(
    "changes", [{}, CUT, {"hybrid_context_parallel": True, "max_seqlen_per_dp_cp_rank": 40}]
)
def test_the_written_config_gives_the_same_run(tmp_path, changes):
    world = 16 if changes is CUT else 4
    run = Run.of(tiny.checked("data", world, **changes).config)
    assert run.vocab_size == tiny.VOCAB
    (tmp_path / "config.yaml").write_text(to_yaml(run.config))
    config = load_config(tmp_path / "config.yaml")
    assert Run.of(config) == run
    assert Run.of(resolve(config, world).config) == run  # a user may train from the file again


def test_nothing_can_be_changed_in_place():
    run = Run.of(tiny.checked("data", 1).config)
    with pytest.raises(dataclasses.FrozenInstanceError):
        run.vocab_size = 3
    with pytest.raises(pydantic.ValidationError):
        run.config.eval_max_samples = 3
    other = run.with_keys(eval_max_samples=3)
    assert isinstance(other, Run)
    assert (other.config.eval_max_samples, run.config.eval_max_samples) == (3, None)


def test_a_config_that_is_not_complete_is_none():
    with pytest.raises(AssertionError, match="not complete"):
        Checked.of(make_config(tiny.values("data")).config)
    with pytest.raises(AssertionError, match="not complete"):
        Run.of(tiny.checked("data", 1, vocab_size=None).config)
