"""A checkpoint that is not as it was written is noticed before it is used, by the file's name, on all ranks."""

import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import command
import pool
import tiny
from full_disk import WEIGHTS, full_disk
from longspan.cli import main
from longspan.errors import UserError
from longspan.training import checkpoint
from longspan.training.checkpoint import Checkpointer
from longspan.training.checksums import Checksum, Manifest, to_json
from longspan.training.trainer import Trainer

CPU = torch.device("cpu")


# --- sums -----------------------------------------------------------------------------------


def test_the_pieces_do_not_depend_on_how_the_bytes_come_and_every_flipped_bit_is_found(tmp_path):
    data = bytes(range(37))
    at_once, in_parts, words = (Checksum(piece_bytes=10) for _ in range(3))
    at_once.update(data)
    for start in range(0, 37, 7):
        in_parts.update(data[start : start + 7])
    words.update(torch.frombuffer(bytearray(data[:36]), dtype=torch.int32).numpy())
    words.update(data[36:])
    assert at_once.record() == in_parts.record() == words.record()
    assert at_once.record()["bytes"] == 37
    # of the polynomial that zip files use
    assert at_once.record()["crc32"][0] == "456cd746"
    assert len(at_once.record()["crc32"]) == 4
    empty = Checksum().record()
    (tmp_path / "checksums.json").write_text(to_json({"a": at_once.record(), "b": empty}, piece_bytes=10))
    (tmp_path / "b").touch()
    (tmp_path / "a").write_bytes(data)
    manifest = Manifest(tmp_path, block_bytes=4)
    assert manifest.damaged() == []
    for place in range(37):
        changed = bytearray(data)
        changed[place] ^= 16
        (tmp_path / "a").write_bytes(changed)
        assert manifest.damaged() == ["a"]
        # any number of ranks share the work, and one of them finds it
        for shares in (2, 3, 5, 9):
            found = [manifest.damaged(share=i, shares=shares) for i in range(shares)]
            assert sorted(found) == [*[[]] * (shares - 1), ["a"]]
    for other in (data[:-1], data + b"\0", b""):
        (tmp_path / "a").write_bytes(other)
        assert manifest.damaged() == ["a"]
    (tmp_path / "a").unlink()
    (tmp_path / "b").write_bytes(b"x")
    assert manifest.damaged() == ["a (No such file or directory)", "b"]


@pytest.mark.parametrize("damage", [
    lambda text: text[:-20],
    lambda text: text.replace('"bytes": 3', '"bytes": 4'),
    lambda text: "[" * 100000,
    lambda text: "[]",
    lambda text: "{}",
    lambda text: text.replace('"piece_bytes"', '"pieces"'),
])  # fmt: skip
def test_damaged_checksums_are_told_from_damaged_files(tmp_path, damage):
    three = Checksum()
    three.update(b"abc")
    text = to_json({"a": three.record()})
    (tmp_path / "checksums.json").write_text(text)
    Manifest(tmp_path)
    (tmp_path / "checksums.json").write_text(damage(text))
    with pytest.raises(ValueError, match=r"checksums.json is damaged"):
        Manifest(tmp_path)


# --- of a checkpoint ------------------------------------------------------------------------


def two_steps(prefix, folder):
    trainer = Trainer(tiny.tiny_run(prefix, 2, max_steps=6, context_parallel_size=2), CPU)
    saves = Checkpointer(Path(folder))
    for step in (1, 2):
        trainer.train_step(trainer.micro_batches(step - 1))
        saves.save(step, trainer.model, trainer.optimizer, trainer.description())
    saves.finish()


@pytest.fixture(scope="module")
def steps(prefix, tmp_path_factory):
    folder = tmp_path_factory.mktemp("steps")
    pool.run(2, two_steps, prefix, str(folder))
    return folder


def test_every_file_has_its_checksum(steps):
    path = steps / "step_00000002"
    names = {p.name for p in path.iterdir()}
    assert names == {".metadata", "__0_0.distcp", "__1_0.distcp", "longspan.json", "checksums.json"}
    manifest = Manifest(path)
    assert manifest.files.keys() == names - {"checksums.json"}
    assert manifest.damaged() == []


