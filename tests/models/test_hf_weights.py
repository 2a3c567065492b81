"""Hugging Face Llama in and out, against transformers itself."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import command
import llamas
import pool
import tiny
from longspan import TransformerConfig
from longspan.config.families.hub import architecture_of
from longspan.errors import UserError
from longspan.models import hf_weights
from longspan.training import checkpoint
from longspan.training.trainer import Trainer

CPU = torch.device("cpu")


def make_llama(folder, tied, dtype=torch.float32, scaling=None, window=None):
    """A random Llama in several files; with a window a Mistral, with (window,) a Ministral whose first layer has it."""
    kind, fields = "Llama", {"rope_scaling": scaling}
    if isinstance(window, int):
        kind, fields = "Mistral", {"sliding_window": window}
    elif window is not None:
        layers = ["sliding_attention", "full_attention"]
        kind, fields = "Ministral", {"sliding_window": window[0], "layer_types": layers, "head_dim": 8}
    return llamas.make_llama(folder, tied, dtype, kind=kind, max_shard_size="20KB", **fields)


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


@pytest.mark.parametrize(
    ("tied", "scaling", "window"),
    [(False, None, None), (True, None, None), (False, LLAMA3, None), (False, None, 9), (False, None, (9,))],
)
def test_logits_are_transformers_and_the_round_trip_is_bit_equal(prefix, tmp_path, tied, scaling, window):
    from transformers import AutoModelForCausalLM

    base = make_llama(tmp_path / "base", tied, scaling=scaling, window=window)
    assert (tmp_path / "base" / "model.safetensors.index.json").exists()
    layout = {"tensor_parallel_size": 2, "context_parallel_size": 2, "params_dtype": "float32"}
    tokens = llamas.row_of_tokens()
    logits = pool.run(4, llamas.imported, prefix, base, str(tmp_path / "hf"), layout)[0]
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(base)(tokens).logits
    assert logits.shape == expected.shape
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)

    before = AutoModelForCausalLM.from_pretrained(base).state_dict()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, expected)


def test_bf16_weights_stay_bf16_and_bit_equal(prefix, tmp_path):
    base = make_llama(tmp_path / "base", tied=False, dtype=torch.bfloat16)
    pool.run(
        2,
        llamas.imported,
        prefix,
        base,
        str(tmp_path / "hf"),
        {"dp_shard_size": 2, "params_dtype": "float32"},
    )
    before = {}
    for file in Path(base).glob("*.safetensors"):
        before |= load_file(file)
    after = load_file(tmp_path / "hf" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(after[n].dtype == torch.bfloat16 and torch.equal(before[n], after[n]) for n in before)


def names(vocab):
    """Of a Llama as make_llama makes them."""
    config = TransformerConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        num_query_groups=2,
        ffn_hidden_size=48,
        normalization="RMSNorm",
        gated_linear_unit=True,
        add_bias_linear=False,
    )
    return hf_weights.Names(config, vocab)


def test_reading_takes_a_ranks_part_only(tmp_path):
    base = make_llama(tmp_path / "base", tied=False)
    source = hf_weights.SafetensorsFolder(base)
    whole = source.slice("model.embed_tokens.weight")[:]
    part = hf_weights.read_part(
        source, names(tiny.VOCAB), "embedding.word_embeddings.weight", (128, 32), [(64, 128), (0, 32)]
    )
    assert torch.equal(part[: tiny.VOCAB - 64], whole[64:])
    assert (part[tiny.VOCAB - 64 :] == 0).all()


def test_broken_model_folders_are_refused(prefix, tmp_path):
    base = Path(make_llama(tmp_path / "base", tied=False))
    source = hf_weights.SafetensorsFolder(base)
    with pytest.raises(UserError, match=r"tensor lm_nose.weight is missing"):
        source.slice("lm_nose.weight")
    with pytest.raises(UserError, match=r"has shape \[97, 32\], the config needs \[96, 32\]"):
        hf_weights.read_part(source, names(96), "output_layer.weight", (128, 32), [(0, 128), (0, 32)])
    first = sorted(base.glob("*.safetensors"))[0]
    first.write_bytes(first.read_bytes()[:100])
    with pytest.raises(UserError, match="cannot be read"):
        for name in source.files:
            hf_weights.SafetensorsFolder(base).slice(name)
    for file in base.glob("*.safetensors*"):
        file.unlink()
    with pytest.raises(UserError, match=r"no model.safetensors"):
        hf_weights.SafetensorsFolder(base)


def longspan(folder, *arguments):
    return command.run(*arguments, cwd=folder)


def trained_weights(prefix, folder):
    trainer = Trainer(
        tiny.tiny_run(prefix, 1, params_dtype="float32", val_set_size=0, no_load_optim=True), CPU
    )
    trainer.resume(checkpoint.find(Path(folder)))
    return dict(hf_weights.whole_parameters(trainer.model))


def test_convert_both_ways_and_train_from_base_model(prefix, tmp_path):
    values = tiny.values(prefix, output_dir="out", val_set_size=0, max_steps=2, params_dtype="float32")
    values |= {"global_batch_size": 2}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    done = longspan(tmp_path, "train", "config.yaml", "--context-parallel-size", 2)
    assert done.returncode == 0, done.stderr
    # checkpoint -> Hugging Face: the same as the run's own export
    done = longspan(tmp_path, "convert", "--checkpoint", "out", "--output", "hf")
    assert done.returncode == 0, done.stderr
    exported, converted = (load_file(tmp_path / p / "model.safetensors") for p in ("out/hf", "hf"))
    assert exported.keys() == converted.keys()
    assert all(torch.equal(exported[n], converted[n]) for n in exported)
    configs = [json.loads((tmp_path / p / "config.json").read_text()) for p in ("out/hf", "hf")]
    assert configs[0] == configs[1]
    # Hugging Face -> checkpoint: the weights the run ended with
    done = longspan(tmp_path, "convert", "--model", "hf", "--output", "again")
    assert done.returncode == 0, done.stderr
    a = pool.run(1, trained_weights, prefix, str(tmp_path / "out"))[0]
    b = pool.run(1, trained_weights, prefix, str(tmp_path / "again"))[0]
    for name in a:
        real = tiny.VOCAB if name in hf_weights.VOCABULARY else None
        assert torch.equal(a[name][:real], b[name][:real])
    # a run that starts from the export, and from the converted checkpoint, goes on from the same loss
    base = {k: v for k, v in values.items() if k not in llamas.OWN} | {
        "base_model": "hf",
        "output_dir": "from-base",
    }
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    assert longspan(tmp_path, "train", "base.yaml", "--tensor-parallel-size", 2).returncode == 0
    resumed = longspan(
        tmp_path, "train", "config.yaml", "--output-dir", "resumed", "--resume", "again", "--no-load-optim"
    )
    assert resumed.returncode == 0, resumed.stderr
    first = [
        json.loads((tmp_path / run / "metrics.jsonl").read_text().splitlines()[0])["loss"]
        for run in ("from-base", "resumed")
    ]
    assert first[0] == pytest.approx(first[1], rel=1e-5)
    without = longspan(tmp_path, "train", "config.yaml", "--output-dir", "never", "--resume", "again")
    assert without.returncode == 2
    assert "no_load_optim" in without.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint", "nowhere", "--output", "x"], "there is no checkpoint at nowhere"),
        (["--model", "nowhere", "--output", "x"], "there is no config.json"),
        (["--output", "x"], "give one of --checkpoint"),
        (["--modle", "a", "--model", "b", "--output", "."], "Did you mean --model?"),
    ],
)
def test_convert_refuses(tmp_path, arguments, message):
    done = longspan(tmp_path, "convert", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_llama_has_no_window_whatever_its_config_says(tmp_path):
    """transformers' Llama does not read sliding_window; a Mistral that became a Llama may still name one."""
    fields = {"model_type": "llama", "hidden_size": 32, "sliding_window": 16}
    for kind, window in (("llama", None), ("mistral", 16)):
        (tmp_path / "config.json").write_text(json.dumps(fields | {"model_type": kind}))
        assert architecture_of(str(tmp_path)).get("sliding_window") == window


