"""``longspan init``: lists the bundled examples, or copies one as a start."""

from __future__ import annotations

import itertools
import shutil
import textwrap
from collections.abc import Sequence
from pathlib import Path

import longspan
from longspan.cli.options import positionals, take_options
from longspan.errors import UserError, did_you_mean

USAGE = """\
usage: longspan init [EXAMPLE] [--output FILE]

Without EXAMPLE: lists the examples. With one: copies it to the current folder; nothing is overwritten.
  --output FILE  write it there instead
"""
OPTIONS = {"--output": True}
#: files of the folder that are not examples
NOT_SHOWN = ("run_all.py", "__init__.py")


def run(arguments: Sequence[str]) -> int:
    if "--help" in arguments or "-h" in arguments:
        print(USAGE)
        return 0
    taken, rest, problems = take_options(arguments, OPTIONS)
    asked = positionals(rest, OPTIONS, problems)
    problems += [f"{a!r}: one example at a time." for a in asked[1:]]
    known = examples()
    names = {name: name for name in known} | {
        name.rsplit(".", 1)[0]: name for name in known if name.endswith(".yaml")
    }
    # An example also has its name without the folder, if no other example has this name.
    for name in known:
        names.setdefault(Path(name).name, name)
        names.setdefault(Path(name).stem, name)
    if asked and asked[0] not in names:
        near = did_you_mean(asked[0], names)
        problems.append(f"{asked[0]!r} is no bundled example.{near} longspan init lists them.")
    if problems:
        raise UserError(problems)
    if not asked:
        width = max(map(len, known))
        print("\n".join(f"{name:<{width}}  {first_line(path)}" for name, path in known.items()))
        return 0
    source = known[names[asked[0]]]
    target = Path(taken.get("--output", source.name))
    if target.is_dir():
        target = target / source.name
    if target.exists():
        raise UserError(f"{target} exists. Move it, or give --output FILE; nothing is overwritten.")
    shutil.copyfile(source, target)
    command = f"longspan train {target}" if source.suffix == ".yaml" else f"see the head of {target}"
    print(f"wrote {target}\nnext: {command}")
    return 0


def examples() -> dict[str, Path]:
    """Bundled examples by name: in the installed package, or next to ``src`` in a clone."""
    package = Path(longspan.__file__).parent
    folder = next((f for f in (package / "examples", package.parents[1] / "examples") if f.is_dir()), None)
    if folder is None:
        raise UserError("the examples are not in this installation. Install longspan again.")
    patterns = ("*.yaml", "scenarios/*.yaml", "*.py", "megatron_scripts/*.py")
    files = [path for pattern in patterns for path in folder.glob(pattern)]
    return {str(p.relative_to(folder)): p for p in sorted(files, key=order) if p.name not in NOT_SHOWN}


def order(path: Path) -> tuple[bool, bool, str]:
    """The sort key of an example: the quickstart comes first, scripts come last."""
    return path.suffix == ".py", path.stem != "quickstart", str(path)


def first_line(path: Path) -> str:
    """The first sentence of a file's first comment or docstring."""
    lines = path.read_text(encoding="utf-8").splitlines()
    head = " ".join(itertools.takewhile(bool, (line.strip("#\"' ") for line in lines)))
    return textwrap.shorten(head.partition(". ")[0].rstrip(".:"), 90)