def flip(path, name):
    data = bytearray((path / name).read_bytes())
    data[len(data) // 2] ^= 1
    (path / name).write_bytes(data)


def of_another_step(path, name):
    shutil.copy(path.parent / "step_00000001" / name, path / name)


def tried(prefix, path, changes):
    """The message of a resume on this rank, or the step it goes on from."""
    trainer = Trainer(tiny.tiny_run(prefix, dist.get_world_size(), max_steps=6, **changes), CPU)
    try:
        trainer.resume(Path(path))
    except UserError as error:
        return str(error)
    return trainer.step


DAMAGE = [(flip, "__0_0.distcp"), (flip, "__1_0.distcp"), (of_another_step, "__1_0.distcp")]
DAMAGE += [(of_another_step, "longspan.json"), (of_another_step, ".metadata"), (flip, "checksums.json")]
DAMAGE += [(of_another_step, "checksums.json")]


@pytest.mark.parametrize(("damage", "name"), DAMAGE)
def test_what_changed_is_named_alike_on_all_ranks_before_it_is_used(prefix, steps, tmp_path, damage, name):
    shutil.copytree(steps, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "step_00000002"
    damage(path, name)
    said = pool.run(3, tried, prefix, str(path), {"context_parallel_size": 3})
    assert len(set(said)) == 1
    assert f"resume: {path} is not as it was written: " in said[0]
    expected = name if damage is flip or name != "checksums.json" else ".metadata, longspan.json"
    assert f"written: {expected}" in said[0]
    assert "Use step_00000001." in said[0]
    assert "verify_checkpoint: false" in said[0]
    if damage is of_another_step and name == "__1_0.distcp":  # it still loads, which is why sums are needed
        off = {"verify_checkpoint": False, "context_parallel_size": 2}
        assert pool.run(2, tried, prefix, str(path), off) == [2, 2]
    elif name in ("longspan.json", "checksums.json"):  # the small files are checked before a process starts
        with pytest.raises(UserError, match=f"written: {expected}"):
            checkpoint.find(path)
        assert checkpoint.find(path, verify=False) == path


def test_checksums_that_were_removed_are_missed(steps, tmp_path):
    shutil.copytree(steps, tmp_path, dirs_exist_ok=True)
    (tmp_path / "step_00000002" / "checksums.json").unlink()
    with pytest.raises(
        UserError, match=r"is not a whole checkpoint: checksums.json missing or damaged. Use step_00000001"
    ):
        checkpoint.find(tmp_path / "step_00000002")


def test_from_the_command_line(prefix, steps, tmp_path, capsys):
    """One message and exit code 2 from the launcher; the same from convert; and the key that skips it."""
    import yaml

    out = tmp_path / "out" / "checkpoints"
    shutil.copytree(steps, out)
    of_another_step(out / "step_00000002", "__1_0.distcp")
    values = tiny.values(prefix, output_dir="out", max_steps=3, context_parallel_size=2)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    done = command.run("train", "config.yaml", "--resume", "auto", cwd=tmp_path)
    assert done.returncode == 2, done.stdout
    assert done.stderr.count("is not as it was written: __1_0.distcp") == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert main.main(["convert", "--checkpoint", str(out), "--output", str(tmp_path / "hf")]) == 2
    assert "--checkpoint: " in (error := capsys.readouterr().err)
    assert "is not as it was written: __1_0.distcp" in error
    assert "verify_checkpoint" not in error  # no key of convert's
    assert not (tmp_path / "hf").exists()
    again = command.run(
        *("train", "config.yaml", "--resume", "auto", "--verify-checkpoint", "false"), cwd=tmp_path
    )
    assert again.returncode == 0, again.stderr


def a_file_that_only_one_rank_cannot_read(prefix, path):
    whole = Path.open

    def refuse(self, *args, **kwargs):
        if self.name == "__1_0.distcp":
            raise PermissionError(13, "Permission denied", str(self))
        return whole(self, *args, **kwargs)

    Path.open = refuse if dist.get_rank() == 1 else whole
    try:
        return tried(prefix, path, {"context_parallel_size": 2})
    finally:
        Path.open = whole


def test_a_file_that_one_rank_cannot_read_is_a_message_on_all(prefix, steps):
    said = pool.run(2, a_file_that_only_one_rank_cannot_read, prefix, str(steps / "step_00000002"))
    assert said[0] == said[1]
    assert "__1_0.distcp (Permission denied)" in said[0]


def named_by_an_option(prefix, path):
    trainer = Trainer(tiny.tiny_run(prefix, 1, no_load_optim=True), CPU)
    with pytest.raises(UserError, match=f"^--checkpoint: {path} is not as it was written: ") as refused:
        trainer.resume(Path(path), "--checkpoint")
    assert "verify_checkpoint" not in str(refused.value)


def test_a_refusal_names_the_option_that_named_the_checkpoint(prefix, steps, tmp_path):
    shutil.copytree(steps / "step_00000002", tmp_path / "step_00000002")
    flip(tmp_path / "step_00000002", "__0_0.distcp")
    pool.run(1, named_by_an_option, prefix, str(tmp_path / "step_00000002"))


def test_a_conversion_that_finds_the_disk_full_says_so(steps, tmp_path, capsys):
    """DCP's exception is no Exception, and came out as a traceback."""
    hf, output = tmp_path / "hf", tmp_path / "step"
    assert main.main(["convert", "--checkpoint", str(steps / "step_00000002"), "--output", str(hf)]) == 0

    with full_disk(WEIGHTS):
        assert main.main(["convert", "--model", str(hf), "--output", str(output)]) == 2
    error = capsys.readouterr().err
    assert f"--output {output}: cannot write there: OSError: [Errno 27] File too large (" in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]
