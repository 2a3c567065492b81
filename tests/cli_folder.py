"""A folder as a user of the commands has one: data, texts and a config."""

import json

import yaml

import tiny


def write_folder(path):
    """Tokenised data, a text corpus and a config."""
    tiny.write_data(path)
    (path / "texts").mkdir()
    for i in range(30):
        (path / "texts" / f"{i}.txt").write_text(f"This is text number {i}. " * (i + 1))
    write(path, "config.yaml")
    return path


def write(folder, name, remove=(), **changes):
    """A config of three steps of two sequences on that data, with changes."""
    start = {"max_steps": 3, "output_dir": "out", "global_batch_size": 2}
    values = tiny.values("tiny", **start | changes)
    for key in remove:
        del values[key]
    (folder / name).write_text(yaml.safe_dump(values))
    return name


def records(path, kind="train"):
    """The records of a kind in a run's metrics.jsonl."""
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]
