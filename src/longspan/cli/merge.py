"""``longspan merge``: merges the .bin/.idx pairs of a folder, as Megatron-LM's ``merge_datasets.py`` does."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from longspan.cli.options import take_options
from longspan.cli.preprocess import LISTS
from longspan.cli.preprocess import OPTIONS as PREPARE
from longspan.errors import UserError, did_you_mean

USAGE = """\
usage: longspan merge --input FOLDER --output-prefix PREFIX

Puts all .bin/.idx pairs of a folder, in the order of their names, into PREFIX.bin and PREFIX.idx.
  --input FOLDER       that holds the pairs
  --output-prefix P    outside of FOLDER
To mix files without merging them, give them to training: --data-path WEIGHT PREFIX WEIGHT PREFIX ...
"""
OPTIONS = {"--input": True, "--output-prefix": True}


def run(arguments: Sequence[str]) -> int:
    if not arguments or "--help" in arguments or "-h" in arguments:
        print(USAGE)
        return 0 if arguments else 2
    taken, rest, problems = take_options(arguments, OPTIONS)
    unknown = [a.partition("=")[0] for a in rest if a.startswith("--")]
    text = [a for a in unknown if a in PREPARE or a in LISTS]
    if text:
        problems.append(
            f"{', '.join(text)}: that is longspan prepare, which makes .bin/.idx from text: longspan prepare --input "
            f"{taken.get('--input', 'PATH')} --output-prefix {taken.get('--output-prefix', 'PREFIX')} {shlex.join(rest)} ... "
            "longspan merge takes .bin/.idx that are there."
        )
    elif "--multimodal" in unknown:
        problems.append("--multimodal: files of images are not read; only tokens are.")
    else:
        problems += [f"{a}: unknown option.{did_you_mean(a, OPTIONS)}" for a in unknown]
        problems += [f"{a!r}: unexpected argument." for a in rest if not a.startswith("--")]
        problems += [f"{name} is missing." for name in OPTIONS if name not in taken]
    if problems:
        raise UserError(problems)
    from longspan.data.indexed import bin_and_idx
    from longspan.data.merge import merge, pairs_of

    output, _ = bin_and_idx(taken["--output-prefix"])
    prefixes = pairs_of(taken["--input"])
    if output.parent.resolve() == Path(taken["--input"]).expanduser().resolve():
        raise UserError(
            f"--output-prefix {taken['--output-prefix']} lies in --input: merged again, the folder would hold everything twice. "
            "Write it elsewhere."
        )
    done = merge(prefixes, output)
    where = str(output).removesuffix(".bin")
    print(
        f"{len(prefixes)} files, {done['documents']:,} documents, {done['tokens']:,} tokens -> {where}.bin, {where}.idx"
    )
    return 0
