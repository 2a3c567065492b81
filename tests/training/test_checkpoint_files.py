"""No foreign code: what lies in a checkpoint's pickles never runs, on any way in."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import BytesStorageMetadata
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict

import pool
import tiny
from longspan.cli import main
from longspan.errors import UserError
from longspan.training import checkpoint
from longspan.training.checkpoint import Checkpointer
from longspan.training.checkpoint_files import read_metadata
from longspan.training.trainer import Trainer

CPU = torch.device("cpu")


class Code:
    """An object whose pickle runs a function of the attacker's choice where it is loaded."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


def trained(prefix, folder):
    """A checkpoint of step 2, and the loss of step 3."""
    trainer = Trainer(tiny.tiny_run(prefix, dist.get_world_size(), max_steps=6), CPU)
    for step in range(2):
        trainer.train_step(trainer.micro_batches(step))
    saves = Checkpointer(Path(folder) / "new")
    saves.save(2, trainer.model, trainer.optimizer, trainer.description())
    saves.finish()
    old_form(trainer, Path(folder) / "old" / "step_00000002")
    return trainer.train_step(trainer.micro_batches(2))["loss"]


def old_form(trainer, path, **entries):
    """A checkpoint as versions before checksums wrote it: with the optimizer's settings as pickles."""
    state = {
        "model": get_model_state_dict(trainer.model),
        "optimizer": get_optimizer_state_dict(trainer.model, trainer.optimizer),
        f"rng.{dist.get_rank()}": torch.get_rng_state(),
    }
    for name, value in entries.items():
        state["optimizer"]["param_groups"][0][name] = value
    dcp.save(state, checkpoint_id=str(path))
    (path / "longspan.json").write_text(json.dumps(trainer.description()))


