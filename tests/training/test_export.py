"""What an export needs is looked at before the first step."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import tiny
from longspan.errors import UserError
from longspan.training.export import check_export, export_dtype, prepare_export


def run_with(tmp_path, said=None, weights=torch.bfloat16, **changes):
    """A run from a model folder whose config.json says this of its dtype."""
    base = tmp_path / "base"
    base.mkdir(exist_ok=True)
    data = {"model_type": "llama", "vocab_size": tiny.VOCAB, "hidden_size": 32, "num_hidden_layers": 2}
    data |= {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
    (base / "config.json").write_text(json.dumps(data | ({} if said is None else said)))
    save_file(
        {"a": torch.zeros(2, dtype=torch.int64), "b": torch.zeros(2, dtype=weights)},
        base / "model.safetensors",
    )
    own = {"base_model": str(base), "output_dir": str(tmp_path / "out"), "val_set_size": 0}
    return tiny.tiny_run("data", 1, **(own | changes))


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({"torch_dtype": "bfloat16"}, torch.bfloat16),
        ({"torch_dtype": "torch.bfloat16"}, torch.bfloat16),
        ({"torch_dtype": "torch.float16"}, torch.float16),
        ({"dtype": "float32"}, torch.float32),
        ({"torch_dtype": "auto"}, torch.bfloat16),  # that of the weights, as transformers reads it
        ({"torch_dtype": None}, torch.bfloat16),
        (None, torch.bfloat16),
    ],
)
def test_the_dtype_of_a_base_model_in_every_spelling(tmp_path, said, expected):
    run = run_with(tmp_path, said)
    dtype, files = prepare_export(run)
    assert dtype == expected
    assert json.loads(files["config.json"])["torch_dtype"] == str(expected).removeprefix("torch.")
    check_export(run)


@pytest.mark.parametrize("said", ["int8", "float8_e4m3fn", "torch.nn", "Half", 16, ["bfloat16"], True])
def test_an_odd_dtype_is_refused_before_the_first_step_unless_nothing_needs_it(tmp_path, said):
    with pytest.raises(
        UserError, match=r"export_dtype: auto takes .* Give export_dtype: bfloat16 or float32"
    ):
        check_export(run_with(tmp_path, {"torch_dtype": said}))
    check_export(run_with(tmp_path, {"torch_dtype": said}, export_hf=False))
    run = run_with(tmp_path, {"torch_dtype": said}, export_dtype="float32")
    check_export(run)
    assert export_dtype(run, {"torch_dtype": said}) == torch.float32


def test_random_weights_leave_in_what_was_computed_in(tmp_path):
    for bf16, expected in ((True, torch.bfloat16), (False, torch.float32)):
        assert export_dtype(tiny.tiny_run("data", 1, bf16=bf16, params_dtype="float32"), None) == expected


def test_a_folder_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write there"):
        check_export(run_with(tmp_path, output_dir=str(tmp_path / "file" / "out")))
    run = run_with(tmp_path)

    def full(path, *_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(UserError, match=r"cannot write there \(Permission denied\)"):
        check_export(run)


def test_a_damaged_file_of_the_base_model_is_refused(tmp_path):
    run = run_with(tmp_path)
    (tmp_path / "base" / "generation_config.json").write_text("{")
    with pytest.raises(UserError, match=r"generation_config.json cannot be read .* an export needs it"):
        check_export(run)
