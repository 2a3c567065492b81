"""Finds the checkpoint that a path names, and checks whether it is whole."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from torch.distributed.checkpoint.metadata import Metadata

from longspan.errors import UserError, did_you_mean
from longspan.training.checkpoint_files import DESCRIPTION, METADATA, read_metadata
from longspan.training.checksums import CHECKSUMS, Manifest
from longspan.training.description import read_description

_STEP = re.compile(r"step_(\d{1,18})")
#: the file Megatron-LM writes beside its checkpoints
MEGATRON = "latest_checkpointed_iteration.txt"

Say = Callable[[str], None]


def to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def find(path: Path, option: str = "resume", *, verify: bool = True, say: Say = to_stderr) -> Path:
    """The checkpoint that a path names: the path itself, or the newest checkpoint of a run's folder.

    Its small files are checked; ``checkpoint.verify`` checks the large ones.

    Args:
        option: the option that named the path, for messages.
        verify: compare checksums (``verify_checkpoint``).
        say: takes a line for the user if another checkpoint is used or the checkpoint has no checksums.

    Raises:
        UserError: there is no checkpoint, or it is half written, damaged or one of Megatron-LM.
    """
    refuse_megatron(path, option)
    try:
        found = None
        for folder in (path, path / "checkpoints"):
            found = found or _newest(folder, option, verify, say)
        if found is None:
            _must_be_there(path, option)
            if bad := missing_or_damaged(path, verify):
                raise not_whole(path, bad, option)
            found = path
        if verify:
            check_small_files(found, option, say)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"{option}: {error.filename or path} cannot be read ({reason}). Check its permissions."
        ) from None
    return found


def newest(folder: Path, option: str = "resume", *, verify: bool = True, say: Say = to_stderr) -> Path | None:
    """The newest checkpoint in a folder of checkpoints, as ``find`` finds it; None if none was saved yet."""
    there = (folder / "latest").is_file() or steps_in(folder)
    return find(folder, option, verify=verify, say=say) if there else None


def newest_own(folder: Path, names: Sequence[str], say: Say = to_stderr) -> Path | None:
    """The newest whole checkpoint among some that a run has saved, the newest last; None if none was saved.

    Raises:
        UserError: some were saved, and none is whole.
    """
    failed: UserError | None = None
    for name in reversed(names):
        path = folder / name
        if not (bad := missing_or_damaged(path)):
            return path
        failed = failed or not_whole(path, bad, "restart")
        say(f"longspan: {path} is not whole ({', '.join(bad)} missing or damaged)")
    if failed is not None:
        raise failed
    return None


def steps_in(folder: Path) -> list[Path]:
    """The checkpoints of a folder, whole or not, the newest first."""
    if not folder.is_dir():
        return []
    found = [(int(m[1]), p) for p in folder.iterdir() if (m := _STEP.fullmatch(p.name)) and p.is_dir()]
    return [path for _, path in sorted(found, reverse=True)]


def _newest(folder: Path, option: str, verify: bool, say: Say) -> Path | None:
    """The checkpoint that ``latest`` names, or else the newest whole one; None if there is neither."""
    steps, named = steps_in(folder), None
    text = _read_latest(folder)
    if text is None and not steps:
        return None
    if text is None:
        why = f"{folder / 'latest'} is missing"
    elif _STEP.fullmatch(text):
        named = folder / text
        why = "" if named in steps else f"there is no checkpoint at {named}, which {folder / 'latest'} names"
    else:
        why = f"{folder / 'latest'} names {text[:60]!r}, which is no checkpoint of that folder"
    if not steps:
        raise UserError(
            f"{option}: {why}, and there is no other one. Remove {folder / 'latest'} to start anew."
        )
    if named is not None:
        # Earlier checkpoints are tried first: a later one must be left from an earlier run in this folder.
        number = _number(named)
        steps = [p for p in steps if _number(p) <= number] + [p for p in steps if _number(p) > number]
    failed: UserError | None = None
    for path in steps:
        if bad := missing_or_damaged(path, verify):
            failed = failed or not_whole(path, bad, option)
            why = why or f"{path} is not whole ({', '.join(bad)} missing or damaged)"
            continue
        if why:
            say(f"longspan: {option}: {why}; taking {path.name}, which is whole")
        return path
    assert failed is not None
    raise failed


def _number(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def _read_latest(folder: Path) -> str | None:
    path = folder / "latest"
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return file.read(1000).decode("utf-8", errors="replace").strip()


def _must_be_there(path: Path, option: str) -> None:
    if path.is_dir():
        return
    siblings = [p.name for p in path.parent.glob("step_*")] if path.parent.is_dir() else []
    near = did_you_mean(path.name, siblings)
    raise UserError(
        f"{option}: there is no checkpoint at {path}.{near} Give a folder step_NNNNNNNN, or a run's."
    )


def missing_or_damaged(path: Path, verify: bool = True) -> dict[str, str]:
    """The files because of which a checkpoint is not whole: missing, cut short, or with invalid content.

    Returns:
        Name -> what is wrong with the content ("" if the file is missing or short).

    Raises:
        OSError: a file exists and cannot be read.
    """
    bad = {name: "" for name in (METADATA, DESCRIPTION) if not (path / name).is_file()}
    if bad:
        return bad
    try:
        metadata = read_metadata(path)
    except ValueError as error:
        return {METADATA: str(error)}
    ends: dict[str, int] = {}
    for part in metadata.storage_data.values():
        ends[part.relative_path] = max(ends.get(part.relative_path, 0), part.offset + part.length)
    for name in sorted(ends):
        if not (path / name).is_file() or (path / name).stat().st_size < ends[name]:
            bad[name] = ""
    try:
        promised = read_description(path).get("checksums") and not (path / CHECKSUMS).is_file()
    except ValueError as error:
        return bad | {DESCRIPTION: str(error)}
    return bad | {CHECKSUMS: ""} if promised and verify else bad


def not_whole(path: Path, bad: dict[str, str], option: str) -> UserError:
    """The error for a checkpoint in which ``missing_or_damaged`` has found ``bad`` files."""
    why = "; ".join(dict.fromkeys(reason for reason in bad.values() if reason))
    return UserError(
        f"{option}: {path} is not a whole checkpoint: {', '.join(bad)} missing or damaged{why and ': '}{why}. {another(path)}"
    )


def changed(path: Path, bad: list[str], option: str) -> UserError:
    """The error for a checkpoint with files whose checksums differ."""
    # Only resume has this key; the commands that only read a checkpoint do not.
    anyway = " verify_checkpoint: false trains on with it all the same." if option == "resume" else ""
    return UserError(
        f"{option}: {path} is not as it was written: {', '.join(bad)} (by {CHECKSUMS}). A disk or a copy damaged it, or "
        f"it is of another checkpoint. {another(path)}{anyway}"
    )


def another(path: Path) -> str:
    """A sentence on what to use instead of a checkpoint."""
    others = [p for p in steps_in(path.parent) if p.name != path.name and (p / METADATA).is_file()]
    return f"Use {others[0].name}." if others else "There is no other one beside it."


def check_small_files(path: Path, option: str, say: Say) -> None:
    """Compares the description and DCP's metadata with their checksums; reports when there are no checksums.

    Raises:
        UserError: they differ.
    """
    if not (path / CHECKSUMS).is_file():
        say(
            f"longspan: {option}: {path} has no {CHECKSUMS} (an older version wrote it): it is read unchecked"
        )
        return
    if bad := small_files_changed(path, read_metadata(path)):
        raise changed(path, bad, option)


def small_files_changed(path: Path, metadata: Metadata) -> list[str]:
    """The files that ``checksums.json`` lacks; if none, those read before the tensors that differ."""
    try:
        manifest = Manifest(path)
    except ValueError:
        return [CHECKSUMS]
    used = {part.relative_path for part in metadata.storage_data.values()}
    if unknown := {METADATA, DESCRIPTION, *used} - manifest.files.keys():
        return sorted(unknown)
    return manifest.damaged([METADATA, DESCRIPTION])


def refuse_megatron(path: Path, option: str = "resume") -> None:
    """Refuses a folder of Megatron-LM's checkpoints by a UserError that names the remedy."""
    if (path / MEGATRON).is_file() or any(path.glob("iter_*/mp_rank_*")) or any(path.glob("mp_rank_*")):
        raise UserError(
            f"{option}: {path} holds a checkpoint of Megatron-LM, whose format depends on the layout and the version it was "
            "written with. Convert it to Hugging Face with Megatron-LM's own tools (Megatron Bridge's export, or "
            "tools/checkpoint/convert.py), then start from it with base_model (--base-model FOLDER)."
        )