@pytest.fixture(scope="module")
def checkpoints(prefix, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    loss = pool.run(1, trained, prefix, str(folder))[0]
    return folder, loss


def goes_on(prefix, path):
    trainer = Trainer(tiny.tiny_run(prefix, dist.get_world_size(), max_steps=6), CPU)
    trainer.resume(Path(path))
    return trainer.train_step(trainer.micro_batches(2))["loss"]


def test_a_checkpoint_holds_tensors_only_and_an_older_one_is_read_bit_equal(prefix, checkpoints, capsys):
    folder, loss = checkpoints
    new, old = folder / "new" / "step_00000002", folder / "old" / "step_00000002"
    kinds = {type(entry) for entry in read_metadata(new).state_dict_metadata.values()}
    assert BytesStorageMetadata not in kinds
    entries = read_metadata(old).state_dict_metadata
    assert BytesStorageMetadata in {type(entry) for entry in entries.values()}
    settings = {name for name in entries if name.startswith("optimizer.param_groups.")}
    assert read_metadata(new).state_dict_metadata.keys() == entries.keys() - settings
    assert pool.run(1, goes_on, prefix, str(new)) == [loss]
    assert pool.run(1, goes_on, prefix, str(old)) == [loss]
    assert checkpoint.find(new) == new
    assert capsys.readouterr().err == ""
    assert checkpoint.find(old) == old
    assert (
        "has no checksums.json (an older version wrote it): it is read unchecked" in capsys.readouterr().err
    )


def test_the_metadata_is_that_of_dcp(checkpoints):
    """The checked values are those that DCP's own reader finds."""
    folder, _ = checkpoints
    for path in (folder / "new" / "step_00000002", folder / "old" / "step_00000002"):
        ours, theirs = read_metadata(path), dcp.FileSystemReader(str(path)).read_metadata()
        assert ours.state_dict_metadata == theirs.state_dict_metadata
        assert ours.storage_data == theirs.storage_data


def copy_of(path, folder):
    shutil.copytree(path, folder / path.name)
    return folder / path.name


def mark(folder):
    return folder / "it-ran"


@pytest.mark.parametrize("place", ["whole", "planner_data", "storage_meta", "a dtype", "a state"])
def test_code_in_the_metadata_does_not_run(checkpoints, tmp_path, place):
    path = copy_of(checkpoints[0] / "old" / "step_00000002", tmp_path)
    code = Code(os.mkdir, str(mark(tmp_path)))
    metadata = dcp.FileSystemReader(str(path)).read_metadata()
    entry = next(iter(metadata.state_dict_metadata.values()))
    if place == "whole":
        metadata = code
    elif place == "a dtype":
        entry.properties.dtype = code
    elif place == "a state":
        entry.__dict__["more"] = code
    else:
        setattr(metadata, place, code)
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(
        UserError,
        match=r"\.metadata missing or damaged: it asks for posix\.mkdir, .* none of its code was run",
    ):
        checkpoint.find(path)
    assert not mark(tmp_path).exists()


@pytest.mark.parametrize("data", [
    b"cbuiltins\neval\n(S'1'\ntR.",
    b"cbuiltins\ngetattr\n.",
    b"ctorch\nload\n.",
    b"ctorch.serialization\nload\n.",
    b"cfunctools\npartial\n.",
    b"ccopyreg\n_reconstructor\n.",
    b"cpathlib\nos\n.",
    # the state of a class itself, which would change it for the whole process
    b"ctorch.distributed.checkpoint.metadata\nMetadata\n(NdS'__init__'\nS'x'\nstb.",
    b"Pos\n.",
    b"\x80\x04.",
    b"",
    b"N.",
])  # fmt: skip
def test_a_pickle_that_is_no_metadata_is_refused(tmp_path, data):
    (tmp_path / ".metadata").write_bytes(data)
    with pytest.raises(ValueError, match="it asks for|it is no metadata|a Metadata is missing"):
        read_metadata(tmp_path)


def code_in_the_files(prefix, folder):
    """Code in entries of a clean ``.metadata``: the optimizer's settings; and in the place of a weight."""
    folder = Path(folder)
    trainer = Trainer(tiny.tiny_run(prefix, 1, max_steps=6), CPU)
    for step in range(2):
        trainer.train_step(trainer.micro_batches(step))
    old_form(trainer, folder / "optimizer", lr=Code(os.mkdir, str(mark(folder))))
    state = {
        "model": get_model_state_dict(trainer.model),
        "optimizer": {"state": get_optimizer_state_dict(trainer.model, trainer.optimizer)["state"]},
    }
    state["model"]["decoder.final_layernorm.weight"] = Code(os.mkdir, str(mark(folder)))
    dcp.save(state, checkpoint_id=str(folder / "weight"))
    (folder / "weight" / "longspan.json").write_text(json.dumps(trainer.description()))
    state["model"] = get_model_state_dict(trainer.model)
    one = next(iter(state["optimizer"]["state"].values()))
    one["exp_avg"] = Code(os.mkdir, str(mark(folder)))
    dcp.save(state, checkpoint_id=str(folder / "moment"))
    (folder / "moment" / "longspan.json").write_text(json.dumps(trainer.description()))
    assert not mark(folder).exists()


def refused_on_resume(prefix, path):
    trainer = Trainer(tiny.tiny_run(prefix, dist.get_world_size(), max_steps=6), CPU)
    with pytest.raises(
        UserError, match="cannot be loaded: ValueError: .* is no tensor there; it was not read"
    ):
        trainer.resume(Path(path))


def test_code_in_the_data_files_does_not_run(prefix, checkpoints, tmp_path, capsys):
    pool.run(1, code_in_the_files, prefix, str(tmp_path))
    # the settings are the config's, so that theirs are not even read
    assert pool.run(1, goes_on, prefix, str(tmp_path / "optimizer")) == [checkpoints[1]]
    pool.run(2, refused_on_resume, prefix, str(tmp_path / "moment"))
    pool.run(1, refused_on_resume, prefix, str(tmp_path / "weight"))
    assert (
        main.main(["convert", "--checkpoint", str(tmp_path / "weight"), "--output", str(tmp_path / "hf")])
        == 2
    )
    error = capsys.readouterr().err
    assert "describes a model with decoder.final_layernorm.weight, and there are no such weights" in error
    assert "Traceback" not in error
    assert not mark(tmp_path).exists()


def test_no_command_runs_code_of_a_folder(prefix, checkpoints, tmp_path, capsys):
    """``generate``, ``convert``, ``eval`` and a resume once ran it before the message that the folder is damaged."""
    import yaml

    path = copy_of(checkpoints[0] / "old" / "step_00000002", tmp_path)
    (path / ".metadata").write_bytes(pickle.dumps(Code(os.mkdir, str(mark(tmp_path)))))
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(tiny.values(prefix, output_dir=str(tmp_path / "out"))))
    for arguments in (
        ["generate", str(path), "--tokenizer", str(tmp_path)],
        ["convert", "--checkpoint", str(path), "--output", str(tmp_path / "hf")],
        ["eval", str(config), "--checkpoint", str(path)],
        ["train", str(config), "--resume", str(path), "--num-processes", "2"],
    ):
        assert main.main(arguments) == 2, arguments
        lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
        assert len(lines) == 1, lines
        assert "it asks for posix.mkdir" in lines[0]
    assert not mark(tmp_path).exists()


