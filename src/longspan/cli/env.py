"""``longspan env``: prints versions, devices and environment variables for a bug report."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from longspan.cli.options import take_options
from longspan.errors import UserError, did_you_mean
from longspan.runs.environment import VARIABLES, found

OPTIONS = {"--json": False}
PACKAGES = (
    "longspan",
    "torch",
    "numpy",
    "pydantic",
    "tokenizers",
    "safetensors",
    "transformers",
    "flash-attn",
)


def usage() -> str:
    lines = [
        "usage: longspan env [--json]",
        "",
        "Prints versions, devices, and which of these environment variables are set and what each does here:",
    ]
    width = max(map(len, VARIABLES))
    return "\n".join([*lines, *(f"  {n:<{width}}  {v.handling}: {v.text}" for n, v in VARIABLES.items())])


def run(arguments: Sequence[str]) -> int:
    if "--help" in arguments or "-h" in arguments:
        print(usage())
        return 0
    taken, rest, problems = take_options(arguments, OPTIONS)
    problems += [f"{a!r}: longspan env takes --json alone.{did_you_mean(a, ['--json'])}" for a in rest]
    if problems:
        raise UserError(problems)
    rows, variables = versions_and_devices(), found(os.environ)
    if "--json" in taken:
        print(json.dumps({**rows, "environment": variables}, indent=2))
        return 0
    for name, value in rows.items():
        for i, line in enumerate(value if isinstance(value, list) else [value]):
            print(f"{f'gpu {i}' if name == 'gpus' else name:<14} {line}")
    if variables:
        print("\nenvironment")
        for v in variables:
            print(f"  {v['name']}={v['value']}\n      {v['handling']}: {v['text']}")
    return 0


def versions_and_devices() -> dict:
    import torch

    rows: dict = {"python": platform.python_version(), "platform": platform.platform()}
    for package in PACKAGES:
        try:
            rows[package] = version(package)
        except PackageNotFoundError:
            rows[package] = "not installed"
    rows["cores"] = os.cpu_count()
    rows["cuda"] = torch.version.cuda or "none"
    rows["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return rows