# --- weights from elsewhere -------------------------------------------------------------------


class Code:
    """A pickle that makes a file when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_pickled_weights_and_adapters_run_nothing(tmp_path, monkeypatch, capsys):
    import pickle
    import shutil

    from longspan.cli import main
    from longspan.config.lora import Lora

    ran = tmp_path / "ran"
    monkeypatch.chdir(tmp_path)
    base = Path(make_llama(tmp_path / "base", tied=False))
    (tmp_path / "evil.bin").write_bytes(pickle.dumps({"model.norm.weight": Code(ran)}))
    pickle.loads((tmp_path / "evil.bin").read_bytes())
    assert ran.exists()  # it does run where it is let
    ran.unlink()

    whole = tmp_path / "whole"
    whole.mkdir()
    shutil.copyfile(base / "config.json", whole / "config.json")
    shutil.copyfile("evil.bin", whole / "pytorch_model.bin")
    indexed = tmp_path / "indexed"
    shutil.copytree(base, indexed)
    index = json.loads((base / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.weight"] = "pytorch_model.bin"
    (indexed / "model.safetensors.index.json").write_text(json.dumps(index))
    shutil.copyfile("evil.bin", indexed / "pytorch_model.bin")
    adapters = tmp_path / "adapters"
    adapters.mkdir()
    (adapters / "adapter_config.json").write_text(json.dumps(Lora(2, 2, ("q_proj",)).peft_config(str(base))))
    shutil.copyfile("evil.bin", adapters / "adapter_model.bin")
    for model, message in (
        (whole, "pytorch_model.bin is a pickle, which may run code: it is not opened"),
        (indexed, "pytorch_model.bin cannot be read"),
    ):
        assert main.main(["convert", "--model", str(model), "--output", "out"]) == 2
        assert message in capsys.readouterr().err
    assert main.main(["convert", "--lora", str(adapters), "--output", "out"]) == 2
    assert "adapter_model.bin is a pickle, which may run code" in capsys.readouterr().err
    assert not ran.exists()
    assert not Path("out").exists()


@pytest.mark.parametrize(
    "place", ["../other/model.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "", 7, None]
)
def test_an_index_that_leads_outside_its_folder_is_refused(tmp_path, place):
    base = Path(make_llama(tmp_path / "base", tied=False))
    file = base / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"]["model.norm.weight"] = place
    file.write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"places model.norm.weight in .*, which is no file of this folder"):
        hf_weights.SafetensorsFolder(base)
    for odd in ([1], {"weight_map": [1]}, {"weight_map": None}):
        file.write_text(json.dumps(odd))
        with pytest.raises(UserError, match=r"base_model .*base"):
            hf_weights.SafetensorsFolder(base)


def test_a_link_of_the_hubs_cache_is_followed(tmp_path):
    base = Path(make_llama(tmp_path / "blobs", tied=False))
    linked = tmp_path / "snapshot"
    linked.mkdir()
    for path in base.iterdir():
        (linked / path.name).symlink_to(path)
    hf_weights.check_tensors(hf_weights.SafetensorsFolder(linked), names(tiny.VOCAB))


def rewrite(base, name, change):
    """The model folder with one tensor changed; its file's name."""
    from safetensors.torch import save_file

    file = json.loads((base / "model.safetensors.index.json").read_text())["weight_map"][name]
    tensors = load_file(base / file)
    tensors[name] = change(tensors[name])
    save_file(tensors, base / file, metadata={"format": "pt"})
    return file