def renamed(path, name):
    """Makes ``.metadata`` name another file for all its parts."""
    metadata = dcp.FileSystemReader(str(path)).read_metadata()
    for part in metadata.storage_data.values():
        part.relative_path = name
    (path / ".metadata").write_bytes(pickle.dumps(metadata))


@pytest.mark.parametrize("name", ["../__0_0.distcp", "/etc/passwd", "a/../__0_0.distcp", "", "..", "a\0b", 7])
def test_a_path_that_leaves_the_folder_is_refused(checkpoints, tmp_path, name):
    path = copy_of(checkpoints[0] / "old" / "step_00000002", tmp_path)
    shutil.copy(path / "__0_0.distcp", tmp_path)
    renamed(path, "__0_0.distcp")
    assert checkpoint.find(path) == path
    renamed(path, name)
    with pytest.raises(UserError, match="it names the file .*, which is not in the checkpoint's folder"):
        checkpoint.find(path)


def test_a_link_out_of_the_folder_is_refused_and_one_inside_is_read(checkpoints, tmp_path):
    path = copy_of(checkpoints[0] / "old" / "step_00000002", tmp_path)
    shutil.move(path / "__0_0.distcp", path / "data")
    (path / "__0_0.distcp").symlink_to("data")
    assert checkpoint.find(path) == path
    shutil.move(path / "data", tmp_path / "data")
    (path / "__0_0.distcp").unlink()
    (path / "__0_0.distcp").symlink_to("../data")
    with pytest.raises(UserError, match="it names the file '__0_0.distcp', which is not in the"):
        checkpoint.find(path)
    # the folder itself may be a link
    other = copy_of(checkpoints[0] / "old" / "step_00000002", tmp_path / "other")
    (tmp_path / "step_00000003").symlink_to(other)
    assert checkpoint.find(tmp_path / "step_00000003") == tmp_path / "step_00000003"


def test_sizes_that_the_files_cannot_hold_are_refused(checkpoints, tmp_path):
    path = copy_of(checkpoints[0] / "old" / "step_00000002", tmp_path)
    good = dcp.FileSystemReader(str(path)).read_metadata()
    name = "model.decoder.final_layernorm.weight"

    def refused(change, message):
        metadata = pickle.loads(pickle.dumps(good))
        change(metadata.state_dict_metadata[name])
        (path / ".metadata").write_bytes(pickle.dumps(metadata))
        with pytest.raises(ValueError, match=message):
            read_metadata(path)

    def grow(entry):
        entry.size = entry.chunks[0].sizes = torch.Size([1 << 50])

    refused(grow, "a part of .* is larger than its place in the file")
    refused(lambda entry: setattr(entry, "size", (1 << 63,)), "is no size")
    refused(lambda entry: setattr(entry, "size", (-1,)), "-1 is no size")
    refused(lambda entry: setattr(entry, "size", (1.5,)), "1.5 is no size")
    refused(lambda entry: setattr(entry, "size", (4,)), "a part of .* lies outside of it")
    refused(lambda entry: setattr(entry, "size", (400,)), "parts of .* are missing")
    refused(lambda entry: setattr(entry, "chunks", []), "parts of .* are missing")
