"""Which checkpoint a path stands for: ``latest`` stays inside its folder, and whole ones are found without it."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch.distributed.checkpoint as dcp

from longspan.errors import UserError
from longspan.runs.generate import is_checkpoint
from longspan.training import checkpoint
from longspan.training.checkpoint_files import SummingWriter


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A small whole checkpoint of any step."""
    import torch

    folder = tmp_path_factory.mktemp("original") / "step"
    folder.mkdir()
    description = {
        "model": {},
        "settings": {},
        "global_batch_size": 4,
        "step": 0,
        "checksums": "checksums.json",
    }
    writer = SummingWriter(folder, json.dumps(description))
    dcp.save({"model": {"weight": torch.ones(3)}}, storage_writer=writer, no_dist=True)
    return folder


def make(folder, original, *numbers, latest=None):
    for number in numbers:
        shutil.copytree(original, folder / f"step_{number:08d}")
    if latest is not None:
        (folder / "latest").write_text(latest)


@pytest.fixture
def lines():
    return []


@pytest.mark.parametrize(
    ("latest", "why"),
    [
        (None, "latest is missing"),
        ("", "latest names '', which is no checkpoint"),
        ("../elsewhere/step_00000009", "latest names '../elsewhere/step_00000009', which is no"),
        ("{}/elsewhere/step_00000009", "latest names '/.*', which is no checkpoint of that folder"),
        ("..", "which is no checkpoint of that folder"),
        (".", "which is no checkpoint of that folder"),
        ("a\0b", "which is no checkpoint of that folder"),
        ("x" * 5000, "which is no checkpoint of that folder"),
        ("step_00000007\n", "there is no checkpoint at .*step_00000007, which .*latest names"),
    ],
)
def test_whole_checkpoints_are_found_without_latest(original, tmp_path, lines, latest, why):
    folder = tmp_path / "out" / "checkpoints"
    make(folder, original, 4, 2, 10)
    make(tmp_path / "elsewhere", original, 9)
    if latest is not None:
        (folder / "latest").write_text(latest.format(tmp_path))
    expected = folder / ("step_00000004" if latest and "step_00000007" in latest else "step_00000010")
    assert checkpoint.newest(folder, say=lines.append) == expected
    assert len(lines) == 1
    assert re.search(why, lines[0]), lines
    assert f"taking {expected.name}, which is whole" in lines[0]
    assert checkpoint.find(tmp_path / "out", say=lines.append) == expected
    assert is_checkpoint(tmp_path / "out")
    assert is_checkpoint(folder)


def test_latest_that_is_no_text(original, tmp_path, lines):
    make(tmp_path, original, 1)
    (tmp_path / "latest").write_bytes(b"\xff\xfe\x00" * 10)
    assert checkpoint.newest(tmp_path, say=lines.append).name == "step_00000001"
    (tmp_path / "latest").unlink()
    (tmp_path / "latest").mkdir()
    assert checkpoint.newest(tmp_path, say=lines.append).name == "step_00000001"


def test_latest_decides_among_whole_ones_without_a_line(original, tmp_path, lines):
    make(tmp_path, original, 2, 4, 6, latest="step_00000004\n")
    assert checkpoint.newest(tmp_path, say=lines.append).name == "step_00000004"
    assert lines == []


def test_an_incomplete_newest_falls_back_with_a_line(original, tmp_path, lines):
    make(tmp_path, original, 2, 4, 6, 8, latest="step_00000006\n")
    (tmp_path / "step_00000006" / "__0_0.distcp").unlink()
    assert checkpoint.newest(tmp_path, say=lines.append).name == "step_00000004"
    assert "step_00000006 is not whole (__0_0.distcp missing or damaged); taking step_00000004" in lines[0]
    (tmp_path / "step_00000004" / "longspan.json").write_text("")
    (tmp_path / "step_00000002" / ".metadata").write_bytes(b"\0" * 100)
    # an earlier try's later steps come last
    assert checkpoint.newest(tmp_path, say=lines.append).name == "step_00000008"
    shutil.rmtree(tmp_path / "step_00000008")
    with pytest.raises(UserError, match=r"step_00000006 is not a whole checkpoint: __0_0.distcp missing"):
        checkpoint.newest(tmp_path, say=lines.append)


def test_where_nothing_was_saved_there_is_nothing(original, tmp_path):
    assert checkpoint.newest(tmp_path / "not there") is None
    (tmp_path / ".step_00000001.partial").mkdir()
    (tmp_path / "step_of_mine").mkdir()
    assert checkpoint.newest(tmp_path) is None
    (tmp_path / "latest").write_text("step_00000001")
    with pytest.raises(
        UserError, match="there is no checkpoint at .*, and there is no other one. Remove .*latest"
    ):
        checkpoint.newest(tmp_path)


def test_what_cannot_be_read_is_a_message(original, tmp_path, monkeypatch):
    make(tmp_path, original, 1)
    whole = Path.open

    def refuse(self, *args, **kwargs):
        if self.name in names:
            raise PermissionError(13, "Permission denied", str(self))
        return whole(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refuse)
    names: set = set()
    assert checkpoint.find(tmp_path / "step_00000001").name == "step_00000001"
    for name in (".metadata", "longspan.json", "checksums.json"):
        names = {name}
        with pytest.raises(UserError, match=f"resume: .*{name} cannot be read .Permission denied"):
            checkpoint.find(tmp_path / "step_00000001")
        with pytest.raises(UserError, match="Permission denied"):
            checkpoint.verify(tmp_path / "step_00000001")
