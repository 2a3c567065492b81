"""``longspan.json``: odd values are a message, whoever reads them."""

import json

import pytest

from longspan.errors import UserError
from longspan.training.description import check_fits, describe

GOOD = {
    "model": {
        "num_layers": 2,
        "hidden_size": 32,
        "kv_channels": 8,
        "normalization": "RMSNorm",
        "vocab_size": 97,
    },
    "settings": {"sequence_len": 50, "seed": 42, "rope_scaling": None, "sliding_window": None},
    "init_method_std": 0.1,
    "max_position_embeddings": 50,
    "global_batch_size": 4,
    "step": 3,
    "tokens": 700,
    "adapter": None,
}
ADAPTER = {
    "rank": 3,
    "alpha": 7.5,
    "targets": ["q_proj"],
    "rslora": False,
    "base_model": "m",
    "base_fingerprint": "f",
}


def written(folder, **changes):
    (folder / "longspan.json").write_text(json.dumps(GOOD | changes))
    return folder


def test_good_values_are_read(tmp_path):
    assert describe(written(tmp_path)) == GOOD
    # older checkpoints do not name all, and converted ones have no batch
    assert (
        describe(written(tmp_path, model={}, settings={}, global_batch_size=None))["global_batch_size"]
        is None
    )
    assert describe(written(tmp_path, adapter=ADAPTER))["adapter"] == ADAPTER
    assert describe(written(tmp_path, adapter=ADAPTER | {"alpha": 8}))["adapter"]["alpha"] == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step": -1}, "step -1"),
        ({"step": 1.5}, "step 1.5"),
        ({"step": "3"}, "step '3'"),
        ({"step": True}, "step True"),
        ({"step": None}, "step None"),
        ({"step": 10**30}, "step 10000"),
        ({"tokens": -4}, "tokens -4"),
        ({"tokens": [1]}, r"tokens \[1\]"),
        ({"global_batch_size": 0}, "global_batch_size 0"),
        ({"global_batch_size": "4"}, "global_batch_size '4'"),
        ({"model": []}, r"model \[\]"),
        ({"settings": "x" * 500}, "settings 'x+[.][.][.][.] Use another"),
        ({"model": {"num_layers": "two"}}, "num_layers 'two'"),
        ({"model": {"num_layers": -2}}, "num_layers -2"),
        ({"model": {"num_layers": 2.5}}, "num_layers 2.5"),
        ({"model": {"hidden_size": 2**60}}, "hidden_size 1152921504606846976"),
        ({"model": {"normalization": ["RMSNorm"]}}, "normalization"),
        ({"settings": {"rope_scaling": 7}}, "rope_scaling 7"),
        ({"init_method_std": "wide"}, "init_method_std 'wide'"),
        ({"adapter": "lora"}, "adapter 'lora'"),
        ({"adapter": ADAPTER | {"rank": 0}}, "rank 0 of the adapter"),
        ({"adapter": ADAPTER | {"targets": [1]}}, r"targets \[1\] of the adapter"),
        ({"adapter": ADAPTER | {"alpha": None}}, "alpha None of the adapter"),
        ({"adapter": {}}, "base_fingerprint None of the adapter"),
    ],
    ids=str,
)
def test_odd_values_are_refused(tmp_path, changes, message):
    with pytest.raises(UserError, match=rf"resume: .*longspan.json holds what no run writes: .*{message}"):
        describe(written(tmp_path, **changes))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        json.dumps(GOOD | {"tokens": float("nan")}),
        json.dumps(GOOD | {"init_method_std": float("inf")}),
        "[" * 100000,
        '{"step": ' + "1" * 5000 + "}",
    ],
    ids=["empty", "list", "nothing in it", "NaN", "infinite", "deep", "5000 digits"],
)
def test_what_is_no_description_is_refused(tmp_path, text):
    (tmp_path / "longspan.json").write_text(text)
    with pytest.raises(UserError, match=r"--checkpoint: .*longspan.json cannot be read \(.+\). Use another"):
        describe(tmp_path, "--checkpoint")


def test_bytes_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "longspan.json").write_bytes(b"\xff\xfe{")
    with pytest.raises(UserError, match="cannot be read"):
        describe(tmp_path)
    (tmp_path / "longspan.json").unlink()
    with pytest.raises(UserError, match="cannot be read .No such file"):
        describe(tmp_path)


def misfits(folder, more):
    """The problems of a model's checkpoint for a run with another value of ffn_hidden_size."""
    model = GOOD["model"] | more
    path = written(folder, model=model | {"ffn_hidden_size": 64})
    wanted = GOOD | {"model": model | {"ffn_hidden_size": 48}}
    try:
        check_fits(path, wanted, weights_only=True)
    except UserError as error:
        return error.problems
    return []


def test_the_size_of_a_dense_mlp_matters_where_a_layer_has_one(tmp_path):
    experts = {"num_moe_experts": 4, "moe_layer_freq": 1}
    for model, matters in (
        (experts, False),
        (experts | {"hybrid_override_pattern": "ME-*"}, True),
        ({"hybrid_override_pattern": "MM"}, False),
        ({}, True),
    ):
        found = misfits(tmp_path, model)
        assert ["ffn_hidden_size was 64" in problem for problem in found] == [True] * matters, model