def test_whole_numbers_are_no_weights(tmp_path):
    base = Path(make_llama(tmp_path / "base", tied=False))
    rewrite(base, "model.layers.1.mlp.up_proj.weight", lambda t: t.to(torch.int8))
    source = hf_weights.SafetensorsFolder(base)
    with pytest.raises(UserError, match=r"up_proj.weight in model-.*safetensors is of type I8; weights are"):
        hf_weights.check_tensors(source, names(tiny.VOCAB))
    with pytest.raises(UserError, match="is of type I8"):
        hf_weights.read_part(
            source, names(tiny.VOCAB), "decoder.layers.1.mlp.linear_up.weight", (48, 32), [(0, 48), (0, 32)]
        )


class OfExperts:
    """The table of names of one stacked parameter [3, 2, 4] whose rows are files of their own, the other way round."""

    def places(self, name, source=None):
        return [hf_weights.Place(f"experts.{i}.w", i, transposed=True) for i in range(3)]

    def rows(self, name):
        return None


def test_one_parameter_may_lie_in_several_tensors(tmp_path):
    whole = torch.arange(24.0).view(3, 2, 4)
    writer = hf_weights.FolderWriter(tmp_path / "out", OfExperts(), None)
    writer.add("experts", whole)
    source = hf_weights.SafetensorsFolder(writer.finish({}))
    assert sorted(source.files) == ["experts.0.w", "experts.1.w", "experts.2.w"]
    assert torch.equal(source.slice("experts.1.w")[:], whole[1].t())
    for ranges in ([(0, 3), (0, 2), (0, 4)], [(1, 3), (1, 2), (0, 3)], [(2, 2), (0, 2), (0, 4)]):
        part = hf_weights.read_part(source, OfExperts(), "experts", whole.shape, ranges)
        assert torch.equal(part, whole[tuple(slice(*edges) for edges in ranges)])
    with pytest.raises(UserError, match=r"experts.0.w has shape \[4, 2\], the config needs \[5, 2\]"):
        hf_weights.read_part(source, OfExperts(), "experts", (3, 2, 5), [(0, 3), (0, 2), (0, 5)])


def not_finite(prefix, base, more):
    """What each rank says of a model that has NaN in one row of one tensor."""
    run = llamas.base_run(prefix, base, **more)
    with pytest.raises(UserError) as caught:
        Trainer(run, CPU)
    return caught.value.problems


@pytest.mark.parametrize(
    ("world", "more"),
    [
        (1, {}),
        (2, {"dp_shard_size": 2}),
        (4, {"tensor_parallel_size": 2, "context_parallel_size": 2}),
    ],
    ids=str,
)
def test_a_nan_in_a_base_model_is_named_on_all_ranks_before_the_first_step(prefix, tmp_path, world, more):
    def last_row(value):
        def change(tensor):
            tensor[-1, 3] = value
            return tensor

        return change

    base = Path(make_llama(tmp_path / "base", tied=False))
    file = rewrite(base, "model.layers.1.mlp.up_proj.weight", last_row(float("nan")))
    found = pool.run(world, not_finite, prefix, str(base), more)
    assert all(problems == found[0] for problems in found)
    assert len(found[0]) == 1
    assert f"model.layers.1.mlp.up_proj.weight in {file} holds NaN" in found[0][0]
    rewrite(base, "lm_head.weight", last_row(float("-inf")))
    found = pool.run(world, not_finite, prefix, str(base), more)
    assert all(problems == found[0] for problems in found)
    assert sorted("infinity" in problem for problem in found[0]) == [False, True]
